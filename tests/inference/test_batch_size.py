"""The default batch size of predictions."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from benchmarks.builders import random_ensemble
from keras import layers
from models import ensemble_with

from snapshot_ensemble.inference.batch_size import (
    batch_size_for,
    batch_size_for_scores,
    batches_at_once,
    rows_at_once,
)
from snapshot_ensemble.keras_compat.graphs import in_batches


def net(*inside, shape=(8,)):
    return keras.Sequential([keras.Input(shape), *inside, layers.Dense(3, "softmax")])


def branches():
    x = keras.Input((8,))
    one, other = layers.Dense(2**12)(x), layers.Dense(2**12)(x)
    return keras.Model(x, layers.Add()([one, other]))


def two_members(model):
    model.compile("sgd", "sparse_categorical_crossentropy")
    rng = np.random.default_rng(0)
    members = [
        [rng.normal(0, 0.3, w.shape).astype(w.dtype) ** 2 for w in model.get_weights()]
        for _ in range(2)
    ]
    return ensemble_with(model, *members)


# The batch size keeps the largest tensor, in float32, within 1 MiB.
@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (net(layers.Dense(64)), 1024),
        (net(layers.Dense(2**9)), 512),
        (net(layers.Dense(2**9 + 1)), 256),
        (net(layers.Dense(2**14)), 32),
        (net(layers.BatchNormalization(), layers.Dropout(0.5)), 1024),
        (net(layers.LSTM(4), shape=(5, 2)), 1024),
        (net(layers.Conv2D(16, 3, padding="same"), layers.Flatten(), shape=(8, 8, 1)), 256),
        (net(net(layers.Dense(2**11))), 128),
        (branches(), 64),
    ],
)
def test_small_layers_get_large_batches(model, expected):
    assert rows_at_once(model) == expected


class OverTheBatch(layers.Layer):
    def call(self, inputs):
        return inputs - keras.ops.mean(inputs, axis=0)


class OwnStep(keras.Sequential):
    def predict_step(self, data):
        return super().predict_step(data)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.head = layers.Dense(3)

    def call(self, inputs):
        return self.head(inputs)


def with_raw_operation():
    x = keras.Input((8,))
    return keras.Model(x, layers.Dense(3, "softmax")(x - keras.ops.mean(x, axis=0)))


def in_training_mode():
    x = keras.Input((8,))
    normed = layers.BatchNormalization()(x, training=True)
    return keras.Model(x, layers.Dense(3, "softmax")(normed))


OTHERS = {
    "a custom layer": lambda: net(OverTheBatch()),
    "a custom layer within": lambda: net(net(OverTheBatch())),
    "a lambda": lambda: net(layers.Lambda(lambda x: x - keras.ops.mean(x, axis=0))),
    "a raw operation": with_raw_operation,
    "training mode": in_training_mode,
    "a custom predict_step": lambda: OwnStep([keras.Input((8,)), layers.Dense(3, "softmax")]),
    "a subclass": Subclassed,
    "a fixed batch": lambda: keras.Sequential([keras.Input(batch_shape=(32, 8)), layers.Dense(3)]),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_that_may_mix_rows_keep_the_batch_size_of_keras(kind):
    assert rows_at_once(OTHERS[kind]()) == 32


@pytest.mark.parametrize("layer", [layers.LSTM(4, stateful=True), layers.SimpleRNN(4)])
def test_recurrent_layers_with_a_fixed_batch_size(layer):
    model = keras.Sequential([keras.Input(batch_shape=(32, 5, 2)), layer])
    assert rows_at_once(model) == 32


def test_sequences_of_any_length():
    model = keras.Sequential([keras.Input((None, 2)), layers.LSTM(4), layers.Dense(3)])
    assert rows_at_once(model) == 32


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ["a custom layer", "a raw operation", "training mode"])
def test_rows_that_depend_on_their_batch_are_predicted_as_by_keras(kind):
    ens = two_members(OTHERS[kind]())
    x = np.random.default_rng(1).normal(size=(600, 8)).astype("float32")
    expected = np.mean([member.predict(x, verbose=0) for member in ens], axis=0)
    np.testing.assert_allclose(ens.predict(x, verbose=0), expected, atol=1e-6)


def test_batches_are_larger_only_if_nothing_depends_on_their_size():
    x, model = np.zeros((9_000, 8), "float32"), net(layers.Dense(64))
    assert batch_size_for(model, x) == {"batch_size": 1024}
    assert batch_size_for(model, {"a": tf.constant(x)}) == {"batch_size": 1024}
    assert batch_size_for(model, x[:800]) == {"batch_size": 100}  # At least eight batches.
    assert batch_size_for(model, x[:8]) == {"batch_size": 32}
    assert batch_size_for(model, x, batch_size=7) == {}
    assert batch_size_for(model, x, steps=3) == {}
    assert batch_size_for(model, x, callbacks=[keras.callbacks.Callback()]) == {}
    assert batch_size_for(model, tf.data.Dataset.from_tensors(x)) == {}


@pytest.mark.parametrize(("rows", "most"), [(1, 4), (4, 4), (9, 4), (12, 5), (3, 7)])
def test_a_graph_in_batches(rows, most):
    x = {"a": np.arange(rows * 2.0).reshape(rows, 2), "b": np.arange(rows).astype(str)}

    def function(batch):
        size = tf.repeat(tf.shape(batch["a"])[0], tf.shape(batch["a"])[0])
        return [2 * batch["a"], (batch["b"], size)]

    doubled, (names, sizes) = tf.function(lambda inputs: in_batches(function, inputs, most))(
        tf.nest.map_structure(tf.constant, x)
    )
    np.testing.assert_array_equal(doubled, 2 * x["a"])
    assert [name.decode() for name in names.numpy()] == list(x["b"])
    last = rows % most
    assert list(sizes) == [most] * (rows - last) + [last] * last


def test_how_many_batches_are_read_at_once():
    x, model = np.zeros((9_000, 8), "float32"), net(layers.Dense(64))
    assert batches_at_once(model, x, batch_size=256) == 4
    assert batches_at_once(model, x[:900], batch_size=32) == 3  # At least eight times.
    assert batches_at_once(model, x, batch_size=2000) == 1
    assert batches_at_once(model, x) == 1
    assert batches_at_once(model, x, batch_size=256, steps=3) == 1
    assert batches_at_once(model, x, batch_size=256, callbacks=[keras.callbacks.Callback()]) == 1
    assert batches_at_once(model, tf.data.Dataset.from_tensors(x), batch_size=256) == 1
    assert batches_at_once(OTHERS["a custom layer"](), x, batch_size=8) == 1


@pytest.mark.slow
def test_batches_of_a_given_size_are_predicted_as_by_keras():
    inputs = keras.Input((8,), name="x")
    hidden = layers.Dense(16, "relu")(inputs)
    outputs = {"a": layers.Dense(3, "softmax")(hidden), "b": layers.Dense(1)(hidden)}
    model = keras.Model({"x": inputs}, outputs)
    model.compile("sgd", {"a": "sparse_categorical_crossentropy", "b": "mse"})
    ens = random_ensemble(model, 3)
    x = {"x": np.random.default_rng(1).normal(size=(1001, 8)).astype("float32")}
    members = [member.predict(x, batch_size=32, verbose=0) for member in ens]
    expected = keras.tree.map_structure(lambda *m: np.mean(m, axis=0), *members)
    for batch_size in (32, 50, 1000):
        actual = ens.predict(x, batch_size=batch_size, verbose=0)
        for name in outputs:
            np.testing.assert_allclose(actual[name], expected[name], atol=1e-6)


@pytest.mark.slow
def test_large_and_small_batches_predict_the_same():
    ens = two_members(net(layers.Dense(64, "relu"), layers.BatchNormalization()))
    x = np.random.default_rng(1).normal(size=(9_001, 8)).astype("float32")
    y = np.arange(len(x)) % 3
    for combine in ("mean", "vote", "geometric"):
        expected = ens.predict(x, combine=combine, batch_size=32, verbose=0)
        actual = ens.predict(x, combine=combine, verbose=0)
        np.testing.assert_allclose(actual, expected, atol=1e-6)
    large, small = ens.report(x, y, verbose=0), ens.report(x, y, batch_size=32, verbose=0)
    assert large.rows["mean"]["nll"] == pytest.approx(small.rows["mean"]["nll"], rel=1e-5)


@pytest.mark.slow
def test_few_rows_in_many_combinations_cause_no_retracing_warning(caplog):
    ens = two_members(net(layers.Dense(64, "relu")))
    x = np.random.default_rng(1).normal(size=(300, 8)).astype("float32")
    for combine in ("mean", "vote", "geometric"):
        for members in (1, 2, [0]):
            ens.predict(x, combine=combine, members=members, verbose=0)
    assert "retracing" not in caplog.text


# The batch size of `evaluate`


class Custom(keras.metrics.MeanSquaredError):
    pass


def cubed(y, p):
    return keras.ops.mean(keras.ops.abs(y - p) ** 3)


X = np.zeros((2**14, 8), "float32")
LOSS = keras.losses.SparseCategoricalCrossentropy


@pytest.mark.parametrize(
    ("loss", "metrics"),
    [
        ("sparse_categorical_crossentropy", ["accuracy"]),
        (LOSS(from_logits=True), None),
        (["mse"], [keras.metrics.AUC(), keras.metrics.RootMeanSquaredError(), "mae"]),
        (keras.losses.mean_squared_error, [["mae"]]),
    ],
)
def test_scores_that_are_sums_over_rows_get_large_batches(loss, metrics):
    model = net()
    model.compile("sgd", loss, metrics=metrics)
    assert batch_size_for_scores(model, X) == {"batch_size": 1024}
    assert batch_size_for_scores(model, X, batch_size=5, y=None) == {}
    assert batch_size_for_scores(model, X, steps=5) == {}
    model.compile("sgd", loss, weighted_metrics=[cubed])
    assert batch_size_for_scores(model, X) == {}


@pytest.mark.parametrize(
    ("loss", "metrics"),
    [
        (cubed, None),
        (keras.losses.Dice(), None),
        (LOSS(reduction="sum"), None),
        (LOSS(ignore_class=1), None),
        ("mse", [cubed]),
        ("mse", [keras.metrics.MeanMetricWrapper(cubed)]),
        ("mse", [Custom()]),
    ],
)
def test_scores_that_depend_on_batches_keep_the_default_of_keras(loss, metrics):
    model = net()
    model.compile("sgd", loss, metrics=metrics)
    assert batch_size_for_scores(model, X) == {}


def test_masks_and_several_outputs_keep_the_default_of_keras():
    masked = net(layers.Masking(), layers.LSTM(4), shape=(5, 8))
    embedded = net(layers.Embedding(7, 4, mask_zero=True), layers.LSTM(4))
    inputs = keras.Input((8,))
    several = keras.Model(inputs, [layers.Dense(2)(inputs), layers.Dense(2)(inputs)])
    for model in (masked, embedded, several):
        model.compile("sgd", "mse")
        x = np.zeros((2**14, *model.input_shape[1:]), "float32")
        assert batch_size_for(model, x) != {}
        assert batch_size_for_scores(model, x) == {}
