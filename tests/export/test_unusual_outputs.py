"""Exports of models whose outputs share a name, or that have no weights."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from benchmarks.builders import random_ensemble
from keras import layers

X = np.random.default_rng(0).normal(size=(4, 5, 4)).astype("float32")


def head_called_twice():
    inputs, head = keras.Input((5, 4)), layers.Dense(3, name="head")
    return keras.Model(inputs, [head(inputs), head(inputs * 2)])


def outputs_of_one_layer():
    inputs = keras.Input((5, 4))
    return keras.Model(inputs, list(layers.LSTM(3, return_state=True, name="lstm")(inputs)))


def taken_name():
    inputs, head = keras.Input((5, 4)), layers.Dense(3, name="head")
    other = layers.Dense(2, name="head_1")
    return keras.Model(inputs, [head(inputs), head(inputs * 2), other(inputs)])


CASES = {
    "head called twice": (head_called_twice, ["head", "head_1"]),
    "outputs of one layer": (outputs_of_one_layer, ["lstm", "lstm_1", "lstm_2"]),
    "taken name": (taken_name, ["head", "head_2", "head_1"]),
}


def ensemble_of(model, count=2):
    model.compile("sgd", ["mse"] * len(model.outputs))
    return random_ensemble(model, count)


def as_lists(outputs, names):
    return [np.asarray(outputs[name]) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_each_output_has_a_name_of_its_own(name, tmp_path):
    make, names = CASES[name]
    ens = ensemble_of(make())
    expected = ens.predict(X, verbose=0)
    ens.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(tmp_path / "served").signatures["serving_default"]
    merged = ens.to_keras()
    assert merged.output_names == names
    outputs = served(tf.constant(X))
    assert set(outputs) == set(names)
    for actual in (as_lists(outputs, names), merged.predict(X, verbose=0)):
        for one, other in zip(actual, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("format", ["tf_saved_model", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_model_without_weights_is_exported(tmp_path, format):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Rescaling(2.0, name="twice")(inputs))
    model.compile("sgd", "mse")
    ens, x = random_ensemble(model, 2), X[:, 0]
    path = tmp_path / ("served" if format == "tf_saved_model" else "served.onnx")
    ens.export(path, format, verbose=False)
    if format == "tf_saved_model":
        served = tf.saved_model.load(path).signatures["serving_default"]
        np.testing.assert_allclose(served(tf.constant(x))["twice"], 2 * x, rtol=1e-6)


@pytest.mark.parametrize("given", [(1,), [2, 3], "x"])
def test_a_signature_of_something_else_is_refused(tmp_path, given):
    ens = ensemble_of(head_called_twice())
    with pytest.raises(TypeError, match="`input_signature` must be a list with one item") as caught:
        ens.export(tmp_path / "served", input_signature=given, verbose=False)
    assert f"Received: input_signature={given!r}" in str(caught.value)
    assert not (tmp_path / "served").exists()
