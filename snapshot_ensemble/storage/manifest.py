"""The manifest of a directory: a validated JSON file that lists its contents."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Annotated, Any

from snapshot_ensemble.storage.atomic_file import Draft, File
from snapshot_ensemble.storage.file_headers import read_at_most
from snapshot_ensemble.storage.file_names import checked_tag
from snapshot_ensemble.storage.record import Learned, Progress, Record
from snapshot_ensemble.storage.snapshot import Snapshot, SnapshotError
from snapshot_ensemble.storage.typed_json import Count, decode, encode, parse

FORMAT = "snapshot_ensemble"
# Version 2 has files with blocks of the history, without which a reader would miss epochs.
VERSIONS = (1, 2)
# The most bytes that are read. Version 1 holds the whole history: this is enough for ten metrics
# over 200,000 epochs.
LARGEST = 2**26


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of a directory.

    Attributes:
        snapshots: The members, oldest first.
        files: The weight file of each.
        model: The file of the model that they belong to; None if it could not be saved.
        state: The file of the state of training; None if no run can be resumed.
        base: The file with all weights, which snapshots in `.npz` files store differences to.
        needs_model: Why `model` cannot stand for the model that was trained; empty if it can.
        replacing: Whether a run has begun that will replace all of this.
        history: The files with blocks of the history (see `history_blocks`), oldest first.
        written: How many files were written so far; used to number them.
        tag: Part of the names of the directory's files; empty in those of earlier versions.
        ensemble: The ensemble's `Record`, as JSON, without the epochs in the blocks.
    """

    snapshots: tuple[Snapshot, ...] = ()
    files: tuple[File | Draft, ...] = ()
    model: File | Draft | None = None
    state: File | Draft | None = None
    base: File | Draft | None = None
    needs_model: str = ""
    history: tuple[File | Draft, ...] = ()
    replacing: bool = False
    written: int = 0
    tag: str = ""
    ensemble: dict[str, Any] = dataclasses.field(default_factory=lambda: describe(Record()))

    def names(self) -> set[str]:
        """The names of all files."""
        every = (*self.files, *self.history, self.model, self.state, self.base)
        return {file.name for file in every if file is not None}

    def finished(self) -> "Manifest":
        """The same manifest, after all files have been written."""

        def finish(file: Any) -> Any:
            return file.finish() if isinstance(file, Draft) else file

        changes: dict[str, Any] = {}
        for name in ("files", "history"):
            changes[name] = tuple(finish(file) for file in getattr(self, name))
        for name in ("model", "state", "base"):
            changes[name] = finish(getattr(self, name))
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """Strict JSON that includes its own SHA-256."""
        entries = []
        for snapshot, file in zip(self.snapshots, self.files, strict=True):
            entries.append({"file": file, **dataclasses.asdict(snapshot)})
            del entries[-1]["index"]
            if snapshot.chain is None:  # As in all manifests before there were merged ones.
                del entries[-1]["chain"]
        content = encode(
            {
                "format": FORMAT,
                "version": VERSIONS[bool(self.history)],
                "written": self.written,
                "tag": self.tag,
                "replacing": self.replacing,
                "model": self.model,
                "state": self.state,
                "base": self.base,
                "needs_model": self.needs_model,
                "history": self.history,
                "snapshots": entries,
                "ensemble": self.ensemble,
            }
        )
        return json.dumps({**content, "sha256": _digest(content)}, indent=1, allow_nan=False)


@dataclasses.dataclass
class _Entry:
    """A snapshot as stored in a manifest."""

    file: File
    cycle: Count | None
    epoch: Count | None
    step: Count | None
    learning_rate: float | None
    metrics: dict[str, float]
    chain: Count | None = None
    is_annealed: bool = True

    def snapshot(self, index: int) -> Snapshot:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["file"]
        return Snapshot(index, **values)


