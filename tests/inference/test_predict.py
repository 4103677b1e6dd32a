"""Predictions of an ensemble against its members' in NumPy, for every task and structure."""

import keras
import numpy as np
import pytest
from inference_cases import KINDS, MEMBERS, RNG, ROWS, average, mean_logits, to_probabilities
from keras import layers
from models import assert_close, dense, ensemble_of
from scipy import special

STEPS = RNG.normal(size=(9, 5, 3)).astype("float32")
IMAGES = RNG.normal(size=(5, 6, 6, 2)).astype("float32")


# Every task


def mean_by_hand(stack, task, logits, weights=None):
    """In float64, with SciPy."""
    return mean_logits(stack, task, weights) if logits else average(stack, weights)


def shares_by_hand(stack, task, logits):
    """The share of members that vote for each class."""
    if task == "multiclass":
        votes = np.asarray(stack).argmax(axis=-1)
        return np.mean(votes[..., None] == np.arange(np.shape(stack)[-1]), axis=0)
    return np.mean(np.asarray(stack) > (0 if logits else 0.5), axis=0)


@pytest.mark.sampled(4, 2)
@pytest.mark.parametrize("name", KINDS)
def test_mean(name, cases):
    ens, stack = cases(name)
    task, logits = KINDS[name][:2]
    actual = ens.predict(ROWS, verbose=0)
    assert actual.dtype == "float32"
    assert actual.shape == stack.shape[1:]
    assert_close(actual, mean_by_hand(stack, task, logits))


@pytest.mark.sampled(2, 2)
@pytest.mark.parametrize("name", KINDS)
def test_weighted(name, cases):
    ens, stack = cases(name)
    task, logits = KINDS[name][:2]
    weights = [0.4, 0.0, 0.35, 0.25]
    ens.weights = weights
    actual = ens.predict(ROWS, combine="weighted", verbose=0)
    assert_close(actual, mean_by_hand(stack, task, logits, weights))


@pytest.mark.parametrize("name", [name for name in KINDS if name != "values"])
def test_vote(name, cases):
    ens, stack = cases(name)
    task, logits = KINDS[name][:2]
    actual = to_probabilities(ens.predict(ROWS, combine="vote", verbose=0), task, logits)
    shares = shares_by_hand(stack, task, logits)
    np.testing.assert_allclose(actual, shares, atol=2e-6)
    means = to_probabilities(stack, task, logits).mean(axis=0)
    if task == "multiclass":
        at_top = np.where(shares == shares.max(axis=-1, keepdims=True), means, -1)
        np.testing.assert_array_equal(actual.argmax(axis=-1), at_top.argmax(axis=-1))
    else:
        np.testing.assert_array_equal(actual > 0.5, np.where(shares == 0.5, means, shares) > 0.5)


CHOICES = [
    (None, [0, 1, 2, 3]),
    (1, [3]),
    (2, [2, 3]),
    (4, [0, 1, 2, 3]),
    (np.int32(3), [1, 2, 3]),
    ([0], [0]),
    ([2, 0], [0, 2]),
    ([-1, 0], [0, 3]),
    (range(1, 3), [1, 2]),
    (np.array([3, 1]), [1, 3]),
]


@pytest.mark.parametrize(("members", "chosen"), CHOICES)
def test_mean_of_chosen_members(members, chosen, cases):
    ens, stack = cases("softmax")
    assert_close(ens.predict(ROWS, members=members, verbose=0), stack[chosen].mean(axis=0))


@pytest.mark.parametrize(("members", "chosen"), CHOICES[1:5])
def test_vote_of_chosen_members(members, chosen, cases):
    ens, stack = cases("softmax")
    actual = ens.predict(ROWS, combine="vote", members=members, verbose=0)
    np.testing.assert_allclose(
        actual, shares_by_hand(stack[chosen], "multiclass", False), atol=1e-6
    )


@pytest.mark.parametrize(("members", "chosen"), CHOICES[:3])
def test_weights_of_chosen_members_are_rescaled_to_sum_to_one(members, chosen, cases):
    ens, stack = cases("values")
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    ens.weights = weights
    actual = ens.predict(ROWS, combine="weighted", members=members, verbose=0)
    assert_close(actual, np.average(stack[chosen], axis=0, weights=weights[chosen]))


def test_weights_follow_the_order_of_chosen_members(cases):
    ens, stack = cases("values")
    ens.weights = [0.1, 0.2, 0.3, 0.4]
    actual = ens.predict(ROWS, combine="weighted", members=[3, 0], verbose=0)
    assert_close(actual, 0.8 * stack[3] + 0.2 * stack[0])


@pytest.mark.parametrize("name", KINDS)
def test_each_members_own_output(name, cases):
    ens, stack = cases(name)
    actual = ens.predict_members(ROWS, verbose=0)
    assert actual.shape == stack.shape
    assert actual.dtype == stack.dtype
    np.testing.assert_allclose(actual, stack, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("members", "chosen"), [(2, [2, 3]), ([2, 0], [2, 0]), ([-1], [3])])
def test_members_outputs_are_in_the_requested_order(members, chosen, cases):
    ens, stack = cases("values")
    assert_close(ens.predict_members(ROWS, members=members, verbose=0), stack[chosen])


