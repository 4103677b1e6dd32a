"""Runs tasks one after another in a background thread, while training continues."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class Background:
    """Runs tasks in the order of submission; after one that fails, no more are run."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether there are tasks that `finish` has not yet been called for."""
        return self._last is not None

    @property
    def failed(self) -> bool:
        """Whether a task has failed so far."""
        return self._last is not None and self._last.done() and bool(self._last.exception())

    def wait(self) -> None:
        """Waits until all tasks have ended, whether they failed or not.

        An interrupt (Ctrl-C) is raised only after that, so that their files are complete.
        """
        interrupt: KeyboardInterrupt | None = None
        # Another thread may submit tasks or finish in the meantime.
        while (last := self._last) is not None and not last.done():
            try:
                wait([last])
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def submit(self, task: Callable[[], None]) -> None:
        """Runs a task after all earlier ones have ended."""
        before = self._last

        def run() -> None:
            if before is not None:
                before.result()  # It has ended; this raises its exception, if any.
            task()

        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="snapshot-ensemble")
        self._last = self._thread.submit(run)

    def finish(self) -> None:
        """Ends the thread, after `wait`; raises the exception of the first task that failed."""
        thread, last = self._thread, self._last
        self._thread = self._last = None
        if thread is not None and last is not None:
            thread.shutdown()
            last.result()
