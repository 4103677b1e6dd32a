"""Warnings of Keras and TensorFlow that would say nothing of use to the caller."""

import contextlib
import threading
import warnings
from collections.abc import Iterator

# Python's filters are those of the whole process: two threads that change them at once would each
# restore what the other had set.
_lock = threading.RLock()


@contextlib.contextmanager
def warnings_ignored(message: str = "", category: type[Warning] = Warning) -> Iterator[None]:
    """Ignores warnings meanwhile whose text begins with `message`, a regular expression."""
    with _lock, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message, category)
        yield
