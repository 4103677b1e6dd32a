"""Early exit: each row gets the mean of the members that ran for it, as NumPy computes it."""

import collections

import keras
import numpy as np
import pytest
import scipy.sparse
import tensorflow as tf
from benchmarks.builders import random_ensemble
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers
from models import pool_of

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.storage.record import EarlyExit

X = np.random.default_rng(1).normal(size=(203, 6)).astype("float32")
HEADS = {
    "multiclass": (3, "softmax", "sparse_categorical_crossentropy"),
    "multiclass_logits": (3, None, keras.losses.SparseCategoricalCrossentropy(from_logits=True)),
    "binary": (1, "sigmoid", "binary_crossentropy"),
    "multilabel": (4, "sigmoid", "binary_crossentropy"),
    "multilabel_logits": (4, None, keras.losses.BinaryCrossentropy(from_logits=True)),
    "regression": (2, None, "mse"),
}


def ensemble(tasks, count=4):
    inputs = keras.Input((6,))
    hidden = layers.Dense(8, "relu")(inputs)
    outputs = [layers.Dense(HEADS[t][0], HEADS[t][1])(hidden) for t in tasks]
    model = keras.Model(inputs, outputs if len(tasks) > 1 else outputs[0])
    losses = [HEADS[task][2] for task in tasks]
    model.compile("sgd", losses if len(tasks) > 1 else losses[0])
    return random_ensemble(model, count, scale=0.6)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def mean_and_doubt(task, stack, temperature):
    """The tempered mean of members, and how unsure it is of each row, in float64."""
    if task == "regression":
        return stack.mean(0), stack.std(0).mean(-1)
    if task.startswith("multiclass"):
        if task.endswith("logits"):
            stack = np.exp(stack) / np.exp(stack).sum(-1, keepdims=True)
        p = stack.mean(0) ** (1 / temperature)
        p /= p.sum(-1, keepdims=True)
        return np.log(p) if task.endswith("logits") else p, 1 - p.max(-1)
    p = (sigmoid(stack) if task.endswith("logits") else stack).mean(0)
    z = np.log(p / (1 - p)) / temperature
    p = sigmoid(z)
    return z if task.endswith("logits") else p, np.minimum(p, 1 - p).mean(-1)


def reference(tasks, members, learned, temperature):
    """The outputs and the number of members of each row, from `(members, rows, …)` outputs."""
    rows = len(members[0][0])
    temperatures = [*learned.temperatures, temperature]
    outputs, counts = [np.zeros(stack.shape[1:]) for stack in members], np.zeros(rows, int)
    for stage, number in enumerate(temperatures):
        parts = [
            mean_and_doubt(task, stack[learned.order[: stage + 1]].astype("float64"), number)
            for task, stack in zip(tasks, members, strict=True)
        ]
        waiting = counts == 0
        for output, (mean, _) in zip(outputs, parts, strict=True):
            output[waiting] = mean[waiting]
        if stage < len(learned.thresholds):
            scaled = [d / s for (_, d), s in zip(parts, learned.scales, strict=True) if s]
            waiting &= np.max(scaled, axis=0) <= learned.thresholds[stage]
        counts[waiting] = stage + 1
    return outputs, counts


