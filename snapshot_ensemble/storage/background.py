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
        """Waits until all tasks have ended, whatever came of them."""
        if self._last is not None:
            wait([self._last])

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

    def join(self) -> None:
        """Waits until all tasks have ended; raises what the first that failed has raised."""
        thread, last = self._thread, self._last
        if thread is None or last is None:
            return
        self.wait()  # If that is interrupted, it can be done again.
        thread.shutdown()
        self._thread = self._last = None
        last.result()
