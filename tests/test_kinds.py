"""Kinds of models and data that Keras trains: each method is right or refuses by a sentence."""

import dataclasses
import pathlib
import warnings

import keras
import numpy as np
import pytest
from benchmarks import kinds as command
from kinds.data import DATA, DATA_OPERATIONS
from kinds.exports import FORMATS
from kinds.kind import combined
from kinds.matrix import KINDS, WITH_ALL_DATA, bad_cells, counts, data_rows, row_of, table
from kinds.operations import OPERATIONS
from kinds.verdicts import Operation, Skip, Verdict, judge

from snapshot_ensemble import SnapshotEnsemble

# A kind without a row in the table of this page has not been judged as a whole yet.
PAGE = (pathlib.Path(__file__).parent / "README.md").read_text("utf-8")
JUDGED = [kind for kind in KINDS if f"| {kind.name} |" in PAGE]
DATA_JUDGED = [kind for kind in WITH_ALL_DATA if f"| {kind.name}: " in PAGE]

# These cells take no conversion and little tracing.
FAST = ("fit", "predict", "weights", "to_keras")


def assert_good(rows):
    assert not bad_cells(rows), "\n".join(bad_cells(rows))


def test_a_few_cells(capsys):
    rows = command.main(["--only", "subclass", "--operations", *FAST])
    rows = {"subclass": rows["subclass"]}
    assert_good(rows)
    assert counts(rows)["right"] >= 3
    assert "✓" in capsys.readouterr().out


# The others take a quarter of an hour; the command runs all.
@pytest.mark.slow
@pytest.mark.parametrize("kind", JUDGED[6::32], ids=lambda kind: kind.name)
def test_every_operation(kind):
    rows = {kind.name: row_of(kind)}
    assert_good(rows)
    assert sum(counts(rows).values()) == len(OPERATIONS)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_every_kind_of_data(number):
    # Each meets one of the four kinds of models, most of them one that can be trained with it.
    rows = data_rows(DATA_JUDGED[number], DATA[(number + 3) % 4 :: 4])
    assert_good(rows)
    assert len(rows) == len(DATA) / 4


def test_names_are_unique():
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    assert {*FAST, *FORMATS} < {operation.name for operation in OPERATIONS}
    assert len(WITH_ALL_DATA) == 4


# The judge itself


@dataclasses.dataclass
class Made:
    """A case of a given tolerance."""

    kind: object = dataclasses.field(default_factory=lambda: KINDS[0])


def verdict(expected, actual, in_keras=None, may_warn=""):
    def compare(case, one, other):
        assert one == other, f"{one}, not {other}"

    return judge(Operation("", expected, actual, compare, in_keras, may_warn), Made())


def failing(error):
    def fail(case):
        raise error

    return fail


def refusing(case):
    SnapshotEnsemble(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]))


def one(case):
    return 1


def test_right_and_wrong():
    assert verdict(one, one) == Verdict("right")
    wrong = verdict(one, lambda case: 2)
    assert wrong.what == "wrong"
    assert "2, not 1" in wrong.detail
    assert verdict(failing(KeyError("no")), one).what == "wrong"


def test_a_refusal_is_a_sentence_of_the_package():
    refused = verdict(one, refusing)
    assert refused.what == "refused"
    assert "compile" in refused.detail
    assert verdict(failing(KeyError("no")), refusing).what == "as Keras"
    assert verdict(one, refusing, in_keras=failing(KeyError("no"))).what == "as Keras"
    # The same sentence from elsewhere, and the same error as Keras gives.
    assert verdict(one, failing(ValueError("That is not so. Received: x=1"))).what == "raw error"
    assert verdict(failing(KeyError("no")), failing(KeyError("no"))).what == "as Keras"


def test_a_difference_that_is_warned_of_is_refused():
    def warning(case):
        warnings.warn("Its own terms are left out: see `ens[0].evaluate`.", stacklevel=2)
        return 2

    assert verdict(one, warning).what == "wrong"
    assert verdict(one, warning, may_warn="evaluate").what == "refused"
    assert verdict(lambda case: 2, warning, may_warn="evaluate").what == "right"


def test_an_error_from_the_depths_is_no_refusal():
    def deep(case):
        ens = SnapshotEnsemble(command.KINDS[0].build())
        ens.fit(np.zeros((4, 5)), np.zeros(4), epochs=5, verbose=0)

    found = verdict(one, deep)
    assert found.what == "raw error", found


def test_what_has_no_meaning_is_skipped():
    assert verdict(failing(Skip("why")), refusing) == Verdict("skipped", "why")
    assert verdict(one, failing(Skip("why"))) == Verdict("skipped", "why")


def test_the_mean_of_probabilities():
    p = np.asarray([[[0.9, 0.1]], [[0.5, 0.5]]])
    mean = np.asarray([[0.7, 0.3]])
    np.testing.assert_allclose(combined("probabilities", list(p)), mean)
    np.testing.assert_allclose(combined("log-probabilities", list(np.log(p) + 3)), np.log(mean))
    odds = np.log(p / (1 - p))
    np.testing.assert_allclose(combined("log-odds", list(odds)), np.log(mean / (1 - mean)))
    with pytest.raises(AssertionError, match="differ"):
        combined("same", [np.asarray([1]), np.asarray([2])])


def test_the_table_and_the_counts():
    rows = {
        "one": {"fit": Verdict("right"), "predict": Verdict("wrong", "by 3")},
        "other": {"fit": Verdict("refused"), "predict": Verdict("raw error", "KeyError: x")},
    }
    assert table(rows).splitlines() == [
        "| kind | fit | predict |",
        "|---|---|---|",
        "| one | ✓ | WRONG |",
        "| other | r | RAW |",
    ]
    assert bad_cells(rows) == [
        "one / predict: wrong: by 3",
        "other / predict: raw error: KeyError: x",
    ]
    text = command.text_of(rows, {})
    assert "4 cells: 1 right (✓), 1 refused (r), 0 as Keras (k)" in text


def test_rows_are_written_into_the_tables_of_a_file(tmp_path):
    def row(operations, what):
        return {operation.name: Verdict(what) for operation in operations}

    first, second = (kind.name for kind in KINDS[:2])
    data = f"{WITH_ALL_DATA[0].name}: {DATA[0].name}"
    path = tmp_path / "README.md"
    path.write_text(f"above\n{command.BEGIN}\n\nold\n\n{command.END}\nbelow\n")
    rows = {second: row(OPERATIONS, "right"), "no kind any more": row(OPERATIONS, "right")}
    command.write(path, rows, {data: row(DATA_OPERATIONS, "as Keras")})
    command.write(path, {first: row(OPERATIONS, "skipped")}, {})
    written = path.read_text()
    rows = {first: row(OPERATIONS, "skipped"), second: row(OPERATIONS, "right")}
    text = command.text_of(rows, {data: row(DATA_OPERATIONS, "as Keras")})
    assert written == f"above\n{command.BEGIN}\n\n{text}\n\n{command.END}\nbelow\n"
    with pytest.raises(SystemExit):
        command.main(["--operations", "fit", "--write", str(path)])
    assert path.read_text() == written
