"""Snapshots in a directory: their weight files, the model, and the state of training."""

import dataclasses
import os
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import keras

from snapshot_ensemble.storage.atomic_file import Draft
from snapshot_ensemble.storage.manifest import NAME, Manifest
from snapshot_ensemble.storage.snapshot import (
    Snapshot,
    SnapshotError,
    Weights,
    load_into,
    load_weights,
    renumbered,
    set_weights,
    weights_only,
)
from snapshot_ensemble.storage.transaction import ManifestDirectory
from snapshot_ensemble.storage.weight_delta import (
    is_worth_it,
    read_base,
    read_difference,
    write_difference,
)


class DirectoryStore(ManifestDirectory):
    """Snapshots as `.weights.h5` files.

    Args:
        directory: Path of the directory. It is made when something is written.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        super().__init__(directory)
        self._base: tuple[str, Weights] = ("", [])  # A base that was read or written: its name.
        self._savable = True  # Until it shows that the model is not.

    @property
    def snapshots(self) -> list[Snapshot]:
        """The snapshots that there are, oldest first."""
        return list(self._kept.snapshots)

    def add(self, model: keras.Model, snapshot: Snapshot, *, commit: bool = True) -> None:
        with self._explained(), self.writing():
            begun, number = self._begun()
            model_file = begun.model
            if model_file is None and self._savable:
                model_file = self._write_model(model, number)
                self._savable = model_file is not None
            try:
                file, base = self._write_weights(model, number, begun, model_file)
            except BaseException:
                if isinstance(model_file, Draft) and model_file is not begun.model:
                    model_file.discard()
                raise
            self._pending = dataclasses.replace(
                begun,
                snapshots=tuple(renumbered([*begun.snapshots, snapshot])),
                files=(*begun.files, file),
                model=model_file,
                base=base,
                replacing=False,
            )
            self._restarting = False
            if commit:
                self.commit()

    def _write_weights(
        self, model: keras.Model, number: int, begun: Manifest, model_file: Any
    ) -> tuple[Draft, Any]:
        """A file with the model's weights, and the base of those that are differences."""
        if not is_worth_it(model):
            with weights_only(model):
                whole = self._draft(f"snapshot-{number:04}.weights.h5", model.save_weights)
                return whole.write(), begun.base
        weights, base = model.get_weights(), begun.base or model_file
        if base is None:
            with weights_only(model):
                base = self._draft(f"snapshot-{number:04}.weights.h5", model.save_weights).write()
            self._base = (base.name, weights)
            return base, base
        if isinstance(base, Draft) and base is not begun.model and base is not begun.base:
            self._base = (base.name, weights)
        old = self._weights_of(model, base)
        name = f"snapshot-{number:04}.npz"
        return self._draft(name, lambda path: write_difference(path, weights, old)), base

    def _weights_of(self, model: keras.Model, base: Any) -> Weights:
        if self._base[0] != base.name:
            self.settle()
            self._base = (base.name, read_base(model, self._path(base)))
        return self._base[1]

    def base(self, model: keras.Model) -> Weights:
        if self._kept.base is None:
            raise SnapshotError(f"'{self.directory / NAME}' names no file that others are part of.")
        return self._weights_of(model, self._kept.base)

    def keep_state(self, write: Callable[[str, Weights | None], None]) -> None:
        """Keeps a file with the state of training in the place of the one before.

        It is written later, by `write`, which takes the path, and weights that are kept already.
        """
        with self._explained(), self.writing():
            begun, number = self._begun()
            shared = self._base[1] if begun.base and begun.base.name == self._base[0] else None
            file = self._draft(f"state-{number:04}.npz", lambda path: write(path, shared))
            self._pending = dataclasses.replace(begun, state=file, replacing=False)
            self._restarting = False
            self.commit()

    @property
    def state(self) -> pathlib.Path | None:
        """The file with the state of the run that was last; None if none was kept."""
        self.settle()
        return self._path(self._kept.state)

    def take_back(self, cycles: int) -> None:
        """Forgets the snapshots of this cycle and later ones, which a run will make again."""
        kept = [s for s in self._kept.snapshots if s.cycle is None or s.cycle < cycles]
        if len(kept) < len(self._kept.snapshots):
            self._pending = dataclasses.replace(
                self._kept, snapshots=tuple(kept), files=self._kept.files[: len(kept)]
            )
            self.commit()

    def keep_newest(self, count: int) -> None:
        if len(self._kept.snapshots) > count:
            self._pending = dataclasses.replace(
                self._kept,
                snapshots=tuple(renumbered(self._kept.snapshots[-count:])),
                files=self._kept.files[-count:],
            )
            self.commit()

    def inspect(self) -> dict[str, Any]:
        """What the manifest says, and of each file whether it is as it was saved."""
        self.settle()
        kept, entries = self._kept, []
        places: list[tuple[Any, Snapshot | None]] = [(kept.model, None)]
        places += [*zip(kept.files, kept.snapshots, strict=True), (kept.state, None)]
        if kept.base is not None and kept.base not in {file for file, _ in places}:
            places.append((kept.base, None))
        for file, snapshot in places:
            if file is None:
                continue
            try:
                self._path(file)
                intact = True
            except SnapshotError:
                intact = False
            names = ("index", "cycle", "epoch", "step", "learning_rate", "metrics")
            facts = {name: getattr(snapshot, name, None) for name in names}
            entries.append({"name": file.name, "bytes": file.size, "intact": intact, **facts})
        ensemble = {
            name: kept.ensemble.get(name)
            for name in ("weights", "temperature", "members", "settings")
        }
        return {"files": entries, **ensemble}

    def damaged(self, model: keras.Model | None = None) -> dict[int, SnapshotError]:
        """What is wrong with snapshots, by index; with a model also whether they are its own."""
        self.settle()
        found = {}
        for index, file in enumerate(self._kept.files):
            try:
                self._path(file)
                if _is_difference(file):
                    self._path(self._kept.base)
                if model is not None:
                    self.weights(model, index)
            except SnapshotError as error:
                found[index] = error
        return found

    def leave_out(self, indices: set[int]) -> None:
        """Goes on without these snapshots, here and not in the directory."""
        kept = [i for i in range(len(self._kept.files)) if i not in indices]
        self._kept = self._saved = dataclasses.replace(
            self._kept,
            snapshots=tuple(renumbered([self._kept.snapshots[i] for i in kept])),
            files=tuple(self._kept.files[i] for i in kept),
            state=None,
        )

    def weights(self, model: keras.Model, index: int) -> Weights:
        self.settle()
        file = self._kept.files[index]
        path = self._path(file)
        if _is_difference(file):
            return read_difference(path, self.base(model))
        return load_weights(model, path, foreign=False)

    def put(self, member: keras.Model, model: keras.Model, index: int) -> None:
        file = self._kept.files[index]
        if _is_difference(file) or type(member) is not type(model):
            set_weights(member, self.weights(model, index))
            return
        # Right into it: nothing else of its size is in memory.
        self.settle()
        load_into(member, self._path(self._kept.files[index]))

    def model(self, custom_objects: dict[str, Any] | None = None) -> keras.Model:
        """The model that the snapshots belong to, compiled as it was."""
        self.settle()
        if not self._kept.files:
            raise SnapshotError(
                f"'{self.directory / NAME}' names no snapshot yet: its run has not come to the "
                "end of a cycle. Go on with it by `fit(..., resume=True)`."
            )
        if self._kept.model is None:
            raise SnapshotError(
                f"'{self.directory / NAME}' names no model, since it could not be saved. "
                "Build and compile the same model, and pass it as `model=`."
            )
        path = self._path(self._kept.model)
        try:
            with warnings.catch_warnings():
                # Snapshots hold no optimizer slots: a loaded model begins with new ones.
                warnings.filterwarnings("ignore", "Skipping variable loading for optimizer")
                return keras.models.load_model(path, custom_objects=custom_objects, safe_mode=True)
        except Exception as error:
            raise SnapshotError(
                f"'{path}' cannot be loaded: {error}\nIf it uses classes or functions of your "
                "own, pass them as `custom_objects=`, or the model itself as `model=`."
            ) from error

    def _write_model(self, model: keras.Model, number: int) -> Draft | None:
        try:
            with weights_only(model):
                return self._draft(f"model-{number:04}.keras", model.save).write()
        except (NotImplementedError, TypeError, ValueError) as error:
            warnings.warn(
                f"The model cannot be saved, only its snapshots: {error}\n"
                "`SnapshotEnsemble.load` will need it as `model=`.",
                stacklevel=2,
            )
            return None


def _is_difference(file: Any) -> bool:
    return bool(file.name.endswith(".npz"))
