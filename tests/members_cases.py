"""Ensembles of weight files with random weights, and the expected outputs of their members."""

import functools

import keras
import models
import numpy as np
import tensorflow as tf
from keras import layers, ops

from snapshot_ensemble import SnapshotEnsemble

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(10, 4)).astype("float32")
STEPS = RNG.normal(size=(6, 5, 3)).astype("float32")
IMAGES = RNG.normal(size=(4, 8, 8, 3)).astype("float32")
TOKENS = np.array([[1, 2, 3, 0, 0], [4, 5, 0, 0, 0], [6, 6, 6, 6, 1], [2, 0, 0, 0, 0]])


def random_weights(model, seed):
    rng = np.random.default_rng(seed)
    return [
        array
        if variable.dtype in ("int32", "int64")
        else rng.uniform(0.5, 1.5, array.shape).astype(array.dtype)
        if "variance" in variable.name
        else rng.normal(0, 0.5, array.shape).astype(array.dtype)
        for variable, array in zip(model.weights, model.get_weights(), strict=True)
    ]


def ensemble_from_files(model, directory, members=2, **arguments):
    """An ensemble of random members, and their weights. The model keeps its own weights."""
    own, paths = model.get_weights(), []
    weights = [random_weights(model, seed) for seed in range(1, members + 1)]
    for index, arrays in enumerate(weights):
        model.set_weights(arrays)
        paths.append(directory / f"{index}.weights.h5")
        model.save_weights(paths[-1])
    model.set_weights(own)
    return SnapshotEnsemble.from_weights(model, paths, **arguments), weights


def outputs_with(model, weights, x):
    """The model's own predictions with each member's weights, stacked on a new first axis."""
    own, outputs = model.get_weights(), []
    for arrays in weights:
        model.set_weights(arrays)
        outputs.append(model.predict(x, verbose=0))
    model.set_weights(own)
    return keras.tree.map_structure(lambda *members: np.stack(members), *outputs)


compiled = functools.partial(models.compiled, loss="mse")


def sequential():
    return compiled(
        keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(8, "relu"),
                layers.BatchNormalization(),
                layers.Dropout(0.5),
                layers.GaussianNoise(1.0),
                layers.Dense(3),
            ]
        )
    ), ROWS


def nested_with_shared_layers():
    inner = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4, "tanh"), layers.LayerNormalization()]
    )
    shared = layers.Dense(4)
    inputs = keras.Input((4,))
    hidden = shared(inner(shared(inputs)))
    outputs = [layers.Dense(2)(hidden), layers.add([inner(hidden), inputs])]
    return compiled(keras.Model(inputs, outputs)), ROWS


def dicts_in_and_out():
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    hidden = layers.Concatenate()([layers.Dense(3)(a), layers.Dense(2)(b)])
    outputs = {"z": layers.Dense(2)(hidden), "y": [layers.Dense(1)(hidden), layers.Dense(1)(a)]}
    return compiled(keras.Model({"a": a, "b": b}, outputs)), {"a": ROWS, "b": ROWS[::-1]}


@keras.saving.register_keras_serializable("test_merging")
class WithConfig(keras.Model):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.hidden = layers.Dense(units, "relu")
        self.norm = layers.BatchNormalization()
        self.head = layers.Dense(2)

    def call(self, inputs, training=False):
        return self.head(self.norm(self.hidden(inputs), training=training))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def subclassed_with_config():
    model = compiled(WithConfig(5))
    model.predict(ROWS, verbose=0)
    return model, ROWS


