"""Votes: the shares of members, and how ties are broken."""

import keras
import numpy as np
import pytest
from combining_cases import SHAPES, array, logits_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from inference_cases import to_probabilities
from scipy import special

from snapshot_ensemble.inference.combining import (
    vote,
)


def votes_by_hand(probabilities):
    """Each row's counts and winner, and masks of tied rows and of rows with an unambiguous winner.

    Ties go to the class with the higher mean.
    """
    probabilities = np.asarray(probabilities, "float64")
    _, rows, classes = probabilities.shape
    counts = np.zeros((rows, classes), int)
    for member in probabilities:
        for row, choice in enumerate(member.argmax(axis=-1)):
            counts[row, choice] += 1
    means = probabilities.mean(axis=0)
    winners, tied, sure = [], [], []
    for row in range(rows):
        top = np.flatnonzero(counts[row] == counts[row].max())
        order = np.sort(means[row][top])[::-1]
        winners.append(top[means[row][top].argmax()])
        tied.append(len(top) > 1)
        sure.append(len(top) == 1 or order[0] - order[1] > 1e-6)
    return counts, np.array(winners), np.array(tied), np.array(sure)


def test_shares_without_ties_are_counts_divided_by_members():
    probabilities = to_probabilities(logits_of((40, 4), members=7), "multiclass").astype("float32")
    counts, winners, tied, _ = votes_by_hand(probabilities)
    assert (~tied).sum() > 10
    shares = array(vote(probabilities, "multiclass", False))
    np.testing.assert_array_equal(shares[~tied], np.float32(counts[~tied]) / np.float32(7))
    np.testing.assert_array_equal(shares.argmax(axis=-1), winners)


def test_each_member_has_one_vote_whatever_its_confidence():
    probabilities = np.float32([[[0.99, 0.01]], [[0.49, 0.51]], [[0.49, 0.51]]])
    np.testing.assert_allclose(
        array(vote(probabilities, "multiclass", False)), [[1 / 3, 2 / 3]], rtol=1e-6
    )


@pytest.mark.parametrize("winner", [0, 1, 2])
@pytest.mark.parametrize("logits", [False, True])
def test_a_tie_goes_to_the_higher_mean(winner, logits):
    # Each class has one vote; the member that votes for the winner is more confident.
    probabilities = np.full((3, 1, 3), 0.3, "float32")
    for member in range(3):
        probabilities[member, 0, member] = 0.8 if member == winner else 0.4
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
    stack = np.log(probabilities) if logits else probabilities
    shares = array(vote(stack, "multiclass", logits))
    shares = special.softmax(np.float64(shares), axis=-1) if logits else shares
    assert shares.argmax(axis=-1) == [winner]
    np.testing.assert_allclose(shares, 1 / 3, rtol=2e-6)


def test_a_tie_is_only_between_the_classes_at_the_top():
    # Class 2 has the highest mean, but two votes fewer.
    probabilities = np.float32(
        [
            [[0.4, 0.3, 0.3]],
            [[0.4, 0.25, 0.35]],
            [[0.2, 0.41, 0.39]],
            [[0.2, 0.41, 0.39]],
        ]
    )
    assert probabilities.mean(axis=0).argmax() == 2
    shares = array(vote(probabilities, "multiclass", False))
    assert shares.argmax() == 1
    np.testing.assert_allclose(shares, [[0.5, 0.5, 0.0]], atol=1e-6)


