"""The interface of stores, which training and inference keep snapshots in."""

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any, Protocol

import keras

from snapshot_ensemble.storage.record import Counts, Learned, Record
from snapshot_ensemble.storage.snapshot import Snapshot, Weights
from snapshot_ensemble.storage.view import View


class SnapshotSink(Protocol):
    """What a run saves its snapshots to.

    Attributes:
        snapshots: The snapshots, oldest first.
    """

    @property
    def snapshots(self) -> list[Snapshot]: ...

    def add(self, model: keras.Model, snapshot: Snapshot) -> None:
        """Saves the current weights of the model."""

    def keep_newest(self, count: int) -> None:
        """Drops all but the newest `count` snapshots."""

    def keep_state(self, write: Callable[[str, Weights | None], None]) -> None:
        """Replaces the saved state of training; does nothing without a directory.

        Args:
            write: Takes a path, and weights that need not be written because another file has them.
        """


class SnapshotStore(SnapshotSink, Protocol):
    """What an ensemble keeps its snapshots in.

    One thread trains and adds snapshots. Meanwhile, others may call `view`, `learn` and `commit`.

    Attributes:
        record: What is kept besides the snapshots.
        version: A number that changes whenever the snapshots change. `record.learned` is reset
            then.
        claimed: Whether the contents of the directory belong to this store. Until a run or `load`
            claims it, a directory is only a path.
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
        """Claims the directory and keeps other writers out until the end.

        After an exception before a new snapshot or state is on disk, the store (including its
        `record`) and the directory are as they were before. After a later exception, everything
        on disk is kept.

        Args:
            resume: Whether existing contents are continued from.
            overwrite: Whether existing contents may be replaced, by calling `restart`.
        """

    def restart(self) -> None:
        """Makes the next `add` or `keep_state` replace all existing snapshots."""

    def take_back(self, done: Counts) -> None:
        """Drops everything after these counts, which a resumed run will do again."""

    def base(self, model: keras.Model, cycle: int | None = None) -> Weights:
        """The weights that a saved state leaves out: a cycle's snapshot, or what all share."""

    def view(self) -> View:
        """The snapshots as they are now, and what was learned about them."""

    def learn(self, version: int, **changes: Any) -> None:
        """Changes what was learned about the snapshots of a version, and saves it.

        If there is another version by now, it is forgotten, as it is whenever they change.
        """

    def commit(self, learned: Learned | None = None) -> None:
        """Saves the current `record`.

        Args:
            learned: What was learned about the members, if they have changed.
        """
