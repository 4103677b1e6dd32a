"""The manifest of a directory: what is in it, in JSON, believed only if it is well formed."""

import dataclasses
import hashlib
import json
import math
import pathlib
import re
from typing import Any

import numpy as np

from snapshot_ensemble.storage.atomic_file import Draft, File
from snapshot_ensemble.storage.snapshot import Snapshot, SnapshotError

NAME = "ensemble.json"
FORMAT = "snapshot_ensemble"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is in a directory.

    Attributes:
        snapshots: The members, oldest first.
        files: The weight file of each.
        model: The file of the model that they belong to; None if it could not be saved.
        state: The file of the state of training; None if no run can go on.
        base: The file with all weights that those ending in `.npz` are differences from.
        replacing: Whether a run has begun that will take the place of all this.
        written: Number of files that were ever written; it numbers them.
        ensemble: What an ensemble says of itself beside its snapshots.
    """

    snapshots: tuple[Snapshot, ...] = ()
    files: tuple[File | Draft, ...] = ()
    model: File | Draft | None = None
    state: File | Draft | None = None
    base: File | Draft | None = None
    replacing: bool = False
    written: int = 0
    ensemble: dict[str, Any] = dataclasses.field(default_factory=dict)

    def names(self) -> set[str]:
        """The names of all files."""
        found = (*self.files, self.model, self.state, self.base)
        return {file.name for file in found if file is not None}

    def finished(self) -> "Manifest":
        """The same, with every file in its place."""

        def finish(file: Any) -> Any:
            return file.finish() if isinstance(file, Draft) else file

        files = tuple(finish(file) for file in self.files)
        others = {name: finish(getattr(self, name)) for name in ("model", "state", "base")}
        return dataclasses.replace(self, files=files, **others)

    def to_json(self) -> str:
        """Strict JSON; numbers that it has no word for become strings that `float` reads."""
        entries = []
        for snapshot, file in zip(self.snapshots, self.files, strict=True):
            entries.append({"file": _described(file), **dataclasses.asdict(snapshot)})
            del entries[-1]["index"]
        content = {
            "format": FORMAT,
            "version": VERSION,
            "written": self.written,
            "replacing": self.replacing,
            "model": _described(self.model),
            "state": _described(self.state),
            "base": _described(self.base),
            "snapshots": entries,
            "ensemble": self.ensemble,
        }
        content = plain(content)
        return json.dumps({**content, "sha256": _digest(content)}, indent=1, allow_nan=False)


def read_manifest(path: pathlib.Path, text: bytes | None) -> Manifest:
    """Reads a manifest; raises `SnapshotError` that names it unless all of it is as written."""
    try:
        if text is None:
            raise FileNotFoundError("there is no such file, or it cannot be read")
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise SnapshotError(f"'{path}' is no readable manifest: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise SnapshotError(f"'{path}' is not a manifest of {FORMAT}.")
    if content.get("version") != VERSION:
        raise SnapshotError(
            f"'{path}' has format version {content.get('version')!r}; this package reads "
            f"version {VERSION}. Update snapshot-ensemble to read it."
        )
    if content.pop("sha256", None) != _digest(content):
        raise SnapshotError(f"'{path}' is not as it was written: its SHA-256 is another.")
    try:
        entries = [_typed(entry, dict, "snapshot") for entry in _entry(content, "snapshots", list)]
        return Manifest(
            snapshots=tuple(_snapshot(index, entry) for index, entry in enumerate(entries)),
            files=tuple(_file(_entry(entry, "file", dict)) for entry in entries),
            model=_file_or_none(content, "model"),
            state=_file_or_none(content, "state"),
            base=_file_or_none({"base": None, **content}, "base"),
            replacing=_entry(content, "replacing", bool),
            written=_count(content, "written"),
            ensemble=_ensemble(_entry(content, "ensemble", dict), len(entries)),
        )
    except (KeyError, ValueError) as error:
        raise SnapshotError(f"'{path}' is not as it was written: {error}") from error


def _digest(content: dict[str, Any]) -> str:
    """Of all that a manifest says, in one way of writing it."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _typed(value: Any, kind: Any, name: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"`{name}` has the wrong type. Received: {name}={value!r}")
    return value


def _entry(content: dict[str, Any], name: str, kind: Any) -> Any:
    return _typed(content[name], kind, name)


def _count(content: dict[str, Any], name: str) -> int:
    value = _entry(content, name, int)
    if value < 0:
        raise ValueError(f"`{name}` must be at least 0. Received: {name}={value!r}")
    return value


def _file(content: dict[str, Any]) -> File:
    name, digest = _entry(content, "name", str), _entry(content, "sha256", str)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", name):
        raise ValueError(f"`name` must be a file of this directory. Received: name={name!r}")
    return File(name, _count(content, "size"), digest)


def _file_or_none(content: dict[str, Any], name: str) -> File | None:
    return None if content[name] is None else _file(_entry(content, name, dict))


def _number(value: Any, name: str) -> Any:
    """A number, or a list of numbers, out of JSON; None stays None."""
    if isinstance(value, list):
        return [_number(item, name) for item in value]
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    return value if value is None else _typed(value, (int, float), name)


def _snapshot(index: int, content: dict[str, Any]) -> Snapshot:
    counts = {
        name: None if content[name] is None else _count(content, name)
        for name in ("cycle", "epoch", "step")
    }
    metrics = {}
    for name, value in _entry(content, "metrics", dict).items():
        metrics[name] = _typed(_number(value, name), (int, float), name)
    rate = _number(content["learning_rate"], "learning_rate")
    return Snapshot(index, **counts, learning_rate=rate, metrics=metrics)


def _ensemble(content: dict[str, Any], members: int) -> dict[str, Any]:
    history = {
        name: [_number(value, name) for value in _typed(values, list, name)]
        for name, values in _entry(content, "history", dict).items()
    }
    done = _entry(content, "done", dict)
    weights = content["weights"]
    if weights is not None:
        weights = [_typed(weight, (int, float), "weights") for weight in _typed(weights, list, "w")]
        if len(weights) != members or any(w < 0 for w in weights) or abs(sum(weights) - 1) > 1e-6:
            raise ValueError(f"`weights` are not those of {members} members")
    temperature = _entry(content, "temperature", (int, float))
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"`temperature` must be above 0. Received: temperature={temperature!r}")
    spared, chosen = content.get("spared"), content.get("members")
    for places in (spared, chosen if isinstance(chosen, list) else None):
        for place in _typed(places or [], list, "places"):
            _typed(place, int, "places")
    if isinstance(chosen, list) and not all(0 <= place < members for place in chosen):
        raise ValueError(f"`members` are not some of {members}")
    if isinstance(chosen, int) and not 0 < chosen <= members:
        raise ValueError(f"`members` are not some of {members}")
    return {
        **content,
        "spared": spared,
        "members": None if chosen is None else _typed(chosen, (int, list), "members"),
        "temperature": temperature,
        "settings": _entry(content, "settings", dict),
        "history": history,
        "done": {name: _count(done, name) for name in ("cycles", "epochs", "steps", "runs")},
        "weights": weights,
        "saves": _typed(content.get("saves", False), bool, "saves"),
    }


def _described(file: File | Draft | None) -> dict[str, Any] | None:
    return dataclasses.asdict(file) if isinstance(file, File) else None


def plain(value: Any) -> Any:
    """A copy of a value in what JSON has words for."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "__array__"):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value
