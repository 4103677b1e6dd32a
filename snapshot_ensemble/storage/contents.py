"""What a process knows of a directory, as it reads it."""

import contextlib
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from snapshot_ensemble.checks import counted
from snapshot_ensemble.storage import history_blocks
from snapshot_ensemble.storage.atomic_file import Draft
from snapshot_ensemble.storage.file_names import LOCK, MANIFEST, is_left_over, new_tag
from snapshot_ensemble.storage.manifest import (
    Manifest,
    describe,
    manifest_text,
    read_manifest,
    read_record,
)
from snapshot_ensemble.storage.record import Counts, History, Learned, Record
from snapshot_ensemble.storage.snapshot import Snapshot, SnapshotError, renumbered

# Versions are not used twice, even after an error: something may have been built for them.
_versions = itertools.count(1)


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
        columns: The columns of the history in the blocks that `kept` names.
        tag: Part of the names of the directory's files.
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
    columns: frozenset[str] = frozenset()
    tag: str = dataclasses.field(default_factory=new_tag)

    def copy(self) -> "Contents":
        """A copy to roll back to."""
        return dataclasses.replace(self, record=dataclasses.replace(self.record))

    def members_changed(self, learned: Learned | None = None) -> None:
        """Resets what was learned about other members."""
        self.version = next(_versions)
        self.record.learned = learned or Learned()

    def describe_record(self, draft: Callable[..., Draft]) -> None:
        """Keeps the record as it is; full blocks of the history become files of their own.

        Args:
            draft: Makes a file of a kind, a number, a suffix and a function that writes it.
        """
        # An epoch that is recorded, but not counted yet, is left out.
        size, progress = history_blocks.EPOCHS, self.record.progress
        epochs = progress.done.epochs
        columns, blocks = frozenset(progress.history), list(self.kept.history)
        if columns != self.columns:
            blocks, self.columns = [], columns
        written = self.kept.written
        while (end := (len(blocks) + 1) * size) <= epochs:
            block = history_blocks.cut(progress.history, end - size, end)
            write = functools.partial(history_blocks.write_block, block=block)
            written += 1
            blocks.append(draft("history", written, "json", write))
        rest = history_blocks.cut(progress.history, len(blocks) * size, epochs)
        progress = dataclasses.replace(progress, history=rest)
        self.kept = dataclasses.replace(
            self.kept,
            ensemble=describe(dataclasses.replace(self.record, progress=progress)),
            history=tuple(blocks),
            written=written,
            tag=self.tag,
        )

    def take_back(self, done: Counts) -> None:
        """Drops everything after these counts from memory, and from the next manifest."""
        kept = [s for s in self.kept.snapshots if s.cycle is None or s.cycle < done.cycles]
        if len(kept) < len(self.kept.snapshots):
            self.members_changed()
        self.kept = dataclasses.replace(
            self.kept,
            snapshots=tuple(kept),
            files=self.kept.files[: len(kept)],
            history=self.kept.history[: done.epochs // history_blocks.EPOCHS],
        )

    def leave_out(self, indices: set[int]) -> None:
        """Drops snapshots, and the state of training, from memory but not from the directory."""
        left = [i for i in range(len(self.kept.files)) if i not in indices]
        self.kept = self.saved = dataclasses.replace(
            self.kept,
            snapshots=tuple(renumbered([self.kept.snapshots[i] for i in left])),
            files=tuple(self.kept.files[i] for i in left),
            state=None,
        )
        self.members_changed()

    @contextlib.contextmanager
    def explained(self, directory: pathlib.Path) -> Iterator[None]:
        """Adds to an error of the operating system what it means for the ensemble."""
        try:
            yield
        except OSError as error:
            if getattr(error, "explained", False) or isinstance(error, BlockingIOError):
                raise
            if directory.exists():
                kept = counted(len(self.saved.snapshots), "snapshot")
                consequence = f"What was written before is intact, including {kept}."
            else:
                consequence = "The directory no longer exists."
            explained = OSError(
                error.errno, f"'{directory}' cannot be written to: {error}. {consequence}"
            )
            explained.explained = True  # type: ignore[attr-defined]
            raise explained from error


def read_contents(directory: pathlib.Path) -> Contents:
    """Reads a directory's manifest, and what belongs to its record.

    Raises:
        SnapshotError: If there is no manifest, or something is damaged.
    """
    known = manifest_text(directory / MANIFEST)
    manifest = read_manifest(directory / MANIFEST, known)
    record = read_record(manifest.ensemble)
    now = Contents(record, manifest, manifest, known=known, claimed=True)
    now.tag = manifest.tag or now.tag
    if manifest.history:
        record.progress.history = whole_history(directory, manifest, record.progress.history)
        try:
            record.progress.check_for(manifest.snapshots)
        except ValueError as error:
            raise SnapshotError(f"'{directory / MANIFEST}' is damaged: {error}") from error
        now.columns = frozenset(record.progress.history)
    return now


def inspected(directory: pathlib.Path, now: Contents) -> dict[str, Any]:
    """The contents of a directory as JSON values, and whether each file is intact."""
    kept = now.kept
    files: list[tuple[Any, Snapshot | None]] = [(kept.model, None)]
    files += [*zip(kept.files, kept.snapshots, strict=True), (kept.state, None)]
    files += [(file, None) for file in kept.history]
    if kept.base is not None and kept.base not in {file for file, _ in files}:
        files.append((kept.base, None))
    entries = [_entry(directory, file, snapshot) for file, snapshot in files if file is not None]
    learned = dataclasses.asdict(now.record.learned)
    return {"files": entries, **learned, "settings": now.record.settings}


def _entry(directory: pathlib.Path, file: Any, snapshot: Snapshot | None) -> dict[str, Any]:
    try:
        file.checked(directory)
        intact = True
    except SnapshotError:
        intact = False
    names = (field.name for field in dataclasses.fields(Snapshot))
    values = {name: getattr(snapshot, name, None) for name in names}
    return {"name": file.name, "bytes": file.size, "intact": intact, **values}


def whole_history(directory: pathlib.Path, manifest: Manifest, rest: History) -> History:
    """The history in the blocks of a manifest, followed by the rest."""
    parts = []
    for file in manifest.history:
        path = file.checked(directory)
        try:
            parts.append(history_blocks.read_block(path))
        except (OSError, ValueError) as error:
            raise SnapshotError(f"'{path}' is damaged: {error}") from error
    try:
        return history_blocks.join([*parts, rest])
    except ValueError as error:
        raise SnapshotError(f"'{directory / MANIFEST}' is damaged: {error}") from error


def is_free(directory: pathlib.Path) -> bool:
    """Whether a directory holds nothing but what a writer that was killed at its start leaves."""
    if not directory.exists():
        return True
    names, tag, written = {file.name for file in directory.iterdir()}, "", 0
    if MANIFEST in names:
        try:
            manifest = read_manifest(directory / MANIFEST, manifest_text(directory / MANIFEST))
        except SnapshotError:
            return False
        if manifest.names() or manifest.replacing:
            return False
        tag, written = manifest.tag, manifest.written
    return all(name in (LOCK, MANIFEST) or is_left_over(name, tag, written) for name in names)


def check_place(directory: pathlib.Path) -> None:
    """Raises `ValueError` if there can be no directory at a path."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"`directory` is a file. Received: directory='{directory}'")
    if directory.is_symlink() and not directory.exists():
        raise ValueError(
            "`directory` is a link to a place that does not exist. Received: "
            f"directory='{directory}' -> '{directory.readlink()}'"
        )
