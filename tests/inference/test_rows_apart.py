"""Larger batches than Keras's only where each row of a batch is computed on its own."""

import functools

import keras
import numpy as np
import pytest
from keras import layers

from snapshot_ensemble.inference.batch_size import rows_at_once

ROWS, BATCH = 96, 32
VECTOR, STEPS, IMAGE, VIDEO = (6,), (4, 6), (8, 8, 2), (4, 8, 8, 2)


@keras.saving.register_keras_serializable("test_rows_apart")
def over_the_batch(x):
    return x - keras.ops.mean(x, axis=0)


def scaled_over_the_batch(x, scale):
    return scale * over_the_batch(x)


# What each of Keras's layers needs to be made; the others need nothing.
ARGUMENTS = {
    "Dense": (3,),
    "EinsumDense": ("ab,bc->ac", 3),
    "Embedding": (10, 3),
    "Reshape": ((3, 2),),
    "RepeatVector": (2,),
    "Permute": ((2, 1),),
    "Activation": ("tanh",),
    "Dropout": (0.5,),
    "SpatialDropout1D": (0.5,),
    "SpatialDropout2D": (0.5,),
    "SpatialDropout3D": (0.5,),
    "GaussianNoise": (0.5,),
    "GaussianDropout": (0.5,),
    "AlphaDropout": (0.5,),
    "LSTM": (3,),
    "GRU": (3,),
    "SimpleRNN": (3,),
    "RNN": lambda: (layers.StackedRNNCells([layers.LSTMCell(3), layers.GRUCell(2)]),),
    "Bidirectional": lambda: (layers.LSTM(3),),
    "TimeDistributed": lambda: (layers.Dense(3),),
    "MultiHeadAttention": (2, 2),
    "GroupQueryAttention": (2, 2, 1),
    "Rescaling": (0.5, 1.0),
    "Resizing": (4, 4),
    "CenterCrop": (4, 4),
    "Discretization": ([0.0, 1.0],),
    "Hashing": (5,),
    "CategoryEncoding": (3,),
    "GroupNormalization": (2,),
    "Dot": (1,),
    "ConvLSTM1D": (2, 3),
    "ConvLSTM2D": (2, 3),
    "ConvLSTM3D": (2, 3),
    "SpectralNormalization": lambda: (layers.Dense(3),),
    "RandomCrop": (4, 4),
    **{f"Adaptive{kind}Pooling{rank}D": (2,) for kind in ("Average", "Max") for rank in (1, 2, 3)},
    **{f"{kind}{rank}D": (2, 3) for kind in ("Conv", "SeparableConv") for rank in (1, 2, 3)},
    **{f"Conv{rank}DTranspose": (2, 3) for rank in (1, 2, 3)},
    **{f"DepthwiseConv{rank}D": (3,) for rank in (1, 2)},
}
SHAPES = [VECTOR, STEPS, IMAGE, VIDEO]
AXES = [None, -1, 1, 0, -2, -3, -4, [1, -2], [-1, 0], [0, 1]]
# Functions of the user's own, and layers that run others, for inputs of one shape.
OTHERS = {
    "a function": (VECTOR, lambda: layers.Activation(over_the_batch)),
    "a dense function": (VECTOR, lambda: layers.Dense(3, activation=over_the_batch)),
    "a lambda": (VECTOR, lambda: layers.Dense(3, activation=lambda x: x - keras.ops.mean(x, 0))),
    "a partial": (
        VECTOR,
        lambda: layers.Activation(functools.partial(scaled_over_the_batch, scale=2.0)),
    ),
    "a layer": (VECTOR, lambda: layers.Dense(3, activation=layers.Softmax(axis=0))),
    "recurrent": (STEPS, lambda: layers.LSTM(3, recurrent_activation=over_the_batch)),
    "a cell": (STEPS, lambda: layers.RNN(layers.GRUCell(3, activation=over_the_batch))),
    "both ways": (
        STEPS,
        lambda: layers.Bidirectional(layers.LSTM(3, activation=over_the_batch)),
    ),
    "over time": (STEPS, lambda: layers.TimeDistributed(layers.Softmax(axis=-2))),
    "attention": (STEPS, lambda: layers.MultiHeadAttention(2, 2, attention_axes=(0,))),
    "einsum": (STEPS, lambda: layers.EinsumDense("abc,cd->bad", (None, 3))),
    "rescaling": (VECTOR, lambda: layers.Rescaling(np.arange(6.0))),
    "a nested model": (
        VECTOR,
        lambda: keras.Sequential([layers.Dense(3), layers.Softmax(axis=0)]),
    ),
}


