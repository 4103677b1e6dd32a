"""The passes over the data that Keras begins in `fit`."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from keras.src.backend.tensorflow.trainer import TFEpochIterator

from snapshot_ensemble.keras_compat.context_patch import ContextPatch


class _Passes:
    def __init__(self, before: Callable[[], None]) -> None:
        self.before = before
        self.training: Any = None


def _noticed(passes: _Passes, original: Any, iterator: Any) -> Any:
    # The first iterator is that of training; others are for validation.
    passes.training = iterator if passes.training is None else passes.training
    if iterator is passes.training:
        passes.before()
    return original(iterator)


_beginning_a_pass = ContextPatch(TFEpochIterator, "_get_iterator", _noticed)


@contextlib.contextmanager
def training_passes_noticed(before: Callable[[], None]) -> Iterator[None]:
    """Calls `before` whenever Keras begins a pass over the training data."""
    with _beginning_a_pass.active(_Passes(before)):
        yield
