"""How an ensemble is saved and comes back: from its directory, or from files of weights."""

import os
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any, Self

import keras

from snapshot_ensemble.inference.member_pool import check_built, check_model
from snapshot_ensemble.learning import Learner
from snapshot_ensemble.schedules import CosineAnnealing, EqualCycles, Schedule
from snapshot_ensemble.storage.directory import DirectoryStore
from snapshot_ensemble.storage.manifest import NAME as MANIFEST
from snapshot_ensemble.storage.snapshot import (
    MemoryStore,
    Snapshot,
    SnapshotError,
    SnapshotStore,
    load_weights,
    set_weights,
)
from snapshot_ensemble.training.learning_rate import AnnealedRate
from snapshot_ensemble.training.shrink_perturb import Restarter, Shrink


class Keeper(Learner):
    """A learner that is kept, with what its constructor and its training say of it."""

    schedule: Schedule
    max_snapshots: int | None
    directory: pathlib.Path | None
    history: dict[str, list[Any]]
    _rate: AnnealedRate
    _restarter: Restarter
    _directory_is_own: bool
    _done: dict[str, int]
    _runs: int
    _saves: bool  # Whether the last run keeps states of training.

    @property
    def shrink(self) -> Shrink:
        """The share of the weights that a restart carries over, as it was given."""
        return self._restarter.shrink

    def save(self, directory: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Saves the whole ensemble: the model, the snapshots, the weights and the history.

        All files are in place before the manifest names them: a save that breaks off leaves
        what was there.

        Args:
            directory: Path of the directory.
            overwrite: Whether the ensemble may take the place of one that lies there.
                Defaults to `False`.

        Raises:
            ValueError: If there are no members, or the directory holds something and
                `overwrite` is `False`.
        """
        self._chosen(None)
        path = pathlib.Path(directory)
        here = self.directory if self._directory_is_own else None
        if here is not None and path.resolve() == here.resolve():
            self._store.commit()  # Its snapshots are there already.
            return
        target = DirectoryStore.create(path, overwrite)
        target.describe = lambda: {**self._description(), "saves": False}  # It holds no state.
        own = self.model.get_weights()
        try:
            with self._rate.lifted(), target.writing():
                for snapshot in self.snapshots:
                    set_weights(self.model, self._store.weights(self.model, snapshot.index))
                    target.add(self.model, snapshot, commit=False)
                target.commit()
        finally:
            set_weights(self.model, own)

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        *,
        custom_objects: dict[str, Any] | None = None,
        model: keras.Model | None = None,
        skip_damaged: bool = False,
    ) -> Self:
        """Loads an ensemble from the directory that `fit` or `save` wrote.

        Nothing in the directory is executed, and every file is checked against the manifest.
        The ensemble stays in its directory: a further `fit` adds to it there. The model has the
        weights of the last snapshot, to go on from; a given one keeps its own.

        Args:
            directory: Path of the directory.
            custom_objects: Classes and functions of your own that the model uses, by name.
            model: The compiled model itself, where it cannot be made from a file: a subclass
                without `get_config`, a loss that is a lambda.
            skip_damaged: Whether to go on without snapshots that are not as they were saved; a
                warning names them. Their files stay where they are. Defaults to `False`.

        Returns:
            A `SnapshotEnsemble`.

        Raises:
            SnapshotError: If the directory holds no ensemble, or a file is not as it was saved;
                the message names it.
        """
        while True:
            store = DirectoryStore.open(directory)
            try:
                return cls._load(store, directory, custom_objects, model, skip_damaged)
            except SnapshotError:
                if store.is_current():
                    raise
                # A writer has replaced files in the meantime: all of it anew.

    @classmethod
    def _load(
        cls,
        store: DirectoryStore,
        directory: str | os.PathLike[str],
        custom_objects: dict[str, Any] | None,
        model: keras.Model | None,
        skip_damaged: bool,
    ) -> Self:
        given, described = model is not None, store.described
        model = store.model(custom_objects) if model is None else model
        check_model(model)
        check_built(model)
        try:
            settings = dict(described["settings"])
            if settings["schedule"] is not None:
                settings["schedule"] = CosineAnnealing(**settings["schedule"])
            make: Any = cls
            ensemble: Self = make(model, directory=directory, **settings)
        except (KeyError, TypeError, ValueError) as error:
            manifest = store.directory / MANIFEST
            raise SnapshotError(f"The settings in '{manifest}' do not hold: {error}") from error
        damaged, count = store.damaged(model if skip_damaged else None), len(store.snapshots)
        if damaged and (not skip_damaged or len(damaged) == count):
            told = str(next(iter(damaged.values())))
            if len(damaged) < count:
                told += (
                    f" The other {count - len(damaged)} of {count} snapshots can be loaded with "
                    "`skip_damaged=True`."
                )
            raise SnapshotError(told)
        if damaged:
            listed = "; ".join(f"snapshot {i}: {error}" for i, error in damaged.items())
            warnings.warn(f"Loaded without what is damaged: {listed}", stacklevel=3)
            store.leave_out(set(damaged))
        ensemble._adopt(store, bool(damaged))
        ensemble._runs = ensemble._done["runs"]
        ensemble._describe_to(store)
        ensemble._directory_is_own = True
        if len(ensemble) and not given:
            store.put(model, model, len(ensemble) - 1)
        return ensemble

    def _adopt(self, store: DirectoryStore, damaged: bool = False) -> None:
        """Takes over what a directory holds; `damaged`: without some of its members."""
        described = store.described
        self._store, self._directory_is_own = store, False
        self.history, self._done = described["history"], described["done"]
        self._saves = described["saves"]
        if described["spared"] is not None:
            self._restarter.spared = described["spared"]
        if described["weights"] is not None and len(described["weights"]) == len(self):
            self.weights = described["weights"]
        if described["weights"] is None or len(described["weights"]) == len(self):
            self.temperature = described["temperature"]
        if not damaged:  # Else these are others.
            self.members = described["members"]

    @classmethod
    def from_weights(
        cls, model: keras.Model, paths: Sequence[str | os.PathLike[str]], **arguments: Any
    ) -> Self:
        """An ensemble of weight files that something else trained.

        Args:
            model: The compiled model that the weights belong to. It is built, and not changed.
            paths: Files of `model.save_weights`, oldest first.
            **arguments: Arguments of `SnapshotEnsemble`, for a later `fit`.

        Returns:
            A `SnapshotEnsemble` that holds the weights in memory.

        Raises:
            SnapshotError: If a file does not hold weights of this model; the message names it.
            ValueError: If there are no paths, or the model is not built.
        """
        paths = paths if isinstance(paths, (str, os.PathLike)) or paths is None else list(paths)
        if not isinstance(paths, list) or not paths:
            raise ValueError(f"`paths` must be a list of weight files. Received: paths={paths!r}")
        if arguments.get("directory") is not None:
            raise ValueError(
                "`from_weights` holds the weights in memory. Received: "
                f"directory={arguments['directory']!r}. Call `save(directory)` afterwards."
            )
        make: Any = cls
        ensemble: Self = make(model, **arguments)
        check_built(model)
        store = MemoryStore()
        for index, path in enumerate(paths):
            store.add_weights(load_weights(model, path), Snapshot(index))
        ensemble._store = store
        return ensemble

    def _keep_learned(self) -> None:
        if self._directory_is_own:
            self._store.commit()

    def _describe_to(self, store: SnapshotStore) -> None:
        if isinstance(store, DirectoryStore):
            store.describe = self._description

    def _description(self) -> dict[str, Any]:
        """What a manifest says beside the snapshots."""
        schedule = self.schedule
        settings: dict[str, Any] = {"max_snapshots": self.max_snapshots, "shrink": self.shrink}
        if isinstance(schedule, EqualCycles):
            settings |= {"schedule": None, **schedule.get_config()}
        else:
            settings["schedule"] = schedule.get_config()
        return {
            "settings": {**settings, "task": self.task},
            "weights": None if self.weights is None else self.weights.tolist(),
            "temperature": self.temperature,
            "members": self.members,
            "spared": self._restarter.spared,
            "history": self.history,
            "done": self._done,
            "saves": self._saves,
        }
