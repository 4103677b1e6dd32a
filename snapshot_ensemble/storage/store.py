"""What training and inference ask of a place for snapshots."""

import contextlib
import pathlib
from collections.abc import Callable
from typing import Protocol

import keras

from snapshot_ensemble.storage.record import Record
from snapshot_ensemble.storage.snapshot import Snapshot, Weights


class SnapshotSink(Protocol):
    """Where a run puts its snapshots.

    Attributes:
        snapshots: Those that there are, oldest first.
    """

    @property
    def snapshots(self) -> list[Snapshot]: ...

    def add(self, model: keras.Model, snapshot: Snapshot) -> None:
        """Keeps the model's weights of this moment."""

    def keep_newest(self, count: int) -> None:
        """Drops all but the newest `count` snapshots."""

    def keep_state(self, write: Callable[[str, Weights | None], None]) -> None:
        """Replaces the saved state of training, where there is a directory.

        Args:
            write: Takes a path, and weights that need not be written there.
        """


class SnapshotStore(SnapshotSink, Protocol):
    """Where snapshots are kept, and found again.

    Attributes:
        record: What is kept beside the snapshots.
        version: Another number whenever the snapshots change. What was learned about them, in
            `record`, is forgotten then.
        claimed: Whether what lies in the directory is this store's. Until a run or `load` claims
            it, a directory is only a path.
        replacing: Whether a run has begun that will replace the snapshots.
        state: The file with the state of the last run, if there is one.
    """

    record: Record

    @property
    def version(self) -> int: ...

    @property
    def claimed(self) -> bool: ...

    @property
    def replacing(self) -> bool: ...

    @property
    def state(self) -> pathlib.Path | None: ...

    def transaction(
        self, *, resume: bool = False, overwrite: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """Claims the place and keeps other writers out until the end.

        If an exception ends it before a new snapshot or state is safe, the store (its `record`,
        too) and the directory are as they were before; later ones keep what is safe.

        Args:
            resume: Whether what lies there is gone on with.
            overwrite: Whether what lies there may be replaced, which `restart` begins.
        """

    def restart(self) -> None:
        """Lets the next `add` or `keep_state` replace all snapshots that there are by then."""

    def take_back(self, cycles: int) -> None:
        """Drops the snapshots of this cycle and later ones, which a run will make again."""

    def base(self, model: keras.Model) -> Weights:
        """The weights that a state leaves out."""

    def weights(self, model: keras.Model, index: int) -> Weights:
        """The weights of one snapshot, in the order of `model.weights`."""

    def put(self, member: keras.Model, model: keras.Model, index: int) -> None:
        """Gives a model of the same architecture the weights of one snapshot."""

    def commit(self) -> None:
        """Makes sure that `record` is kept as it is now."""