def check(tasks, learned, ens=None):
    ens = ens or ensemble(tasks, len(learned.order))
    ens.temperature = 1.3
    pool_of(ens).learn(early_exit=learned)
    stacks = ens.predict_members(X, verbose=0)
    expected, counts = reference(tasks, stacks if len(tasks) > 1 else [stacks], learned, 1.3)
    actual, ran = ens.predict(X, early_exit=True, return_counts=True, verbose=0)
    called = ens(X, early_exit=True)
    assert ran.dtype == np.int32
    assert np.mean(ran == counts) > 0.99  # Where a doubt is nearly the threshold.
    for one, other, of_call in zip(
        *map(keras.tree.flatten, (actual, expected, called)), strict=True
    ):
        same = ran == counts
        np.testing.assert_allclose(one[same], other[same], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(of_call, one, rtol=1e-5, atol=1e-6)
    return ens, actual, ran


THRESHOLDS = {
    "multiclass": [0.4, 0.5, 0.5],
    "multiclass_logits": [0.4, 0.5, 0.5],
    "binary": [0.3, 0.4, 0.45],
    "multilabel": [0.35, 0.37, 0.4],
    "multilabel_logits": [0.35, 0.37, 0.4],
    "regression": [-1.0, 0.7, 1.0],
}


@pytest.mark.slow
@pytest.mark.parametrize("task", HEADS)
def test_each_row_gets_the_mean_of_the_members_that_ran(task):
    learned = EarlyExit([2, 0, 3, 1], [0.8, 1.2, 1.1], THRESHOLDS[task], [1.0])
    ens, actual, counts = check([task], learned)
    assert len(set(counts)) >= 3
    full = ens.predict(X, verbose=0)
    np.testing.assert_allclose(actual[counts == 4], full[counts == 4], rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_several_outputs_must_all_be_sure():
    learned = EarlyExit([1, 0, 2], [0.8, 1.2], [1.1, 1.3], [0.4, 0.0, 0.5])
    _, _, counts = check(["multiclass", "regression", "multilabel"], learned)
    assert len(set(counts)) == 3


@pytest.mark.slow
@settings(deadline=None, max_examples=8, database=None)
@given(
    tasks=st.lists(st.sampled_from(sorted(HEADS)), min_size=1, max_size=2),
    order=st.permutations(range(3)),
    numbers=st.lists(st.floats(0.3, 3.0), min_size=6, max_size=6),
)
def test_any_tasks_orders_and_thresholds(tasks, order, numbers):
    scales = numbers[4:][: len(tasks)]
    check(tasks, EarlyExit(list(order), numbers[:2], [n / 3 for n in numbers[2:4]], scales))


@pytest.mark.slow
@pytest.mark.parametrize(("threshold", "ran"), [(-1.0, 4), (9.0, 1)])
def test_thresholds_of_never_and_always(threshold, ran):
    learned = EarlyExit([2, 0, 3, 1], [1.0] * 3, [threshold] * 3, [1.0])
    ens, actual, counts = check(["multiclass"], learned)
    assert set(counts) == {ran}
    if ran == 4:
        np.testing.assert_allclose(actual, ens.predict(X, verbose=0), rtol=1e-6)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("data", ["dataset", "few at once", "steps", "callbacks"])
def test_other_data_and_arguments(data):
    ens = ensemble(["multiclass"])
    pool_of(ens).learn(
        early_exit=EarlyExit([2, 0, 3, 1], [0.8, 1.2, 1.1], THRESHOLDS["multiclass"], [1.0])
    )
    expected, counts = ens.predict(X, early_exit=True, return_counts=True, verbose=0)
    x, arguments = X, {}
    if data in ("dataset", "steps"):
        x = tf.data.Dataset.from_tensor_slices(X).batch(20)
    if data == "steps":
        arguments = {"steps": 11}
    if data == "callbacks":
        arguments = {"callbacks": [keras.callbacks.Callback()]}
    if data == "few at once":
        arguments = {"batch_size": 7}
    actual, ran = ens.predict(x, early_exit=True, return_counts=True, verbose=0, **arguments)
    np.testing.assert_array_equal(ran, counts)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def classifier(**arguments):
    return keras.Sequential(
        [keras.Input((6,), **arguments), layers.Dense(8, "relu"), layers.Dense(3, "softmax")]
    )


CASCADE = EarlyExit([2, 0, 3, 1], [0.8, 1.2, 1.1], THRESHOLDS["multiclass"], [1.0])


@pytest.mark.slow
def test_a_model_that_is_compiled_by_xla():
    """XLA pads what has as many rows as a branch finds; a batch that is not the first showed it."""
    model = classifier()
    model.compile("sgd", "sparse_categorical_crossentropy", jit_compile=True)
    ens = random_ensemble(model, 4, scale=0.6)
    expected, counts = reference(["multiclass"], [ens.predict_members(X, verbose=0)], CASCADE, 1.0)
    pool_of(ens).learn(early_exit=CASCADE)
    for batch_size in (None, 32):
        actual, ran = ens.predict(
            X, early_exit=True, return_counts=True, batch_size=batch_size, verbose=0
        )
        np.testing.assert_array_equal(ran, counts)
        np.testing.assert_allclose(actual, expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_call_in_a_function_and_its_gradient():
    model = classifier()
    model.compile("sgd", "sparse_categorical_crossentropy")
    ens, x = random_ensemble(model, 4, scale=0.6), tf.constant(X)
    pool_of(ens).learn(early_exit=CASCADE)

    @tf.function
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(ens(x, early_exit=True) ** 2)
        return tape.gradient(loss, x)

    actual = gradient(x)  # The first call, so that members are made inside the function.
    counts = ens.predict(X, early_exit=True, return_counts=True, verbose=0)[1]
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss, mean = 0.0, 0.0
        for k, temperature in enumerate([*CASCADE.temperatures, 1.0]):
            mean = (k * mean + ens[CASCADE.order[k]](x)) / (k + 1)
            p = mean ** (1 / temperature)
            p /= tf.reduce_sum(p, axis=-1, keepdims=True)
            loss += tf.reduce_sum(p[counts == k + 1] ** 2)
    np.testing.assert_allclose(actual, tape.gradient(loss, x), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_sparse_inputs():
    model = classifier(sparse=True)
    model.compile("sgd", "sparse_categorical_crossentropy")
    ens = random_ensemble(model, 4, scale=0.6)
    x = np.where(X > 0.5, X, 0)
    x[[0, 3, -1]] = 0
    x = scipy.sparse.csr_matrix(x)
    expected, counts = reference(["multiclass"], [ens.predict_members(x, verbose=0)], CASCADE, 1.0)
    pool_of(ens).learn(early_exit=CASCADE)
    actual, ran = ens.predict(x, early_exit=True, return_counts=True, verbose=0)
    np.testing.assert_array_equal(ran, counts)
    np.testing.assert_allclose(actual, expected[0], rtol=1e-4, atol=1e-5)


def test_members_that_are_too_large_for_memory_run_in_turn(tmp_path):
    ens = ensemble(["multiclass"])
    pool_of(ens).learn(
        early_exit=EarlyExit([2, 0, 3, 1], [0.8, 1.2, 1.1], THRESHOLDS["multiclass"], [1.0])
    )
    expected, counts = ens.predict(X, early_exit=True, return_counts=True, verbose=0)
    ens.save(tmp_path / "saved")
    again = SnapshotEnsemble.load(tmp_path / "saved")
    again.memory_limit = 0
    actual, ran = again.predict(X, early_exit=True, return_counts=True, verbose=0)
    np.testing.assert_array_equal(ran, counts)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


ROWS = collections.Counter()


class Counted(layers.Dense):
    """Counts the rows that it sees, by its name."""

    def call(self, inputs):
        def count(array):
            ROWS[self.name] += len(array)
            return array

        # What has a side effect would not be shared.
        counted = tf.numpy_function(count, [inputs], inputs.dtype, stateful=False)
        counted.set_shape(inputs.shape)
        return super().call(counted)

    def compute_output_spec(self, inputs):
        return keras.KerasTensor((*inputs.shape[:-1], self.units))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wide", "pixels", "narrow"])
def test_rows_that_layers_see(kind):
    """A large part that members share runs once for a row; else, only members that a row needs."""
    inputs = hidden = keras.Input((6,))
    if kind == "pixels":  # Fewer weights than the members' own, but each is used six times.
        hidden = layers.Reshape((6, 1))(inputs)
    units = {"wide": 64, "pixels": 8, "narrow": 2}[kind]
    hidden = Counted(units, "tanh", trainable=False, name="shared")(hidden)
    if kind == "pixels":
        hidden = layers.GlobalMaxPooling1D()(hidden)
    if kind == "narrow":
        hidden = layers.Dense(32, "tanh")(hidden)
    model = keras.Model(inputs, Counted(3, "softmax", name="own")(hidden))
    model.compile("sgd", "sparse_categorical_crossentropy")
    ens = random_ensemble(model, 4, scale=0.3 if kind == "narrow" else 0.6)
    pool_of(ens).learn(early_exit=CASCADE)
    ROWS.clear()
    counts = ens.predict(X, early_exit=True, return_counts=True, verbose=0)[1]
    assert 1.1 < counts.mean() < 3.9
    is_large = kind != "narrow"
    assert ROWS["own"] == (4 * len(X) if is_large else counts.sum())
    assert ROWS["shared"] == (len(X) if is_large else counts.sum())
    check(["multiclass"], CASCADE, ens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"early_exit": True, "combine": "vote"}, "Received: early_exit=True, combine='vote'"),
        ({"early_exit": True, "members": 2}, "combine='mean', members=2. Leave"),
        ({"early_exit": True}, "needs thresholds. Received: early_exit=True, but none learned"),
        ({"return_counts": True}, "Received: return_counts=True, early_exit=False"),
    ],
)
def test_arguments_that_contradict_each_other(arguments, message):
    ens = ensemble(["multiclass"])
    with pytest.raises(ValueError, match=message):
        ens.predict(X, verbose=0, **arguments)
