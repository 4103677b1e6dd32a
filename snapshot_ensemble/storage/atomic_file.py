"""Files that are written completely or not at all, and whose contents are verified."""

import dataclasses
import hashlib
import os
import pathlib
import re
import uuid
from collections.abc import Callable
from typing import Annotated, Any

from snapshot_ensemble.storage.snapshot import SnapshotError
from snapshot_ensemble.storage.typed_json import Count


def _plain_name(name: str, field: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", name):
        raise ValueError(f"`{field}` must be a file of this directory. Received: {field}={name!r}")
    return name


@dataclasses.dataclass(frozen=True)
class File:
    """A file in a directory, with the size and hash that it was written with."""

    name: Annotated[str, _plain_name]
    size: Count
    sha256: str

    def checked(self, directory: pathlib.Path) -> pathlib.Path:
        """Its path; raises `SnapshotError` if its contents have changed."""
        path = directory / self.name
        try:
            with path.open("rb") as opened:
                size = os.fstat(opened.fileno()).st_size
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise SnapshotError(f"'{path}' cannot be read: {error}") from error
        if size != self.size or digest != self.sha256:
            raise SnapshotError(
                f"'{path}' differs from the file that was saved. Received: {size} bytes with "
                f"SHA-256 {digest}; expected {self.size} bytes with {self.sha256}"
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
        # The suffix is kept, since Keras chooses the format by it.
        self._temporary = directory / f"writing-{uuid.uuid4().hex}-{name}"
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

    def checked(self, directory: pathlib.Path) -> pathlib.Path:
        """Its path, once it is finished; raises `SnapshotError` if that failed."""
        if self._file is None:
            raise SnapshotError(f"'{self._path}' could not be written.")
        return self._file.checked(directory)

    def finish(self) -> File:
        """Flushes the file to disk and renames it; does nothing more if called again."""
        if self._file is not None:
            return self._file
        if not self._written:
            self.write()
        try:
            with self._temporary.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                size = os.fstat(file.fileno()).st_size
                os.fsync(file.fileno())
            self._temporary.replace(self._path)
        except BaseException:
            self.discard()
            raise
        _sync_directory(self._path.parent)
        self._file = File(self.name, size, digest)
        return self._file


def _sync_directory(directory: pathlib.Path) -> None:
    if os.name == "posix":  # Other systems cannot open directories.
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
