"""Functional models with layers that no config describes: exported, and refused by `to_keras`."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import ensemble_of

layers = keras.layers


class Patches(layers.Layer):
    """As in many examples of Keras: an argument, but no `get_config`."""

    def __init__(self, size):
        super().__init__(name="patches")
        self.size = size

    def call(self, inputs):
        return keras.ops.reshape(inputs, (-1, self.size))


class RaisingConfig(layers.Layer):
    """Of a script that was never saved."""

    def call(self, inputs):
        return inputs * 3.0

    def get_config(self):
        raise NotImplementedError("no config")


class Wrapped(layers.Layer):
    """Keeps a function of the user, as wrappers of pretrained backbones do."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, inputs):
        return self.function(inputs)


def lowered(text):
    return tf.strings.lower(text)


def doubled(x):
    return x * 2.0


def scaled(x, factor):
    return x * factor


FACTOR = 3.0


def closure():
    factor = 1.5
    return lambda x: x * factor * FACTOR


class Holder:
    def method(self, x):
        return x - 1.0


KINDS = {
    "no get_config": lambda: Patches(4),
    "get_config raises": RaisingConfig,
    "a function as argument": lambda: Wrapped(doubled),
    "lambda that reads a global": lambda: layers.Lambda(closure()),
    "named function": lambda: layers.Lambda(doubled),
    "partial": lambda: layers.Lambda(functools.partial(scaled, factor=2.0), output_shape=(4,)),
    "method": lambda: layers.Lambda(Holder().method),
    "lambda as activation": lambda: layers.Dense(4, activation=lambda x: x * 2.0),
    "partial as activation": lambda: layers.Dense(
        4, activation=functools.partial(scaled, factor=2.0)
    ),
}


def model_with(layer):
    inputs = keras.Input((4,), name="features")
    outputs = layers.Dense(3, "softmax", name="answer")(layer(layers.Dense(4)(inputs)))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


def served_outputs(path, **inputs):
    loaded = tf.saved_model.load(str(path))
    outputs = loaded.signatures["serving_default"](**inputs)
    return {name: value.numpy() for name, value in outputs.items()}


def mean_of_members(model, ens, x):
    """By the user's own model, with the weights of one member after the other."""
    own, outputs = model.get_weights(), []
    for member in ens:
        model.set_weights(member.get_weights())
        outputs.append(model.predict(x, verbose=0))
    model.set_weights(own)
    return np.mean(outputs, axis=0)


@pytest.mark.sampled(8, 2)
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_has_the_models_names_and_the_members_mean(kind, tmp_path):
    model = model_with(KINDS[kind]())
    ens = ensemble_of(model, 2)
    ens.export(tmp_path / "served")
    x = np.random.default_rng(1).normal(size=(5, 4)).astype("float32")
    actual = served_outputs(tmp_path / "served", features=x)
    np.testing.assert_allclose(actual["answer"], mean_of_members(model, ens, x), atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "get_config raises"][:6])
def test_to_keras_names_the_layer_or_makes_it(kind):
    model = model_with(KINDS[kind]())
    ens = ensemble_of(model, 2)
    x = np.random.default_rng(1).normal(size=(5, 4)).astype("float32")
    merged = error = None
    try:
        merged = ens.to_keras()
    except ValueError as caught:
        error = str(caught)
    if merged is None:
        layer = model.layers[2]
        assert f"Layer {layer.name!r} of class {type(layer).__name__} cannot be made" in error
        assert "`export` works without" in error
    else:
        expected = ens.predict(x, verbose=0)
        np.testing.assert_allclose(merged.predict(x, verbose=0), expected, atol=1e-6)


def test_to_keras_refuses_by_the_layers_name():
    ens = ensemble_of(model_with(Patches(4)), 2)
    with pytest.raises(ValueError, match="Layer 'patches' of class Patches cannot be made from"):
        ens.to_keras()


@pytest.mark.slow
@pytest.mark.parametrize(("format", "name"), [("onnx", "m.onnx"), ("litert", "m.tflite")])
def test_the_other_formats_pass_their_check(format, name, tmp_path):
    ensemble_of(model_with(Patches(4)), 2).export(tmp_path / name, format)
    assert (tmp_path / name).exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*np.object:FutureWarning")
def test_a_vocabulary_of_a_layer_that_has_no_config_is_in_the_file(tmp_path):
    """Text classification with `TextVectorization(standardize=f)`."""
    words = tf.constant([["Red green"], ["blue never"]])
    vectorize = layers.TextVectorization(standardize=lowered, output_sequence_length=2)
    vectorize.adapt(words)
    inputs = keras.Input((1,), dtype="string", name="words")
    embedded = layers.Flatten()(layers.Embedding(9, 3)(vectorize(inputs)))
    model = keras.Model(inputs, layers.Dense(3, "softmax", name="answer")(embedded))
    model.compile("sgd", "sparse_categorical_crossentropy")
    ens = ensemble_of(model, 2)
    ens.export(tmp_path / "served")
    actual = served_outputs(tmp_path / "served", words=words)["answer"]
    np.testing.assert_allclose(actual, mean_of_members(model, ens, words), atol=1e-6)
    assert len(np.unique(actual.round(5), axis=0)) == 2


class RandomMask(layers.Layer):
    """As in Keras's example of neural decision trees: a constant that the constructor draws."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.mask = np.random.default_rng().normal(size=4).astype("float32")

    def call(self, inputs):
        return inputs * self.mask


def test_to_keras_refuses_a_layer_that_is_another_when_it_is_made_again(tmp_path):
    model = model_with(RandomMask(name="mask"))
    ens = ensemble_of(model, 2)
    with pytest.raises(ValueError, match="Layer 'mask' of class RandomMask gives other outputs"):
        ens.to_keras()
    ens.export(tmp_path / "served")
    x = np.random.default_rng(1).normal(size=(5, 4)).astype("float32")
    actual = served_outputs(tmp_path / "served", features=x)["answer"]
    np.testing.assert_allclose(actual, mean_of_members(model, ens, x), atol=1e-6)


def test_a_shared_weight_is_in_the_file_once_and_no_other_weights_are(tmp_path):
    ens = ensemble_of(model_with(Patches(4)), 3, shared=lambda v: v.path.startswith("dense/"))
    ens.export(tmp_path / "served")
    variables = tf.saved_model.load(str(tmp_path / "served"))._all_variables
    shared = {v.path for v in ens.model.weights if v.path.startswith("dense/")}
    assert len(variables) == len(shared) + 3 * (len(ens.model.weights) - len(shared))
    listed = tf.train.list_variables(str(tmp_path / "served" / "variables" / "variables"))
    # Keras lists all variables of a model, and those that its function uses.
    assert sum(name.startswith("variables/") for name, _ in listed) == len(shared) + 3 * 2
