"""Keras weight files with a model's weights but not its optimizer's slots."""

import ctypes
import gc
import io
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import h5py
import keras

from snapshot_ensemble.keras_compat.layer_graph import all_layers
from snapshot_ensemble.keras_compat.optimizers import optimizers_hidden
from snapshot_ensemble.keras_compat.stateless_call import assignments_kept_apart
from snapshot_ensemble.keras_compat.weights_file import weights_file
from snapshot_ensemble.storage.file_headers import check_weight_file
from snapshot_ensemble.storage.snapshot import SnapshotError, Weights


def save_weights(model: keras.Model, path: str | os.PathLike[str]) -> None:
    """Writes a `.weights.h5` file with only the model's weights."""
    with open(path, "wb") as file:  # noqa: PTH123  As for the other kinds of files.
        file.write(weights_file(model).getbuffer())


def load_weights(
    model: keras.Model, path: str | os.PathLike[str], *, foreign: bool = True
) -> Weights:
    """Reads a Keras weight file into arrays; the model itself does not change, even for a moment.

    Args:
        model: A built model.
        path: The file.
        foreign: Whether the file may belong to another model, and its layout must be checked.
            Keras itself accepts a file with more layers than the model.

    Raises:
        SnapshotError: If the file does not hold the weights of this model.
    """
    try:
        check_weight_file(path, _needed(model))
        with optimizers_hidden():
            if foreign and str(path).endswith(".weights.h5"):
                _check_layout(model, path)
            with assignments_kept_apart():
                # Not through the model's own methods, which its class may override.
                keras.Model.load_weights(model, path)
                return get_weights(model)
    except Exception as error:  # Keras and h5py raise many classes of errors for a damaged file.
        raise SnapshotError(f"'{path}' does not hold weights of this model: {error}") from error


def load_into(model: keras.Model, path: str | os.PathLike[str]) -> None:
    """Reads a weight file directly into the model, with little additional memory.

    Args:
        model: A built model, whose weights are lost if there is an error.
        path: A file of the same model's weights.

    Raises:
        SnapshotError: If the file does not hold the weights of this model.
    """
    try:
        check_weight_file(path, _needed(model))
        with optimizers_hidden():
            keras.Model.load_weights(model, path)
    except Exception as error:  # Keras and h5py raise many classes of errors for a damaged file.
        raise SnapshotError(f"'{path}' does not hold weights of this model: {error}") from error
    refresh_derived_state(model)
    # Reading leaves reference cycles that hold arrays. To search all older objects, too, would take
    # longer than to read a file of some megabytes.
    gc.collect(1)
    if sys.platform == "linux":
        # glibc keeps the freed memory in pieces too small for the next arrays.
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)


def get_weights(model: Any) -> Weights:
    """The weights of a model, in the order of `model.weights`, whatever its class overrides."""
    return [variable.numpy() for variable in model.weights]


def set_weights(model: Any, weights: Sequence[Any]) -> None:
    """Sets the weights of a model or layer, and updates what its layers derive from them.

    A class of the user's may override `set_weights`. What runs the user's model with weights of
    its own has them in the order of that model.
    """
    in_order = getattr(model, "in_model_order", None)
    if in_order is None:
        keras.layers.Layer.set_weights(model, weights)
        refresh_derived_state(model)
        return
    for variable, value in zip(in_order, weights, strict=True):
        variable.assign(value)


def refresh_derived_state(model: Any) -> None:
    """Updates values that layers derive from their weights."""
    for layer in all_layers(model):
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()  # It holds copies of its mean and variance.


def _needed(model: keras.Model) -> int:
    """The most bytes that a file of a model's weights may hold: each number may be a float64."""
    return 8 * sum(math.prod(variable.shape) for variable in model.variables) + 2**16


def _check_layout(model: keras.Model, path: str | os.PathLike[str]) -> None:
    optimizers = {name for name, own in vars(model).items() if isinstance(own, keras.Optimizer)}
    more = {
        name
        for name in _layout(path) - _layout(weights_file(model))
        if name.split("/")[0] not in optimizers
    }
    if more:
        raise ValueError(f"it also holds {', '.join(sorted(more))}")


def _layout(path: str | os.PathLike[str] | io.BytesIO) -> set[str]:
    """The names of the arrays in a file, except for those of optimizers and random seeds."""
    names: set[str] = set()
    with h5py.File(path) as file:
        file.visititems(lambda name, item: names.add(name) if hasattr(item, "shape") else None)
    return {n for n in names if not n.startswith("optimizer/") and "seed_generator" not in n}
