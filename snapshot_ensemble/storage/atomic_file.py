"""Files that are written completely or not at all, and whose contents are verified."""

import dataclasses
import hashlib
import os
import pathlib
import re
import uuid
from collections.abc import Callable
from typing import Annotated, Any

from snapshot_ensemble.storage.file_headers import open_regular, size_of
from snapshot_ensemble.storage.snapshot import SnapshotError
from snapshot_ensemble.storage.typed_json import Count


def _own_name(name: str, field: str) -> str:
    # Files that are no longer needed are removed, so no other name may get into a manifest.
    if not re.fullmatch(r"(snapshot|model|state)-[0-9]{4,18}\.(weights\.h5|keras|npz)", name):
        raise ValueError(f"`{field}` must be a file of this package. Received: {field}={name!r}")
    return name


def _digest(text: str, field: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise ValueError(f"`{field}` must be 64 hexadecimal digits. Received: {field}={text!r}")
    return text


@dataclasses.dataclass(frozen=True)
class File:
    """A file in a directory, with the size and hash that it was written with."""

    name: Annotated[str, _own_name]
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
