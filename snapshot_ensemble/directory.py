"""Snapshots in a directory: weight files, beside a manifest that alone says what is in them."""

import contextlib
import dataclasses
import math
import os
import pathlib
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras

from snapshot_ensemble.background import Background
from snapshot_ensemble.checks import counted
from snapshot_ensemble.files import Draft
from snapshot_ensemble.locking import NAME as LOCK
from snapshot_ensemble.locking import DirectoryLock
from snapshot_ensemble.manifest import NAME, Manifest, plain, read_manifest
from snapshot_ensemble.sharing import is_worth_it, read_base, read_difference, write_difference
from snapshot_ensemble.snapshots import (
    Snapshot,
    SnapshotError,
    Weights,
    load_into,
    load_weights,
    renumbered,
    set_weights,
    weights_only,
)

# Those of this process that have something under way, by their directories' real paths.
_writers: weakref.WeakValueDictionary[str, "DirectoryStore"] = weakref.WeakValueDictionary()


class DirectoryStore:
    """Snapshots as `.weights.h5` files.

    Files are written first and never changed; then the manifest is replaced in one step; then
    files that it no longer names are removed. A reader, or a run that broke off, finds the state
    before a change or the state after it.

    Inside `writing()` that happens behind the caller's back, in the same order: what is kept is
    seen at once, and an error comes with a later call, at the latest with the end of `writing()`,
    and then nothing is kept that is not in the directory.

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
        self._saved = self._kept  # What the manifest says, as far as it is known.
        self._saved_version = 0
        self._pending: Manifest | None = None  # Written, and not yet in the manifest.
        self._background = Background()
        self._base: tuple[str, Weights] = ("", [])  # A base that was read or written: its name.
        self._restarting = False
        self._savable = True  # Until it shows that the model is not.

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> "DirectoryStore":
        """The store that a manifest describes; raises `SnapshotError` if there is none."""
        writer = _writers.get(os.path.realpath(directory))
        if writer is not None:
            writer._background.wait()  # What this process has kept is there for it at once.
        store = cls(directory)
        store._kept = store._saved = read_manifest(store.directory / NAME, store._known)
        return store

    @classmethod
    def create(cls, directory: str | os.PathLike[str], overwrite: bool) -> "DirectoryStore":
        """A store where nothing lies, or where what lies there may be replaced.

        With `overwrite` the snapshots of an ensemble that lies there go when the first new one
        is added; other files stay.
        """
        path = pathlib.Path(directory)
        if cls.is_free(directory):
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

    @classmethod
    def is_free(cls, directory: str | os.PathLike[str]) -> bool:
        """Whether nothing lies there but what a writer leaves that was killed at once."""
        path = pathlib.Path(directory)
        if not path.exists():
            return True
        found = [file.name for file in path.iterdir()] if path.is_dir() else [NAME]
        try:
            kept = cls.open(directory)._kept if NAME in found else None
        except SnapshotError:
            return False
        if kept is not None and (kept.names() or kept.replacing):
            return False
        # Without a manifest, a numbered file may be a member of an ensemble that lost it.
        return all(
            name in (LOCK, NAME) or _is_left(name, math.inf if kept is None else kept.written)
            for name in found
        )

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
                self._kept = dataclasses.replace(self._kept, replacing=restarting)
                self._submit()
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
                _writers[os.path.realpath(self.directory)] = self
            try:
                yield
            finally:
                if not entered:
                    self.settle()

    def settle(self) -> None:
        """Waits until all that is kept is in the directory; if it cannot be, it is not kept."""
        if not self._background.busy:
            return
        try:
            self._background.join()
        except BaseException:
            self.version = self._saved_version
            raise
        finally:
            self._kept = dataclasses.replace(self._saved, written=self._kept.written)
            with contextlib.suppress(OSError):  # The directory may be gone.
                self._clean()

    def is_current(self) -> bool:
        """Whether nobody else has written since it was read."""
        self.settle()
        return self._manifest_now() == self._known

    def _manifest_now(self) -> bytes | None:
        try:
            return (self.directory / NAME).read_bytes()
        except OSError:
            return None

    def _clean(self) -> None:
        """Removes what a writer that was killed has left: no manifest ever named it."""
        for path in self.directory.iterdir():
            if _is_left(path.name, self._kept.written):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _begun(self) -> tuple[Manifest, int]:
        """What the next file is added to, and the number of that file."""
        if self._background.failed:
            self.settle()
        # Names are used once, also those of a write that failed.
        number = (self._pending or self._kept).written + 1
        self._kept = dataclasses.replace(self._kept, written=number)
        if self._pending is not None:
            return dataclasses.replace(self._pending, written=number), number
        return (Manifest(written=number) if self._restarting else self._kept), number

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

    def commit(self) -> None:
        with self._explained(), self.writing():
            if self._pending is not None:
                self.version += self._pending.files != self._kept.files
                self._kept, self._pending = self._pending, None
            # Not before now: what is said may depend on which members there are.
            self._kept = dataclasses.replace(self._kept, ensemble=plain(self.describe()))
            self._submit()

    def _submit(self) -> None:
        """Lets the manifest say what is kept."""
        now, version = self._kept, self.version

        def settle() -> None:
            with self._explained():
                self._settle(now, version)

        self._background.submit(settle)

    def _settle(self, manifest: Manifest, version: int) -> None:
        if self._known is None:
            # Numbered files that a manifest never knew could be anyone's, and would stop a run
            # that was killed here from going on.
            nothing = {**manifest.ensemble, "weights": None, "members": None}
            self._publish(Manifest(ensemble=nothing))
        manifest, before = manifest.finished(), self._saved
        self._publish(manifest)
        self._saved, self._saved_version = manifest, version
        for name in before.names() - manifest.names():
            with contextlib.suppress(OSError):  # No longer named, it does no harm.
                (self.directory / name).unlink()

    def _publish(self, manifest: Manifest) -> None:
        text = manifest.to_json()
        self._draft(NAME, lambda path: pathlib.Path(path).write_text(text, "utf-8")).finish()
        self._known = text.encode()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Says of an error of the operating system what it means for the ensemble."""
        try:
            yield
        except OSError as error:
            if getattr(error, "explained", False) or isinstance(error, BlockingIOError):
                raise
            if self.directory.exists():
                kept = counted(len(self._saved.snapshots), "snapshot")
                told = f"What was written before is as it was, {kept} with it."
            else:
                told = "The directory is gone."
            told = f"'{self.directory}' cannot be written to: {error}. {told}"
            explained = OSError(error.errno, told)
            explained.explained = True  # type: ignore[attr-defined]
            raise explained from error

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

    def _draft(self, name: str, write: Callable[[str], Any]) -> Draft:
        return Draft(self.directory, name, write)

    def _path(self, file: Any) -> Any:
        """The path of a file that is as it was saved; None of none."""
        return None if file is None else file.checked(self.directory)


def _is_difference(file: Any) -> bool:
    return bool(file.name.endswith(".npz"))


def _is_left(name: str, written: float) -> bool:
    """Whether a file of this name is not whole, or later than a manifest that says `written`."""
    number = re.fullmatch(r"(?:snapshot|model|state)-(\d{4,})\.(?:weights\.h5|keras|npz)", name)
    return name.startswith("writing-") or (number is not None and int(number[1]) > written)