def test_models_with_and_without_softmax_agree():
    # The same weights, once with the softmax and once without it.
    models = {name: dense(*KINDS[name][2:]) for name in ("softmax", "softmax logits")}
    actual = {}
    for name, model in models.items():
        actual[name] = ensemble_of(model, MEMBERS).predict(ROWS, verbose=0)
    assert_close(special.softmax(actual["softmax logits"], axis=-1), actual["softmax"])
    assert_close(special.logsumexp(actual["softmax logits"], axis=-1), 0)


# Structures and shapes


def two_inputs(inputs, outputs, loss):
    model = keras.Model(inputs, outputs)
    model.compile("sgd", loss)
    return model


def lists():
    a, b = keras.Input((4,)), keras.Input((3,))
    hidden = layers.Concatenate()([a, b])
    outputs = [layers.Dense(3)(hidden), layers.Dense(2, "sigmoid")(hidden), layers.Dense(1)(b)]
    categorical = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = two_inputs([a, b], outputs, [categorical, "binary_crossentropy", "mse"])
    x = [ROWS, ROWS[:, :3]]
    return model, x, [("multiclass", True), ("multilabel", False), ("regression", False)]


def dicts():
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    hidden = layers.Concatenate()([a, b])
    outputs = {"z": layers.Dense(3)(hidden), "c": layers.Dense(2)(hidden)}
    loss = {"z": keras.losses.CategoricalCrossentropy(from_logits=True), "c": "mae"}
    model = two_inputs({"a": a, "b": b}, outputs, loss)
    x = {"a": ROWS, "b": ROWS[:, :3]}
    return model, x, [("regression", False), ("multiclass", True)]


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.z, self.c = layers.Dense(1), layers.Dense(2)

    def call(self, inputs):
        return {"z": self.z(inputs["a"]), "c": self.c(inputs["b"])}


def subclassed():
    model, x = Subclassed(), {"a": ROWS, "b": ROWS[:, :3]}
    model.compile("sgd", {"z": keras.losses.BinaryCrossentropy(from_logits=True), "c": "mse"})
    model.predict(x, verbose=0)
    return model, x, [("regression", False), ("binary", True)]


def sequences():
    inputs = keras.Input((5, 3))
    model = keras.Model(inputs, layers.Dense(4)(layers.SimpleRNN(3, return_sequences=True)(inputs)))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model, STEPS, [("multiclass", True)]


def images():
    model = keras.Sequential([keras.Input((6, 6, 2)), layers.Conv2D(3, 3, activation="softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model, IMAGES, [("multiclass", False)]


def numbers_without_an_axis():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(1, "sigmoid")(inputs)[:, 0])
    model.compile("sgd", "binary_crossentropy")
    return model, ROWS, [("binary", False)]


def double_precision():
    inputs = keras.Input((4,), dtype="float64")
    model = keras.Model(inputs, layers.Dense(3, "softmax", dtype="float64")(inputs))
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model, ROWS.astype("float64"), [("multiclass", False)]


STRUCTURES = [
    lists,
    dicts,
    subclassed,
    sequences,
    images,
    numbers_without_an_axis,
    double_precision,
]


@pytest.mark.sampled(4, 2)
@pytest.mark.parametrize("make", STRUCTURES)
def test_outputs_have_the_models_structure_and_their_own_meanings(make):
    model, x, meanings = make()
    ens = ensemble_of(model, 3)
    members = [keras.tree.flatten(member.predict(x, verbose=0)) for member in ens]
    actual, like = ens.predict(x, verbose=0), model.predict(x, verbose=0)
    keras.tree.assert_same_structure(actual, like)
    own = ens.predict_members(x, verbose=0)
    keras.tree.assert_same_structure(own, like)
    for i, (task, logits) in enumerate(meanings):
        output, expected = keras.tree.flatten(actual)[i], keras.tree.flatten(like)[i]
        assert type(output) is np.ndarray
        assert (output.shape, output.dtype) == (expected.shape, expected.dtype)
        stack = np.stack([member[i] for member in members])
        assert_close(output, mean_by_hand(stack, task, logits))
        assert_close(keras.tree.flatten(own)[i], stack)


@pytest.mark.parametrize("make", [sequences, images])
def test_votes_at_each_step_and_pixel(make):
    model, x, [(task, logits)] = make()
    ens = ensemble_of(model, 3)
    stack = np.stack([member.predict(x, verbose=0) for member in ens])
    actual = ens.predict(x, combine="vote", verbose=0)
    shares = shares_by_hand(stack, task, logits)
    np.testing.assert_allclose(to_probabilities(actual, task, logits), shares, atol=2e-6)


def test_half_precision_is_combined_in_single_precision():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(3, "softmax", dtype="mixed_float16")(inputs))
    model.compile("sgd", "sparse_categorical_crossentropy")
    ens = ensemble_of(model, MEMBERS)
    own = ens.predict_members(ROWS, verbose=0)
    assert own.dtype == "float16"
    actual = ens.predict(ROWS, verbose=0)
    assert actual.dtype == "float32"
    np.testing.assert_allclose(actual, own.astype("float64").mean(axis=0), atol=1e-6)
