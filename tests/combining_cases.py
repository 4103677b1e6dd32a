"""Logits and member weights for tests of combinations."""

import numpy as np
from keras import ops

SHAPES = [(6, 3), (4, 5, 3), (2, 4, 4, 3)]
UNEQUAL = np.array([0.5, 0.0, 0.1, 0.15, 0.25])


def logits_of(shape, members=5, scale=3.0, seed=0):
    rng = np.random.default_rng(seed)
    return (scale * rng.normal(size=(members, *shape))).astype("float32")


def array(tensor):
    return ops.convert_to_numpy(tensor)
