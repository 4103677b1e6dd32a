"""Delays Ctrl-C where files and what is known of them change together."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

# What ends a process on request. A scheduler's SIGTERM may be turned into an exception, too.
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Calls the handlers of signals that arrive during the block when the block has ended.

    Python runs handlers, which may raise `KeyboardInterrupt`, in the main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: dict[int, Any] = {}
    found = {number: signal.getsignal(number) for number in SIGNALS}
    handlers: dict[int, Any] = {n: handler for n, handler in found.items() if callable(handler)}
    try:
        for number in handlers:
            signal.signal(number, arrived.__setitem__)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in arrived.items():
            handlers[number](number, frame)