def stock_layers():
    for name, kind in sorted(vars(layers).items()):
        if isinstance(kind, type) and issubclass(kind, layers.Layer):
            for axis in AXES:
                axis_argument = {} if axis is None else {"axes" if name == "Dot" else "axis": axis}
                yield name, axis, functools.partial(made, kind, name, axis_argument)


def made(kind, name, axis_argument):
    arguments = ARGUMENTS.get(name, ())
    return kind(*(arguments() if callable(arguments) else arguments), **axis_argument)


def data(shape):
    return np.random.default_rng(1).uniform(0, 2.9, (ROWS, *shape)).astype("float32")


def model_of(make, shape):
    """A model of one layer; None if it cannot be made, or takes no such input."""
    inputs = keras.Input(shape)
    try:
        layer = make()
        merging = layer.__class__.__module__.startswith("keras.src.layers.merging")
        attention = "attention" in layer.__class__.__module__
        twice = attention and not isinstance(layer, layers.Attention | layers.AdditiveAttention)
        if twice:
            outputs = layer(inputs, inputs)
        else:
            outputs = layer([inputs, inputs] if merging or attention else inputs)
        model = keras.Model(inputs, outputs)
        rng = np.random.default_rng(0)
        model.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in model.get_weights()])
        model(data(shape)[:BATCH])
    except Exception:
        return None
    return model


def assert_rows_apart(model, shape):
    x = data(shape)
    whole = model(x)
    parts = [model(x[start : start + BATCH]) for start in range(0, ROWS, BATCH)]
    for one, *others in zip(*map(keras.tree.flatten, (whole, *parts)), strict=True):
        np.testing.assert_allclose(one, np.concatenate(others), rtol=1e-4, atol=1e-5)


@pytest.mark.sampled(5, 3)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("part", range(6))
def test_each_of_keras_layers_and_axes(part, shape):
    large = 0
    for name, axis, make in list(stock_layers())[part::6]:
        model = model_of(make, shape)
        if model is not None and rows_at_once(model) > 32:
            large += 1
            try:
                assert_rows_apart(model, shape)
            except Exception as error:
                raise AssertionError(f"{name}, axis={axis}") from error
    assert large


@pytest.mark.parametrize("kind", OTHERS)
def test_what_works_over_the_batch_keeps_the_batch_size_of_keras(kind):
    shape, make = OTHERS[kind]
    inputs = keras.Input(shape)
    layer = make()
    attention = isinstance(layer, layers.MultiHeadAttention)
    outputs = layer(inputs, inputs) if attention else layer(inputs)
    assert rows_at_once(keras.Model(inputs, outputs)) == 32


KNOWN = [
    (layers.Dense(3, "softmax"), VECTOR),
    (layers.Softmax(axis=-1), STEPS),
    (layers.Softmax(axis=[1, 2]), STEPS),
    (layers.UnitNormalization(axis=1), STEPS),
    (layers.LayerNormalization(axis=[-2, -1]), STEPS),
    (layers.BatchNormalization(), IMAGE),
    (layers.GroupNormalization(2), IMAGE),
    (layers.Normalization(), VECTOR),
    (layers.Concatenate(axis=1), STEPS),
    (layers.Dot(axes=2), STEPS),
    (layers.MultiHeadAttention(2, 2), STEPS),
    (layers.Bidirectional(layers.LSTM(3)), STEPS),
    (layers.RNN(layers.StackedRNNCells([layers.LSTMCell(3), layers.GRUCell(2)])), STEPS),
    (layers.TimeDistributed(layers.Dense(3)), STEPS),
    (layers.EinsumDense("abc,cd->abd", (4, 3)), STEPS),
    (layers.Dense(3, activation=layers.ReLU()), VECTOR),
]


@pytest.mark.parametrize(("layer", "shape"), KNOWN, ids=lambda value: getattr(value, "name", ""))
def test_rows_that_are_known_to_be_apart_get_larger_batches(layer, shape):
    model = model_of(lambda: layer, shape)
    assert rows_at_once(model) > 32
    assert_rows_apart(model, shape)
