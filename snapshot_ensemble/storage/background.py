"""Work that does not stop training: one task after another, in a thread of its own."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class Background:
    """Runs tasks in the order in which they come; after one that fails, none."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether there are tasks whose end nobody has waited for."""
        return self._last is not None

    @property
    def failed(self) -> bool:
        """Whether it is known by now that a task failed."""
        return self._last is not None and self._last.done() and bool(self._last.exception())

    def wait(self) -> None:
        """Waits until all tasks have ended, whether they failed or not.

        An interrupt (Ctrl-C) meanwhile is raised when they have: what they write is whole then.
        """
        interrupt: KeyboardInterrupt | None = None
        while self._last is not None and not self._last.done():
            try:
                wait([self._last])
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def submit(self, task: Callable[[], None]) -> None:
        """Runs a task when those before it have ended."""
        before = self._last

        def run() -> None:
            if before is not None:
                before.result()  # It has ended; this is its exception, if it had one.
            task()

        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="snapshot-ensemble")
        self._last = self._thread.submit(run)

    def finish(self) -> None:
        """Ends the thread when `wait` has ended; raises what the first task that failed raised."""
        thread, last = self._thread, self._last
        self._thread = self._last = None
        if thread is not None and last is not None:
            thread.shutdown()
            last.result()
