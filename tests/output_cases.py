"""Models and losses for tests of inferred tasks."""

import keras
import numpy as np
from keras import ops
from keras.layers import (
    Dense,
)
from models import MULTICLASS

from snapshot_ensemble.inference.output_specs import read_outputs
from snapshot_ensemble.inference.task_words import Output


def custom_loss(y_true, y_pred):
    return ops.mean(ops.square(y_true - y_pred))


def ending_in(last, loss, shape=(4,)):
    """A compiled model with `last` as its only layer."""
    inputs = keras.Input(shape)
    model = keras.Model(inputs, last(inputs))
    model.compile("sgd", loss)
    return model


def meanings(model, task=None):
    return read_outputs(model, task, model(np.zeros((2, *model.input_shape[1:]), "float32")))


def meaning(last, loss, task=None, shape=(4,)):
    [output] = meanings(ending_in(last, loss, shape), task)
    return output


def two_outputs(losses, structure=list, activations=("softmax", None)):
    """Three classes named `kind` and one value named `amount`."""
    inputs = keras.Input((4,))
    kind = Dense(3, activations[0], name="kind")(inputs)
    amount = Dense(1, activations[1], name="amount")(inputs)
    outputs = {"kind": kind, "amount": amount} if structure is dict else [kind, amount]
    model = keras.Model(inputs, outputs if structure is dict else structure(outputs))
    model.compile("sgd", losses)
    return model


IN_LISTS = [MULTICLASS, Output("regression")]
IN_DICTS = IN_LISTS[::-1]  # `keras.tree.flatten` sorts by key.
