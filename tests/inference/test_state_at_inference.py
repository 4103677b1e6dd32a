"""Members draw random numbers and carry recurrent states on as the model itself does."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from models import compiled, ensemble_of, pool_of

from snapshot_ensemble.inference.cloning import states_of
from snapshot_ensemble.keras_compat.layer_states import recurrent_states, state_variables

X = np.random.default_rng(0).normal(size=(8, 3, 4)).astype("float32")


@keras.saving.register_keras_serializable("test_state")
class AlwaysDropout(layers.Dropout):
    """Monte Carlo dropout."""

    def call(self, inputs, training=None):
        return super().call(inputs, training=True)


@keras.saving.register_keras_serializable("test_state")
class Sampling(layers.Layer):
    """As in a variational autoencoder."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.seed_generator = keras.random.SeedGenerator(7)

    def call(self, mean):
        return mean + keras.random.normal(ops.shape(mean), seed=self.seed_generator)


class InAFunction(layers.Layer):
    """Draws in a `tf.function` of its own, and cannot be made from a config."""

    def __init__(self, rate):
        super().__init__()
        self.drop = layers.Dropout(rate)

    @tf.function
    def call(self, inputs):
        return self.drop(inputs, training=True)


class Unseeded(layers.Layer):
    def call(self, inputs):
        return inputs + keras.random.normal(ops.shape(inputs))


class OfTensorFlow(layers.Layer):
    def call(self, inputs):
        return inputs + tf.random.normal(tf.shape(inputs))


def recurrent(*inside):
    return compiled(keras.Sequential([keras.Input(batch_shape=(4, 3, 4)), *inside]), "mse")


def drawing(layer):
    return compiled(keras.Sequential([keras.Input((3, 4)), layer, layers.Dense(2)]), "mse")


