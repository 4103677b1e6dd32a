"""What makes two models different for a run that is resumed."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from snapshot_ensemble.schedules import EqualCycles
from snapshot_ensemble.training.fingerprint import fingerprint


class Lookup(keras.Model):
    """Has a table of numbers among its settings."""

    def __init__(self, table):
        super().__init__()
        self.table, self.head = table, layers.Dense(2)

    def get_config(self):
        return {"table": self.table}

    def call(self, x):
        return self.head(x)


def layers_of(table):
    model = Lookup(table)
    model.compile("sgd", "mse")
    plan = EqualCycles(1, 0.1, 0.0).plan(1)
    return fingerprint(model, plan, 1.0, np.zeros((4, 3)), {})["layers"]


TABLE = np.zeros(2000, "float32")
IN_THE_MIDDLE = np.where(np.arange(2000) == 1000, 1, TABLE).astype("float32")


@pytest.mark.parametrize("convert", [np.asarray, tf.constant])
def test_arrays_among_the_settings_are_compared_by_their_contents(convert):
    assert layers_of(convert(TABLE)) == layers_of(convert(TABLE.copy()))
    assert layers_of(convert(TABLE)) != layers_of(convert(IN_THE_MIDDLE))
    assert layers_of(convert(TABLE)) != layers_of(convert(TABLE.astype("int32")))
    assert layers_of(convert(TABLE)) != layers_of(convert(TABLE.reshape(2, -1)))


@pytest.mark.parametrize("convert", [lambda words: np.asarray(words, object), tf.constant])
def test_so_are_words(convert):
    assert layers_of(convert(["red", "green"])) == layers_of(convert(["red", "".join("green")]))
    assert layers_of(convert(["red", "green"])) != layers_of(convert(["red", "blue"]))


def test_other_objects_are_compared_by_their_class():
    assert layers_of(object()) == layers_of(object())
    assert layers_of(object()) != layers_of(print)
