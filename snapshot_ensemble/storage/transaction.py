"""A directory that changes from one manifest to the next and is consistent at any time."""

import contextlib
import dataclasses
import os
import pathlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Self

from snapshot_ensemble.storage.atomic_file import Draft, sync_directory
from snapshot_ensemble.storage.background import Background
from snapshot_ensemble.storage.contents import (
    Contents,
    check_place,
    is_free,
    read_contents,
)
from snapshot_ensemble.storage.file_names import MANIFEST, directory_path, is_left_over, numbered
from snapshot_ensemble.storage.interrupts import interrupts_deferred
from snapshot_ensemble.storage.lock import DirectoryLock
from snapshot_ensemble.storage.manifest import Manifest, is_foreign, manifest_text, read_record
from snapshot_ensemble.storage.record import Counts, Learned, Record
from snapshot_ensemble.storage.snapshot import SnapshotError
from snapshot_ensemble.storage.view import FilesInUse

# The stores of this process that are writing, by the real paths of their directories.
_writers: weakref.WeakValueDictionary[str, "ManifestDirectory"] = weakref.WeakValueDictionary()


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
        self.directory = directory_path(directory)
        self._now = Contents()
        self._lock = DirectoryLock(self.directory)
        self._background = Background()
        # Held while what is kept changes, but not while snapshots are read or written. The
        # background thread never takes it, so that whoever holds it may wait for that thread.
        self._guard = threading.RLock()
        self._files = FilesInUse(self.directory)

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Self:
        """Opens the store in a directory; raises `SnapshotError` if there is none."""
        store = cls(directory)
        writer = _writers.get(os.path.realpath(store.directory))
        if writer is not None:
            writer.wait_for_writes()  # So that it sees what this process has kept.
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

    @property
    def needs_model(self) -> str:
        """Why the file of the model cannot stand for it; empty if it can."""
        return self._now.kept.needs_model

    def read(self) -> None:
        """Reads the contents of the directory.

        Raises:
            SnapshotError: If there is no manifest, or it is damaged.
        """
        self._now = read_contents(self.directory)

    def claim(self, *, resume: bool, overwrite: bool) -> None:
        """Makes the contents of the directory this store's own, if that is allowed.

        Raises:
            ValueError: If the directory has contents that may be neither resumed nor overwritten.
            SnapshotError: If the manifest to resume from is damaged.
        """
        if self.claimed:
            return
        check_place(self.directory)
        free, known = is_free(self.directory), self._manifest_now()
        if resume and known is not None and not free:
            self.read()
            return
        if not free and not overwrite:
            raise ValueError(
                f"The directory is not empty. Received: directory='{self.directory}'. Choose "
                "another one, load the ensemble in it with `SnapshotEnsemble.load`, or pass "
                "`overwrite=True` to replace it."
            )
        record = self.record
        if known is not None:
            try:
                self.read()
            except SnapshotError as error:
                if is_foreign(known):
                    raise ValueError(
                        f"'{self.directory / MANIFEST}' was written by another program, and is not "
                        f"replaced. Received: directory='{self.directory}'. Choose another one, or "
                        "move that file."
                    ) from error
        self._now.record, self._now.known, self._now.claimed = record, known, True

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
                    is_safe = True
                except BaseException:
                    with interrupts_deferred():
                        is_safe = self._end_early(claimed)
                        if not (is_safe or had_lock):
                            self._remove_lock(is_new)
                    raise
        except BaseException:
            if not is_safe:
                with self._guard:
                    self._now = before
            raise

    def _end_early(self, claimed: Contents) -> bool:
        """Commits if something new is on disk, or restores the directory as it was when claimed.

        The exception that ended the transaction matters more than one in here.

        Returns:
            Whether something new is on disk.
        """
        if not self._lock.held:  # A forked child: the directory is its parent's.
            return False
        with contextlib.suppress(Exception):
            self.settle()
        is_safe = self._now.saved.names() != claimed.saved.names()
        with contextlib.suppress(Exception), self._guard:
            if is_safe:
                self.commit()
                self.settle()
            else:
                self._undo(claimed)
        return is_safe

    def _undo(self, claimed: Contents) -> None:
        """Restores the directory as it was when claimed; its manifest names no new files yet."""
        now = self._now
        if claimed.known is not None and now.known != claimed.known:
            self._publish(claimed.known, claimed.saved, claimed.saved_version)
        self._clean()
        if claimed.known is None and self._manifest_now() == now.known:
            (self.directory / MANIFEST).unlink(missing_ok=True)

    def _remove_lock(self, is_new: bool) -> None:
        with contextlib.suppress(OSError):
            if self._lock.held:
                self._lock.remove()
                if is_new:
                    self.directory.rmdir()

    def restart(self) -> None:
        """Makes the next added file replace all existing ones."""
        with interrupts_deferred(), self._guard:
            now = self._now
            if not now.kept.replacing and now.saved.names():
                # So that, if the run is killed before it has replaced anything, resuming it does
                # not resume the old run instead.
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
        entered = acquired = False
        try:
            with interrupts_deferred(), self._guard:
                entered = self._lock.held
                if not entered:
                    self._check_existence()
                with self._now.explained(self.directory):
                    self._lock.acquire()
                acquired = True
                if not entered:
                    self._begin_writing()
            yield
        finally:
            if acquired and self._lock.held:
                with interrupts_deferred():
                    self._end_writing(is_last=not entered)

    def _check_existence(self) -> None:
        if self._now.known is not None and not self.directory.exists():
            raise SnapshotError(
                f"'{self.directory}' no longer exists. Load the ensemble from where it is now, or "
                "save it with `save`."
            )

    def _begin_writing(self) -> None:
        if not self.is_current():
            raise self._changed_error()
        self._clean()
        _writers[os.path.realpath(self.directory)] = self

    def _end_writing(self, is_last: bool) -> None:
        try:
            if is_last:
                self.settle()
        finally:
            with self._guard:
                try:
                    if is_last:
                        self.settle()  # What another thread has kept since.
                finally:
                    self._lock.release()

    def _changed_error(self) -> SnapshotError:
        return SnapshotError(
            f"'{self.directory / MANIFEST}' was changed by another process since it was read. Load "
            "the ensemble again."
        )

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        """One change of what is kept, which Ctrl-C does not cut in two."""
        with interrupts_deferred(), self._now.explained(self.directory), self.writing():
            yield

    def wait_for_writes(self) -> None:
        """Waits until everything kept so far has been written, or has failed to be."""
        self._background.wait()

    def settle(self) -> None:
        """Waits until everything kept is in the directory, and drops what could not be written.

        An interrupt (Ctrl-C) is raised only after that.
        """
        if not self._background.busy:
            return
        with interrupts_deferred():
            self._background.wait()
            with self._guard:
                self._finish()

    def _finish(self) -> None:
        now = self._now
        try:
            self._background.finish()
        except BaseException:
            now.version = now.saved_version
            now.record.learned = read_record(now.saved.ensemble).learned
            raise
        finally:
            now.kept = dataclasses.replace(now.saved, written=now.kept.written)
            with contextlib.suppress(OSError):  # The directory may be gone.
                self._clean()

    def is_current(self) -> bool:
        """Whether nobody else has written to the directory since it was read."""
        self.settle()
        return self._manifest_now() == self._now.known

    def _manifest_now(self) -> bytes | None:
        return manifest_text(self.directory / MANIFEST)

    def _clean(self) -> None:
        """Removes files left over from a killed writer, which the manifest does not name."""
        if self._manifest_now() != self._now.known:  # They may be those of another writer.
            return
        for path in self.directory.iterdir():
            if is_left_over(path.name, self._now.tag, self._now.saved.written):
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
        # Another thread may have used numbers in the meantime.
        written = max(begun.written, now.kept.written)
        now.pending = dataclasses.replace(begun, replacing=False, written=written, **changes)
        now.restarting = False

    def commit(self, learned: Learned | None = None) -> None:
        """Writes the manifest for what is kept.

        Args:
            learned: What was learned about the members, if they have changed.
        """
        if not self.claimed:
            return
        with self._change(), self._guard:
            now = self._now
            if now.pending is not None:
                if now.pending.files != now.kept.files:
                    now.members_changed(learned)
                now.kept, now.pending = now.pending, None
            now.describe_record(self._draft)
            self._submit()

    def take_back(self, done: Counts) -> None:
        with self._guard:
            self._now.take_back(done)

    def _submit(self) -> None:
        """Writes the manifest of what is kept, in the background."""
        kept, version = self._now.kept, self._now.version

        def write() -> None:
            with self._now.explained(self.directory):
                self._write(kept, version)

        self._background.submit(write)

    def _write(self, manifest: Manifest, version: int) -> None:
        now = self._now
        if now.known is None:
            # Begin with an empty manifest, so that files whose manifest was lost are never taken
            # for what a killed run has left, and a run that is killed here can be resumed.
            record = {**manifest.ensemble, "weights": None, "members": None}
            empty = Manifest(ensemble=record, tag=now.tag)
            self._publish(empty.to_json().encode(), now.saved, now.saved_version)
        manifest, before = manifest.finished(), now.saved
        self._publish(manifest.to_json().encode(), manifest, version)
        self._files.remove(before.names() - manifest.names())

    def _publish(self, text: bytes, manifest: Manifest, version: int) -> None:
        """Replaces the manifest, unless somebody has written in spite of the lock."""
        now = self._now
        if self._manifest_now() != now.known:
            raise self._changed_error()
        Draft(self.directory, MANIFEST, lambda path: pathlib.Path(path).write_bytes(text)).put()
        now.known, now.saved, now.saved_version = text, manifest, version
        sync_directory(self.directory)

    def _draft(self, kind: str, number: int, suffix: str, write: Callable[[str], Any]) -> Draft:
        return Draft(self.directory, numbered(kind, number, self._now.tag, suffix), write)

    def _path(self, file: Any) -> Any:
        """The path of a file, after checking that it is intact; None for None."""
        if file is None:
            return None
        try:
            return file.checked(self.directory)
        except SnapshotError as error:
            if self.claimed and self._manifest_now() not in (None, self._now.known):
                raise self._changed_error() from error
            raise
