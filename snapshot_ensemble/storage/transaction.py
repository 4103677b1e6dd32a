"""A directory that goes from one manifest to the next, whole at every moment."""

import contextlib
import dataclasses
import math
import os
import pathlib
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Self

from snapshot_ensemble.checks import counted
from snapshot_ensemble.storage.atomic_file import Draft
from snapshot_ensemble.storage.background import Background
from snapshot_ensemble.storage.lock import NAME as LOCK
from snapshot_ensemble.storage.lock import DirectoryLock
from snapshot_ensemble.storage.manifest import NAME, Manifest, plain, read_manifest
from snapshot_ensemble.storage.snapshot import SnapshotError

# Those of this process that have something under way, by their directories' real paths.
_writers: weakref.WeakValueDictionary[str, "ManifestDirectory"] = weakref.WeakValueDictionary()


class ManifestDirectory:
    """Files, beside a manifest that alone says what they are.

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
        self._restarting = False

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Self:
        """The store that a manifest describes; raises `SnapshotError` if there is none."""
        writer = _writers.get(os.path.realpath(directory))
        if writer is not None:
            writer._background.wait()  # What this process has kept is there for it at once.
        store = cls(directory)
        store._kept = store._saved = read_manifest(store.directory / NAME, store._known)
        return store

    @classmethod
    def create(cls, directory: str | os.PathLike[str], overwrite: bool) -> Self:
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

    def _draft(self, name: str, write: Callable[[str], Any]) -> Draft:
        return Draft(self.directory, name, write)

    def _path(self, file: Any) -> Any:
        """The path of a file that is as it was saved; None of none."""
        return None if file is None else file.checked(self.directory)


def _is_left(name: str, written: float) -> bool:
    """Whether a file of this name is not whole, or later than a manifest that says `written`."""
    number = re.fullmatch(r"(?:snapshot|model|state)-(\d{4,})\.(?:weights\.h5|keras|npz)", name)
    return name.startswith("writing-") or (number is not None and int(number[1]) > written)
