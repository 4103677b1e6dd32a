"""Arguments that `predict` and `evaluate` refuse without changing the ensemble."""

import numpy as np
import pytest
from inference_cases import (
    LABELS,
    MEMBERS,
    ROWS,
    named_outputs,
)
from models import dense, ensemble_of

from snapshot_ensemble import SnapshotEnsemble


def calls(ens):
    return [
        lambda **arguments: ens.predict(ROWS, verbose=0, **arguments),
        lambda **arguments: ens.evaluate(ROWS, LABELS, verbose=0, **arguments),
    ]


def test_predicting_without_members_is_refused():
    ens = SnapshotEnsemble(dense())
    for call in [*calls(ens), lambda: ens.predict_members(ROWS, verbose=0)]:
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == (
            "The ensemble has no members yet. Call `fit`, or make it with `load` or `from_weights`."
        )
    assert len(ens) == 0
    assert list(ens) == []
    with pytest.raises(IndexError, match="out of range"):
        ens[0]


@pytest.mark.parametrize("combine", ["max", "Mean", None, 3])
def test_unknown_combinations_are_refused(combine, ensemble):
    for call in calls(ensemble):
        with pytest.raises(ValueError, match="`combine` must be one of") as caught:
            call(combine=combine)
        assert str(caught.value).endswith(f"Received: combine={combine!r}")
    assert len(ensemble) == MEMBERS


def test_a_vote_on_values_is_refused(regression_ensemble):
    y = np.ones((len(ROWS), 2))
    for call in (
        regression_ensemble.predict,
        lambda x, **a: regression_ensemble.evaluate(x, y, **a),
    ):
        with pytest.raises(ValueError, match="`combine='vote'` is for classes, and output 0"):
            call(ROWS, combine="vote", verbose=0)
    assert len(regression_ensemble) == MEMBERS
    assert regression_ensemble.predict(ROWS, verbose=0).shape == (len(ROWS), 2)


def test_a_vote_is_refused_if_one_output_is_a_regression():
    ens = ensemble_of(named_outputs(list), 2)
    with pytest.raises(ValueError, match="output 1 of the model is a regression"):
        ens.predict(ROWS, combine="vote", verbose=0)
    assert len(ens) == 2


def test_weighted_without_weights_is_refused(ensemble):
    for call in calls(ensemble):
        with pytest.raises(ValueError, match="`combine='weighted'` needs weights"):
            call(combine="weighted")
    assert len(ensemble) == MEMBERS


def test_weighted_is_refused_if_the_chosen_members_have_weight_0(ensemble):
    ensemble.weights = [1, 0, 0, 0]
    for call in calls(ensemble):
        with pytest.raises(ValueError, match="The chosen members all have weight 0"):
            call(combine="weighted", members=2)
    assert len(ensemble) == MEMBERS


@pytest.mark.parametrize(
    ("members", "error", "message"),
    [
        (0, ValueError, "`members` must be at least 1. Received: members=0"),
        (-2, ValueError, "`members` must be at least 1. Received: members=-2"),
        (
            5,
            ValueError,
            "The ensemble has 4 members, so `members` can be at most 4. Received: members=5",
        ),
        ([4], ValueError, "`members` must be indices from 0 to 3. Received: members=[4]"),
        (
            [],
            ValueError,
            "`members` must contain at least one index and no duplicates. Received: members=[]",
        ),
        (
            [0, -4],
            ValueError,
            "`members` must contain at least one index and no duplicates. "
            "Received: members=[0, -4]",
        ),
        (True, TypeError, "`members` must be a whole number. Received: members=True"),
        ("all", TypeError, "`members` must be a whole number. Received: members='all'"),
    ],
)
def test_invalid_members_are_refused(members, error, message, ensemble):
    for call in [*calls(ensemble), lambda **a: ensemble.predict_members(ROWS, **a)]:
        with pytest.raises(error) as caught:
            call(members=members)
        assert str(caught.value) == message
    assert len(ensemble) == MEMBERS


def test_unknown_arguments_are_refused(ensemble):
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        ensemble.predict(ROWS, y=LABELS)
    with pytest.raises(ValueError, match="foo"):
        ensemble.evaluate(ROWS, LABELS, foo=1)
    assert len(ensemble) == MEMBERS


def test_generators_of_members_are_refused(ensemble):
    with pytest.raises(TypeError, match="`members` must be a whole number"):
        ensemble.predict(ROWS, members=(index for index in (0, 1)))
