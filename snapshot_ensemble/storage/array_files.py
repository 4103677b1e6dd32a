"""Reads `.npz` files, which anyone may have written."""

import contextlib
import functools
import math
import os
import zipfile
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from snapshot_ensemble.storage.file_headers import check_entries, open_regular, size_of

Header = tuple[tuple[int, ...], np.dtype]
Result = TypeVar("Result")
_ATTEMPTS = 20


def array_headers(path: str | os.PathLike[str]) -> dict[str, Header]:
    """The shape and dtype of each array; raises `OSError` or `ValueError` for no such file."""
    headers: dict[str, Header] = {}
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        check_entries(archive, size_of(file))
        for entry in archive.infolist():
            shape, dtype = _again_if_parsers_met(functools.partial(_header, archive, entry))
            if dtype.hasobject or math.prod(shape) * dtype.itemsize > entry.file_size:
                raise ValueError(f"{entry.filename} has shape {shape} and dtype {dtype}")
            headers[entry.filename.removesuffix(".npy")] = (shape, dtype)
    return headers


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All arrays of a file by name."""
    with np.load(path, allow_pickle=False) as file:
        return {
            name: _again_if_parsers_met(functools.partial(file.__getitem__, name))
            for name in file.files
        }


def _header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Header:
    with archive.open(entry) as opened:
        version = np.lib.format.read_magic(opened)
        read: Any = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(opened)
    return shape, dtype


def _again_if_parsers_met(read: Callable[[], Result]) -> Result:
    """What `read` returns, which is tried again after a `SystemError`.

    NumPy parses headers with `ast`. Python 3.11 counts how deep it is for all threads together, so
    that it fails if another thread parses at the same time: TensorFlow does while it traces.
    """
    for _ in range(_ATTEMPTS - 1):
        with contextlib.suppress(SystemError):
            return read()
    return read()
