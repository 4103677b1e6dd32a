"""Runs the matrix of kinds and writes its table."""

import collections
import tempfile

import keras

from kinds.case import Case
from kinds.data import DATA, DATA_OPERATIONS, DataCase
from kinds.operations import OPERATIONS
from kinds.own import OWN
from kinds.programs import PROGRAMS
from kinds.stock import STOCK
from kinds.verdicts import BAD, MARKS, judge

KINDS = [*STOCK, *OWN, *PROGRAMS]
# Kinds of models that meet every kind of data.
WITH_ALL_DATA = [
    kind
    for kind in KINDS
    if kind.name
    in ("Functional", "two inputs and outputs, dicts", "BatchNormalization", "own train_step")
]


def row_of(kind, operations=OPERATIONS):
    """The verdicts on one kind, by operation."""
    with tempfile.TemporaryDirectory() as folder:
        case = Case(kind, folder)
        row = {operation.name: judge(operation, case) for operation in operations}
    keras.backend.clear_session()
    return row


def counts(rows):
    """How many cells have each verdict, in the order of `MARKS`."""
    found = collections.Counter(cell.what for row in rows.values() for cell in row.values())
    return {what: found[what] for what in MARKS}


def bad_cells(rows):
    """A line for each cell that is wrong or raises from the depths."""
    return [
        f"{kind} / {operation}: {cell.what}: {cell.detail}"
        for kind, row in rows.items()
        for operation, cell in row.items()
        if cell.what in BAD
    ]


def table(rows):
    """The matrix in Markdown."""
    names = list(next(iter(rows.values())))
    lines = [f"| kind | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for kind, row in rows.items():
        lines.append(f"| {kind} | {' | '.join(MARKS[row[name].what] for name in names)} |")
    return "\n".join(lines)


def data_rows(kind, data=DATA, operations=DATA_OPERATIONS):
    """The verdicts on one kind of model with each kind of data."""
    with tempfile.TemporaryDirectory() as folder:
        case = Case(kind, folder)
        rows = {
            f"{kind.name}: {each.name}": {
                operation.name: judge(operation, DataCase(case, each)) for operation in operations
            }
            for each in data
        }
    keras.backend.clear_session()
    return rows
