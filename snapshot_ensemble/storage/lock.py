"""A lock that allows one writer at a time, and is released if its process dies."""

import pathlib
from types import TracebackType

NAME = "ensemble.lock"


class DirectoryLock:
    """The right to write to a directory, as a re-entrant context manager.

    It keeps out other processes, and other locks in the same process.

    Args:
        directory: Path of a directory. It is created when the lock is acquired.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        import filelock  # noqa: PLC0415  Loaded where it is used.

        self._path = directory / NAME
        self._timeout = filelock.Timeout
        # The background thread that writes uses the lock of the training thread.
        self._lock = filelock.FileLock(self._path, timeout=0, thread_local=False)

    @property
    def held(self) -> bool:
        return self._lock.is_locked

    def __enter__(self) -> "DirectoryLock":
        if not self.held:  # A directory deleted during a run is not recreated.
            self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except self._timeout:
            raise BlockingIOError(
                f"Another run is writing to the directory. Received: "
                f"directory='{self._path.parent}'. Wait until it has ended, or choose another one."
            ) from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()

    @property
    def exists(self) -> bool:
        """Whether there is a lock file, of whoever."""
        return self._path.exists()

    def remove(self) -> None:
        """Removes the lock file while the lock is held, so that nobody else can have locked it."""
        self._path.unlink(missing_ok=True)
