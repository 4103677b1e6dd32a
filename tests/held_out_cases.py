"""Targets and models for tests of held-out data."""

import keras
import numpy as np
from keras import layers
from models import eager, pool_of

from snapshot_ensemble.evaluation.gathering import gather
from snapshot_ensemble.inference.member_pool import PredictArguments

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(11, 4)).astype("float32")
LABELS = np.arange(11) * 7 % 3


def gathered(ens, x, y=None, sample_weight=None, **options):
    arguments = PredictArguments(**{"verbose": 0, **options})
    return gather(pool_of(ens), x, y, sample_weight, arguments)


PIXELS = RNG.integers(0, 3, (2, 4, 5))
YES = RNG.integers(0, 2, (11, 3))


def two_headed(structure, **arguments):
    inputs = keras.Input((4,))
    kind = layers.Dense(3, "softmax", name="kind")(inputs)
    amount = layers.Dense(2, name="amount")(inputs)
    outputs = {"kind": kind, "amount": amount} if structure is dict else [kind, amount]
    loss = {"kind": "sparse_categorical_crossentropy", "amount": "mse"}
    return eager(keras.Model(inputs, outputs), loss, **arguments)


AMOUNTS = RNG.normal(size=(11, 2))
BY_NAME = {"kind": LABELS, "amount": AMOUNTS}
