"""Combining members, against NumPy and SciPy in float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from keras import ops
from scipy import special

from snapshot_ensemble.inference.combining import (
    COMBINATIONS,
    check_combine,
    check_members,
    check_weights,
    combine_outputs,
    geometric,
    mean,
    median,
    vote,
    weights_of,
)
from snapshot_ensemble.inference.output_specs import Output

CLASSES = ("multiclass", "binary", "multilabel")
SHAPES = [(6, 3), (4, 5, 3), (2, 4, 4, 3)]
UNEQUAL = np.array([0.5, 0.0, 0.1, 0.15, 0.25])


@pytest.fixture(autouse=True)
def _seeded():
    """No models are made here, so that there is nothing to clear."""


def logits_of(shape, members=5, scale=3.0, seed=0):
    rng = np.random.default_rng(seed)
    return (scale * rng.normal(size=(members, *shape))).astype("float32")


def to_probabilities(logits, task):
    """What an output of logits means, in float64."""
    logits = np.asarray(logits, "float64")
    return special.softmax(logits, axis=-1) if task == "multiclass" else special.expit(logits)


def average(stack, weights=None):
    return np.average(np.asarray(stack, "float64"), axis=0, weights=weights)


def log_mean(log_stack, weights=None):
    weights = np.full(len(log_stack), 1 / len(log_stack)) if weights is None else weights
    weights = np.reshape(weights, (-1,) + (1,) * (log_stack.ndim - 1))
    return special.logsumexp(log_stack, axis=0, b=weights)


def mean_logits(logits, task, weights=None):
    """The logits whose probabilities are the mean of the members' probabilities, in float64."""
    logits = np.asarray(logits, "float64")
    if task == "multiclass":
        return log_mean(special.log_softmax(logits, axis=-1), weights)
    yes, no = special.log_expit(logits), special.log_expit(-logits)
    return log_mean(yes, weights) - log_mean(no, weights)


def array(tensor):
    return ops.convert_to_numpy(tensor)


# The mean


