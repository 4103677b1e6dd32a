"""One training at a time: a second one of the same model is refused."""

import contextlib
import threading
import weakref
from collections.abc import Iterator

import keras

_lock = threading.Lock()
_in_training: weakref.WeakSet[keras.Model] = weakref.WeakSet()


@contextlib.contextmanager
def only_training(model: keras.Model) -> Iterator[None]:
    """Refuses to begin while the model is already being trained, in whatever thread.

    Raises:
        RuntimeError: If it is. Nothing has changed then.
    """
    with _lock:
        if model in _in_training:
            raise RuntimeError(
                "The model is already being trained: another `fit` or `find_lr` of it has not "
                f"ended. Received: model={model.name!r}. Wait until it has ended, or train "
                "another model in an ensemble of its own."
            )
        _in_training.add(model)
    try:
        yield
    finally:
        with _lock:
            _in_training.discard(model)


def is_training(model: keras.Model) -> bool:
    """Whether the model is being trained, in whatever thread."""
    with _lock:
        return model in _in_training
