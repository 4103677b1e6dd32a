"""Checks of files that anyone may have written, from their headers, before their data are read.

The files that this package and Keras write are not compressed. So no file needs more memory than
it has bytes, and one that claims to is refused. Each check raises `OSError` or `ValueError`.
"""

import io
import math
import os
import stat
import zipfile
from typing import Any

import h5py

# What Keras writes for optimizers is not read.
_UNREAD = ("optimizer/", "optimizer_weights/")


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Opens a file to be read; raises `OSError` for a pipe, a device or a directory."""
    # Opening a pipe would wait for somebody to write to it.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(f"'{os.fspath(path)}' is not a regular file")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def size_of(file: io.BufferedReader) -> int:
    """The size of an open file in bytes."""
    return os.fstat(file.fileno()).st_size


def read_at_most(path: str | os.PathLike[str], limit: int) -> bytes:
    """The contents of a regular file; raises `OSError` if it has more bytes than the limit."""
    with open_regular(path) as file:
        if size_of(file) > limit:
            raise OSError(f"it has {size_of(file)} bytes, more than the {limit} that are read")
        return file.read(limit)


def check_weight_file(path: str | os.PathLike[str], needed: int | None = None) -> None:
    """Checks a Keras file of weights or of a model.

    Args:
        path: The file.
        needed: The most bytes that its weights may take; None if that is not known.
    """
    with open_regular(path) as file:
        size = size_of(file)
        limit = size if needed is None else min(size, needed)
        if str(path).endswith((".h5", ".hdf5")):
            _check_data_sets(file, limit)
        elif str(path).endswith(".keras"):
            with zipfile.ZipFile(file) as archive:
                check_entries(archive, size)
                with archive.open("model.weights.h5") as weights:
                    _check_data_sets(weights, limit)


def check_entries(archive: zipfile.ZipFile, size: int) -> None:
    """Checks the entries of an archive of this many bytes."""
    entries = archive.infolist()
    total = sum(entry.file_size for entry in entries)
    if total > size:
        raise ValueError(f"its entries have {total} bytes, but the file has {size}")
    if len({entry.filename for entry in entries}) < len(entries):
        raise ValueError("it has two entries of the same name")


def _check_data_sets(file: Any, limit: int) -> None:
    """Raises `ValueError` unless the data sets of an HDF5 file are plain and within a limit."""
    total = 0

    def is_soft(name: str, link: Any) -> str | None:
        return None if isinstance(link, h5py.HardLink) else name

    def add(name: str, item: Any) -> None:
        nonlocal total
        if isinstance(item, h5py.Dataset):
            _check_storage(name, item)
            if not name.startswith(_UNREAD):
                values = max(item.size or 0, math.prod(item.chunks or (0,)))
                total += values * item.dtype.itemsize

    with h5py.File(file, "r") as opened:
        # An exception in the function would be lost.
        if (name := opened.visititems_links(is_soft)) is not None:
            raise ValueError(f"{name!r} is a link to another file or place")
        opened.visititems(add)
    if total > limit:
        raise ValueError(f"its data sets take {total} bytes, more than the {limit} that they may")


def _check_storage(name: str, item: Any) -> None:
    if item.external or item.is_virtual:
        raise ValueError(f"the data of {name!r} are in another file")
    if item.dtype.hasobject or item.id.get_create_plist().get_nfilters():
        raise ValueError(f"{name!r} is compressed or has values of no fixed size")
