"""Suppresses warnings of Keras and TensorFlow that are of no use to the caller."""

import contextlib
import threading
import warnings
from collections.abc import Iterator

# Warning filters are global to the process. Without the lock, two threads that change them at once
# could each restore the other's filters.
_lock = threading.RLock()


@contextlib.contextmanager
def warnings_ignored(message: str = "", category: type[Warning] = Warning) -> Iterator[None]:
    """Ignores warnings whose text starts with `message`, a regular expression."""
    with _lock, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message, category)
        yield
