"""A directory that changes from one manifest to the next and is consistent at any time."""

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
from snapshot_ensemble.storage.manifest import (
    NAME,
    Manifest,
    describe,
    manifest_text,
    read_manifest,
    read_record,
)
from snapshot_ensemble.storage.record import Learned, Record
from snapshot_ensemble.storage.snapshot import SnapshotError

# The stores of this process that are writing, by the real paths of their directories.
_writers: weakref.WeakValueDictionary[str, "ManifestDirectory"] = weakref.WeakValueDictionary()


@dataclasses.dataclass
class Contents:
    """What this process knows of a directory: everything that a transaction rolls back.

    Attributes:
        record: What is kept besides the snapshots; updated during training.
        kept: The manifest that the directory will have when all writes have finished.
        saved: The manifest in the directory.
        version: A number that changes whenever the snapshots change.
        saved_version: The version of `saved`.
        pending: The manifest with additions that are not yet committed.
        known: The manifest's text when it was last read or written; None if there was none.
        claimed: Whether the contents of the directory belong to this store.
        restarting: Whether the next added file replaces all existing ones.
        trusted: Whether the manifest, if any, could be read. Only then are files that it does not
            name known to be left over from a killed writer.
    """

    record: Record = dataclasses.field(default_factory=Record)
    kept: Manifest = dataclasses.field(default_factory=Manifest)
    saved: Manifest = dataclasses.field(default_factory=Manifest)
    version: int = 0
    saved_version: int = 0
    pending: Manifest | None = None
    known: bytes | None = None
    claimed: bool = False
    restarting: bool = False
    trusted: bool = True

    def copy(self) -> "Contents":
        """A copy to roll back to."""
        return dataclasses.replace(self, record=dataclasses.replace(self.record))


