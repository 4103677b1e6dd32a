"""Stores weights that training does not change, such as a frozen backbone's, only once on disk.

One file, the base, has all weights; the others have the weights that differ from it.
"""

import math
import os
import pathlib
import tempfile
import zipfile

import keras
import numpy as np

from snapshot_ensemble.storage.array_files import array_headers, read_arrays
from snapshot_ensemble.storage.file_headers import check_weight_file
from snapshot_ensemble.storage.snapshot import SnapshotError, Weights
from snapshot_ensemble.storage.weight_files import load_weights

# If the frozen share of the bytes is lower, each snapshot is a Keras file with all weights.
MIN_FROZEN_SHARE = 0.1


def is_worth_it(model: keras.Model) -> bool:
    """Whether enough of a model's bytes are frozen to store differences."""
    trained, frozen = bytes_of(model)
    return frozen > MIN_FROZEN_SHARE * (trained + frozen)


def bytes_of(model: keras.Model) -> tuple[int, int]:
    """The bytes of a model's trainable weights, and of its other weights."""
    sizes = [0, 0]
    for variable in model.weights:
        size = math.prod(variable.shape) * np.dtype(_plain(variable.dtype)).itemsize
        sizes[not variable.trainable] += size
    return sizes[0], sizes[1]


def _plain(dtype: str) -> str:
    """A dtype of the same size that NumPy has a name for."""
    return "float16" if dtype == "bfloat16" else dtype


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are equal bit for bit."""
    return (
        one.shape == other.shape and one.dtype == other.dtype and one.tobytes() == other.tobytes()
    )


def write_difference(path: str, weights: Weights, base: Weights | None = None) -> None:
    """Writes the weights that differ from the base, or all if there is none."""
    kept = {
        f"weight_{i}": as_bits(own)
        for i, own in enumerate(weights)
        if base is None or not same(own, base[i])
    }
    with open(path, "wb") as file:  # noqa: PTH123  For a path, NumPy adds a suffix.
        np.savez(file, **kept)  # type: ignore[arg-type]  # Names of arrays.


def read_difference(path: str | os.PathLike[str], base: Weights) -> Weights:
    """Reads what `write_difference` wrote; the other weights are the base's arrays, not copies."""
    weights = list(base)
    try:
        expected = {f"weight_{i}": header_of(array) for i, array in enumerate(base)}
        for name, (shape, dtype) in array_headers(path).items():
            if expected.get(name) != (shape, dtype):
                raise ValueError(f"{name} has shape {shape} and dtype {dtype}")
        for name, array in read_arrays(path).items():
            index = int(name.removeprefix("weight_"))
            weights[index] = from_bits(array, base[index].dtype)
    except Exception as error:  # NumPy raises many classes of errors for a damaged file.
        raise SnapshotError(f"'{path}' does not hold weights of this model: {error}") from error
    return weights


def as_bits(array: np.ndarray) -> np.ndarray:
    """The array, or its bits if NumPy cannot store its dtype in a file (bfloat16)."""
    return array.view(f"uint{8 * array.itemsize}") if array.dtype.kind == "V" else array


def header_of(array: np.ndarray) -> tuple[tuple[int, ...], np.dtype]:
    """The shape and dtype that an array has in a file."""
    return array.shape, as_bits(array[:0] if array.ndim else array).dtype


def from_bits(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Restores the array that was passed to `as_bits`, which has this dtype."""
    return array.view(dtype) if dtype.kind == "V" else array


def gives_back(model: keras.Model, path: pathlib.Path, weights: Weights) -> bool:
    """Whether a file of the model's weights gives back these weights bit for bit.

    Layers may save something else than their variables: one with LoRA saves a merged kernel.
    """
    try:
        read = read_base(model, path)
    except SnapshotError:
        return False
    return len(read) == len(weights) and all(map(same, read, weights))


def _read_all(model: keras.Model, path: pathlib.Path) -> Weights:
    blank = [
        np.broadcast_to(np.zeros((), np.dtype(v.dtype)), tuple(v.shape)) for v in model.weights
    ]
    weights = read_difference(path, blank)
    if any(one is other for one, other in zip(weights, blank, strict=True)):
        raise SnapshotError(f"'{path}' does not hold all weights of this model.")
    return weights


def read_base(model: keras.Model, path: pathlib.Path) -> Weights:
    """All weights of a base, which is an `.npz`, `.weights.h5` or `.keras` file."""
    if path.suffix == ".npz":
        return _read_all(model, path)
    if path.suffix != ".keras":
        return load_weights(model, path, foreign=False)
    with tempfile.TemporaryDirectory() as folder:
        try:
            check_weight_file(path)
            with zipfile.ZipFile(path) as archive:
                inside = archive.extract("model.weights.h5", folder)
        except Exception as error:
            raise SnapshotError(f"'{path}' holds no weights: {error}") from error
        return load_weights(model, inside, foreign=False)
