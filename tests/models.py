"""Models, members of given weights, and data that several test files use."""

import collections
import math

import keras
import numpy as np
import tensorflow as tf

from snapshot_ensemble import Snapshot, SnapshotEnsemble
from snapshot_ensemble.inference.task_words import Output

layers = keras.layers

# Arguments of `dense` for each task, and the combinations that make sense for it.
TASKS = {
    "softmax": ("sparse_categorical_crossentropy", 3, "softmax"),
    "logits": (keras.losses.SparseCategoricalCrossentropy(from_logits=True), 3, None),
    "sigmoid": ("binary_crossentropy", 1, "sigmoid"),
    "log-odds": (keras.losses.BinaryCrossentropy(from_logits=True), 1, None),
    "multilabel": ("binary_crossentropy", 3, "sigmoid"),
    "regression": ("mse", 2, None),
}
COMBINATIONS = [
    (task, combine)
    for task in TASKS
    for combine in ("mean", "vote", "weighted", "geometric", "median")
    if combine not in (("vote", "geometric") if task == "regression" else ("median",))
]


# What outputs mean.
MULTICLASS, MULTICLASS_LOGITS = Output("multiclass"), Output("multiclass", logits=True)
BINARY, BINARY_LOGITS = Output("binary"), Output("binary", logits=True)
MULTILABEL, MULTILABEL_LOGITS = Output("multilabel"), Output("multilabel", logits=True)
REGRESSION = Output("regression")
# Of each task of classes: what probabilities mean, and what logits do.
TWINS = {
    "multiclass": (MULTICLASS, MULTICLASS_LOGITS),
    "binary": (BINARY, BINARY_LOGITS),
    "multilabel": (MULTILABEL, MULTILABEL_LOGITS),
}


class SimulatedCrashError(Exception):
    """What tests raise to interrupt a run."""


# Members


def pool_of(ens):
    """The members of an ensemble as the package's own modules see them; here and nowhere else."""
    return ens._pool


def add_members(ens, members):
    """Adds members of these weights to an ensemble in memory, oldest first, and returns it."""
    dtypes = [array.dtype for array in ens.model.get_weights()]
    for index, weights in enumerate(members, start=len(ens)):
        arrays = [np.asarray(array, dtype) for array, dtype in zip(weights, dtypes, strict=True)]
        pool_of(ens).store.add_weights(arrays, Snapshot(index))
    return ens


def ensemble_with(model, *members, **arguments):
    """An ensemble of members of these weights."""
    return add_members(SnapshotEnsemble(model, **arguments), members)


def member_weights(ens):
    """The weights of each member, in the order of `model.weights`; no model is built."""
    return pool_of(ens).now().weights(range(len(ens)))


def ensemble_of(model, count=3, *, shared=lambda variable: False, **arguments):
    """An ensemble of members with random weights, except for `shared` ones."""
    rng = np.random.default_rng(0)
    own = model.get_weights()
    members = [
        [
            # Positive where it is a variance, and small enough to keep outputs apart.
            array
            if shared(v)
            else np.abs(rng.normal(0, 0.5, array.shape)).astype(array.dtype)
            if "variance" in v.name
            else rng.normal(0, 0.5, array.shape).astype(array.dtype)
            for v, array in zip(model.weights, own, strict=True)
        ]
        for _ in range(count)
    ]
    return ensemble_with(model, *members, **arguments)


def same(left, right):
    """Whether two nested lists of arrays are equal bit for bit."""
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return np.array_equal(left, right)


def assert_same(left, right):
    """Two nested lists of arrays are equal bit for bit."""
    if isinstance(left, list):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        np.testing.assert_array_equal(left, right, strict=True)


def assert_close(actual, expected, tolerance=1e-5):
    """Two arrays are equal up to rounding."""
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def assert_all_close(actual, expected, tolerance=1e-5):
    """Two structures of arrays are alike, and their arrays equal up to rounding."""
    keras.tree.assert_same_structure(actual, expected)
    for one, other in zip(keras.tree.flatten(actual), keras.tree.flatten(expected), strict=True):
        assert_close(one, other, tolerance)


