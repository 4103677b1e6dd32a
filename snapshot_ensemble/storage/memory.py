"""Snapshots in memory."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import keras
import numpy as np

from snapshot_ensemble.storage.record import Counts, Learned, Record
from snapshot_ensemble.storage.snapshot import Snapshot, Weights, renumbered
from snapshot_ensemble.storage.weight_files import set_weights


class MemoryStore:
    """Snapshots as arrays in memory: a `SnapshotStore`."""

    claimed = True
    # Interrupted runs cannot be resumed from memory.
    replacing = False
    state = None

    def __init__(self) -> None:
        self.record = Record()
        self.snapshots: list[Snapshot] = []
        self.version = 0
        self._weights: list[Weights] = []
        self._restarting = False

    @contextlib.contextmanager
    def transaction(self, *, resume: bool = False, overwrite: bool = False) -> Iterator[None]:
        version, record = self.version, dataclasses.replace(self.record)
        try:
            yield
        except BaseException:
            if self.version == version:
                self.record, self._restarting = record, False
            raise

    def restart(self) -> None:
        self._restarting = True

    def add(self, model: keras.Model, snapshot: Snapshot) -> None:
        if self._restarting:
            self.snapshots, self._weights, self._restarting = [], [], False
        self.add_weights(model.get_weights(), snapshot)

    def add_weights(self, weights: Weights, snapshot: Snapshot) -> None:
        """Adds arrays; those equal to the last snapshot's (frozen layers) are stored only once."""
        if self._weights:
            pairs = zip(self._weights[-1], weights, strict=True)
            weights = [old if np.array_equal(old, new) else new for old, new in pairs]
        self._change([*self._weights, weights], [*self.snapshots, snapshot])

    def keep_newest(self, count: int) -> None:
        self._change(self._weights[-count:], self.snapshots[-count:])

    def _change(self, weights: list[Weights], snapshots: list[Snapshot]) -> None:
        self._weights, self.snapshots = weights, renumbered(snapshots)
        self.version += 1
        self.record.learned = Learned()

    def weights(self, model: keras.Model, index: int) -> Weights:
        return self._weights[index]

    def put(self, member: keras.Model, model: keras.Model, index: int) -> None:
        set_weights(member, self._weights[index])

    def commit(self) -> None:
        pass  # Memory is always up to date.

    def keep_state(self, write: Callable[[str, Weights | None], None]) -> None:
        pass  # It would not outlive the process.

    def base(self, model: keras.Model) -> Weights:
        return []

    def take_back(self, done: Counts) -> None:
        pass
