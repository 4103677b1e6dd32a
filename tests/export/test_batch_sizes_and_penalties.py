"""Any batch size after a build by a call, and the loss of a merged model."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import ensemble_of

layers = keras.layers


def built_by_a_call():
    model = keras.Sequential([layers.Dense(4, "relu"), layers.Dense(3, "softmax")])
    model(np.zeros((3, 10), "float32"))
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


def test_a_sequential_that_was_built_by_a_call_takes_any_batch_size(tmp_path):
    ens = ensemble_of(built_by_a_call(), 2)
    merged = ens.to_keras()
    assert merged.input_shape == (None, 10)
    ens.export(tmp_path / "served")
    serve = tf.saved_model.load(str(tmp_path / "served")).signatures["serving_default"]
    (name,) = serve.structured_input_signature[1]
    for rows in (1, 3, 5):
        x = np.random.default_rng(rows).normal(size=(rows, 10)).astype("float32")
        expected = ens.predict(x, verbose=0)
        np.testing.assert_allclose(merged(x), expected, atol=1e-5)
        (actual,) = serve(**{name: tf.constant(x)}).values()
        np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_a_batch_size_that_was_given_stays(tmp_path):
    inputs = keras.Input((4,), batch_size=2, name="features")
    model = keras.Model(inputs, layers.Dense(3, "softmax")(inputs))
    model.compile("sgd", "sparse_categorical_crossentropy")
    ens = ensemble_of(model, 2)
    assert ens.to_keras().input_shape == (2, 4)
    ens.export(tmp_path / "served")
    serve = tf.saved_model.load(str(tmp_path / "served")).signatures["serving_default"]
    assert serve.structured_input_signature[1]["features"].shape == (2, 4)


PENALTIES = {
    "kernel and bias": lambda: [layers.Dense(4, kernel_regularizer="l2", bias_regularizer="l1")],
    "activity": lambda: [layers.Dense(4, activity_regularizer="l2")],
    "activity layer": lambda: [layers.Dense(4), layers.ActivityRegularization(l2=0.1)],
    "wrapped": lambda: [
        layers.Reshape((2, 2)),
        layers.Bidirectional(layers.LSTM(2, recurrent_regularizer="l2")),
    ],
    "time distributed": lambda: [
        layers.Reshape((2, 2)),
        layers.TimeDistributed(layers.Dense(2, kernel_regularizer="l2")),
        layers.Flatten(),
    ],
    "normalization": lambda: [layers.BatchNormalization(gamma_regularizer="l2")],
    "nested": lambda: [keras.Sequential([layers.Dense(4, kernel_regularizer="l2")])],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PENALTIES)
def test_the_loss_is_that_of_the_combined_outputs(kind, tmp_path):
    model = keras.Sequential([keras.Input((4,)), *PENALTIES[kind](), layers.Dense(3, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    ens = ensemble_of(model, 2)
    x = np.random.default_rng(1).normal(size=(6, 4)).astype("float32")
    y = np.arange(6) % 3
    mean = np.mean([member.predict(x, verbose=0) for member in ens], axis=0)
    expected = -np.mean(np.log(mean[np.arange(6), y]))
    merged = ens.to_keras()
    assert merged.evaluate(x, y, verbose=0) == pytest.approx(expected, rel=1e-5)
    merged.save(tmp_path / "merged.keras")
    again = keras.models.load_model(tmp_path / "merged.keras")
    assert again.evaluate(x, y, verbose=0) == pytest.approx(expected, rel=1e-5)


class Penalized(layers.Layer):
    """A variational encoder: a term of the loss that the layer's code adds."""

    def call(self, inputs):
        self.add_loss(keras.ops.mean(keras.ops.square(inputs)))
        return inputs


def test_terms_that_code_adds_are_named():
    inputs = keras.Input((4,))
    outputs = layers.Dense(3, "softmax")(Penalized(name="penalized")(inputs))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.warns(UserWarning, match=r"add terms to the loss.*layers=\['penalized'\]"):
        ensemble_of(model, 2).to_keras()
