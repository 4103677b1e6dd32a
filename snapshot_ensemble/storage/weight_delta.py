"""Weights that training leaves alone, such as a frozen backbone's, are kept once on disk.

One whole file, the base, has all weights; the others have what differs from it.
"""

import math
import os
import pathlib
import tempfile
import zipfile

import keras
import numpy as np

from snapshot_ensemble.storage.snapshot import SnapshotError, Weights
from snapshot_ensemble.storage.weight_files import load_weights

# Below this share of the bytes, each snapshot is a file of Keras's with all weights.
WORTH = 0.1


def is_worth_it(model: keras.Model) -> bool:
    """Whether a good part of a model's bytes is frozen."""
    trained, frozen = bytes_of(model)
    return frozen > WORTH * (trained + frozen)


def bytes_of(model: keras.Model) -> tuple[int, int]:
    """The bytes of a model's weights, those that are trained and those that are not."""
    sizes = [0, 0]
    for variable in model.weights:
        size = math.prod(variable.shape) * np.dtype(_plain(variable.dtype)).itemsize
        sizes[not variable.trainable] += size
    return sizes[0], sizes[1]


def _plain(dtype: str) -> str:
    """A type of as many bytes that NumPy has a name for."""
    return "float16" if dtype == "bfloat16" else dtype


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are equal to the bit."""
    return (
        one.shape == other.shape and one.dtype == other.dtype and one.tobytes() == other.tobytes()
    )


def write_difference(path: str, weights: Weights, base: Weights) -> None:
    """Writes the weights that are not those of the base."""
    pairs = enumerate(zip(weights, base, strict=True))
    kept = {f"weight_{i}": as_bits(own) for i, (own, old) in pairs if not same(own, old)}
    with open(path, "wb") as file:  # noqa: PTH123  A file, so that NumPy adds no ending.
        np.savez(file, **kept)  # type: ignore[arg-type]  # Names of arrays.


def read_difference(path: str | os.PathLike[str], base: Weights) -> Weights:
    """Reads what `write_difference` wrote, and the rest from the base: the very same arrays."""
    weights = list(base)
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in file.files:
                place = int(name.removeprefix("weight_"))
                found = from_bits(file[name], base[place].dtype)
                if (found.shape, found.dtype) != (base[place].shape, base[place].dtype):
                    raise ValueError(f"{name} is of shape {found.shape} and type {found.dtype}")
                weights[place] = found
    except Exception as error:  # NumPy raises errors of many classes for a broken file.
        raise SnapshotError(f"'{path}' does not hold weights of this model: {error}") from error
    return weights


def as_bits(array: np.ndarray) -> np.ndarray:
    """The array, or its bits if NumPy has no name for its type in a file (bfloat16)."""
    return array.view(f"uint{8 * array.itemsize}") if array.dtype.kind == "V" else array


def from_bits(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array that `as_bits` was given, of this type."""
    return array.view(dtype) if dtype.kind == "V" else array


def read_base(model: keras.Model, path: pathlib.Path) -> Weights:
    """All weights of a base: of a `.weights.h5` file, or of those in a `.keras` file."""
    if path.suffix != ".keras":
        return load_weights(model, path, foreign=False)
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                inside = archive.extract("model.weights.h5", folder)
        except (KeyError, OSError, zipfile.BadZipFile) as error:
            raise SnapshotError(f"'{path}' holds no weights: {error}") from error
        return load_weights(model, inside, foreign=False)