class Subclass(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden, self.drop = layers.LSTM(3, stateful=True), layers.Dropout(0.5)

    def call(self, x):
        return self.drop(self.hidden(x), training=True)


def subclass():
    model = compiled(Subclass(), "mse")
    model(X[:4])
    return model


KINDS = {
    "recurrent": lambda: recurrent(layers.LSTM(3, stateful=True), layers.Dense(2)),
    "both ways": lambda: recurrent(layers.Bidirectional(layers.GRU(3, stateful=True))),
    "half precision": lambda: recurrent(layers.LSTM(3, stateful=True, dtype="mixed_float16")),
    "dropout": lambda: drawing(AlwaysDropout(0.5)),
    "sampling": lambda: drawing(Sampling()),
    "a subclass": subclass,
}


def predict(model, **arguments):
    return model.predict(X, batch_size=4, verbose=0, **arguments)


def by_keras(model, ens, values, times):
    """What the model itself predicts with each member's weights and first states."""
    own = [variable.numpy() for variable in model.variables + recurrent_states(model)]
    outputs = []
    for member, states in zip(ens, values, strict=True):
        model.set_weights(member.get_weights())
        for variable, value in zip(state_variables(model), states, strict=True):
            variable.assign(value)
        outputs.append([predict(model) for _ in range(times)])
    for variable, value in zip(model.variables + recurrent_states(model), own, strict=True):
        variable.assign(value)
    return np.asarray(outputs, "float64")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_members_predict_as_the_model_does_batch_for_batch(kind):
    model = KINDS[kind]()
    ens = ensemble_of(model, 2, task="regression")
    values = [[state.numpy() for state in states_of(member)] for member in ens]
    before = [variable.numpy() for variable in state_variables(model)]
    expected = by_keras(model, ens, values, times=3)
    tolerance = {"atol": 5e-3 if kind == "half precision" else 1e-5}
    assert np.abs(expected[:, 0] - expected[:, 1]).max() > 1e-3  # The states matter.
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
    np.testing.assert_allclose(predict(ens), expected[:, 0].mean(axis=0), **tolerance)
    # Other graphs of the same members, and members one after another, go on from there.
    np.testing.assert_allclose(
        ens.predict_members(X, batch_size=4, verbose=0), expected[:, 1], **tolerance
    )
    ens.memory_limit = 0
    np.testing.assert_allclose(predict(ens), expected[:, 2].mean(axis=0), **tolerance)
    for index, member in enumerate(ens):
        np.testing.assert_allclose(predict(member), expected[index, 0], **tolerance)
    for variable, value in zip(state_variables(model), before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


@pytest.mark.sampled(3, 2)
@pytest.mark.parametrize("kind", ["recurrent", "both ways"])
@pytest.mark.parametrize("memory_limit", [2**28, 0])
def test_recurrent_states_are_reset(kind, memory_limit):
    ens = ensemble_of(KINDS[kind](), 2, task="regression")
    ens.memory_limit = memory_limit
    first, second = predict(ens), predict(ens)
    assert np.abs(first - second).max() > 1e-3
    ens.reset_state()
    np.testing.assert_allclose(predict(ens), first, atol=1e-6)


def test_resetting_leaves_random_generators_as_they_are():
    model = subclass()
    ens = ensemble_of(model, 2, task="regression")
    predict(ens)
    states = pool_of(ens)._cache.graphs.states
    seed = states[1].values[0].numpy()
    ens.reset_state()
    np.testing.assert_array_equal(states[1].values[0].numpy(), seed)
    assert not any(value.numpy().any() for value in states[1].values[-2:])


def test_a_member_of_a_model_without_a_config_is_reset():
    member = ensemble_of(subclass(), 1, task="regression")[0]
    state = states_of(member)[-1]
    predict(member)
    assert state.numpy().any()
    member.reset_state()
    assert not state.numpy().any()


LAYERS = {
    "dropout": lambda: AlwaysDropout(0.5),
    "sampling": Sampling,
    "a function": lambda: InAFunction(0.5),
    "unseeded": Unseeded,
    "of TensorFlow": OfTensorFlow,
}


@pytest.mark.sampled(3, 2)
@pytest.mark.parametrize(
    ("kind", "call"),
    [
        *((kind, "predict") for kind in LAYERS),
        # TensorFlow gives its own operations in two graphs the same seeds.
        *((kind, "one batch") for kind in LAYERS if kind != "of TensorFlow"),
    ],
)
def test_each_call_batch_and_member_draws_anew(kind, call):
    # All weights are equal, so that only draws tell the members apart.
    model = drawing(LAYERS[kind]())
    ens = ensemble_of(model, 2, shared=lambda variable: True, task="regression")
    x = np.repeat(X[:1], 8, axis=0)

    def draw():
        if call == "predict":
            return np.asarray(ens.predict_members(x, batch_size=4, verbose=0))
        pool = pool_of(ens)
        return np.stack([np.asarray(ens(x, members=[k])) for k in range(len(pool))])

    draws = np.stack([draw(), draw()])
    flat = draws.reshape(4, 2, 4, -1)  # By call and member, batch, row.
    for index in np.ndindex(4, 2, 4):
        same = np.isclose(flat, flat[index], atol=1e-7).all(axis=-1)
        # Dropout has few outcomes, so single rows may be equal.
        assert same.mean() < 0.3, index
    batches = draws.reshape(8, -1)
    assert len(np.unique(batches, axis=0)) == len(batches)


def test_draws_are_right_on_average():
    model = drawing(Sampling())
    ens = ensemble_of(model, 3, task="regression")
    x = np.repeat(X[:1], 4000, axis=0)
    kernels = [member.get_weights() for member in ens]
    expected = np.mean([X[0] @ kernel + bias for kernel, bias in kernels], axis=0)
    actual = ens.predict(x, verbose=0)
    deviation = np.sqrt(np.mean([(k**2).sum(axis=0) for k, _ in kernels], axis=0) / 3)
    np.testing.assert_allclose(actual.mean(axis=0), expected, atol=0.1)
    # Members that draw independently have a mean with a third of the variance.
    np.testing.assert_allclose(actual.std(axis=0), np.tile(deviation, (3, 1)), rtol=0.1)


def test_draws_are_the_same_after_the_same_seed():
    def drawn():
        keras.utils.set_random_seed(3)
        return predict(ensemble_of(drawing(AlwaysDropout(0.5)), 2, task="regression"))

    np.testing.assert_array_equal(drawn(), drawn())
