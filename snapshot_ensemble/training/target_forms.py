"""Targets in the form that a compiled loss takes, and checks that they fit the model's output."""

import functools
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.inference.losses import per_output
from snapshot_ensemble.inference.output_specs import known_outputs, names_of, read_outputs
from snapshot_ensemble.inference.task_words import Output

# Losses that take a label as an integer. Keras chooses by shape for the last two.
_OF_INTEGERS = (
    keras.losses.sparse_categorical_crossentropy,
    keras.losses.SparseCategoricalCrossentropy,
    "crossentropy",
    "ce",
)


def encode_classes(model: keras.Model, task: Any, x: np.ndarray, classes: int) -> Any:
    """How the compiled loss takes class numbers: as integers, one-hot or as a 0-1 column.

    Losses of the user's own take them one-hot, in one column for each class.

    Args:
        model: A compiled model.
        task: As for `SnapshotEnsemble`.
        x: Rows of inputs.
        classes: The number of classes.

    Returns:
        A function that turns an array of class numbers into targets.

    Raises:
        ValueError: If the model has another number of outputs than there are classes, or none that
            are classes.
    """
    outputs, meaning = _only_output(model, task, x)
    if not meaning.is_classes:
        raise ValueError(
            "The model of a classifier must output classes. Received: loss="
            f"{model.loss!r}, which is for values. End the model with a softmax or a sigmoid, or "
            "compile it with a cross-entropy."
        )
    units = outputs.shape[-1]
    is_column = meaning.task == "binary"
    if units != (1 if is_column else classes) or (is_column and classes != 2):
        raise ValueError(
            "The model must have one output for each class, or one sigmoid for two classes. "
            f"Received: {classes} classes and an output of shape {tuple(outputs.shape)}. The model "
            "function gets `y` with one column for each class: `y.shape[1]` is their number."
        )
    if is_column:
        return _as_column
    losses = per_output(model.loss, outputs, names_of(model, outputs))[0]
    if any(_takes_integers(loss) for loss in losses):
        return _as_integers
    return functools.partial(one_hot, classes=classes)


def check_values(model: keras.Model, task: Any, x: np.ndarray, columns: int) -> None:
    """Checks that a model outputs values, one for each column of the targets.

    Args:
        model: A compiled model.
        task: As for `SnapshotEnsemble`.
        x: Rows of inputs.
        columns: The number of columns of the targets.

    Raises:
        ValueError: If it has another number of outputs, or outputs classes.
    """
    outputs, meaning = _only_output(model, task, x)
    if meaning.is_classes:
        raise ValueError(
            f"The model of a regressor must output values. Received: loss={model.loss!r}, which is "
            "for classes. Compile the model with a loss such as 'mse', or use a classifier."
        )
    if meaning.is_gaussian:
        raise ValueError(
            "A regressor of scikit-learn predicts values, and this model predicts a mean and a "
            f"log-variance. Received: loss={model.loss!r}. Use `SnapshotEnsemble` itself."
        )
    if outputs.shape[-1] != columns:
        raise ValueError(
            "The model must have one output for each column of `y`. Received: "
            f"{columns} columns and an output of shape {tuple(outputs.shape)}. The model function "
            "gets `y` in two dimensions: `y.shape[1]` is the number of columns."
        )


def _only_output(model: keras.Model, task: Any, x: np.ndarray) -> tuple[Any, Output]:
    outputs = known_outputs(model)
    if outputs is None:
        outputs = model(x[:1], training=False)
    flat = keras.tree.flatten(outputs)
    if len(flat) != 1 or len(flat[0].shape) != 2:
        shapes = [tuple(tensor.shape) for tensor in flat]
        raise ValueError(
            "The model must have one output, with one row for each row of the data. "
            f"Received: outputs of shapes {shapes}. Use `SnapshotEnsemble` itself for other models."
        )
    [meaning] = read_outputs(model, task, outputs)
    return flat[0], meaning


def _takes_integers(loss: Any) -> bool:
    if isinstance(loss, functools.partial):
        return _takes_integers(loss.func)
    if isinstance(loss, str):
        loss = loss.lower() if loss.lower() in _OF_INTEGERS else keras.losses.get(loss)
    if isinstance(loss, keras.losses.Loss):
        loss = type(loss)
    kinds = loss.__mro__ if isinstance(loss, type) else (loss,)
    return any(kind in _OF_INTEGERS for kind in kinds)


def _as_integers(codes: np.ndarray) -> np.ndarray:
    return np.asarray(codes, "int32")


def _as_column(codes: np.ndarray) -> np.ndarray:
    return np.asarray(codes, "float32")[:, None]


def one_hot(codes: np.ndarray, classes: int) -> np.ndarray:
    """Class numbers as rows of zeros with a one in the column of the class.

    Args:
        codes: Class numbers, from 0.
        classes: The number of classes.

    Returns:
        An array of float32 of shape `(len(codes), classes)`.
    """
    return np.eye(classes, dtype="float32")[codes]
