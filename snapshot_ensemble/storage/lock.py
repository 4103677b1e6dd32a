"""One writer at a time: a lock that its holder's death releases."""

import pathlib
from types import TracebackType

import filelock

NAME = "ensemble.lock"


class DirectoryLock:
    """The right to write to a directory, as a context manager that may be entered again inside.

    It keeps out other processes and other locks of this one, whatever opens and closes the lock
    file.

    Args:
        directory: Path of a directory. It is made when the lock is acquired.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self._path = directory / NAME
        # The thread that writes behind training's back works under the lock of the one that trains.
        self._lock = filelock.FileLock(self._path, timeout=0, thread_local=False)

    @property
    def held(self) -> bool:
        return self._lock.is_locked

    def __enter__(self) -> "DirectoryLock":
        if not self.held:  # A directory that is deleted meanwhile stays so.
            self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise BlockingIOError(
                f"Another run writes to the directory. Received: directory='{self._path.parent}'. "
                "Wait until it has ended, or choose another directory."
            ) from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()

    def remove(self) -> None:
        """Removes the lock file, while the lock is held: nobody can have locked it since."""
        self._path.unlink(missing_ok=True)