# Models


def eager(model, loss=None, **arguments):
    """Compiled to run without tracing, which takes longer than small data do."""
    model.compile("sgd", model.loss if loss is None else loss, run_eagerly=True, **arguments)
    return model


def compiled(model, loss="sparse_categorical_crossentropy", **arguments):
    model.compile("sgd", loss, **arguments)
    return model


def classifier(optimizer="sgd", inside=(), **arguments):
    """A dense classifier of four features, compiled; `inside`: layers before its head."""
    model = keras.Sequential([keras.Input((4,)), *inside, layers.Dense(3, "softmax")])
    # Eager: a few steps of a small model are done before a graph would be traced.
    arguments = {
        "loss": "sparse_categorical_crossentropy",
        "metrics": ["accuracy"],
        "run_eagerly": True,
        **arguments,
    }
    model.compile(optimizer, **arguments)
    return model


def dense(
    loss="sparse_categorical_crossentropy", units=3, activation="softmax", **compile_arguments
):
    """A dense Functional model, compiled."""
    inputs = keras.Input((4,), name="features")
    hidden = layers.Dense(6, "tanh")(inputs)
    model = keras.Model(inputs, layers.Dense(units, activation, name="answer")(hidden))
    model.compile("sgd", loss, **compile_arguments)
    return model


def dense_outputs(weights, x):
    """What `dense` gives before its last activation, in float64."""
    kernel, bias, head, shift = (np.asarray(array, "float64") for array in weights)
    return np.tanh(x @ kernel + bias) @ head + shift


def with_backbone(nested, trainable=False):
    """A convolutional backbone with a skip past its border, and a head of 5 x 4 weights.

    Returns the model, and whether a variable is the backbone's.
    """
    inputs = keras.Input((6, 6, 3), name="image")
    body = keras.Input((6, 6, 3)) if nested else inputs
    early = layers.Conv2D(4, 3, padding="same", activation="relu", name="back_conv")(body)
    late = layers.Conv2D(4, 3, padding="same", name="back_late")(early)
    late = layers.BatchNormalization(name="back_norm")(late)
    late = layers.Add()([early, late])
    if nested:
        backbone = keras.Model(body, [early, late], name="backbone")
        early, late = backbone(inputs, training=False)
    mixed = layers.Add()([early, keras.ops.relu(late)])
    pooled = layers.Dropout(0.5)(layers.GlobalAveragePooling2D()(mixed))
    model = keras.Model(inputs, layers.Dense(4, "softmax", name="head")(pooled))
    for layer in model._flatten_layers():
        if "back" in layer.name:
            layer.trainable = trainable
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model, lambda variable: "back_" in variable.path


# Data


def three_classes(rows=32, features=4):
    """Rows of numbers, and which of the first three is the largest."""
    x = np.random.default_rng(0).normal(size=(rows, features)).astype("float32")
    return x, np.argmax(x[:, :3], axis=1)


def scaled_digits(rows=None):
    """Scikit-learn's images of digits, as rows of numbers from 0 to 1, and their labels."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return (x[:rows] / 16).astype("float32"), y[:rows]


def one_batch(*columns):
    """Data that Keras takes as they are, where it would trace a pipeline for arrays."""
    return tf.data.Dataset.from_tensors(columns if len(columns) > 1 else columns[0])


def sliced(*columns):
    """A dataset of batches of five rows."""
    return tf.data.Dataset.from_tensor_slices(columns if len(columns) > 1 else columns[0]).batch(5)


class Batches(keras.utils.PyDataset):
    """Counts how often each of its batches is asked for."""

    def __init__(self, *columns, size=5):
        super().__init__()
        self.columns, self.size, self.asked = columns, size, collections.Counter()

    def __len__(self):
        return math.ceil(len(self.columns[0]) / self.size)

    def __getitem__(self, index):
        self.asked[index] += 1
        rows = slice(index * self.size, (index + 1) * self.size)
        return tuple(column[rows] for column in self.columns)