@pytest.mark.parametrize("classes", [2, 50, 500])
@pytest.mark.parametrize("logits", [False, True])
def test_a_tie_is_broken_for_any_number_of_classes(classes, logits):
    # Each class has two votes; one voter for the last class is more confident than all others.
    stack = np.zeros((2 * classes, 1, classes), "float32")
    stack[np.arange(2 * classes), 0, np.arange(2 * classes) // 2] = 1
    stack[-1, 0, -1] = 3
    if not logits:
        stack = to_probabilities(stack, "multiclass").astype("float32")
    assert array(vote(stack, "multiclass", logits)).argmax() == classes - 1


@settings(deadline=None, max_examples=100)
@given(
    tenths=arrays.arrays(
        "int64",
        st.tuples(st.integers(1, 7), st.integers(1, 5), st.integers(2, 5)),
        elements=st.integers(0, 8),
    ),
    logits=st.booleans(),
)
def test_votes_of_any_members(tenths, logits):
    stack = (tenths / 4).astype("float32")
    if not logits:
        stack = to_probabilities(stack, "multiclass").astype("float32")
    counts, winners, tied, sure = votes_by_hand(
        to_probabilities(stack, "multiclass") if logits else stack
    )
    shares = array(vote(stack, "multiclass", logits))
    assert np.isfinite(shares).all()
    if logits:
        np.testing.assert_array_equal(shares.argmax(axis=-1)[sure], winners[sure])
        shares = np.exp(np.float64(shares))
        np.testing.assert_allclose(shares, counts / len(stack), atol=2e-6)
        return
    np.testing.assert_allclose(shares.sum(axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(shares, counts / len(stack), atol=1e-6)
    exact = np.float32(counts) / np.float32(len(stack))
    np.testing.assert_array_equal(shares[~tied], exact[~tied])
    np.testing.assert_array_equal(shares.argmax(axis=-1)[sure], winners[sure])


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_votes_of_sequences_and_images_are_taken_at_each_position(shape):
    probabilities = to_probabilities(logits_of(shape), "multiclass").astype("float32")
    shares = array(vote(probabilities, "multiclass", False))
    assert shares.shape == shape
    counts, winners, _, sure = votes_by_hand(probabilities.reshape(5, -1, 3))
    np.testing.assert_allclose(shares.reshape(-1, 3), counts / 5, atol=1e-6)
    np.testing.assert_array_equal(shares.reshape(-1, 3).argmax(axis=-1)[sure], winners[sure])


@pytest.mark.parametrize("task", ["binary", "multilabel"])
@pytest.mark.parametrize("members", [1, 3, 5])
def test_the_share_of_yes_of_an_odd_number_of_members(task, members):
    logits = logits_of((6, 3), members)
    expected = np.float32((logits > 0).sum(axis=0)) / np.float32(members)
    probabilities = to_probabilities(logits, task).astype("float32")
    np.testing.assert_array_equal(array(vote(probabilities, task, False)), expected)
    np.testing.assert_allclose(
        special.expit(np.float64(array(vote(logits, task, True)))), expected, atol=1e-6
    )


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_a_tie_of_yes_and_no_is_broken_by_the_mean(task, logits):
    # Columns: the mean is above, below and at one half.
    probabilities = np.float32([[[0.9, 0.6, 0.75]], [[0.4, 0.1, 0.25]]])
    threshold = 0.0 if logits else 0.5
    stack = special.logit(probabilities) if logits else probabilities
    shares = array(vote(stack, task, logits))
    np.testing.assert_array_equal(shares > threshold, [[True, False, False]])
    shares = special.expit(np.float64(shares)) if logits else shares
    np.testing.assert_allclose(shares, 0.5, atol=1e-6)


@pytest.mark.parametrize(
    ("logits", "yes"), [([0.1, -2.0, 9.0, -2.0], False), ([-0.1, 2.0, -12.0, 2.0], True)]
)
def test_a_tie_of_log_odds_is_broken_by_the_mean_probability(logits, yes):
    assert (np.mean(logits) > 0) != yes  # The mean of the log-odds is on the other side.
    assert (special.expit(logits).mean() > 0.5) == yes
    stack = np.reshape(logits, (4, 1, 1)).astype("float32")
    assert (array(vote(stack, "binary", True)) > 0) == yes


def test_a_probability_of_one_half_is_not_a_vote_for_yes():
    probabilities = np.float32([[[0.5]], [[0.5]], [[0.9]]])
    np.testing.assert_allclose(array(vote(probabilities, "binary", False)), [[1 / 3]], rtol=1e-6)


def test_unanimous_votes_are_certain():
    logits = np.float32([[[3.0, -1.0]], [[2.0, -5.0]]])
    shares = special.expit(array(vote(logits, "multilabel", True)))
    np.testing.assert_allclose(shares, [[1.0, 0.0]], atol=2e-7)


def test_keras_metrics_agree_on_votes():
    logits = logits_of((50, 1), members=4)
    labels = np.random.default_rng(1).integers(0, 2, (50, 1))
    probabilities = to_probabilities(logits, "binary").astype("float32")
    of_shares = keras.metrics.BinaryAccuracy()(labels, vote(probabilities, "binary", False))
    of_logits = keras.metrics.BinaryAccuracy(threshold=0.0)(labels, vote(logits, "binary", True))
    yes = (logits > 0).sum(axis=0)
    decided = np.where(yes == 2, special.expit(np.float64(logits)).mean(axis=0) > 0.5, yes > 2)
    assert float(of_shares) == float(of_logits) == pytest.approx((decided == labels).mean())
