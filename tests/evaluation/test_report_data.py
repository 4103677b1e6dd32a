"""Reports on all kinds of data, and the notes in a report."""

import math

import numpy as np
import pytest
import tensorflow as tf
from models import (
    Batches,
    assert_close,
    dense,
    dense_outputs,
    ensemble_of,
    ensemble_with,
    member_weights,
)
from report_cases import LABELS, ROWS, assert_aligned, calibration_error, linear, nll, through_json
from scipy import special
from sklearn.metrics import (
    mean_absolute_error,
    mean_squared_error,
)

from snapshot_ensemble import SnapshotEnsemble

# Data


@pytest.fixture(scope="module")
def weighted_rows():
    """An ensemble of two, data with sample weights, and the report on these arrays."""
    members = [(np.arange(4)[:, None] / 4, [0.5]), (np.ones((4, 1)), [-0.5])]
    ens = ensemble_with(linear(4, weighted_metrics=["mae"]), *members)
    y = ROWS.sum(axis=1, keepdims=True) + 0.3
    counts = np.random.default_rng(5).random(len(ROWS)) * 3
    return ens, (ROWS, y, counts), ens.report(ROWS, y, sample_weight=counts, verbose=0)


def test_sample_weights(weighted_rows):
    ens, (x, y, counts), report = weighted_rows
    stack = np.stack([x @ kernel + bias for kernel, bias in member_weights(ens)])
    expected = {"member 0": stack[0], "member 1": stack[1], "mean": stack.mean(axis=0)}
    for name, actual in expected.items():
        row = report.rows[name]
        squared = mean_squared_error(y, actual, sample_weight=counts)
        assert_close(row["squared_error"], squared)
        assert_close(row["mae"], mean_absolute_error(y, actual, sample_weight=counts))
        assert_close(row["loss"], np.mean(counts * np.square(actual - y)[:, 0]))
    distance = math.sqrt(mean_squared_error(*stack, sample_weight=counts))
    assert_close(report.rows["member 0"]["disagreement"], distance)
    evaluated = ens.evaluate(x, y, sample_weight=counts, return_dict=True, verbose=0)
    assert_close([report.rows["mean"][name] for name in evaluated], list(evaluated.values()), 1e-6)


def assert_alike(report, other):
    assert report.rows.keys() == other.rows.keys()
    for name, row in report.rows.items():
        assert row.keys() == other.rows[name].keys()
        assert_close(list(row.values()), list(other.rows[name].values()), 1e-6)
    assert_close(report.added_from_last["loss"], other.added_from_last["loss"], 1e-6)
    assert (report.worth, report.examples) == (other.worth, other.examples)


def test_a_tensorflow_dataset_has_the_same_report(weighted_rows, capsys):
    ens, arrays, report = weighted_rows
    dataset = tf.data.Dataset.from_tensor_slices(arrays).batch(7)
    assert_alike(ens.report(dataset, verbose=0), report)
    assert capsys.readouterr().out == ""


def test_the_data_is_read_once(weighted_rows):
    ens, arrays, report = weighted_rows
    dataset, once = Batches(*arrays), Batches(*arrays)
    ens.model.predict(once, verbose=0)
    assert_alike(ens.report(dataset, verbose=0), report)
    assert dataset.asked == once.asked


def test_one_row_of_data():
    ens = ensemble_of(dense(), 2)
    report = ens.report(ROWS[:1], LABELS[:1], verbose=0)
    p = [
        special.softmax(dense_outputs(weights, ROWS[:1]), axis=-1)
        for weights in member_weights(ens)
    ]
    assert (report.examples, report.bins) == (1, 1)
    for name, actual in {"member 0": p[0], "member 1": p[1], "mean": np.mean(p, axis=0)}.items():
        row = report.rows[name]
        assert_close([row["loss"], row["nll"]], nll(actual, LABELS[:1]))
        assert_close(row["ece"], calibration_error(actual, LABELS[:1], bins=1))
        # One row cannot be split into two halves.
        assert math.isnan(row["nll_calibrated"])
    assert_aligned(report)
    through_json(report)


