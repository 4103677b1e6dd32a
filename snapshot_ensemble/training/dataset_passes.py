"""Passes over a dataset, whose order of rows must depend only on the epoch."""

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from snapshot_ensemble.keras_compat.epoch_iterator import training_passes_noticed


class Passes:
    """Makes the order of a dataset that shuffles with a seed depend only on the epoch.

    Such a dataset draws a new shuffling seed from its generator each time an iterator is created,
    and Keras creates one or two per epoch. For a resumed run to see the same order as an
    uninterrupted one, both must create the same number of iterators: exactly two for each earlier
    epoch, and one for the current epoch.

    Args:
        x: The training data of a run.
    """

    def __init__(self, x: Any) -> None:
        self._data = x if isinstance(x, tf.data.Dataset) else None
        self._begun = 0
        self._wanted = 0

    def up_to(self, epoch: int) -> None:
        """Sets how many passes must have begun before the next one, which is for this epoch."""
        self._wanted = 1 + 2 * epoch

    def end(self, epochs: int) -> None:
        """Begins the passes that are missing at the end of a run of so many epochs."""
        self.up_to(epochs)
        self._catch_up()

    def _catch_up(self) -> None:
        while self._data is not None and self._begun < self._wanted:
            iter(self._data)
            self._begun += 1

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Counts the passes that Keras begins in training, and begins missing ones before each."""
        if self._data is None:
            yield
            return

        def begin_pass() -> None:
            self._catch_up()
            self._begun += 1

        with training_passes_noticed(begin_pass):
            yield