class WithoutConfig(keras.Model):
    """Its constructor takes a function, which cannot be stored in a config."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.hidden = layers.Dense(4)
        self.head = layers.Dense(2)

    def call(self, inputs):
        return self.head(self.function(self.hidden(inputs)))


def subclassed_without_config():
    model = compiled(WithoutConfig(lambda x: ops.sin(3 * x)))
    model.predict(ROWS, verbose=0)
    return model, ROWS


class Pair(keras.Model):
    def __init__(self):
        super().__init__()
        self.left, self.right = layers.Dense(2), layers.Dense(3)

    def call(self, inputs):
        return {"left": self.left(inputs["x"]), "both": self.right(inputs["x"] * inputs["z"])}


def subclassed_with_dicts():
    model, x = compiled(Pair()), {"x": ROWS, "z": ROWS[::-1]}
    model.predict(x, verbose=0)
    return model, x


class Tuned(keras.Model):
    """Has an attribute that is set after construction and is not in its config."""

    def __init__(self):
        super().__init__()
        self.gain = 1.0
        self.head = layers.Dense(2)

    def call(self, inputs):
        return self.gain * self.head(inputs)


def subclassed_and_tuned():
    model = compiled(Tuned())
    model.gain = 5.0
    model.predict(ROWS, verbose=0)
    return model, ROWS


class Unregistered(layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 3))

    def call(self, inputs):
        return ops.tanh(inputs @ self.kernel)


def custom_layer():
    inputs = keras.Input((4,))
    return compiled(keras.Model(inputs, layers.Dense(2)(Unregistered()(inputs)))), ROWS


def with_lambda():
    inputs = keras.Input((4,))
    hidden = layers.Lambda(lambda x: x**2)(layers.Dense(3)(inputs))
    return compiled(keras.Model(inputs, layers.Dense(2)(hidden))), ROWS


def with_operations():
    inputs = keras.Input((4,))
    hidden = ops.tanh(layers.Dense(4)(inputs)) * 2 + inputs[:, ::-1]
    return compiled(keras.Model(inputs, layers.Dense(2)(hidden))), ROWS


def convolutions():
    return compiled(
        keras.Sequential(
            [
                keras.Input((8, 8, 3)),
                layers.Conv2D(4, 3, padding="same"),
                layers.BatchNormalization(),
                layers.ReLU(),
                layers.DepthwiseConv2D(3, padding="same"),
                layers.GroupNormalization(2),
                layers.Conv2DTranspose(2, 2, strides=2),
            ]
        )
    ), IMAGES


def recurrent():
    inputs = keras.Input((5, 3))
    hidden = layers.LSTM(4, return_sequences=True, dropout=0.3)(inputs)
    hidden = layers.Bidirectional(layers.GRU(3, return_sequences=True))(hidden)
    return compiled(keras.Model(inputs, layers.TimeDistributed(layers.Dense(2))(hidden))), STEPS


def attention():
    inputs = keras.Input((5, 3))
    hidden = layers.MultiHeadAttention(2, 2, dropout=0.3)(inputs, inputs, use_causal_mask=True)
    return compiled(keras.Model(inputs, layers.Dense(2)(layers.add([hidden, inputs])))), STEPS


def masked_tokens():
    inputs = keras.Input((5,), dtype="int32")
    hidden = layers.Embedding(7, 4, mask_zero=True)(inputs)
    return compiled(keras.Model(inputs, layers.Dense(2)(layers.LSTM(3)(hidden)))), TOKENS


class Postprocessed(keras.Model):
    def predict_step(self, data):
        outputs = super().predict_step(data)
        return {"value": outputs, "square": outputs**2}


def own_predict_step():
    inputs = keras.Input((4,))
    return compiled(Postprocessed(inputs, layers.Dense(2)(inputs))), ROWS


def adapted_normalization():
    normalization = layers.Normalization()
    normalization.adapt(ROWS * 5 + 3)
    return compiled(keras.Sequential([keras.Input((4,)), normalization, layers.Dense(2)])), ROWS


def adapted_vocabulary():
    lookup = layers.StringLookup(output_mode="one_hot")
    lookup.adapt(["a", "b", "b", "c"])
    inputs = keras.Input((1,), dtype="string")
    model = keras.Model(inputs, layers.Dense(2)(lookup(inputs)))
    return compiled(model), tf.constant([["a"], ["b"], ["c"], ["d"]])


def half_precision():
    inputs = keras.Input((4,))
    hidden = layers.Dense(8, "relu", dtype="mixed_float16")(inputs)
    return compiled(keras.Model(inputs, layers.Dense(2, dtype="float32")(hidden))), ROWS


def double_precision():
    inputs = keras.Input((4,), dtype="float64")
    return compiled(keras.Model(inputs, layers.Dense(2, dtype="float64")(inputs))), ROWS


def frozen_layers():
    model, x = sequential()
    model.layers[0].trainable = False
    model.compile("sgd", "mse")
    return model, x


KINDS = [
    sequential,
    nested_with_shared_layers,
    dicts_in_and_out,
    subclassed_with_config,
    subclassed_without_config,
    subclassed_with_dicts,
    subclassed_and_tuned,
    custom_layer,
    with_lambda,
    with_operations,
    convolutions,
    recurrent,
    attention,
    masked_tokens,
    own_predict_step,
    adapted_normalization,
    adapted_vocabulary,
    half_precision,
    double_precision,
    frozen_layers,
]
