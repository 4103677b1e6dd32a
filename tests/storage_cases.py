"""Ensembles in directories, and helpers that read their files."""

import dataclasses
import hashlib
import json
import pathlib

import keras
import numpy as np
from models import SimulatedCrashError, classifier, three_classes

from snapshot_ensemble import SnapshotEnsemble

MANIFEST, LOCK = "ensemble.json", "ensemble.lock"
X, Y = three_classes()


def crash(*_):
    raise SimulatedCrashError


def ensemble(directory=None, model=None, **arguments):
    arguments = {"cycles": 3, "lr_init": 0.5, **arguments}
    return SnapshotEnsemble(model or classifier(), directory=directory, **arguments)


def fit(ens, epochs=3, **arguments):
    return ens.fit(X, arguments.pop("y", Y), epochs=epochs, verbose=0, **arguments)


def fitted(directory=None, **arguments):
    ens = ensemble(directory, **arguments)
    fit(ens)
    return ens


def each_epoch(function):
    """A callback that calls a function at the end of each epoch."""
    return keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: function(epoch))


def contents(directory):
    """The contents of all files in a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != LOCK
    }


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def manifest_of(directory):
    return strict_json((directory / MANIFEST).read_text("utf-8"))


def write_manifest(directory, manifest):
    """Writes a manifest with a matching hash."""
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    signed = {**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (directory / MANIFEST).write_text(json.dumps(signed))


def file_entries(node):
    """All entries in a manifest that describe a file."""
    if isinstance(node, dict):
        if "name" in node:
            return [node]
        node = list(node.values())
    return [entry for item in node for entry in file_entries(item)] if type(node) is list else []


def weight_files(directory):
    """The weight files that the manifest names, oldest first."""
    names = [entry["name"] for entry in file_entries(manifest_of(directory)["snapshots"])]
    return [directory / name for name in names]


@dataclasses.dataclass
class Made:
    directory: pathlib.Path
    weights: list
    predictions: np.ndarray


def load_and_use(directory, **arguments):
    return SnapshotEnsemble.load(directory, **arguments).predict(X, verbose=0)
