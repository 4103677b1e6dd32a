"""Members by index, and the weights of `combine="weighted"`."""

import numpy as np
import pytest
from inference_cases import LABELS, MEMBERS, ROWS
from models import assert_close, dense, ensemble_of

from snapshot_ensemble import SnapshotEnsemble

# Members by index


def test_length_and_iteration(ensemble):
    assert len(ensemble) == MEMBERS
    members = list(ensemble)
    assert len(members) == MEMBERS
    for index, member in enumerate(members):
        for actual, expected in zip(
            member.get_weights(), ensemble[index].get_weights(), strict=True
        ):
            np.testing.assert_array_equal(actual, expected)


def test_snapshots_of_explicit_weights_have_only_an_index(ensemble):
    assert [snapshot.index for snapshot in ensemble.snapshots] == [0, 1, 2, 3]
    assert {snapshot.epoch for snapshot in ensemble.snapshots} == {None}


@pytest.mark.parametrize("index", [0, 3, -1, -4, np.int64(2)])
def test_indices_count_from_either_end(index, regression_ensemble):
    own = regression_ensemble.predict_members(ROWS, verbose=0)
    assert_close(regression_ensemble[index].predict(ROWS, verbose=0), own[index])


@pytest.mark.parametrize("index", [4, -5, 100])
def test_indices_out_of_range(index, ensemble):
    with pytest.raises(IndexError, match="out of range"):
        ensemble[index]
    assert len(ensemble) == MEMBERS


@pytest.mark.parametrize("index", [1.0, "0", None, slice(2)])
def test_indices_of_a_wrong_type(index, ensemble):
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        ensemble[index]


def test_repr(tmp_path):
    model = dense()
    model.name = "mine"
    assert repr(SnapshotEnsemble(model)) == "<SnapshotEnsemble of 'mine': 0 members in memory>"
    ens = ensemble_of(model, 2)
    assert repr(ens) == "<SnapshotEnsemble of 'mine': 2 members in memory>"
    kept = SnapshotEnsemble(model, directory=tmp_path / "kept")
    assert repr(kept) == f"<SnapshotEnsemble of 'mine': 0 members in '{tmp_path / 'kept'}'>"


# Weights


def test_weights_are_none_until_they_are_set(ensemble):
    assert ensemble.weights is None
    ensemble.weights = [0.25, 0.25, 0.5, 0]
    np.testing.assert_array_equal(ensemble.weights, [0.25, 0.25, 0.5, 0])
    assert ensemble.weights.dtype == "float64"
    ensemble.weights = None
    assert ensemble.weights is None


def test_weights_are_a_copy(ensemble):
    given = np.array([0.25, 0.25, 0.25, 0.25])
    ensemble.weights = given
    given[:] = 0
    ensemble.weights[:] = 0
    np.testing.assert_array_equal(ensemble.weights, [0.25, 0.25, 0.25, 0.25])


def test_new_weights_apply_immediately(cases):
    ens, stack = cases("values")
    for index in (0, 2):
        ens.weights = np.eye(MEMBERS)[index]
        assert_close(ens.predict(ROWS, combine="weighted", verbose=0), stack[index])


def test_weights_are_kept_when_only_some_members_predict(ensemble):
    ensemble.weights = [0.1, 0.2, 0.3, 0.4]
    ensemble.predict(ROWS, combine="weighted", members=[0, 1], verbose=0)
    np.testing.assert_allclose(ensemble.weights, [0.1, 0.2, 0.3, 0.4])


def test_another_fit_clears_the_weights_and_adds_members():
    model = dense()
    ens = ensemble_of(model, 2, cycles=2, lr_init=0.1)
    ens.weights = [0.5, 0.5]
    before = ens.predict_members(ROWS, verbose=0)
    ens.predict(ROWS, combine="weighted", verbose=0)
    ens.fit(ROWS, LABELS, epochs=2, verbose=0)
    assert ens.weights is None
    assert len(ens) == 4
    own = ens.predict_members(ROWS, verbose=0)
    assert own.shape == (4, len(ROWS), 3)
    np.testing.assert_array_equal(own[:2], before)
    assert_close(own[3], model.predict(ROWS, verbose=0))
    assert_close(ens.predict(ROWS, verbose=0), own.mean(axis=0))
    with pytest.raises(ValueError, match="needs weights"):
        ens.predict(ROWS, combine="weighted", verbose=0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.5], "`weights` must be one number for each of the 4 members. Received: weights="),
        (1.0, "`weights` must be one number for each of the 4 members. Received: weights="),
        ([1, 1, 1, 1], "`weights` must be finite, at least 0 and sum to 1. Received: weights="),
        ([2, -1, 0, 0], "`weights` must be finite, at least 0 and sum to 1. Received: weights="),
        ([np.nan] * 4, "`weights` must be finite, at least 0 and sum to 1. Received: weights="),
    ],
)
def test_refused_weights_leave_the_previous_ones(weights, message, ensemble):
    ensemble.weights = [0.1, 0.2, 0.3, 0.4]
    with pytest.raises(ValueError) as caught:
        ensemble.weights = weights
    assert str(caught.value).startswith(message)
    np.testing.assert_allclose(ensemble.weights, [0.1, 0.2, 0.3, 0.4])
    assert len(ensemble) == MEMBERS
