"""Exports of models that draw random numbers or carry states on when they predict."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import ensemble_of

layers = keras.layers


class Sampling(layers.Layer):
    """The reparameterization of a variational autoencoder, which samples in `predict`, too."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.generator = keras.random.SeedGenerator(1)

    def call(self, inputs):
        return inputs + keras.random.normal(keras.ops.shape(inputs), seed=self.generator)


def sampling():
    inputs = keras.Input((4,), name="features")
    model = keras.Model(inputs, layers.Dense(2, name="answer")(Sampling()(inputs)))
    model.compile("sgd", "mse")
    return model


def stateful():
    inputs = keras.Input((3, 2), batch_size=2, name="features")
    hidden = layers.SimpleRNN(3, stateful=True)(inputs)
    model = keras.Model(inputs, layers.Dense(2, name="answer")(hidden))
    model.compile("sgd", "mse")
    return model


def signature_of(path):
    loaded = tf.saved_model.load(str(path))
    serve = loaded.signatures["serving_default"]
    return lambda x: (serve(features=tf.constant(x))["answer"].numpy(), loaded)[0]


def test_a_model_that_samples_draws_anew_in_each_call(tmp_path):
    ens = ensemble_of(sampling(), 2)
    ens.export(tmp_path / "served")
    serve, x = signature_of(tmp_path / "served"), np.ones((4, 4), "float32")
    first, second = serve(x), serve(x)
    assert np.abs(first - second).max() > 1e-3
    again = ensemble_of(sampling(), 2)
    np.testing.assert_allclose(first, again.predict(x, verbose=0), atol=1e-5)
    np.testing.assert_allclose(second, again.predict(x, verbose=0), atol=1e-5)


@pytest.mark.slow
def test_a_stateful_model_carries_its_state_on_as_in_predict(tmp_path):
    ens = ensemble_of(stateful(), 2)
    x = np.random.default_rng(1).normal(size=(2, 3, 2)).astype("float32")
    first, second = (ens.predict(x, verbose=0) for _ in range(2))
    ens.export(tmp_path / "served")
    serve = signature_of(tmp_path / "served")
    np.testing.assert_allclose(serve(x), first, atol=1e-5)
    np.testing.assert_allclose(serve(x), second, atol=1e-5)
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize(("format", "name"), [("onnx", "m.onnx"), ("openvino", "m.xml")])
def test_formats_without_states_are_refused_for_stateful_models(format, name, tmp_path):
    pytest.importorskip("openvino")
    with pytest.raises(ValueError, match="A stateful layer carries its state on.*Received: format"):
        ensemble_of(stateful(), 2).export(tmp_path / name, format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("build", [sampling, stateful])
def test_to_keras_is_not_refused_and_starts_with_new_states(build):
    ens = ensemble_of(build(), 2)
    shape = (2, 3, 2) if build is stateful else (4, 4)
    x = np.random.default_rng(1).normal(size=shape).astype("float32")
    merged = ens.to_keras()
    expected, actual = ens.predict(x, verbose=0), merged.predict(x, verbose=0)
    assert actual.shape == expected.shape
    if build is stateful:
        np.testing.assert_allclose(actual, expected, atol=1e-5)
