"""Members are traced once and called with each member's weights, where they all do the same."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from benchmarks.builders import random_ensemble
from keras import layers, ops

from snapshot_ensemble.inference import members_model
from snapshot_ensemble.inference.member_states import own_states
from snapshot_ensemble.inference.members_model import MembersModel

COUNT = 3
X = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
IDS = np.array([[1, 2, 0], [3, 0, 0]], "int32")


class Listed(layers.Layer):
    """Notes each of its calls, as a layer with work in Python would be slow in each."""

    calls = 0

    def call(self, inputs):
        Listed.calls += 1
        return inputs


class OwnRandom(layers.Layer):
    """Draws with TensorFlow's own operations."""

    def call(self, inputs):
        return inputs + tf.random.uniform(tf.shape(inputs))


class Looked(layers.Layer):
    """Draws inside of a loop."""

    def call(self, inputs):
        return tf.while_loop(lambda i, x: i < 2, lambda i, x: (i + 1, OwnRandom()(x)), [0, inputs])[
            1
        ]


class InPython(layers.Layer):
    """Runs Python in the graph."""

    def call(self, inputs):
        outputs = tf.numpy_function(lambda x: x * 2, [inputs], inputs.dtype)
        return ops.reshape(outputs, ops.shape(inputs))


def stack(*inner):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(6), *inner, layers.Dense(3)])
    model.compile("sgd", "mse")
    return model


def texts():
    embedding = layers.Embedding(4, 5, mask_zero=True)
    last = layers.Dense(3, "softmax")
    inside = [embedding, layers.Bidirectional(layers.LSTM(4, return_sequences=True)), last]
    model = keras.Sequential([keras.Input((3,), dtype="int32"), *inside])
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


@pytest.fixture
def ways(monkeypatch):
    """For each graph that was built: whether its members were traced once."""
    noticed = []
    original = members_model.outputs_traced_once

    def noticing(*arguments):
        outputs = original(*arguments)
        noticed.append(outputs is not None)
        return outputs

    monkeypatch.setattr(members_model, "outputs_traced_once", noticing)
    return noticed


def members_of(ens):
    return [
        [tf.constant(array) for array in weights] for weights in ens._pool.weights(range(COUNT))
    ]


def test_a_layer_runs_in_python_once_for_all_members(ways):
    model = stack(Listed())
    ens = random_ensemble(model, COUNT)
    expected = np.mean([member.predict(X, verbose=0) for member in ens], axis=0)
    Listed.calls = 0
    np.testing.assert_allclose(ens.predict(X, verbose=0), expected, rtol=1e-6)
    assert (Listed.calls, ways) == (1, [True])


@pytest.mark.parametrize(
    ("inner", "once"),
    [
        ((layers.BatchNormalization,), True),
        ((layers.Dropout,), True),
        ((InPython,), False),
        ((OwnRandom,), False),
        ((Looked,), False),
    ],
)
def test_what_may_draw_is_laid_out(ways, inner, once):
    arguments = [0.5] if inner[0] is layers.Dropout else []
    ens = random_ensemble(stack(*(kind(*arguments) for kind in inner)), COUNT)
    ens.predict(X, verbose=0)
    assert ways == [once]


def test_members_that_draw_do_not_draw_alike(ways):
    model = stack(OwnRandom())
    ens = random_ensemble(model, 1)
    weights = [[tf.constant(array) for array in ens._pool.weights([0])[0]] for _ in range(COUNT)]
    model = MembersModel(model, weights, ops.stack, [[]] * COUNT)
    one, two, three = model.run(X)
    assert not np.allclose(one, two)
    assert not np.allclose(two, three)
    assert ways == [False]


def test_states_are_each_members_own(ways):
    class Draws(layers.Dropout):
        def call(self, inputs):
            return super().call(inputs, training=True)

    ens = random_ensemble(stack(Draws(0.5)), COUNT)
    ens.predict(X, verbose=0)
    assert ways == [False]


@pytest.mark.slow
def test_masks_and_logits_are_attached_again(ways):
    model = texts()
    ens = random_ensemble(model, COUNT)
    attached = []

    def combine(outputs):
        attached.extend((x._keras_logits, x._keras_mask) for x in outputs)
        return ops.stack([ops.softmax(x._keras_logits) for x in outputs])

    weights = members_of(ens)
    states = [own_states(model, index).values for index in range(COUNT)]
    run = MembersModel(model, weights, combine, states)
    np.testing.assert_allclose(run.run(IDS), [m(IDS) for m in ens], atol=1e-6)
    assert ways == [True]
    assert len(attached) == COUNT
    assert all(mask is not None for _, mask in attached)


def test_a_loss_is_differentiable(ways):
    ens = random_ensemble(stack(), COUNT)
    inputs = tf.constant(X)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        total = ops.sum(ops.square(ens(inputs)))
    actual = tape.gradient(total, inputs)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        total = ops.sum(ops.square(ops.mean(ops.stack([m(inputs) for m in ens]), axis=0)))
    np.testing.assert_allclose(actual, tape.gradient(total, inputs), atol=1e-6)
    assert ways == [True]


def test_keras_generator_goes_on_from_member_to_member(ways):
    class Unseeded(layers.Layer):
        def call(self, inputs):
            return inputs * 0 + keras.random.uniform(ops.shape(inputs))

    model = keras.Sequential([keras.Input((6,)), Unseeded(), layers.Dense(1)])
    model.compile("sgd", "mse")
    weights = [[tf.ones((6, 1)), tf.zeros(1)]] * COUNT
    run = MembersModel(model, weights, ops.stack, [[]] * COUNT)
    keras.utils.set_random_seed(0)
    actual = run.run(X)
    keras.utils.set_random_seed(0)
    expected = [model.layers[0](X).numpy().sum(axis=1, keepdims=True) for _ in range(COUNT)]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
