"""Names of combinations, selections of members, and weights: what is accepted and refused."""

import numpy as np
import pytest
from combining_cases import UNEQUAL

from snapshot_ensemble.inference.combining import (
    check_combine,
    check_members,
    check_weights,
    weights_of,
)


@pytest.mark.parametrize("combine", ["mean", "vote", "weighted", "geometric", "median"])
def test_known_combinations(combine):
    check_combine(combine)


@pytest.mark.parametrize("combine", ["max", "Mean", "", None, 3, ["mean"]])
def test_unknown_combinations_are_refused(combine):
    with pytest.raises(ValueError) as caught:
        check_combine(combine)
    assert str(caught.value) == (
        "`combine` must be one of ('mean', 'vote', 'weighted', 'geometric', 'median'). "
        f"Received: combine={combine!r}"
    )


@pytest.mark.parametrize(
    ("members", "chosen"),
    [
        (None, [0, 1, 2, 3]),
        (1, [3]),
        (3, [1, 2, 3]),
        (4, [0, 1, 2, 3]),
        (np.int64(2), [2, 3]),
        ([0], [0]),
        ([2, 0], [2, 0]),
        ((1, 3), [1, 3]),
        ([-1], [3]),
        ([-4, -1], [0, 3]),
        (range(1, 3), [1, 2]),
        (np.array([3, 1]), [3, 1]),
    ],
)
def test_selected_members(members, chosen):
    assert check_members(members, 4) == chosen


@pytest.mark.parametrize("members", [[4], [-5], [0, 7], ["0"], [0.0], [None], [[0]]])
def test_invalid_indices_are_refused(members):
    with pytest.raises(ValueError) as caught:
        check_members(members, 4)
    assert str(caught.value) == (
        f"`members` must be indices from 0 to 3. Received: members={members!r}"
    )


@pytest.mark.parametrize(
    "members", [[True, False], (True, True, False, True), np.array([True, False])]
)
def test_a_boolean_mask_is_refused(members):
    with pytest.raises(ValueError, match=r"`members` must be indices from 0 to 3\. Received: "):
        check_members(members, 4)


@pytest.mark.parametrize("members", [[], (), [1, 1], [0, -4], [3, 1, -1]])
def test_empty_and_duplicate_members_are_refused(members):
    with pytest.raises(ValueError) as caught:
        check_members(members, 4)
    assert str(caught.value) == (
        f"`members` must contain at least one index and no duplicates. "
        f"Received: members={members!r}"
    )


def test_more_members_than_exist_are_refused():
    with pytest.raises(ValueError) as caught:
        check_members(5, 4)
    assert str(caught.value) == (
        "The ensemble has 4 members, so `members` can be at most 4. Received: members=5"
    )


@pytest.mark.parametrize("members", [0, -1])
def test_fewer_than_one_member_is_refused(members):
    with pytest.raises(ValueError) as caught:
        check_members(members, 4)
    assert str(caught.value) == f"`members` must be at least 1. Received: members={members}"


@pytest.mark.parametrize("members", [1.0, "all", True, {0, 1}, {0: 1}])
def test_members_of_a_wrong_type_are_refused(members):
    with pytest.raises(TypeError) as caught:
        check_members(members, 4)
    assert str(caught.value) == (f"`members` must be a whole number. Received: members={members!r}")


@pytest.mark.parametrize(
    "weights", [[0.5, 0.25, 0.25], (1, 0, 0), np.float32([0.2, 0.3, 0.5]), [1 / 3, 1 / 3, 1 / 3]]
)
def test_weights_are_float64_that_sum_to_one(weights):
    checked = check_weights(weights, 3)
    assert checked.dtype == "float64"
    assert checked.sum() == pytest.approx(1, abs=1e-15)
    np.testing.assert_allclose(checked, weights, atol=1e-7)


def test_checked_weights_are_a_copy():
    weights = np.array([0.5, 0.5])
    check_weights(weights, 2)[0] = 9
    np.testing.assert_array_equal(weights, [0.5, 0.5])


@pytest.mark.parametrize(
    "weights",
    [
        1.0,
        [],
        [0.5, 0.5],
        [[1.0, 0.0, 0.0]],
        [0.25, 0.25, 0.25, 0.25],
        ["a", "b", "c"],
        [[1], [2, 3], 4],
        {"a": 1},
    ],
)
def test_weights_that_are_not_one_number_per_member_are_refused(weights):
    with pytest.raises(ValueError) as caught:
        check_weights(weights, 3)
    assert str(caught.value) == (
        f"`weights` must be one number for each of the 3 members. Received: weights={weights!r}"
    )


@pytest.mark.parametrize(
    "weights",
    [[1, 1, 1], [0, 0, 0], [1.5, -0.5, 0], [np.nan, 0.5, 0.5], [np.inf, 0, 0], [0.5, 0.5, 1e-4]],
)
def test_weights_off_the_simplex_are_refused(weights):
    with pytest.raises(ValueError) as caught:
        check_weights(weights, 3)
    assert str(caught.value) == (
        "`weights` must be finite, at least 0 and sum to 1. "
        f"Received: weights={weights!r}, summing to {np.sum(np.float64(weights))}. "
        "Divide them by their sum."
    )


def test_weights_of_chosen_members_are_rescaled_to_sum_to_one():
    np.testing.assert_allclose(weights_of(UNEQUAL, [4, 0]), [1 / 3, 2 / 3])
    np.testing.assert_allclose(weights_of(UNEQUAL, [1, 2]), [0, 1])


def test_weights_that_are_not_set_are_refused():
    with pytest.raises(ValueError) as caught:
        weights_of(None, [0, 1])
    assert str(caught.value) == (
        "`combine='weighted'` needs weights. Received: weights=None. Call "
        "`fit_weights(x, y)` on held-out data, or set `weights` to one number per member, "
        "at least 0 and summing to 1."
    )


def test_chosen_members_that_all_have_weight_0_are_refused():
    with pytest.raises(ValueError) as caught:
        weights_of(UNEQUAL, [1])
    assert str(caught.value) == ("The chosen members all have weight 0. Received: members=[1]")
