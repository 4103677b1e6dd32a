"""Ensembles for tests of prediction, and reference combinations in float64."""

import collections

import keras
import numpy as np
from keras import layers
from scipy import special


def to_probabilities(outputs, task, logits=True):
    """The probabilities (or values) that outputs stand for, in float64."""
    outputs = np.asarray(outputs, "float64")
    if not logits:
        return outputs
    return special.softmax(outputs, axis=-1) if task == "multiclass" else special.expit(outputs)


def log_mean(log_stack, weights=None):
    """The logarithm of the (weighted) mean over members."""
    weights = np.full(len(log_stack), 1 / len(log_stack)) if weights is None else weights
    weights = np.reshape(weights, (-1,) + (1,) * (log_stack.ndim - 1))
    return special.logsumexp(log_stack, axis=0, b=weights)


def mean_logits(logits, task, weights=None):
    """The logits whose probabilities are the mean of the members' probabilities."""
    logits = np.asarray(logits, "float64")
    if task == "multiclass":
        return log_mean(special.log_softmax(logits, axis=-1), weights)
    yes, no = special.log_expit(logits), special.log_expit(-logits)
    return log_mean(yes, weights) - log_mean(no, weights)


def average(stack, weights=None):
    return np.average(np.asarray(stack, "float64"), axis=0, weights=weights)


MEMBERS = 4
RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(23, 4)).astype("float32")

Kind = collections.namedtuple("Kind", "task logits loss units activation")
KINDS = {
    "softmax": Kind("multiclass", False, "sparse_categorical_crossentropy", 3, "softmax"),
    "softmax logits": Kind(
        "multiclass", True, keras.losses.SparseCategoricalCrossentropy(from_logits=True), 3, None
    ),
    "sigmoid": Kind("binary", False, "binary_crossentropy", 1, "sigmoid"),
    "log-odds": Kind("binary", True, keras.losses.BinaryCrossentropy(from_logits=True), 1, None),
    "labels": Kind("multilabel", False, "binary_crossentropy", 3, "sigmoid"),
    "log-odds of labels": Kind(
        "multilabel", True, keras.losses.BinaryCrossentropy(from_logits=True), 3, None
    ),
    "values": Kind("regression", False, "mse", 2, None),
}

LABELS = np.random.default_rng(2).integers(0, 3, len(ROWS))


def named_outputs(structure):
    inputs = keras.Input((4,))
    kind = layers.Dense(3, "softmax", name="kind")(inputs)
    amount = layers.Dense(2, name="amount")(inputs)
    outputs = {"kind": kind, "amount": amount} if structure is dict else [kind, amount]
    model = keras.Model(inputs, outputs)
    model.compile(
        "sgd",
        {"amount": "mse", "kind": "sparse_categorical_crossentropy"},
        loss_weights={"amount": 0.5, "kind": 2.0},
        metrics={"amount": ["mae"], "kind": ["accuracy"]},
    )
    return model
