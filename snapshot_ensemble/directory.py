"""Snapshots in a directory: weight files beside a manifest that alone says what is in them."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import uuid
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.snapshots import (
    Snapshot,
    SnapshotError,
    Weights,
    load_weights,
    renumbered,
    weights_only,
)

MANIFEST = "ensemble.json"
FORMAT = "snapshot_ensemble"
VERSION = 1


class DirectoryStore:
    """Snapshots as `.weights.h5` files beside a manifest that alone says what is in them.

    The manifest is replaced last and in one step, so that a reader, or a run that broke off,
    finds the state before a change or the state after it.

    Args:
        directory: Path of the directory. It is made when something is written.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = pathlib.Path(directory).absolute()  # Whoever changes folder later.
        self.snapshots: list[Snapshot] = []
        self.describe: Callable[[], dict[str, Any]] = dict  # What else the manifest shall say.
        self.described: dict[str, Any] = {}  # What it said when it was opened.
        self._files: list[dict[str, Any]] = []
        self._model_file: dict[str, Any] | None = None
        self._written = 0  # Numbers the files, so that no name is used twice.
        self._obsolete: list[str] = []  # Files to remove once no manifest names them.
        self._restarting = False

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> "DirectoryStore":
        """The store that a manifest describes; raises `SnapshotError` if there is none."""
        store = cls(directory)
        path = store.directory / MANIFEST
        manifest = _read_manifest(path)
        try:
            entries = manifest["snapshots"]
            store._model_file = manifest["model"] and _checked_entry(manifest["model"])
            store._files = [_checked_entry(entry["file"]) for entry in entries]
            store.snapshots = [_snapshot_from_json(i, entry) for i, entry in enumerate(entries)]
            store._written = int(manifest["written"])
            store.described = dict(manifest["ensemble"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SnapshotError(f"'{path}' is not as it was written: {error!r}") from error
        return store

    @classmethod
    def create(cls, directory: str | os.PathLike[str], overwrite: bool) -> "DirectoryStore":
        """A store where nothing lies, or where what lies there may be replaced.

        With `overwrite` the snapshots of an ensemble that lies there go when the first new one
        is added; other files stay.
        """
        if not cls.occupied(directory):
            return cls(directory)
        if not overwrite:
            raise ValueError(
                f"The directory holds something already. Received: directory='{directory}'. "
                "Choose another one, load what is there with `SnapshotEnsemble.load`, or pass "
                "`overwrite=True` to replace it."
            )
        try:
            store = cls.open(directory)
        except SnapshotError:
            return cls(directory)
        store.restart()
        return store

    @staticmethod
    def occupied(directory: str | os.PathLike[str]) -> bool:
        """Whether anything at all lies at this path."""
        path = pathlib.Path(directory)
        return path.exists() and not (path.is_dir() and not any(path.iterdir()))

    def restart(self, restarting: bool = True) -> None:
        self._restarting = restarting

    def add(self, model: keras.Model, snapshot: Snapshot, *, commit: bool = True) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._restarting:
            self._obsolete = [entry["name"] for entry in (*self._files, self._model_file) if entry]
            self.snapshots, self._files, self._model_file = [], [], None
            self._restarting = False
        self._written += 1
        if self._model_file is None:
            self._add_model(model)
        with weights_only(model):
            entry = self._write(f"snapshot-{self._written:04}.weights.h5", model.save_weights)
        self._files.append(entry)
        self.snapshots = renumbered([*self.snapshots, snapshot])
        if commit:
            self.commit()

    def _add_model(self, model: keras.Model) -> None:
        try:
            with weights_only(model):
                self._model_file = self._write(f"model-{self._written:04}.keras", model.save)
        except (NotImplementedError, TypeError, ValueError) as error:
            warnings.warn(
                f"The model cannot be saved, only its snapshots: {error}\n"
                "`SnapshotEnsemble.load` will need it as `model=`.",
                stacklevel=2,
            )

    def keep_newest(self, count: int) -> None:
        dropped, self._files = self._files[:-count], self._files[-count:]
        if dropped:
            self.snapshots = renumbered(self.snapshots[-count:])
            self._obsolete += [entry["name"] for entry in dropped]
            self.commit()

    def commit(self) -> None:
        """Writes the manifest, and then removes the files that it no longer names."""
        entries = []
        for snapshot, file in zip(self.snapshots, self._files, strict=True):
            entries.append({"file": file, **dataclasses.asdict(snapshot)})
            del entries[-1]["index"]
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "written": self._written,
            "model": self._model_file,
            "snapshots": entries,
            "ensemble": self.describe(),
        }
        text = json.dumps(_to_json(manifest), indent=1, allow_nan=False)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._write(MANIFEST, lambda path: pathlib.Path(path).write_text(text, "utf-8"))
        while self._obsolete:
            (self.directory / self._obsolete.pop()).unlink(missing_ok=True)

    def weights(self, model: keras.Model, index: int) -> Weights:
        path = self._checked(self._files[index])
        return load_weights(model, path)

    def model(self, custom_objects: dict[str, Any] | None = None) -> keras.Model:
        """The model that the snapshots belong to, compiled as it was."""
        if self._model_file is None:
            raise SnapshotError(
                f"'{self.directory / MANIFEST}' names no model, since it could not be saved. "
                "Build and compile the same model, and pass it as `model=`."
            )
        path = self._checked(self._model_file)
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

    def _write(self, name: str, write: Callable[[str], Any]) -> dict[str, Any]:
        """Writes a file beside its place, moves it there and returns its entry in a manifest."""
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
        return {"name": name, "size": size, "sha256": digest}

    def _checked(self, entry: dict[str, Any]) -> pathlib.Path:
        path = self.directory / entry["name"]
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise SnapshotError(f"'{path}' cannot be read: {error}") from error
        if size != entry["size"] or digest != entry["sha256"]:
            raise SnapshotError(
                f"'{path}' is not the file that was saved. Received: {size} bytes with SHA-256 "
                f"{digest}; the manifest says {entry['size']} bytes with {entry['sha256']}"
            )
        return path


def _sync_directory(directory: pathlib.Path) -> None:
    if os.name == "posix":  # Elsewhere a directory cannot be opened.
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _to_json(value: Any) -> Any:
    """Numbers that JSON has no word for become strings that `float` reads."""
    if isinstance(value, dict):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    if isinstance(value, np.ndarray):
        value = _to_json(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


def _read_manifest(path: pathlib.Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SnapshotError(f"'{path}' is no readable manifest: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise SnapshotError(f"'{path}' is not a manifest of {FORMAT}.")
    if manifest.get("version") != VERSION:
        raise SnapshotError(
            f"'{path}' has format version {manifest.get('version')!r}; this package reads "
            f"version {VERSION}. Update snapshot-ensemble to read it."
        )
    return manifest


def _checked_entry(entry: dict[str, Any]) -> dict[str, Any]:
    name = entry["name"]
    if pathlib.PurePath(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"the file name {name!r} leads out of the directory")
    return {"name": name, "size": int(entry["size"]), "sha256": str(entry["sha256"])}


def _snapshot_from_json(index: int, entry: dict[str, Any]) -> Snapshot:
    values = {key: value for key, value in entry.items() if key != "file"}
    values["metrics"] = {name: float(value) for name, value in values["metrics"].items()}
    return Snapshot(index, **values)