@dataclasses.dataclass
class _Content:
    """The contents of a manifest of this version."""

    written: Count
    replacing: bool
    model: File | None
    state: File | None
    snapshots: list[_Entry]
    ensemble: dict[str, Any]
    base: File | None = None
    needs_model: str = ""
    history: list[File] = dataclasses.field(default_factory=list)
    tag: Annotated[str, checked_tag] | None = None

    def check_files(self) -> None:
        """Raises `ValueError` if two files have one name, or one is not written yet."""
        entries = (entry.file for entry in self.snapshots)
        every = [*entries, *self.history, self.model, self.state]
        files = {file.name: file for file in every if file is not None}
        if len(files) < len(every) - every.count(None):
            raise ValueError(f"it names a file twice. Received: {sorted(files)}")
        if self.base is not None and files.setdefault(self.base.name, self.base) != self.base:
            raise ValueError(f"it names a file twice. Received: base={self.base.name!r}")
        for file in files.values():
            if file.number > self.written:
                raise ValueError(
                    f"`written` must be at least the number of each file. Received: "
                    f"written={self.written}, {file.name!r}"
                )


def describe(record: Record) -> dict[str, Any]:
    """A record as JSON: the settings, what was learned, and the progress, in one object."""
    return encode(
        {
            "settings": record.settings,
            **encode(record.learned),
            **encode(record.progress.copy()),
        }
    )


def read_record(ensemble: dict[str, Any]) -> Record:
    """Reads what `describe` returned; raises `ValueError` for anything else."""
    settings = decode(dict[str, Any], ensemble.get("settings"), "settings")
    learned, progress = (decode(kind, ensemble, "ensemble") for kind in (Learned, Progress))
    return Record(settings, learned, progress)


def manifest_text(path: pathlib.Path) -> bytes | None:
    """The text of a manifest; None if it cannot be read."""
    try:
        return read_at_most(path, LARGEST)
    except OSError:
        return None


def read_manifest(path: pathlib.Path, text: bytes | None) -> Manifest:
    """Reads a manifest; raises `SnapshotError` that names it if it is damaged.

    Args:
        path: The path of the manifest.
        text: Its text; None if that could not be read.
    """
    try:
        content = parse(read_at_most(path, LARGEST) if text is None else text)
    except (OSError, ValueError) as error:
        raise SnapshotError(f"'{path}' is not a readable manifest: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise SnapshotError(f"'{path}' is not a manifest of {FORMAT}.")
    if content.get("version") not in VERSIONS:
        raise SnapshotError(
            f"'{path}' has format version {content.get('version')!r}; this package reads "
            f"versions {VERSIONS[0]} to {VERSIONS[-1]}. Update snapshot-ensemble to read it."
        )
    if content.pop("sha256", None) != _digest(content):
        raise SnapshotError(f"'{path}' is damaged: its SHA-256 does not match.")
    try:
        typed: _Content = decode(_Content, content, "manifest")
        snapshots = tuple(entry.snapshot(index) for index, entry in enumerate(typed.snapshots))
        record = read_record(typed.ensemble)
        record.learned.check_for(len(snapshots))
        if not typed.history:  # The blocks of the history are read later.
            record.progress.check_for(snapshots)
        typed.check_files()
    except ValueError as error:
        raise SnapshotError(f"'{path}' is damaged: {error}") from error
    return Manifest(
        snapshots=snapshots,
        files=tuple(entry.file for entry in typed.snapshots),
        model=typed.model,
        state=typed.state,
        base=typed.base,
        needs_model=typed.needs_model,
        history=tuple(typed.history),
        replacing=typed.replacing,
        written=typed.written,
        tag=typed.tag or "",
        ensemble=typed.ensemble,
    )


def is_foreign(text: bytes) -> bool:
    """Whether a file is valid JSON that another program has written; a damaged one is not."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return not isinstance(content, dict) or content.get("format") != FORMAT


def _digest(content: dict[str, Any]) -> str:
    """The SHA-256 of a manifest's contents in canonical form."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
