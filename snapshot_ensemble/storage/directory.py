"""Snapshots in a directory: their weight files, the model, and the state of training."""

import contextlib
import dataclasses
import errno
import functools
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras

from snapshot_ensemble.keras_compat.optimizers import optimizers_hidden
from snapshot_ensemble.keras_compat.random_seed import seeds_drawn_apart
from snapshot_ensemble.keras_compat.stateless_call import weights_shown
from snapshot_ensemble.storage.atomic_file import Draft
from snapshot_ensemble.storage.contents import whole_history
from snapshot_ensemble.storage.file_headers import check_weight_file
from snapshot_ensemble.storage.file_names import MANIFEST
from snapshot_ensemble.storage.interrupts import interrupts_deferred
from snapshot_ensemble.storage.manifest import Manifest, read_record
from snapshot_ensemble.storage.record import Learned, Progress, Record
from snapshot_ensemble.storage.snapshot import Snapshot, SnapshotError, Weights, renumbered
from snapshot_ensemble.storage.transaction import ManifestDirectory
from snapshot_ensemble.storage.typed_json import encode
from snapshot_ensemble.storage.view import View
from snapshot_ensemble.storage.weight_delta import (
    is_worth_it,
    read_base,
    read_difference,
    write_difference,
)
from snapshot_ensemble.storage.weight_files import (
    load_into,
    load_weights,
    save_weights,
    set_weights,
)

# The errors of a directory that may only be read.
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