@pytest.mark.parametrize("weights", [None, UNEQUAL])
@pytest.mark.parametrize("task", [*CLASSES, "regression"])
@pytest.mark.parametrize("shape", SHAPES)
def test_mean_of_probabilities_or_values_is_the_average(shape, task, weights):
    stack = logits_of(shape)
    if task != "regression":
        stack = to_probabilities(stack, task).astype("float32")
    combined = array(mean(stack, task, False, weights))
    assert combined.shape == shape
    np.testing.assert_allclose(combined, average(stack, weights), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", [None, UNEQUAL])
@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("shape", SHAPES)
def test_mean_of_logits_is_the_logarithm_of_the_mean_probability(shape, task, weights):
    logits = logits_of(shape)
    combined = array(mean(logits, task, True, weights))
    np.testing.assert_allclose(combined, mean_logits(logits, task, weights), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("combination", ["mean", "weighted"])
@pytest.mark.parametrize("task", CLASSES)
def test_logits_and_probabilities_mean_the_same(task, combination):
    logits = logits_of((6, 3))
    weights = UNEQUAL if combination == "weighted" else None
    function = COMBINATIONS[combination]
    of_logits = to_probabilities(array(function(logits, task, True, weights)), task)
    of_probabilities = array(
        function(to_probabilities(logits, task).astype("float32"), task, False, weights)
    )
    np.testing.assert_allclose(of_logits, of_probabilities, atol=1e-6)


def test_logits_are_not_simply_averaged():
    logits = np.array([[[8.0, 0.0]], [[0.0, 2.0]]], "float32")
    combined = to_probabilities(array(mean(logits, "multiclass", True)), "multiclass")
    wrong = to_probabilities(logits.mean(axis=0), "multiclass")
    assert np.abs(combined - wrong).max() > 0.3


def test_mean_log_probabilities_are_normalised():
    combined = array(mean(logits_of((6, 3)), "multiclass", True))
    np.testing.assert_allclose(special.logsumexp(combined, axis=-1), 0, atol=1e-6)


@pytest.mark.parametrize("task", CLASSES)
def test_mean_does_not_depend_on_the_order_of_members(task):
    logits = logits_of((6, 3))
    backwards = array(mean(logits[::-1], task, True))
    np.testing.assert_allclose(array(mean(logits, task, True)), backwards, rtol=1e-6, atol=1e-6)


def test_constants_added_to_one_members_softmax_logits_change_nothing():
    logits = logits_of((6, 3))
    moved = logits + np.float32([10, -20, 5, 0, 40]).reshape(-1, 1, 1)
    np.testing.assert_allclose(
        array(mean(moved, "multiclass", True)), array(mean(logits, "multiclass", True)), atol=2e-5
    )


def test_mean_of_one_member_is_that_member():
    logits = logits_of((6, 3), members=1)
    np.testing.assert_array_equal(array(mean(logits, "regression", False)), logits[0])
    np.testing.assert_allclose(array(mean(logits, "binary", True)), logits[0], atol=2e-6)


# The far ends


def extremes(ends=(-80.0, 0.0, 80.0)):
    """Two members, three units: each combination of far ends, a row each."""
    grid = np.stack(np.meshgrid(*[ends] * 6, indexing="ij"), axis=-1)
    return grid.reshape(-1, 2, 3).transpose(1, 0, 2).astype("float32")


@pytest.mark.parametrize("weights", [None, [0.25, 0.75], [0.0, 1.0]])
@pytest.mark.parametrize("task", CLASSES)
def test_extreme_logits_stay_finite_and_right(task, weights):
    logits = extremes()
    combined = array(mean(logits, task, True, weights))
    assert np.isfinite(combined).all()
    np.testing.assert_allclose(combined, mean_logits(logits, task, weights), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("task", CLASSES)
def test_votes_of_extreme_logits_stay_finite(task):
    assert np.isfinite(array(vote(extremes(), task, True))).all()


def test_half_precision_extremes_do_not_overflow():
    logits = np.array([[[6e4, -6e4, 0.0]], [[-6e4, 6e4, 0.0]]], "float16")
    [combined] = combine_outputs(list(logits[:, None]), "mean", [Output("multiclass", True)])
    np.testing.assert_allclose(
        array(combined)[0], mean_logits(logits, "multiclass")[0], rtol=1e-6, atol=1e-6
    )


def test_a_class_that_all_members_rule_out_stays_ruled_out():
    logits = logits_of((6, 3))
    logits[..., 1] = -np.inf
    for weights in (None, UNEQUAL):
        combined = array(mean(logits, "multiclass", True, weights))
        assert (combined[:, 1] == -np.inf).all()
        rest = mean_logits(logits[..., [0, 2]], "multiclass", weights)
        np.testing.assert_allclose(combined[:, [0, 2]], rest, rtol=2e-6, atol=2e-6)


def test_a_class_that_one_member_rules_out_has_the_others_share():
    logits = np.array([[[-np.inf, 0.0]], [[0.0, 0.0]]], "float32")
    combined = array(mean(logits, "multiclass", True))
    np.testing.assert_allclose(np.exp(combined), [[0.25, 0.75]], rtol=1e-6)


# Weights


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("task", CLASSES)
def test_a_weight_of_zero_takes_a_member_out(task, logits):
    stack = logits_of((6, 3))
    if not logits:
        stack = to_probabilities(stack, task).astype("float32")
    others = [0, 2, 3, 4]
    combined = array(mean(stack, task, logits, UNEQUAL))
    alone = array(mean(stack[others], task, logits, UNEQUAL[others]))
    np.testing.assert_allclose(combined, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("logits", [False, True])
def test_equal_weights_are_the_mean(logits):
    stack = to_probabilities(logits_of((6, 3)), "binary").astype("float32")
    equal = array(mean(stack, "binary", logits, np.full(5, 0.2)))
    np.testing.assert_allclose(equal, array(mean(stack, "binary", logits)), atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    logits=arrays.arrays(
        "float32",
        st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(2, 4)),
        elements=st.floats(-80, 80, width=32),
    ),
    parts=st.lists(st.integers(0, 9), min_size=6, max_size=6),
    task=st.sampled_from(CLASSES),
)
def test_weighted_mean_of_any_logits(logits, parts, task):
    parts = np.array(parts[: len(logits)])
    assume(parts.sum() > 0)
    weights = parts / parts.sum()
    combined = array(mean(logits, task, True, weights))
    np.testing.assert_allclose(combined, mean_logits(logits, task, weights), rtol=1e-5, atol=2e-5)


# Votes


def votes_by_hand(probabilities):
    """Each row's counts, and the class that wins: of equal counts the one with the higher mean.

    With it a mask of the rows whose winner is beyond doubt.
    """
    probabilities = np.asarray(probabilities, "float64")
    _, rows, classes = probabilities.shape
    counts = np.zeros((rows, classes), int)
    for member in probabilities:
        for row, choice in enumerate(member.argmax(axis=-1)):
            counts[row, choice] += 1
    means = probabilities.mean(axis=0)
    winners, drawn, sure = [], [], []
    for row in range(rows):
        top = np.flatnonzero(counts[row] == counts[row].max())
        order = np.sort(means[row][top])[::-1]
        winners.append(top[means[row][top].argmax()])
        drawn.append(len(top) > 1)
        sure.append(len(top) == 1 or order[0] - order[1] > 1e-6)
    return counts, np.array(winners), np.array(drawn), np.array(sure)


def test_shares_of_a_clear_vote_are_counts_by_members():
    probabilities = to_probabilities(logits_of((40, 4), members=7), "multiclass").astype("float32")
    counts, winners, drawn, _ = votes_by_hand(probabilities)
    assert (~drawn).sum() > 10
    shares = array(vote(probabilities, "multiclass", False))
    np.testing.assert_array_equal(shares[~drawn], np.float32(counts[~drawn]) / np.float32(7))
    np.testing.assert_array_equal(shares.argmax(axis=-1), winners)


def test_members_sure_and_unsure_have_one_vote_each():
    probabilities = np.float32([[[0.99, 0.01]], [[0.49, 0.51]], [[0.49, 0.51]]])
    np.testing.assert_allclose(
        array(vote(probabilities, "multiclass", False)), [[1 / 3, 2 / 3]], rtol=1e-6
    )


@pytest.mark.parametrize("winner", [0, 1, 2])
@pytest.mark.parametrize("logits", [False, True])
def test_a_draw_goes_to_the_higher_mean(winner, logits):
    # Each class has the vote of one member; the winner's is surer of it.
    probabilities = np.full((3, 1, 3), 0.3, "float32")
    for member in range(3):
        probabilities[member, 0, member] = 0.8 if member == winner else 0.4
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
    stack = np.log(probabilities) if logits else probabilities
    shares = array(vote(stack, "multiclass", logits))
    shares = special.softmax(np.float64(shares), axis=-1) if logits else shares
    assert shares.argmax(axis=-1) == [winner]
    np.testing.assert_allclose(shares, 1 / 3, rtol=2e-6)


def test_a_draw_is_only_between_the_classes_at_the_top():
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
def test_a_draw_shows_however_many_classes_have_a_part(classes, logits):
    # Two members vote for each class; one of those for the last class is surer than all others.
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
    counts, winners, drawn, sure = votes_by_hand(
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
    np.testing.assert_array_equal(shares[~drawn], exact[~drawn])
    np.testing.assert_array_equal(shares.argmax(axis=-1)[sure], winners[sure])


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_votes_of_sequences_and_images_are_taken_at_each_place(shape):
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
def test_a_draw_of_yes_and_no_goes_to_the_mean(task, logits):
    # Columns: the mean says yes, the mean says no, the mean does not know.
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
def test_a_draw_of_log_odds_is_settled_by_probabilities(logits, yes):
    assert (np.mean(logits) > 0) != yes  # The mean of the log-odds says the contrary.
    assert (special.expit(logits).mean() > 0.5) == yes
    stack = np.reshape(logits, (4, 1, 1)).astype("float32")
    assert (array(vote(stack, "binary", True)) > 0) == yes


def test_a_probability_of_one_half_is_no_vote_for_yes():
    probabilities = np.float32([[[0.5]], [[0.5]], [[0.9]]])
    np.testing.assert_allclose(array(vote(probabilities, "binary", False)), [[1 / 3]], rtol=1e-6)


def test_unanimous_votes_are_certain():
    logits = np.float32([[[3.0, -1.0]], [[2.0, -5.0]]])
    shares = special.expit(array(vote(logits, "multilabel", True)))
    np.testing.assert_allclose(shares, [[1.0, 0.0]], atol=2e-7)


def test_votes_are_counted_alike_by_keras_metrics():
    logits = logits_of((50, 1), members=4)
    labels = np.random.default_rng(1).integers(0, 2, (50, 1))
    probabilities = to_probabilities(logits, "binary").astype("float32")
    of_shares = keras.metrics.BinaryAccuracy()(labels, vote(probabilities, "binary", False))
    of_logits = keras.metrics.BinaryAccuracy(threshold=0.0)(labels, vote(logits, "binary", True))
    yes = (logits > 0).sum(axis=0)
    decided = np.where(yes == 2, special.expit(np.float64(logits)).mean(axis=0) > 0.5, yes > 2)
    assert float(of_shares) == float(of_logits) == pytest.approx((decided == labels).mean())


# The geometric mean and the median


def geometric_by_hand(logits, task):
    """Probabilities, in float64."""
    logits = np.asarray(logits, "float64")
    if task == "multiclass":
        return special.softmax(special.log_softmax(logits, axis=-1).mean(axis=0), axis=-1)
    yes = np.exp(special.log_expit(logits).mean(axis=0))
    no = np.exp(special.log_expit(-logits).mean(axis=0))
    return yes / (yes + no)


@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("shape", SHAPES)
def test_geometric_mean(shape, task):
    logits = logits_of(shape)
    expected = geometric_by_hand(logits, task)
    of_logits = to_probabilities(array(geometric(logits, task, True)), task)
    np.testing.assert_allclose(of_logits, expected, atol=1e-6)
    probabilities = to_probabilities(logits, task).astype("float32")
    # Near 1, float32 has lost digits of the odds before.
    exact = np.float64(probabilities)
    rounded = np.log(exact) if task == "multiclass" else special.logit(exact)
    np.testing.assert_allclose(
        array(geometric(probabilities, task, False)), geometric_by_hand(rounded, task), atol=1e-6
    )


def test_the_geometric_mean_of_logits_is_normalised():
    combined = array(geometric(logits_of((6, 3)), "multiclass", True))
    np.testing.assert_allclose(special.logsumexp(combined, axis=-1), 0, atol=1e-6)


@pytest.mark.parametrize("task", CLASSES)
def test_the_geometric_mean_of_extremes_is_finite(task):
    assert np.isfinite(array(geometric(extremes(), task, True))).all()
    certain = np.float32([[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 0.0]]])
    combined = array(geometric(certain, task, False))
    assert np.isfinite(combined).all()
    np.testing.assert_allclose(combined, [[1, 0]], atol=1e-2)


@pytest.mark.parametrize("members", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_median(shape, members):
    stack = logits_of(shape, members)
    combined = array(median(stack, "regression", False))
    np.testing.assert_allclose(combined, np.median(stack, axis=0), rtol=1e-6)


# Precision and structure


MEANINGS = [(task, logits) for task in CLASSES for logits in (False, True)] + [
    ("regression", False)
]
MADE_FOR = [
    (combine, task, logits)
    for combine in ("mean", "vote", "weighted", "geometric", "median")
    for task, logits in MEANINGS
    if combine not in (("vote", "geometric") if task == "regression" else ("median",))
]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("combine", "task", "logits"), MADE_FOR)
def test_members_are_combined_in_float32_at_least(combine, task, logits, dtype):
    stack = logits_of((6, 3))
    if not logits and task != "regression":
        stack = to_probabilities(stack, task)
    members = [[ops.cast(member, dtype)] for member in stack]
    weights = UNEQUAL if combine == "weighted" else None
    [combined] = combine_outputs(members, combine, [Output(task, logits)], weights)
    wide = "float64" if dtype == "float64" else "float32"
    assert keras.backend.standardize_dtype(combined.dtype) == wide
    if combine not in ("mean", "weighted"):
        return
    # The very numbers that the members had, in float64.
    exact = np.stack([array(ops.cast(member[0], "float64")) for member in members])
    expected = mean_logits(exact, task, weights) if logits else average(exact, weights)
    tolerance = 1e-12 if wide == "float64" else 2e-6
    np.testing.assert_allclose(array(combined), expected, rtol=tolerance, atol=tolerance)


def test_half_precision_would_have_lost_digits():
    members = [[np.float16([[1.0]])], [np.float16([[1.0 + 2**-10]])]]
    [combined] = combine_outputs(members, "mean", [Output("regression")])
    assert float(array(combined)[0, 0]) == 1.0 + 2**-11


def test_structures_are_combined_output_by_output():
    rng = np.random.default_rng(0)

    def member():
        return {"b": [rng.normal(size=(4, 2)), rng.normal(size=(4, 3))], "a": rng.random((4, 1))}

    members = [member() for _ in range(3)]
    meanings = [Output("binary"), Output("regression"), Output("multiclass", True)]
    combined = combine_outputs(members, "mean", meanings)
    assert set(combined) == {"a", "b"}
    np.testing.assert_allclose(array(combined["a"]), average([m["a"] for m in members]))
    np.testing.assert_allclose(array(combined["b"][0]), average([m["b"][0] for m in members]))
    expected = mean_logits([m["b"][1] for m in members], "multiclass")
    np.testing.assert_allclose(array(combined["b"][1]), expected)


def test_one_tensor_comes_back_as_one_tensor():
    members = list(logits_of((6, 3)))
    combined = combine_outputs(members, "mean", [Output("regression")])
    assert combined.shape == (6, 3)


@pytest.mark.parametrize("combine", ["vote", "geometric"])
def test_combinations_of_classes_are_refused_for_values(combine):
    members = [[np.zeros((4, 3), "float32"), np.zeros((4, 1), "float32")]] * 2
    with pytest.raises(ValueError) as caught:
        combine_outputs(members, combine, [Output("multiclass"), Output("regression")])
    assert str(caught.value) == (
        f"`combine='{combine}'` is for classes, and output 1 of the model is a regression. "
        f"Received: combine='{combine}'. Use 'mean', 'median' or 'weighted'."
    )


@pytest.mark.parametrize("task", CLASSES)
def test_the_median_is_refused_for_classes(task):
    members = [np.zeros((4, 3), "float32")] * 2
    with pytest.raises(ValueError) as caught:
        combine_outputs(members, "median", [Output(task)])
    assert str(caught.value) == (
        f"`combine='median'` is for regression, and output 0 of the model is {task}. "
        "Received: combine='median'. Use 'mean', 'vote', 'geometric' or 'weighted'."
    )


@pytest.mark.parametrize(("combine", "task", "logits"), MADE_FOR)
def test_a_graph_combines_as_eager_code_does(combine, task, logits):
    function = COMBINATIONS[combine]
    weights = UNEQUAL if combine == "weighted" else None
    graph = tf.function(
        lambda stack: function(stack, task, logits, weights),
        input_signature=[tf.TensorSpec((5, None, 3), "float32")],
        autograph=False,
    )
    # Numbers of few digits, so that there are draws.
    stack = np.round(logits_of((40, 3), scale=1.0))
    if not logits and task != "regression":
        stack = to_probabilities(stack, task).astype("float32")
    np.testing.assert_allclose(
        array(graph(stack)), array(function(stack, task, logits, weights)), rtol=1e-6, atol=1e-6
    )


# Arguments


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
def test_which_members_are_meant(members, chosen):
    assert check_members(members, 4) == chosen


@pytest.mark.parametrize("members", [[4], [-5], [0, 7], ["0"], [0.0], [None], [[0]]])
def test_indices_that_are_none(members):
    with pytest.raises(ValueError) as caught:
        check_members(members, 4)
    assert str(caught.value) == (
        f"`members` must be indices from 0 to 3. Received: members={members!r}"
    )


@pytest.mark.parametrize(
    "members", [[True, False], (True, True, False, True), np.array([True, False])]
)
def test_a_mask_is_not_taken_for_indices(members):
    with pytest.raises(ValueError, match=r"`members` must be indices from 0 to 3\. Received: "):
        check_members(members, 4)


@pytest.mark.parametrize("members", [[], (), [1, 1], [0, -4], [3, 1, -1]])
def test_no_member_and_the_same_member_twice(members):
    with pytest.raises(ValueError) as caught:
        check_members(members, 4)
    assert str(caught.value) == (
        f"`members` must name at least one member, and none twice. Received: members={members!r}"
    )


def test_more_members_than_there_are():
    with pytest.raises(ValueError) as caught:
        check_members(5, 4)
    assert str(caught.value) == (
        "The ensemble has 4 members, so `members` can be at most 4. Received: members=5"
    )


@pytest.mark.parametrize("members", [0, -1])
def test_no_members_by_number(members):
    with pytest.raises(ValueError) as caught:
        check_members(members, 4)
    assert str(caught.value) == f"`members` must be at least 1. Received: members={members}"


@pytest.mark.parametrize("members", [1.0, "all", True, {0, 1}, {0: 1}])
def test_members_of_a_wrong_type(members):
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
def test_weights_that_are_not_one_number_a_member(weights):
    with pytest.raises(ValueError) as caught:
        check_weights(weights, 3)
    assert str(caught.value) == (
        f"`weights` must be one number for each of the 3 members. Received: weights={weights!r}"
    )


@pytest.mark.parametrize(
    "weights",
    [[1, 1, 1], [0, 0, 0], [1.5, -0.5, 0], [np.nan, 0.5, 0.5], [np.inf, 0, 0], [0.5, 0.5, 1e-4]],
)
def test_weights_that_are_no_shares(weights):
    with pytest.raises(ValueError) as caught:
        check_weights(weights, 3)
    assert str(caught.value) == (
        "`weights` must be finite, at least 0 and sum to 1. "
        f"Received: weights={weights!r}, summing to {np.sum(np.float64(weights))}. "
        "Divide them by their sum."
    )


def test_weights_of_chosen_members_sum_to_one_again():
    np.testing.assert_allclose(weights_of(UNEQUAL, [4, 0]), [1 / 3, 2 / 3])
    np.testing.assert_allclose(weights_of(UNEQUAL, [1, 2]), [0, 1])


def test_weights_that_are_not_set():
    with pytest.raises(ValueError) as caught:
        weights_of(None, [0, 1])
    assert str(caught.value) == (
        "`combine='weighted'` needs weights. Received: weights=None. Call "
        "`fit_weights(x, y)` on held-out data, or set `weights` to one number a member, at "
        "least 0 and summing to 1."
    )


def test_chosen_members_without_any_weight():
    with pytest.raises(ValueError) as caught:
        weights_of(UNEQUAL, [1])
    assert str(caught.value) == ("The chosen members all have weight 0. Received: members=[1]")
