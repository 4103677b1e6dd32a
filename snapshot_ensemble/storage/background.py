"""Runs tasks one after another in a background thread, while training continues."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class Background:
    """Runs tasks in the order of submission; after one that fails, no more are run."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None
        self._process = os.getpid()

    @property
    def busy(self) -> bool:
        """Whether there are tasks that `finish` has not yet been called for."""
        # A forked child has no such thread: it would wait for ever.
        return self._last is not None and self._process == os.getpid()

    @property
    def failed(self) -> bool:
        """Whether a task has failed so far."""
        return self._last is not None and self._last.done() and bool(self._last.exception())

    def wait(self) -> None:
        """Waits until all tasks have ended, whether they failed or not."""
        # Another thread may submit tasks or finish in the meantime.
        while self.busy and (last := self._last) is not None and not last.done():
            wait([last])

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
        """Waits, and ends the thread; raises the exception of the first task that failed."""
        thread, last = self._thread, self._last
        self._thread = self._last = None
        if thread is not None and last is not None:
            thread.shutdown()
            last.result()
