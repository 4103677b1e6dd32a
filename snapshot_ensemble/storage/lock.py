"""One writer at a time: a lock that its holder's death releases."""

import os
import pathlib
from types import TracebackType
from typing import Any

try:
    import fcntl
except ImportError:  # The operating system has none of this kind: nobody is locked out.
    fcntl = None  # type: ignore[assignment]

NAME = "ensemble.lock"
# The operating system lets a process lock a file again that it holds already.
_held: set[str] = set()


class DirectoryLock:
    """The right to write to a directory, as a context manager that may be entered again inside.

    Args:
        directory: Path of a directory.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self._path = directory / NAME
        self._depth = 0
        self._file: Any = None
        self._key = ""

    def __enter__(self) -> "DirectoryLock":
        if not self._depth:
            self._acquire()
        self._depth += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if not self._depth:
            _held.discard(self._key)
            self._file.close()  # Which releases it.

    @property
    def held(self) -> bool:
        return self._depth > 0

    def _acquire(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        key = os.path.realpath(self._path)
        taken = key in _held
        file = None
        if not taken:
            file = self._path.open("a")
            try:
                if fcntl is not None:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.close()
                taken = True
        if taken:
            raise BlockingIOError(
                f"Another run writes to the directory. Received: directory='{self._path.parent}'. "
                "Wait until it has ended, or choose another directory."
            )
        self._file, self._key = file, key
        _held.add(key)
