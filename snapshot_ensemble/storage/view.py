"""What a store holds at one moment, for readers in other threads than the one that trains."""

import dataclasses
import pathlib
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras

from snapshot_ensemble.storage.atomic_file import File
from snapshot_ensemble.storage.record import Learned, Progress
from snapshot_ensemble.storage.snapshot import Snapshot, Weights


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """The snapshots at one moment; it stays as it is while training adds and drops some.

    Attributes:
        snapshots: The snapshots, oldest first.
        version: The store's version at that moment.
        learned: What was learned about these snapshots.
        progress: Returns how far training had come when it was last saved.
        weights: Returns the weights of one snapshot, in the order of `model.weights`; called with
            the model and the index.
        put: Gives a model of the same architecture, or what has variables `in_model_order`, the
            weights of one snapshot; called with it, the model of the ensemble and the index.
        files: The names of the files that are needed.
        whole_file: Returns the path and the `File` of a snapshot that is one of Keras's weight
            files, called with its index; None if it is kept in another form.
    """

    snapshots: Sequence[Snapshot]
    version: int
    learned: Learned
    progress: Callable[[], Progress]
    weights: Callable[[keras.Model, int], Weights]
    put: Callable[[Any, keras.Model, int], None]
    files: frozenset[str] = frozenset()
    whole_file: Callable[[int], tuple[pathlib.Path, File] | None] = lambda index: None


class FilesInUse:
    """Removes files of a directory, but not before the last view that needs them is gone.

    Args:
        directory: The directory.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self._directory = directory
        # The garbage collector may end a view at any time, also in the thread that has the lock.
        self._lock = threading.RLock()
        self._in_use: dict[int, frozenset[str]] = {}
        self._due: set[str] = set()

    def add(self, view: View) -> View:
        """Keeps the files of a view as long as it exists; returns it."""
        with self._lock:
            self._in_use[id(view)] = view.files
        weakref.finalize(view, self._release, id(view)).atexit = False
        return view

    def _release(self, key: int) -> None:
        with self._lock:
            del self._in_use[key]
            if self._due:
                self.remove(())

    def remove(self, names: Iterable[str]) -> None:
        """Removes files, now or when no view needs them any more."""
        with self._lock:
            due = self._due.union(names)
            self._due = due.intersection(*[set().union(*self._in_use.values())])
            for name in sorted(due - self._due):
                try:
                    (self._directory / name).unlink(missing_ok=True)
                except OSError:  # Windows refuses if a reader has it open: try again later.
                    self._due.add(name)