class DirectoryStore(ManifestDirectory):
    """Snapshots as files in a directory: a `SnapshotStore`.

    Args:
        directory: Path of the directory. It is created when something is written.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        super().__init__(directory)
        # The base that was last read or written, with the name of its file.
        self._base: tuple[str, Weights] = ("", [])
        self._savable = True  # Until saving the model fails.

    @property
    def snapshots(self) -> list[Snapshot]:
        """The snapshots, oldest first."""
        return list(self._now.kept.snapshots)

    def add(self, model: keras.Model, snapshot: Snapshot, *, commit: bool = True) -> None:
        with self._change():
            with self._guard:
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
            with self._guard:
                self._add(
                    begun=begun,
                    snapshots=tuple(renumbered([*begun.snapshots, snapshot])),
                    files=(*begun.files, file),
                    model=model_file,
                    base=base,
                )
                if commit:
                    self.commit()

    def _write_weights(
        self, model: keras.Model, number: int, begun: Manifest, model_file: Any
    ) -> tuple[Draft, Any]:
        """A file with the model's weights, and the base of the files that hold differences."""
        if not is_worth_it(model):
            return self._whole(model, number), begun.base
        weights, base = model.get_weights(), begun.base or model_file
        if base is None:
            base = self._whole(model, number)
            self._base = (base.name, weights)
            return base, base
        if isinstance(base, Draft) and base is not begun.model and base is not begun.base:
            self._base = (base.name, weights)
        old = self._weights_of(model, base)
        file = self._draft(
            "snapshot", number, "npz", lambda path: write_difference(path, weights, old)
        )
        return file, base

    def _whole(self, model: keras.Model, number: int) -> Draft:
        file = self._draft("snapshot", number, "weights.h5", lambda path: save_weights(model, path))
        return file.write()

    def _weights_of(self, model: keras.Model, base: Any) -> Weights:
        name, weights = self._base
        if name != base.name:
            self.wait_for_writes()
            weights = read_base(model, self._path(base))
            self._base = (base.name, weights)
        return weights

    def base(self, model: keras.Model) -> Weights:
        return self._base_of(self._now.kept, model)

    def _base_of(self, kept: Manifest, model: keras.Model) -> Weights:
        if kept.base is None:
            raise SnapshotError(
                f"'{self.directory / MANIFEST}' names no base file, which the other files need."
            )
        return self._weights_of(model, kept.base)

    def keep_state(self, write: Callable[[str, Weights | None], None]) -> None:
        """Replaces the file with the state of training.

        It is written later, by `write`, which takes the path, and weights that are already saved.
        """
        with self._change(), self._guard:
            begun, number = self._begun()
            shared = self._base[1] if begun.base and begun.base.name == self._base[0] else None
            file = self._draft("state", number, "npz", lambda path: write(path, shared))
            self._add(begun=begun, state=file)
            self.commit()

    @property
    def state(self) -> pathlib.Path | None:
        """The file with the state of the last run; None if none was saved."""
        self.settle()
        return self._path(self._now.kept.state)

    def keep_newest(self, count: int) -> None:
        with self._guard:
            if len(self._now.kept.snapshots) > count:
                self._add(
                    snapshots=tuple(renumbered(self._now.kept.snapshots[-count:])),
                    files=self._now.kept.files[-count:],
                )
                self.commit()

    def inspect(self) -> dict[str, Any]:
        """The manifest's contents, and whether each file is intact."""
        self.settle()
        kept = self._now.kept
        files: list[tuple[Any, Snapshot | None]] = [(kept.model, None)]
        files += [*zip(kept.files, kept.snapshots, strict=True), (kept.state, None)]
        files += [(file, None) for file in kept.history]
        if kept.base is not None and kept.base not in {file for file, _ in files}:
            files.append((kept.base, None))
        entries = [self._entry(file, snapshot) for file, snapshot in files if file is not None]
        learned = dataclasses.asdict(self.record.learned)
        return {"files": entries, **learned, "settings": self.record.settings}

    def _entry(self, file: Any, snapshot: Snapshot | None) -> dict[str, Any]:
        try:
            self._path(file)
            intact = True
        except SnapshotError:
            intact = False
        names = ("index", "cycle", "epoch", "step", "learning_rate", "metrics")
        values = {name: getattr(snapshot, name, None) for name in names}
        return {"name": file.name, "bytes": file.size, "intact": intact, **values}

    @contextlib.contextmanager
    def settings_checked(self) -> Iterator[dict[str, Any]]:
        """Yields the settings; an error while they are used becomes a `SnapshotError`."""
        try:
            yield dict(self.record.settings)
        except Exception as error:  # Values of any kind may be in there.
            manifest = self.directory / MANIFEST
            raise SnapshotError(f"The settings in '{manifest}' are not valid: {error}") from error

    def leave_out_damaged(self, model: keras.Model, skip_damaged: bool) -> None:
        """Checks all snapshots, and drops damaged ones from memory but not from the directory.

        Args:
            model: The model that they belong to.
            skip_damaged: Whether damaged ones may be left out, with a warning.

        Raises:
            SnapshotError: If one is damaged and `skip_damaged` is false, or if all are damaged.
        """
        damaged, count = self._damaged(model if skip_damaged else None), len(self.snapshots)
        if damaged and (not skip_damaged or len(damaged) == count):
            message = str(next(iter(damaged.values())))
            if len(damaged) < count:
                message += (
                    f" The other {count - len(damaged)} of {count} snapshots can be loaded with "
                    "`skip_damaged=True`."
                )
            raise SnapshotError(message)
        if damaged:
            listed = "; ".join(f"snapshot {i}: {error}" for i, error in damaged.items())
            warnings.warn(f"Loaded without damaged snapshots: {listed}", stacklevel=4)
            self._leave_out(set(damaged))

    def _damaged(self, model: keras.Model | None) -> dict[int, SnapshotError]:
        """The errors of snapshots, by index; with a model, also of those that do not fit it."""
        self.settle()
        errors = {}
        for index, file in enumerate(self._now.kept.files):
            try:
                self._path(file)
                if _is_difference(file):
                    self._path(self._now.kept.base)
                if model is not None:
                    self._weights(self._now.kept, model, index)
            except SnapshotError as error:
                errors[index] = error
        return errors

    def _leave_out(self, indices: set[int]) -> None:
        kept = [i for i in range(len(self._now.kept.files)) if i not in indices]
        self._now.kept = self._now.saved = dataclasses.replace(
            self._now.kept,
            snapshots=tuple(renumbered([self._now.kept.snapshots[i] for i in kept])),
            files=tuple(self._now.kept.files[i] for i in kept),
            state=None,
        )
        self._now.members_changed()

    def learn(self, version: int, **changes: Any) -> None:
        with interrupts_deferred(), self._guard:
            if self.version != version:
                return
            record, before = self.record, self.record.learned
            record.learned = learned = dataclasses.replace(before, **changes)
            try:
                if self.claimed:
                    self._write_learned(learned)
            except OSError as error:
                if error.errno not in NOT_WRITABLE:
                    record.learned = before
                    raise
                warnings.warn(
                    f"{', '.join(changes)} will not be saved: {error} Save the ensemble elsewhere "
                    "with `save`.",
                    stacklevel=4,
                )
            except BaseException:
                record.learned = before
                raise

    def _write_learned(self, learned: Learned) -> None:
        with self._change():
            now = self._now
            # Not the record: training in another thread may be changing its progress.
            described = {**now.kept.ensemble, **encode(learned)}
            now.kept = dataclasses.replace(now.kept, ensemble=described)
            self._submit()

    def view(self) -> View:
        with self._guard:
            kept = self._now.kept
            return self._files.add(
                View(
                    snapshots=list(kept.snapshots),
                    version=self.version,
                    learned=self.record.learned,
                    progress=functools.partial(self._progress, kept),
                    weights=functools.partial(self._weights, kept),
                    put=functools.partial(self._put, kept),
                    files=frozenset(kept.names()),
                )
            )

    def _progress(self, kept: Manifest) -> Progress:
        progress = read_record(kept.ensemble).progress
        if kept.history:
            self.wait_for_writes()
            progress.history = whole_history(self.directory, kept, progress.history)
        return progress

    def _weights(self, kept: Manifest, model: keras.Model, index: int) -> Weights:
        self.wait_for_writes()
        file = kept.files[index]
        path = self._path(file)
        if _is_difference(file):
            return read_difference(path, self._base_of(kept, model))
        return load_weights(model, path, foreign=False)

    def _put(self, kept: Manifest, member: keras.Model, model: keras.Model, index: int) -> None:
        file = kept.files[index]
        if _is_difference(file) or type(member) is not type(model):
            set_weights(member, self._weights(kept, model, index))
            return
        # Read directly into the model, so that no second copy is in memory.
        self.wait_for_writes()
        load_into(member, self._path(file))

    def model(self, custom_objects: dict[str, Any] | None = None) -> keras.Model:
        """The model that the snapshots belong to, compiled as it was."""
        self.settle()
        if not self._now.kept.files:
            raise SnapshotError(
                f"'{self.directory / MANIFEST}' names no snapshot yet: its run has not reached the "
                "end of a cycle. Resume it with `fit(..., resume=True)`."
            )
        if self._now.kept.model is None:
            raise SnapshotError(
                f"'{self.directory / MANIFEST}' names no model file: the model could not be saved. "
                "Build and compile the same model, and pass it as `model=`."
            )
        path = self._path(self._now.kept.model)
        try:
            check_weight_file(path)
            # The file holds no optimizer slots: a loaded model gets new ones.
            with optimizers_hidden(), seeds_drawn_apart():
                return keras.models.load_model(path, custom_objects=custom_objects, safe_mode=True)
        except Exception as error:
            raise SnapshotError(
                f"'{path}' cannot be loaded: {error}\nIf it uses classes or functions of your "
                "own, pass them as `custom_objects=`, or the model itself as `model=`."
            ) from error

    def _write_model(self, model: keras.Model, number: int) -> Draft | None:
        try:
            with optimizers_hidden():
                return self._draft("model", number, "keras", model.save).write()
        except (NotImplementedError, TypeError, ValueError) as error:
            cause = error.__context__
            if isinstance(cause, OSError):  # `zipfile` hides that the disk is full.
                raise cause from None
            warnings.warn(
                f"The model cannot be saved, only its snapshots: {error}\n"
                "`SnapshotEnsemble.load` will need it as `model=`.",
                stacklevel=2,
            )
            return None


def copy_snapshots(
    model: keras.Model,
    source: View,
    directory: str | os.PathLike[str],
    settings: dict[str, Any],
    overwrite: bool,
) -> None:
    """Copies a store into another directory, completely or not at all.

    Args:
        model: The model that the snapshots belong to. It is not changed.
        source: A view of the store.
        directory: Path of the other directory.
        settings: Arguments of the ensemble's constructor.
        overwrite: Whether the contents of the directory may be replaced.
    """
    target = DirectoryStore(directory)
    progress = source.progress()
    progress.saves_state = False  # No run can be resumed there.
    target.record = Record(settings=settings, progress=progress)
    with target.transaction(overwrite=overwrite):
        target.restart()
        for snapshot in source.snapshots:
            with weights_shown(model, source.weights(model, snapshot.index)):
                target.add(model, snapshot, commit=False)
        target.commit(source.learned)


def _is_difference(file: Any) -> bool:
    return bool(file.name.endswith(".npz"))
