"""Snapshots in memory."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.storage.record import Counts, Learned, Record
from snapshot_ensemble.storage.snapshot import Snapshot, Weights, renumbered
from snapshot_ensemble.storage.view import View
from snapshot_ensemble.storage.weight_files import get_weights, set_weights


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
        self._progress = self.record.progress.copy()
        self._restarting = False
        self._guard = threading.Lock()  # Held while several of the values above change together.

    @contextlib.contextmanager
    def transaction(self, *, resume: bool = False, overwrite: bool = False) -> Iterator[None]:
        version, record = self.version, dataclasses.replace(self.record)
        try:
            yield
        except BaseException:
            if self.version == version:
                with self._guard:
                    # Another thread may have learned something about the same snapshots.
                    record.learned = self.record.learned
                    self.record, self._restarting = record, False
            raise

    def restart(self) -> None:
        self._restarting = True

    def add(self, model: keras.Model, snapshot: Snapshot) -> None:
        self.add_weights(get_weights(model), snapshot)

    def add_weights(self, weights: Weights, snapshot: Snapshot) -> None:
        """Adds arrays; those equal to the last snapshot's (frozen layers) are stored only once."""
        held, snapshots = ([], []) if self._restarting else (self._weights, self.snapshots)
        if held:
            pairs = zip(held[-1], weights, strict=True)
            weights = [old if np.array_equal(old, new) else new for old, new in pairs]
        self._change([*held, weights], [*snapshots, snapshot])
        self._restarting = False

    def keep_newest(self, count: int) -> None:
        self._change(self._weights[-count:], self.snapshots[-count:])

    def _change(self, weights: list[Weights], snapshots: list[Snapshot]) -> None:
        with self._guard:
            # New lists: a view may hold the old ones.
            self._weights, self.snapshots = weights, renumbered(snapshots)
            self.version += 1
            self.record.learned = Learned()
            self._progress = self.record.progress.copy()

    def view(self) -> View:
        with self._guard:
            held, progress = self._weights, self._progress

            def weights(model: keras.Model, index: int) -> Weights:
                return held[index]

            def put(member: Any, model: keras.Model, index: int) -> None:
                set_weights(member, held[index])

            learned = self.record.learned
            return View(self.snapshots, self.version, learned, progress.copy, weights, put)

    def learn(self, version: int, **changes: Any) -> None:
        with self._guard:
            if self.version == version:
                self.record.learned = dataclasses.replace(self.record.learned, **changes)

    def commit(self, learned: Learned | None = None) -> None:
        with self._guard:
            self.record.learned = learned or self.record.learned
            self._progress = self.record.progress.copy()

    def keep_state(self, write: Callable[[str, Weights | None], None]) -> None:
        pass  # It would not outlive the process.

    def base(self, model: keras.Model, cycle: int | None = None) -> Weights:
        return []

    def take_back(self, done: Counts) -> None:
        pass
