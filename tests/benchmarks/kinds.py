"""Puts every kind of model and data to every method, and counts what became of each cell.

    python tests/benchmarks/kinds.py
    python tests/benchmarks/kinds.py --only LoRA "own predict" --operations fit predict
    python tests/benchmarks/kinds.py --write tests/README.md
    python tests/benchmarks/kinds.py --data-only --write tests/README.md

Each cell is compared with Keras or NumPy alone: with `model.fit` of an equal model at the same
rates, with plain copies of the model that have the members' weights, with the definition of a
score or an uncertainty written out, and with the outputs of an exported file in its own runtime.
A cell is

- ✓: right;
- r: refused, by a sentence of the package's own, though Keras can do as much for one model;
- k: refused, and Keras cannot do it either;
- -: without meaning for this kind, or its runtime is not installed;
- WRONG: another value than it should be;
- RAW: an error from the depths.
"""

import argparse
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from kinds.data import DATA, DATA_OPERATIONS
from kinds.matrix import KINDS, WITH_ALL_DATA, bad_cells, counts, data_rows, row_of, table
from kinds.operations import OPERATIONS
from kinds.verdicts import MARKS, Verdict

# Between these lines of a file are the tables.
BEGIN, END = "<!-- kinds -->", "<!-- end of kinds -->"


def run(only, operations, with_models, with_data):
    """The verdicts on kinds of models by operation, and on kinds of data."""
    chosen = [each for each in OPERATIONS if not operations or each.name in operations]
    rows, of_data = {}, {}
    for kind in KINDS if with_models else ():
        if not only or any(name in kind.name for name in only):
            rows[kind.name] = row_of(kind, chosen)
            print(f"{kind.name}: {line_of(rows[kind.name])}", file=sys.stderr, flush=True)
    if with_data:
        for kind in WITH_ALL_DATA:
            of_data |= data_rows(kind)
    return rows, of_data


def line_of(row):
    """How many cells of a row have each verdict."""
    return ", ".join(f"{count} {what}" for what, count in counts({"": row}).items() if count)


def text_of(rows, of_data):
    """The tables and counts in Markdown."""
    parts = []
    for found in (rows, of_data):
        if found:
            total = sum(len(row) for row in found.values())
            said = ", ".join(
                f"{count} {what} ({MARKS[what]})" for what, count in counts(found).items()
            )
            parts += [table(found), f"{total} cells: {said}."]
    return "\n\n".join(parts)


def read(text, operations):
    """The rows of the table that has these operations, if there is one."""
    names = [operation.name for operation in operations]
    meanings = {mark: what for what, mark in MARKS.items()}
    for part in text.split("\n\n"):
        lines = [line.strip("| ").split(" | ") for line in part.splitlines()]
        if lines and lines[0] == ["kind", *names]:
            return {
                kind: {
                    name: Verdict(meanings[mark]) for name, mark in zip(names, marks, strict=True)
                }
                for kind, *marks in lines[2:]
            }
    return {}


def write(path, rows, of_data):
    """Puts rows into the tables of a file, which keep the other kinds that there still are."""
    before, rest = path.read_text("utf-8").split(BEGIN, 1)
    old, after = rest.split(END, 1)
    rows, of_data = read(old, OPERATIONS) | rows, read(old, DATA_OPERATIONS) | of_data
    models = [kind.name for kind in KINDS]
    data = [f"{kind.name}: {each.name}" for kind in WITH_ALL_DATA for each in DATA]
    rows = {name: rows[name] for name in models if name in rows}
    of_data = {name: of_data[name] for name in data if name in of_data}
    path.write_text(f"{before}{BEGIN}\n\n{text_of(rows, of_data)}\n\n{END}{after}", "utf-8")


def main(arguments=None):
    """Prints the tables and the cells that are bad, and returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="parts of names of kinds of models")
    parser.add_argument("--operations", nargs="*", help="names of operations")
    parser.add_argument("--without-data", action="store_true", help="leave kinds of data out")
    parser.add_argument("--data-only", action="store_true", help="judge nothing but kinds of data")
    parser.add_argument("--write", type=pathlib.Path, help="a file to put the rows into")
    given = parser.parse_args(arguments)
    if given.write and given.operations:
        parser.error("--write needs whole rows: leave --operations out")
    with_data = not (given.without_data or given.only or given.operations)
    rows, of_data = run(given.only, given.operations, not given.data_only, with_data)
    print(text_of(rows, of_data))
    for line in bad_cells(rows | of_data):
        print(line)
    if given.write:
        write(given.write, rows, of_data)
    return rows | of_data


if __name__ == "__main__":
    main()
