"""A lock that allows one writer at a time, and is released if its process dies."""

import os
import pathlib
from types import TracebackType
from typing import Any

from snapshot_ensemble.storage.atomic_file import make_directory
from snapshot_ensemble.storage.file_names import LOCK

# Locks of the parent process in a forked child. They are kept here, since `filelock` would release
# them, for the parent as well, when they are collected.
_inherited: list[Any] = []


class DirectoryLock:
    """The right to write to a directory, as a re-entrant context manager.

    It keeps out other processes, and other locks in the same process. A forked child does not
    hold the lock of its parent.

    Args:
        directory: Path of a directory. It is created when the lock is acquired.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self._path = directory / LOCK
        self._make()

    def _make(self) -> None:
        import filelock  # noqa: PLC0415  Loaded where it is used.

        self._timeout, self._process = filelock.Timeout, os.getpid()
        # The background thread that writes uses the lock of the training thread. `filelock` uses
        # `flock`, which others that open and close the file do not release.
        self._lock = filelock.FileLock(self._path, timeout=0, thread_local=False)

    @property
    def held(self) -> bool:
        """Whether this process holds it."""
        return self._process == os.getpid() and self._lock.is_locked

    def acquire(self) -> None:
        """Acquires the lock; raises `BlockingIOError` if another writer holds it."""
        if self._process != os.getpid():
            _inherited.append(self._lock)
            self._make()
        if not self.held:  # A directory deleted during a run is not recreated.
            make_directory(self._path.parent)
        try:
            self._lock.acquire()
        except self._timeout:
            raise BlockingIOError(
                f"Another run is writing to the directory. Received: "
                f"directory='{self._path.parent}'. Wait until it has ended, or choose another one."
            ) from None

    def release(self) -> None:
        """Releases the lock once; does nothing if this process does not hold it."""
        if self.held:
            self._lock.release()

    def __enter__(self) -> "DirectoryLock":
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    @property
    def exists(self) -> bool:
        """Whether there is a lock file, of whoever."""
        return self._path.exists()

    def remove(self) -> None:
        """Removes the lock file while the lock is held, so that nobody else can have locked it."""
        self._path.unlink(missing_ok=True)
