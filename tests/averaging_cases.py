"""Data, models and reference means for tests of weight averaging."""

import keras
import numpy as np
from keras import layers
from models import compiled, dense_outputs

RNG = np.random.default_rng(0)
ROWS = RNG.normal(3, 2, size=(23, 4)).astype("float32")
LABELS = RNG.integers(0, 3, len(ROWS))
IMAGES = RNG.normal(1, 2, size=(10, 6, 6, 2)).astype("float32")


def mean_by_hand(members):
    return [np.mean(arrays, axis=0, dtype="float64") for arrays in zip(*members, strict=True)]


def normalization(model):
    """The only batch-normalisation layer of a model."""
    (layer,) = [x for x in model._flatten_layers() if isinstance(x, layers.BatchNormalization)]
    return layer


def statistics(model):
    layer = normalization(model)
    return layer.moving_mean.numpy(), layer.moving_variance.numpy()


def normalized_input(**arguments):
    model = keras.Sequential(
        [keras.Input((4,)), layers.BatchNormalization(**arguments), layers.Dense(3, "softmax")]
    )
    return compiled(model, metrics=["accuracy"])


def teacher(seed=0):
    """Weights of `dense()`, and the classes that they predict for `ROWS`."""
    rng = np.random.default_rng(seed)
    shapes = [(4, 6), (6,), (6, 3), (3,)]
    weights = [rng.normal(0, 1, shape).astype("float32") for shape in shapes]
    return weights, dense_outputs(weights, ROWS).argmax(axis=1)


def turned(weights):
    """Other weights of the same function, since tanh is odd."""
    kernel, bias, head, shift = weights
    return [-kernel, -bias, -head, shift]
