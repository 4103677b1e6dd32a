"""Combining members, against NumPy and SciPy in float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from combining_cases import SHAPES, UNEQUAL, array, logits_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from inference_cases import average, mean_logits, to_probabilities
from keras import ops
from scipy import special

from snapshot_ensemble.inference.combining import (
    COMBINATIONS,
    combine_outputs,
    geometric,
    mean,
    median,
    vote,
)
from snapshot_ensemble.inference.task_words import Output

CLASSES = ("multiclass", "binary", "multilabel")


# The mean


@pytest.mark.parametrize("weights", [None, UNEQUAL])
@pytest.mark.parametrize("task", [*CLASSES, "regression"])
@pytest.mark.parametrize("shape", SHAPES)
def test_mean_of_probabilities_or_values(shape, task, weights):
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
def test_logits_and_probabilities_have_the_same_mean(task, combination):
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


# Extreme logits and probabilities


def extremes(ends=(-80.0, 0.0, 80.0)):
    """Two members and three units: a row for each combination of extreme values."""
    grid = np.stack(np.meshgrid(*[ends] * 6, indexing="ij"), axis=-1)
    return grid.reshape(-1, 2, 3).transpose(1, 0, 2).astype("float32")


@pytest.mark.parametrize("weights", [None, [0.25, 0.75], [0.0, 1.0]])
@pytest.mark.parametrize("task", CLASSES)
def test_extreme_logits_stay_finite_and_correct(task, weights):
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


def test_a_class_with_probability_0_in_all_members_keeps_it():
    logits = logits_of((6, 3))
    logits[..., 1] = -np.inf
    for weights in (None, UNEQUAL):
        combined = array(mean(logits, "multiclass", True, weights))
        assert (combined[:, 1] == -np.inf).all()
        rest = mean_logits(logits[..., [0, 2]], "multiclass", weights)
        np.testing.assert_allclose(combined[:, [0, 2]], rest, rtol=2e-6, atol=2e-6)


def test_a_class_with_probability_0_in_one_member_has_the_others_share():
    logits = np.array([[[-np.inf, 0.0]], [[0.0, 0.0]]], "float32")
    combined = array(mean(logits, "multiclass", True))
    np.testing.assert_allclose(np.exp(combined), [[0.25, 0.75]], rtol=1e-6)


# Weights


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("task", CLASSES)
def test_a_weight_of_zero_removes_a_member(task, logits):
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
    # Near 1, the odds of float32 probabilities have already lost digits.
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
COMBINATIONS_BY_TASK = [
    (combine, task, logits)
    for combine in ("mean", "vote", "weighted", "geometric", "median")
    for task, logits in MEANINGS
    if combine not in (("vote", "geometric") if task == "regression" else ("median",))
]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("combine", "task", "logits"), COMBINATIONS_BY_TASK)
def test_members_are_combined_in_at_least_float32(combine, task, logits, dtype):
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
    # The members' outputs after rounding to the dtype, in float64.
    exact = np.stack([array(ops.cast(member[0], "float64")) for member in members])
    expected = mean_logits(exact, task, weights) if logits else average(exact, weights)
    tolerance = 1e-12 if wide == "float64" else 2e-6
    np.testing.assert_allclose(array(combined), expected, rtol=tolerance, atol=tolerance)


def test_half_precision_outputs_keep_their_digits():
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


def test_a_single_output_is_returned_as_a_single_tensor():
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


@pytest.mark.parametrize(("combine", "task", "logits"), COMBINATIONS_BY_TASK)
def test_graph_mode_and_eager_mode_agree(combine, task, logits):
    function = COMBINATIONS[combine]
    weights = UNEQUAL if combine == "weighted" else None
    graph = tf.function(
        lambda stack: function(stack, task, logits, weights),
        input_signature=[tf.TensorSpec((5, None, 3), "float32")],
        autograph=False,
    )
    # Rounded, so that there are ties.
    stack = np.round(logits_of((40, 3), scale=1.0))
    if not logits and task != "regression":
        stack = to_probabilities(stack, task).astype("float32")
    np.testing.assert_allclose(
        array(graph(stack)), array(function(stack, task, logits, weights)), rtol=1e-6, atol=1e-6
    )
