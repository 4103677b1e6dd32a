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
from snapshot_ensemble.keras_compat.stateless_call import assignments_sent
from snapshot_ensemble.storage.atomic_file import Draft, File
from snapshot_ensemble.storage.contents import inspected, whole_history
from snapshot_ensemble.storage.copying_files import link_or_copy
from snapshot_ensemble.storage.file_names import MANIFEST
from snapshot_ensemble.storage.interrupts import interrupts_deferred
from snapshot_ensemble.storage.manifest import Manifest, read_record
from snapshot_ensemble.storage.model_file import ComputesTheSame, fault_of, load_model
from snapshot_ensemble.storage.record import Learned, Progress
from snapshot_ensemble.storage.snapshot import Snapshot, SnapshotError, Weights, renumbered
from snapshot_ensemble.storage.transaction import ManifestDirectory
from snapshot_ensemble.storage.typed_json import encode
from snapshot_ensemble.storage.view import View
from snapshot_ensemble.storage.weight_delta import (
    gives_back,
    is_worth_it,
    read_base,
    read_difference,
    write_difference,
)
from snapshot_ensemble.storage.weight_files import (
    get_weights,
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
        # Whether Keras's files give back the weights bit for bit, once that is known.
        self._is_exact: bool | None = None
        # Says whether a model that was loaded from a file gives the outputs of the model that has
        # these weights; None: it is believed.
        self.computes_the_same: ComputesTheSame | None = None

    @property
    def snapshots(self) -> list[Snapshot]:
        """The snapshots, oldest first."""
        return list(self._now.kept.snapshots)

    def add(self, model: keras.Model, snapshot: Snapshot, *, commit: bool = True) -> None:
        with self._change():
            with self._guard:
                begun, number = self._begun()
            model_file, fault, weights = begun.model, begun.needs_model, get_weights(model)
            if model_file is None and self._savable:
                model_file = self._write_model(model, number)
                self._savable = model_file is not None
            try:
                if isinstance(model_file, Draft) and model_file is not begun.model:
                    fault = self._read_back(model, model_file, weights)
                file, base = self._write_weights(model, number, begun, model_file, weights)
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
                    needs_model=fault,
                )
                if commit:
                    self.commit()

    def take(self, source: pathlib.Path, expected: File, snapshot: Snapshot) -> bool:
        """Adds a snapshot by another directory's weight file of the same model; does not commit.

        Returns:
            Whether it was added: only if files of Keras give this model's weights back, which the
            first `add` finds out.
        """
        if not self._is_exact:
            return False
        with self._change(), self._guard:
            begun, number = self._begun()
            link = functools.partial(link_or_copy, source, expected)
            self._add(
                begun=begun,
                snapshots=tuple(renumbered([*begun.snapshots, snapshot])),
                files=(*begun.files, self._draft("snapshot", number, "weights.h5", link).write()),
            )
        return True

    def _read_back(self, model: keras.Model, file: Draft, weights: Weights) -> str:
        """Why the file of the model cannot stand for it; empty if it can, or nobody can tell."""
        if self.computes_the_same is None:
            return ""
        fault, self._is_exact = fault_of(model, file.path, weights, self.computes_the_same)
        if fault:
            warnings.warn(
                f"The saved copy of the model cannot be used: {fault} "
                "`SnapshotEnsemble.load` will need the model as `model=`.",
                stacklevel=2,
            )
        return fault

    def _write_weights(
        self, model: keras.Model, number: int, begun: Manifest, model_file: Any, weights: Weights
    ) -> tuple[Draft, Any]:
        """A file with the model's weights, and the base of the files that hold differences.

        Keras's own files are used if they give back the weights bit for bit, others if not.
        """
        whole = None
        if self._is_exact is not False and not is_worth_it(model):
            whole = self._draft(
                "snapshot", number, "weights.h5", lambda path: save_weights(model, path)
            ).write()
            if self._gives_back(model, whole, weights):
                return whole, begun.base
            whole.discard()
        base = begun.base
        is_new = isinstance(model_file, Draft) and model_file is not begun.model
        if base is None and is_new and self._gives_back(model, model_file, weights):
            base = model_file
            self._base = (base.name, weights)
        old = None if base is None else self._weights_of(model, base)
        file = self._draft(
            "snapshot", number, "npz", lambda path: write_difference(path, weights, old)
        )
        if base is None:
            base, self._base = file, (file.name, weights)
        return file, base

    def _gives_back(self, model: keras.Model, file: Draft, weights: Weights) -> bool:
        """Whether Keras's files give back weights bit for bit, which is found out once."""
        if self._is_exact is None:
            self._is_exact = gives_back(model, file.path, weights)
        return self._is_exact

    def _weights_of(self, model: keras.Model, base: Any) -> Weights:
        name, weights = self._base
        if name != base.name:
            self.wait_for_writes()
            weights = read_base(model, self._path(base))
            self._base = (base.name, weights)
        return weights

    def base(self, model: keras.Model, cycle: int | None = None) -> Weights:
        kept = self._now.kept
        if cycle is None:
            return self._base_of(kept, model)
        for index, snapshot in enumerate(kept.snapshots):
            if snapshot.cycle == cycle:
                return self._weights(kept, model, index)
        raise SnapshotError(
            f"'{self.directory}' has no snapshot of cycle {cycle}, whose weights its state of "
            "training leaves out."
        )

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
        return inspected(self.directory, self._now)

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
            self._now.leave_out(set(damaged))

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
                    whole_file=functools.partial(self._whole_file, kept),
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
            base = self._base_of(kept, model)
            # A base of the package's own is also the file of a snapshot.
            is_base = kept.base is not None and kept.base.name == file.name
            return base if is_base else read_difference(path, base)
        return load_weights(model, path, foreign=False)

    def _whole_file(self, kept: Manifest, index: int) -> tuple[pathlib.Path, File] | None:
        self.wait_for_writes()
        file = kept.files[index]
        if _is_difference(file):
            return None
        finished = file.finish() if isinstance(file, Draft) else file
        return self.directory / file.name, finished

    def _put(self, kept: Manifest, member: Any, model: keras.Model, index: int) -> None:
        file, in_order = kept.files[index], getattr(member, "in_model_order", None)
        if _is_difference(file) or (in_order is None and type(member) is not type(model)):
            set_weights(member, self._weights(kept, model, index))
            return
        # Read directly into the variables, so that no second copy is in memory.
        self.wait_for_writes()
        if in_order is None:
            load_into(member, self._path(file))
        else:
            with assignments_sent(model, in_order):
                load_into(model, self._path(file))

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
        if self._now.kept.needs_model:
            raise SnapshotError(
                "Build and compile the same model, and pass it as `model=`: "
                f"{self._now.kept.needs_model} Received: '{path}'."
            )
        return load_model(path, custom_objects)

    def _write_model(self, model: keras.Model, number: int) -> Draft | None:
        try:
            with optimizers_hidden():
                save = functools.partial(keras.Model.save, model)
                return self._draft("model", number, "keras", save).write()
        except (OSError, MemoryError):
            raise
        except Exception as error:  # A `get_config` of the user's may raise anything.
            cause = error.__context__
            if isinstance(cause, OSError):  # `zipfile` hides that the disk is full.
                raise cause from None
            warnings.warn(
                f"The model cannot be saved, only its snapshots: {error}\n"
                "`SnapshotEnsemble.load` will need it as `model=`.",
                stacklevel=2,
            )
            return None


def _is_difference(file: Any) -> bool:
    return bool(file.name.endswith(".npz"))
