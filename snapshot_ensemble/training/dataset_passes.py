"""Passes over a dataset: their order is a matter of the epoch alone."""

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from snapshot_ensemble.keras_compat.epoch_iterator import training_passes_noticed


class Passes:
    """Makes the order of a dataset that shuffles with a seed a matter of the epoch alone.

    Such a dataset draws the seed of a pass from a generator whenever a pass over it begins, and
    Keras begins one or two for an epoch. So that a run which goes on in mid-way sees the order
    that the unbroken one sees, both begin exactly two for each epoch before, and one more.

    Args:
        x: The data of a run.
    """

    def __init__(self, x: Any) -> None:
        self._data = x if isinstance(x, tf.data.Dataset) else None
        self._begun = 0
        self._wanted = 0

    def up_to(self, epoch: int) -> None:
        """Before the next pass, as many must have begun as belong before this epoch."""
        self._wanted = 1 + 2 * epoch

    def end(self, epochs: int) -> None:
        """After a run, as many have begun as belong to its epochs."""
        self.up_to(epochs)
        self._catch_up()

    def _catch_up(self) -> None:
        while self._data is not None and self._begun < self._wanted:
            iter(self._data)
            self._begun += 1

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Counts the passes that Keras begins in training, and adds to them meanwhile."""
        if self._data is None:
            yield
            return

        def begin_pass() -> None:
            self._catch_up()
            self._begun += 1

        with training_passes_noticed(begin_pass):
            yield
