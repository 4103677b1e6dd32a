"""Snapshots in a directory: weight files, beside a manifest that alone says what is in them."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import re
import uuid
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras

from snapshot_ensemble.locking import NAME as LOCK
from snapshot_ensemble.locking import DirectoryLock
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
        self._lock = DirectoryLock(self.directory)
        self._known = self._manifest_now()
        self._kept = Manifest()
        self._pending: Manifest | None = None  # Written, and not yet in the manifest.
        self._restarting = False
        self._savable = True  # Until it shows that the model is not.

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> "DirectoryStore":
        """The store that a manifest describes; raises `SnapshotError` if there is none."""
        store = cls(directory)
        store._kept = read_manifest(store.directory / NAME, store._known)
        return store

    @classmethod
    def create(cls, directory: str | os.PathLike[str], overwrite: bool) -> "DirectoryStore":
        """A store where nothing lies, or where what lies there may be replaced.

        With `overwrite` the snapshots of an ensemble that lies there go when the first new one
        is added; other files stay.
        """
        path = pathlib.Path(directory)
        # What a writer that was killed may leave is nothing.
        if not path.exists() or (path.is_dir() and all(map(_is_left, path.iterdir()))):
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

    @property
    def replacing(self) -> bool:
        """Whether a run has begun that will take the place of what there is."""
        return self._kept.replacing

    def restart(self, restarting: bool = True) -> None:
        if self._kept.replacing != restarting and self._known is not None:
            # So that, if the run breaks off before it has replaced anything, it is not taken for
            # the one that is still here.
            with self.writing():
                self._put(dataclasses.replace(self._kept, replacing=restarting))
        self._restarting = restarting

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Keeps other writers out, and makes sure that none was here since it was read.

        Raises:
            BlockingIOError: If another process writes.
            SnapshotError: If another one has written.
        """
        entered = self._lock.held
        with self._lock:
            if not entered:
                if not self.is_current():
                    raise SnapshotError(
                        f"'{self.directory / NAME}' was changed by another process since it was "
                        "read. Load the ensemble again."
                    )
                self._clean()
            yield

    def is_current(self) -> bool:
        """Whether nobody else has written since it was read."""
        return self._manifest_now() == self._known

    def _manifest_now(self) -> bytes | None:
        try:
            return (self.directory / NAME).read_bytes()
        except OSError:
            return None

    def _clean(self) -> None:
        """Removes what a writer that was killed has left: no manifest ever named it."""
        ours = r"(?:snapshot|model|state)-(\d{4,})\.(?:weights\.h5|keras|npz)"
        for path in self.directory.iterdir():
            number = re.fullmatch(ours, path.name)
            if path.name.startswith("writing-") or (number and int(number[1]) > self._kept.written):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _base(self) -> tuple[Manifest, int]:
        """What the next file is added to, and the number of that file."""
        # Names are used once, also those of a write that failed.
        number = (self._pending or self._kept).written + 1
        self._kept = dataclasses.replace(self._kept, written=number)
        if self._pending is not None:
            return dataclasses.replace(self._pending, written=number), number
        return (Manifest(written=number) if self._restarting else self._kept), number

    def add(self, model: keras.Model, snapshot: Snapshot, *, commit: bool = True) -> None:
        with self._explained(), self.writing():
            base, number = self._base()
            model_file = base.model
            if model_file is None and self._savable:
                model_file = self._write_model(model, number)
                self._savable = model_file is not None
            with weights_only(model):
                file = self._write(f"snapshot-{number:04}.weights.h5", model.save_weights)
            self._pending = dataclasses.replace(
                base,
                snapshots=tuple(renumbered([*base.snapshots, snapshot])),
                files=(*base.files, file),
                model=model_file,
                replacing=False,
            )
            self._restarting = False
            if commit:
                self.commit()

    def keep_state(self, write: Callable[[str], None]) -> None:
        """Keeps a file with the state of training in the place of the one before."""
        with self._explained(), self.writing():
            base, number = self._base()
            file = self._write(f"state-{number:04}.npz", write)
            self._pending = dataclasses.replace(base, state=file, replacing=False)
            self._restarting = False
            self.commit()

    @property
    def state(self) -> pathlib.Path | None:
        """The file with the state of the run that was last; None if none was kept."""
        return None if self._kept.state is None else self._checked(self._kept.state)

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

    def commit(self) -> None:
        before, version = self._kept, self.version
        now = self._kept
        if self._pending is not None:
            now, self._pending = self._pending, None
            changed = now.files != before.files
            self._kept, self.version = now, version + changed
        try:
            # Not before now: what is said may depend on which members there are.
            now = dataclasses.replace(now, ensemble=self.describe())
            with self._explained(), self.writing():
                self._put(now)
        except BaseException:
            self._kept = dataclasses.replace(before, written=now.written)
            self.version = version
            raise
        for name in before.names() - now.names():
            with contextlib.suppress(OSError):  # No longer named, it does no harm.
                (self.directory / name).unlink()

    def _put(self, manifest: Manifest) -> None:
        """Replaces the manifest."""
        text = manifest.to_json()
        self._write(NAME, lambda path: pathlib.Path(path).write_text(text, "utf-8"))
        self._kept, self._known = manifest, text.encode()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Says of an error of the operating system what it means for the ensemble."""
        try:
            yield
        except OSError as error:
            if getattr(error, "explained", False) or isinstance(error, BlockingIOError):
                raise
            if self.directory.exists():
                count = len(self._kept.snapshots)
                told = f"What was written before is as it was, {count} snapshots with it."
            else:
                told = "The directory is gone."
            told = f"'{self.directory}' cannot be written to: {error}. {told}"
            explained = OSError(error.errno, told)
            explained.explained = True  # type: ignore[attr-defined]
            raise explained from error

    def inspect(self) -> dict[str, Any]:
        """What the manifest says, and of each file whether it is as it was saved."""
        kept, entries = self._kept, []
        places: list[tuple[File | None, Snapshot | None]] = [(kept.model, None)]
        places += [*zip(kept.files, kept.snapshots, strict=True), (kept.state, None)]
        for file, snapshot in places:
            if file is None:
                continue
            try:
                self._checked(file)
                intact = True
            except SnapshotError:
                intact = False
            names = ("index", "cycle", "epoch", "step", "learning_rate", "metrics")
            facts = {name: getattr(snapshot, name, None) for name in names}
            entries.append({"name": file.name, "bytes": file.size, "intact": intact, **facts})
        ensemble = {
            name: kept.ensemble.get(name) for name in ("weights", "temperature", "settings")
        }
        return {"files": entries, **ensemble}

    def damaged(self, model: keras.Model | None = None) -> dict[int, SnapshotError]:
        """What is wrong with snapshots, by index; with a model also whether they are its own."""
        found = {}
        for index, file in enumerate(self._kept.files):
            try:
                self._checked(file)
                if model is not None:
                    self.weights(model, index)
            except SnapshotError as error:
                found[index] = error
        return found

    def leave_out(self, indices: set[int]) -> None:
        """Goes on without these snapshots, here and not in the directory."""
        kept = [i for i in range(len(self._kept.files)) if i not in indices]
        self._kept = dataclasses.replace(
            self._kept,
            snapshots=tuple(renumbered([self._kept.snapshots[i] for i in kept])),
            files=tuple(self._kept.files[i] for i in kept),
            state=None,
        )

    def weights(self, model: keras.Model, index: int) -> Weights:
        return load_weights(model, self._checked(self._kept.files[index]), foreign=False)

    def model(self, custom_objects: dict[str, Any] | None = None) -> keras.Model:
        """The model that the snapshots belong to, compiled as it was."""
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


def _is_left(path: pathlib.Path) -> bool:
    return path.name == LOCK or path.name.startswith("writing-")


def _sync_directory(directory: pathlib.Path) -> None:
    if os.name == "posix":  # Elsewhere a directory cannot be opened.
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
