"""Files that are written completely or not at all, and whose contents are verified."""

import dataclasses
import hashlib
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

from snapshot_ensemble.storage.file_headers import open_regular, size_of
from snapshot_ensemble.storage.file_names import checked_name, temporary
from snapshot_ensemble.storage.snapshot import SnapshotError
from snapshot_ensemble.storage.typed_json import Count

# Windows refuses to replace a file that a reader has open: try again after these seconds.
_IS_WINDOWS = os.name == "nt"
_WAITS = (0.01, 0.05, 0.2, 1.0, 2.0)


def _digest(text: str, field: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise ValueError(f"`{field}` must be 64 hexadecimal digits. Received: {field}={text!r}")
    return text


@dataclasses.dataclass(frozen=True)
class File:
    """A file in a directory, with the size and hash that it was written with."""

    name: Annotated[str, checked_name]
    size: Count
    sha256: Annotated[str, _digest]

    @property
    def number(self) -> int:
        """The number in its name: files are numbered as they are written."""
        return int(self.name.split("-")[1].split(".")[0])

    def checked(self, directory: pathlib.Path) -> pathlib.Path:
        """Its path; raises `SnapshotError` if its contents have changed."""
        path = directory / self.name
        try:
            with open_regular(path) as opened:
                # A file of another size, which may be huge, is not read.
                found = f"{size_of(opened)} bytes"
                if size_of(opened) == self.size:
                    found += f" with SHA-256 {hashlib.file_digest(opened, 'sha256').hexdigest()}"
        except OSError as error:
            raise SnapshotError(f"'{path}' cannot be read: {error}") from error
        expected = f"{self.size} bytes with SHA-256 {self.sha256}"
        if found != expected:
            raise SnapshotError(
                f"'{path}' differs from the file that was saved. Received: {found}; "
                f"expected {expected}"
            )
        return path


class Draft:
    """A file that is being written: to a temporary name first, then renamed.

    Args:
        directory: The directory.
        name: The file's name in it.
        write: Takes a path, and writes the contents to it.
    """

    def __init__(self, directory: pathlib.Path, name: str, write: Callable[[str], Any]) -> None:
        self.name = name
        self._path, self._write = directory / name, write
        self._temporary = directory / temporary(name)
        self._written = False
        self._file: File | None = None

    def write(self) -> "Draft":
        """Writes the contents now, before what they are made from changes."""
        try:
            self._write(str(self._temporary))
        except BaseException:
            self.discard()
            raise
        self._written = True
        return self

    def discard(self) -> None:
        """Removes the temporary file."""
        self._temporary.unlink(missing_ok=True)

    @property
    def path(self) -> pathlib.Path:
        """Where the contents are now."""
        return self._path if self._file is not None else self._temporary

    def checked(self, directory: pathlib.Path) -> pathlib.Path:
        """Its path, once it is in place; raises `SnapshotError` if that failed."""
        if self._file is None:
            raise SnapshotError(f"'{self._path}' could not be written.")
        return self._file.checked(directory)

    def put(self) -> File:
        """Flushes the contents to disk and renames the file; does nothing more if called again."""
        if self._file is not None:
            return self._file
        if not self._written:
            self.write()
        try:
            # Windows flushes only files that are open for writing.
            with self._temporary.open("r+b") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                size = os.fstat(file.fileno()).st_size
                flush(file.fileno())
            _replace(self._temporary, self._path)
        except BaseException:
            self.discard()
            raise
        self._file = File(self.name, size, digest)
        return self._file

    def finish(self) -> File:
        """Puts the file in place so that it also survives a power cut."""
        file = self.put()
        sync_directory(self._path.parent)
        return file


def flush(handle: int) -> None:
    """Flushes a file to the disk, on macOS also through the disk's own cache."""
    if sys.platform == "darwin":
        import fcntl  # noqa: PLC0415  Not on Windows.

        try:
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            return
        except OSError:  # Not every file system has it.
            pass
    os.fsync(handle)


def _replace(source: pathlib.Path, target: pathlib.Path) -> None:
    for wait in _WAITS if _IS_WINDOWS else ():
        try:
            source.replace(target)
            return
        except PermissionError:
            time.sleep(wait)
    source.replace(target)


def sync_directory(directory: pathlib.Path) -> None:
    """Makes the renames in a directory survive a power cut."""
    if _IS_WINDOWS:  # It cannot open directories.
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_directory(directory: pathlib.Path) -> None:
    """Creates a directory and its missing parents, so that they also survive a power cut."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_directory(path.parent)