class ManifestDirectory:
    """A directory of files, and a manifest that names those that count.

    A file is written completely and never changed. Then the manifest is replaced atomically, and
    files that it no longer names are removed. A reader, or a resumed run, therefore sees the
    contents either before or after a change.

    Inside `transaction()` a background thread does this, in the same order. The store shows a
    change at once. If a write fails, a later call raises the error, at the latest at the end of
    the transaction, and the store drops everything that is not in the directory.

    Args:
        directory: Path of the directory. It is created when something is written.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = pathlib.Path(directory).absolute()  # The working folder may change.
        self._now = Contents()
        self._lock = DirectoryLock(self.directory)
        self._background = Background()

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Self:
        """Opens the store in a directory; raises `SnapshotError` if there is none."""
        writer = _writers.get(os.path.realpath(directory))
        if writer is not None:
            writer.wait_for_writes()  # So that it sees what this process has kept.
        store = cls(directory)
        store.read()
        return store

    @property
    def record(self) -> Record:
        return self._now.record

    @record.setter
    def record(self, record: Record) -> None:
        self._now.record = record

    @property
    def version(self) -> int:
        return self._now.version

    @property
    def claimed(self) -> bool:
        return self._now.claimed

    @property
    def replacing(self) -> bool:
        """Whether a run has begun that will replace the existing contents."""
        return self._now.kept.replacing

    def read(self) -> None:
        """Reads the contents of the directory.

        Raises:
            SnapshotError: If there is no manifest, or it is damaged.
        """
        known = self._manifest_now()
        manifest = read_manifest(self.directory / NAME, known)
        record = read_record(manifest.ensemble)
        self._now = Contents(record, manifest, manifest, known=known, claimed=True)

    def claim(self, *, resume: bool, overwrite: bool) -> None:
        """Makes the contents of the directory this store's own, if that is allowed.

        Raises:
            ValueError: If the directory has contents that may be neither resumed nor overwritten.
            SnapshotError: If the manifest to resume from is damaged.
        """
        if self.claimed:
            return
        free, known = self._is_free(), self._manifest_now()
        if resume and known is not None and not free:
            self.read()
            return
        if not free and not overwrite:
            raise ValueError(
                f"The directory is not empty. Received: directory='{self.directory}'. Choose "
                "another one, load the ensemble in it with `SnapshotEnsemble.load`, or pass "
                "`overwrite=True` to replace it."
            )
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"`directory` is a file. Received: directory='{self.directory}'")
        record = self.record
        try:
            if not free:
                self.read()
        except SnapshotError:
            self._now.trusted = False
        self._now.record, self._now.known, self._now.claimed = record, known, True

    def _is_free(self) -> bool:
        """Whether the directory holds nothing but what a writer killed at its start leaves."""
        if not self.directory.exists():
            return True
        if not self.directory.is_dir():
            return False
        names = [file.name for file in self.directory.iterdir()]
        written = math.inf
        if NAME in names:
            try:
                manifest = read_manifest(self.directory / NAME, self._manifest_now())
            except SnapshotError:
                return False
            if manifest.names() or manifest.replacing:
                return False
            written = manifest.written
        # Without a manifest, a numbered file may belong to an ensemble whose manifest was lost.
        return all(name in (LOCK, NAME) or _is_left_over(name, written) for name in names)

    @contextlib.contextmanager
    def transaction(self, *, resume: bool = False, overwrite: bool = False) -> Iterator[None]:
        """Claims the directory and keeps other writers out; see `SnapshotStore.transaction`."""
        before, is_safe = self._now.copy(), False
        is_new, had_lock = not self.directory.exists(), self._lock.exists
        try:
            self.claim(resume=resume, overwrite=overwrite)
            claimed = self._now.copy()
            with self.writing():
                try:
                    yield
                    self.settle()
                except BaseException:
                    # The original exception matters more than an error in here.
                    with contextlib.suppress(OSError):
                        self.settle()
                    is_safe = self._now.saved.names() != claimed.saved.names()
                    with contextlib.suppress(OSError):
                        if is_safe:
                            self.commit()
                            self.settle()
                        else:
                            self._undo(claimed)
                            if not had_lock:
                                self._lock.remove()
                            if is_new:
                                self.directory.rmdir()
                    raise
        except BaseException:
            if not is_safe:
                self._now = before
            raise

    def _undo(self, claimed: Contents) -> None:
        """Restores the directory as it was when claimed; its manifest names no new files yet."""
        self._now.kept = claimed.kept
        self._clean()
        if claimed.known is None:
            (self.directory / NAME).unlink(missing_ok=True)
        elif self._now.known != claimed.known:
            self._publish(claimed.known)

    def restart(self) -> None:
        """Makes the next added file replace all existing ones."""
        now = self._now
        if not now.kept.replacing and now.saved.names():
            # So that, if the run is killed before it has replaced anything, resuming it does not
            # resume the old run instead.
            now.kept = dataclasses.replace(now.kept, replacing=True)
            self._submit()
        now.restarting = True

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Keeps other writers out, and checks that none has written since the last read.

        Raises:
            BlockingIOError: If another process is writing.
            SnapshotError: If another process has written.
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

    def wait_for_writes(self) -> None:
        """Waits until everything kept so far has been written, or has failed to be."""
        self._background.wait()

    def settle(self) -> None:
        """Waits until everything kept is in the directory, and drops what could not be written.

        An interrupt (Ctrl-C) is raised only after that.
        """
        if not self._background.busy:
            return
        interrupt: KeyboardInterrupt | None = None
        try:
            self._background.wait()
        except KeyboardInterrupt as error:
            interrupt = error
        now = self._now
        try:
            self._background.finish()
        except BaseException:
            now.version = now.saved_version
            now.record.learned = read_record(now.saved.ensemble).learned
            if interrupt is None:
                raise
        finally:
            now.kept = dataclasses.replace(now.saved, written=now.kept.written)
            with contextlib.suppress(OSError):  # The directory may be gone.
                self._clean()
        if interrupt is not None:
            raise interrupt

    def is_current(self) -> bool:
        """Whether nobody else has written to the directory since it was read."""
        self.settle()
        return self._manifest_now() == self._now.known

    def _manifest_now(self) -> bytes | None:
        return manifest_text(self.directory / NAME)

    def _clean(self) -> None:
        """Removes files left over from a killed writer, which no manifest names."""
        if not self._now.trusted:
            return
        for path in self.directory.iterdir():
            if _is_left_over(path.name, self._now.kept.written):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _begun(self) -> tuple[Manifest, int]:
        """The manifest that the next file is added to, and the number of that file."""
        if self._background.failed:
            self.settle()
        now = self._now
        # Each number is used once, even if its write failed.
        number = (now.pending or now.kept).written + 1
        now.kept = dataclasses.replace(now.kept, written=number)
        if now.pending is not None:
            return dataclasses.replace(now.pending, written=number), number
        return (Manifest(written=number) if now.restarting else now.kept), number

    def _add(self, **changes: Any) -> None:
        """Changes the manifest that the next commit will write."""
        now = self._now
        begun = changes.pop("begun", now.kept)
        now.pending = dataclasses.replace(begun, replacing=False, **changes)
        now.restarting = False

    def commit(self, learned: Learned | None = None) -> None:
        """Writes the manifest for what is kept.

        Args:
            learned: What was learned about the members, if they have changed.
        """
        if not self.claimed:
            return
        with self._explained(), self.writing():
            now = self._now
            if now.pending is not None:
                if now.pending.files != now.kept.files:
                    self._members_changed(learned)
                now.kept, now.pending = now.pending, None
            now.kept = dataclasses.replace(now.kept, ensemble=describe(now.record))
            self._submit()

    def _members_changed(self, learned: Learned | None = None) -> None:
        self._now.version += 1
        self._now.record.learned = learned or Learned()

    def _submit(self) -> None:
        """Writes the manifest of what is kept, in the background."""
        kept, version = self._now.kept, self._now.version

        def write() -> None:
            with self._explained():
                self._write(kept, version)

        self._background.submit(write)

    def _write(self, manifest: Manifest, version: int) -> None:
        now = self._now
        if now.known is None:
            # Begin with an empty manifest: numbered files without one could be anyone's, and would
            # keep a run that is killed here from being resumed.
            record = {**manifest.ensemble, "weights": None, "members": None}
            self._publish(Manifest(ensemble=record).to_json().encode())
        manifest, before = manifest.finished(), now.saved
        self._publish(manifest.to_json().encode())
        now.saved, now.saved_version, now.trusted = manifest, version, True
        for name in before.names() - manifest.names():
            with contextlib.suppress(OSError):  # A leftover file does no harm.
                (self.directory / name).unlink()

    def _publish(self, text: bytes) -> None:
        self._draft(NAME, lambda path: pathlib.Path(path).write_bytes(text)).finish()
        self._now.known = text

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Adds to an error of the operating system what it means for the ensemble."""
        try:
            yield
        except OSError as error:
            if getattr(error, "explained", False) or isinstance(error, BlockingIOError):
                raise
            if self.directory.exists():
                kept = counted(len(self._now.saved.snapshots), "snapshot")
                consequence = f"What was written before is intact, including {kept}."
            else:
                consequence = "The directory no longer exists."
            explained = OSError(
                error.errno, f"'{self.directory}' cannot be written to: {error}. {consequence}"
            )
            explained.explained = True  # type: ignore[attr-defined]
            raise explained from error

    def _draft(self, name: str, write: Callable[[str], Any]) -> Draft:
        return Draft(self.directory, name, write)

    def _path(self, file: Any) -> Any:
        """The path of a file, after checking that it is intact; None for None."""
        return None if file is None else file.checked(self.directory)


def _is_left_over(name: str, written: float) -> bool:
    """Whether a file name is temporary, or numbered above the manifest's `written`."""
    number = re.fullmatch(r"(?:snapshot|model|state)-(\d{4,})\.(?:weights\.h5|keras|npz)", name)
    return name.startswith("writing-") or (number is not None and int(number[1]) > written)
