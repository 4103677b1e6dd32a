"""Kinds of data: what `fit`, `predict` and `evaluate` must give for them, taken from Keras."""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kinds.kind import BATCH, EPOCHS, RNG, ROWS, Recorder, built, combined, plain_copy
from kinds.operations import assert_scores_alike
from kinds.verdicts import Operation, Skip, assert_alike, assert_bitwise
from snapshot_ensemble.inference.graphs import Graphs

QUIET = {"verbose": 0}
STEPS = ROWS // BATCH
ROW_WEIGHTS = RNG.uniform(0.1, 2, ROWS).astype("float32")


@dataclasses.dataclass(frozen=True)
class Data:
    """A kind of data; functions that make it anew from arrays, each time it is read.

    Attributes:
        name: What it is.
        fit: Arguments of `fit` for inputs and targets.
        evaluate: Arguments of `evaluate`, or None: it is for `fit` alone.
        predict: Arguments of `predict` for inputs, or None.
        only_one_input: Whether it cannot hold a structure of arrays.
    """

    name: str
    fit: Callable[[Any, Any], dict[str, Any]]
    evaluate: Callable[[Any, Any], dict[str, Any]] | None = None
    predict: Callable[[Any], dict[str, Any]] | None = None
    only_one_input: bool = False


def mapped(function):
    return lambda structure: keras.tree.map_structure(function, structure)


def arrays(x, y):
    return {"x": x, "y": y, "batch_size": BATCH}


def with_arguments(**more):
    return lambda x, y: arrays(x, y) | more


def converted(function):
    """Data whose arrays are each converted."""
    convert = mapped(function)
    return {
        "fit": lambda x, y: arrays(convert(x), convert(y)),
        "evaluate": lambda x, y: arrays(convert(x), convert(y)),
        "predict": lambda x: {"x": convert(x), "batch_size": BATCH},
    }


def dataset(*parts):
    return tf.data.Dataset.from_tensor_slices(parts).batch(BATCH)


def inputs_alone(x):
    return tf.data.Dataset.from_tensor_slices((x,)).batch(BATCH)


def of_unknown_length(made):
    # Filters lose the length.
    return made.filter(lambda *_: True)


class Batches(keras.utils.PyDataset):
    """Arrays in batches."""

    def __init__(self, *parts, **arguments):
        super().__init__(**arguments)
        self.parts = parts

    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        rows = slice(index * BATCH, (index + 1) * BATCH)
        return keras.tree.map_structure(lambda array: array[rows], self.parts)


def generated(*parts):
    """A generator without an end."""
    batches = Batches(*parts)
    while True:
        for index in range(STEPS):
            yield batches[index]


def frame(array):
    import pandas

    return pandas.DataFrame(array) if array.ndim == 2 else pandas.Series(array)