def test_a_report_without_members_is_refused():
    with pytest.raises(ValueError) as caught:
        SnapshotEnsemble(dense()).report(ROWS, LABELS)
    assert str(caught.value) == (
        "The ensemble has no members yet. Call `fit`, or make it with `load` or `from_weights`."
    )


def test_a_report_without_targets_is_refused(weighted_rows):
    ens, _, _ = weighted_rows
    with pytest.raises(ValueError, match="There are no targets to compare with"):
        ens.report(ROWS, verbose=0)


# Notes


def with_errors(errors):
    """Linear members with constant errors, and the targets."""
    ens = ensemble_with(linear(4), *((np.ones((4, 1)), [error]) for error in errors))
    return ens, ROWS.sum(axis=1)


def worse_than(report):
    """The note that the mean is worse than a member, or None."""
    return next((note for note in report.notes if "is worse than" in note), None)


def test_a_mean_that_is_worse_than_the_best_member_is_noted():
    # Of the means from the last, that of two is best: (0.5 + -0.3) / 2 is 0.1.
    ens, y = with_errors([9.0, 0.2, -0.3, 0.5])
    report = ens.report(ROWS, y, verbose=0)
    assert_close(report.added_from_last["loss"], [0.25, 0.01, (0.4 / 3) ** 2, 2.35**2])
    assert worse_than(report) == (
        "The mean of all members (loss 5.5225) is worse than member 1 alone (0.0400). Try "
        "members=2 (the last 2: 0.0100) or fit_weights on held-out data."
    )
    assert worse_than(report) in str(report)
    # The errors are the same in each row, so the standard error is 0.
    assert report.worth == 2


def test_fewer_members_are_not_proposed_if_all_are_best():
    ens, y = with_errors([0.0, 4.0, 8.0])
    ens.weights = [0.75, 0.25, 0.0]
    report = ens.report(ROWS, y, verbose=0)
    assert worse_than(report) == (
        "The mean of all members (loss 16.0000) is worse than member 0 alone (0.0000). Try "
        "combine='weighted'."
    )
    assert_close(report.rows["weighted"]["loss"], 1)


def test_no_note_if_the_mean_is_better_than_each_member(diabetes_report):
    y, stack, report = diabetes_report.y, diabetes_report.stack, diabetes_report.report
    alone = [mean_squared_error(y, member) for member in stack]
    assert mean_squared_error(y, stack.mean(axis=0)) < min(alone)
    assert report.notes == [
        f"Worth it: {report.worth} of 4 members. The mean of the last {report.worth} is within "
        "one standard error of the best such mean."
    ]


def identical(count):
    """Identical members, and data for which the compared sums are rounded differently."""
    (weights,) = member_weights(ensemble_of(dense(), 1))
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(30, 4)).astype("float32"), rng.integers(0, 3, 30)
    return ensemble_with(dense(), *[weights] * count), x, y


def test_no_note_if_all_members_are_identical():
    ens, x, y = identical(3)
    report = ens.report(x, y, verbose=0)
    assert worse_than(report) is None
    assert report.worth == 1


def test_one_member_is_its_own_mean():
    ens, x, y = identical(1)
    report = ens.report(x, y, verbose=0)
    combinations = ["mean", "vote", "geometric"]
    assert list(report.rows) == ["member 0", "last snapshot", "best member", *combinations]
    scores = dict(report.rows["member 0"])
    assert scores.pop("disagreement") == 0
    for name in ("mean", "geometric"):
        assert report.rows[name].keys() == scores.keys()
        assert_close(list(report.rows[name].values()), list(scores.values()))
    (matrix,) = report.disagreement.values()
    np.testing.assert_array_equal(matrix, [[0]])
    assert report.worth == 1
    (note,) = report.notes
    assert note.startswith("Worth it: 1 of 1 member.")
