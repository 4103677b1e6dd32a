"""Snapshots in a directory: weight files, beside a manifest that alone says what is in them."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import uuid
import warnings
from collections.abc import Callable
from typing import Any

import keras

from snapshot_ensemble.manifest import NAME, File, Manifest, read_manifest
from snapshot_ensemble.snapshots import (
    Snapshot,
    SnapshotError,
    Weights,
    load_weights,
    renumbered,
    weights_only,
)


class DirectoryStore:
    """Snapshots as `.weights.h5` files.

    Files are written first and never changed; then the manifest is replaced in one step; then
    files that it no longer names are removed. A reader, or a run that broke off, finds the state
    before a change or the state after it.

    Args:
        directory: Path of the directory. It is made when something is written.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = pathlib.Path(directory).absolute()  # Whoever changes folder later.
        self.describe: Callable[[], dict[str, Any]] = dict  # What the manifest says beside.
        self.version = 0
        self._kept = Manifest()
        self._pending: Manifest | None = None  # Written, and not yet in the manifest.
        self._restarting = False
        self._savable = True  # Until it shows that the model is not.

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> "DirectoryStore":
        """The store that a manifest describes; raises `SnapshotError` if there is none."""
        store = cls(directory)
        store._kept = read_manifest(store.directory / NAME)
        return store

    @classmethod
    def create(cls, directory: str | os.PathLike[str], overwrite: bool) -> "DirectoryStore":
        """A store where nothing lies, or where what lies there may be replaced.

        With `overwrite` the snapshots of an ensemble that lies there go when the first new one
        is added; other files stay.
        """
        path = pathlib.Path(directory)
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return cls(directory)
        if not overwrite:
            raise ValueError(
                f"The directory holds something already. Received: directory='{directory}'. "
                "Choose another one, load what is there with `SnapshotEnsemble.load`, or pass "
                "`overwrite=True` to replace it."
            )
        if not path.is_dir():
            raise ValueError(f"`directory` is a file. Received: directory='{directory}'")
        try:
            store = cls.open(directory)
        except SnapshotError:
            return cls(directory)
        store.restart()
        return store

    @property
    def snapshots(self) -> list[Snapshot]:
        """The snapshots that there are, oldest first."""
        return list(self._kept.snapshots)

    @property
    def described(self) -> dict[str, Any]:
        """What the manifest said beside the snapshots when it was opened."""
        return self._kept.ensemble

    def restart(self, restarting: bool = True) -> None:
        self._restarting = restarting

    def add(self, model: keras.Model, snapshot: Snapshot, *, commit: bool = True) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        # Names are used once, also those of a write that failed.
        number = (self._pending or self._kept).written + 1
        self._kept = dataclasses.replace(self._kept, written=number)
        base = self._pending or self._kept
        if self._restarting:
            base = Manifest()
        model_file = base.model
        if model_file is None and self._savable:
            model_file = self._write_model(model, number)
            self._savable = model_file is not None
        with weights_only(model):
            file = self._write(f"snapshot-{number:04}.weights.h5", model.save_weights)
        self._pending = Manifest(
            tuple(renumbered([*base.snapshots, snapshot])),
            (*base.files, file),
            model_file,
            number,
        )
        self._restarting = False
        if commit:
            self.commit()

    def keep_newest(self, count: int) -> None:
        if len(self._kept.snapshots) > count:
            self._pending = dataclasses.replace(
                self._kept,
                snapshots=tuple(renumbered(self._kept.snapshots[-count:])),
                files=self._kept.files[-count:],
            )
            self.commit()

    def commit(self) -> None:
        before, version = self._kept, self.version
        if self._pending is not None:
            self._kept, self.version = self._pending, version + 1
            self._pending = None
        # Not before now: what is said may depend on which members there are.
        now = self._kept = dataclasses.replace(self._kept, ensemble=self.describe())
        text = now.to_json()
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            self._write(NAME, lambda path: pathlib.Path(path).write_text(text, "utf-8"))
        except BaseException:
            self._kept = dataclasses.replace(before, written=now.written)
            self.version = version
            raise
        for name in before.names() - now.names():
            with contextlib.suppress(OSError):  # No longer named, it does no harm.
                (self.directory / name).unlink()

    def weights(self, model: keras.Model, index: int) -> Weights:
        return load_weights(model, self._checked(self._kept.files[index]), foreign=False)

    def model(self, custom_objects: dict[str, Any] | None = None) -> keras.Model:
        """The model that the snapshots belong to, compiled as it was."""
        if self._kept.model is None:
            raise SnapshotError(
                f"'{self.directory / NAME}' names no model, since it could not be saved. "
                "Build and compile the same model, and pass it as `model=`."
            )
        path = self._checked(self._kept.model)
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

    def _write_model(self, model: keras.Model, number: int) -> File | None:
        try:
            with weights_only(model):
                return self._write(f"model-{number:04}.keras", model.save)
        except (NotImplementedError, TypeError, ValueError) as error:
            warnings.warn(
                f"The model cannot be saved, only its snapshots: {error}\n"
                "`SnapshotEnsemble.load` will need it as `model=`.",
                stacklevel=2,
            )
            return None

    def _write(self, name: str, write: Callable[[str], Any]) -> File:
        """Writes a file beside its place, and moves it there."""
        # Keras tells formats apart by the ending.
        temporary = self.directory / f"writing-{uuid.uuid4().hex}-{name}"
        try:
            write(str(temporary))
            with temporary.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                size = os.fstat(file.fileno()).st_size
                os.fsync(file.fileno())
            temporary.replace(self.directory / name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(self.directory)
        return File(name, size, digest)

    def _checked(self, file: File) -> pathlib.Path:
        path = self.directory / file.name
        try:
            with path.open("rb") as opened:
                size = os.fstat(opened.fileno()).st_size
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise SnapshotError(f"'{path}' cannot be read: {error}") from error
        if size != file.size or digest != file.sha256:
            raise SnapshotError(
                f"'{path}' is not the file that was saved. Received: {size} bytes with SHA-256 "
                f"{digest}; the manifest says {file.size} bytes with {file.sha256}"
            )
        return path


def _sync_directory(directory: pathlib.Path) -> None:
    if os.name == "posix":  # Elsewhere a directory cannot be opened.
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