DATA = [
    Data("NumPy", **converted(np.asarray)),
    Data("tf.Tensor", **converted(tf.constant)),
    Data("pandas", **converted(frame), only_one_input=True),
    Data(
        "tf.data",
        lambda x, y: {"x": dataset(x, y)},
        lambda x, y: {"x": dataset(x, y)},
        lambda x: {"x": inputs_alone(x)},
    ),
    Data(
        "tf.data, shuffled",
        lambda x, y: {"x": dataset(x, y).unbatch().shuffle(ROWS, seed=3).batch(BATCH)},
    ),
    Data(
        "tf.data, unknown length",
        lambda x, y: {"x": of_unknown_length(dataset(x, y))},
        lambda x, y: {"x": of_unknown_length(dataset(x, y))},
        lambda x: {"x": of_unknown_length(inputs_alone(x))},
    ),
    Data(
        "tf.data, repeated, steps",
        lambda x, y: {"x": dataset(x, y).repeat(), "steps_per_epoch": STEPS},
        lambda x, y: {"x": dataset(x, y).repeat(), "steps": STEPS},
        lambda x: {"x": inputs_alone(x).repeat(), "steps": STEPS},
    ),
    Data(
        "tf.data, sample weights",
        lambda x, y: {"x": dataset(x, y, ROW_WEIGHTS)},
        lambda x, y: {"x": dataset(x, y, ROW_WEIGHTS)},
    ),
    Data(
        "PyDataset",
        lambda x, y: {"x": Batches(x, y)},
        lambda x, y: {"x": Batches(x, y)},
        lambda x: {"x": Batches(x)},
    ),
    Data("PyDataset, two workers", lambda x, y: {"x": Batches(x, y, workers=2)}),
    Data(
        "generator",
        lambda x, y: {"x": generated(x, y), "steps_per_epoch": STEPS},
        lambda x, y: {"x": generated(x, y), "steps": STEPS},
        lambda x: {"x": generated(x), "steps": STEPS},
    ),
    Data(
        "sample_weight",
        with_arguments(sample_weight=ROW_WEIGHTS),
        with_arguments(sample_weight=ROW_WEIGHTS),
    ),
    Data("class_weight", with_arguments(class_weight={0: 1.0, 1: 2.0, 2: 0.5})),
    Data("validation_split", with_arguments(validation_split=0.25)),
    Data("validation_data", lambda x, y: arrays(x, y) | {"validation_data": (x, y)}),
    Data(
        "validation_data, weighted",
        lambda x, y: arrays(x, y) | {"validation_data": (x, y, ROW_WEIGHTS)},
    ),
    Data(
        "validation_data, tf.data",
        lambda x, y: arrays(x, y) | {"validation_data": dataset(x, y), "validation_freq": 2},
    ),
    Data("shuffle=False", with_arguments(shuffle=False)),
    Data("steps_per_epoch", with_arguments(steps_per_epoch=2)),
    Data("an incomplete batch", lambda x, y: arrays(x, y) | {"batch_size": 7}),
]


class DataCase:
    """One kind of data for one kind of model.

    Args:
        case: The `Case` of the model.
        data: A `Data`.
    """

    def __init__(self, case, data):
        self.case, self.data, self.kind = case, data, case.kind
        is_structure = keras.tree.is_nested(self.kind.x) or keras.tree.is_nested(self.kind.y)
        self.is_possible = not (data.only_one_input and is_structure)
        if data.name == "pandas":
            self.is_possible &= importlib.util.find_spec("pandas") is not None
        if "weight" in data.name:
            self.is_possible &= not keras.tree.is_nested(self.kind.y)

    def arguments(self, method):
        make = getattr(self.data, method)
        if make is None or not self.is_possible:
            raise Skip("there are no such data")
        data = (self.kind.x,) if method == "predict" else (self.kind.trained_on, self.kind.y)
        return make(*data) | QUIET

    def plain_fit(self):
        model, recorder = built(self.kind), Recorder()
        arguments = self.arguments("fit") | {"epochs": EPOCHS, "callbacks": [recorder]}
        history = model.fit(**arguments)
        return recorder.weights, history.history

    def fit(self):
        ens, recorder = self.case.ensemble(), Recorder()
        arguments = self.arguments("fit") | {"epochs": EPOCHS, "callbacks": [recorder]}
        history = dict(ens.fit(**arguments).history)
        del history["learning_rate"], history["cycle"]
        return recorder.weights, history

    def plain_predictions(self):
        outputs = [
            plain_copy(self.kind, weights).predict(**self.arguments("predict"))
            for weights in self.case.weights
        ]
        return combined(self.kind.meaning, outputs)

    def plain_scores(self):
        model = plain_copy(self.kind, self.case.weights[-1])
        return model.evaluate(**self.arguments("evaluate"), return_dict=True)

    def scores(self):
        # A model of Keras's, too, can only be evaluated on targets of one rank, until it is
        # compiled again: pandas gives a column.
        self.case.ens._pool._cache.graphs = Graphs()
        return self.case.ens.evaluate(**self.arguments("evaluate"), members=[-1], return_dict=True)


DATA_OPERATIONS = [
    Operation("fit", DataCase.plain_fit, DataCase.fit, assert_bitwise),
    Operation(
        "predict",
        DataCase.plain_predictions,
        lambda c: c.case.ens.predict(**c.arguments("predict")),
        assert_alike,
    ),
    Operation("evaluate", DataCase.plain_scores, DataCase.scores, assert_scores_alike),
]
