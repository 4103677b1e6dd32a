"""The history in blocks of epochs, each written once: an epoch costs the same, early or late."""

import json
import pathlib
from collections.abc import Sequence

from snapshot_ensemble.storage.file_headers import read_at_most
from snapshot_ensemble.storage.record import History
from snapshot_ensemble.storage.typed_json import decode, encode, parse

# The manifest, which is written at every epoch, holds the rest.
EPOCHS = 500
# The most bytes of a block that are read.
LARGEST = 2**24


def cut(history: History, first: int, last: int | None = None) -> History:
    """The epochs from `first` to `last - 1`."""
    return {name: column[first:last] for name, column in history.items()}


def join(parts: Sequence[History]) -> History:
    """The parts one after another; raises `ValueError` if their columns differ."""
    if any(set(part) != set(parts[0]) for part in parts):
        raise ValueError("the blocks of the history have different columns")
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def write_block(path: str, block: History) -> None:
    """Writes a block as JSON."""
    pathlib.Path(path).write_text(json.dumps(encode(block), allow_nan=False), "utf-8", newline="\n")


def read_block(path: pathlib.Path) -> History:
    """Reads what `write_block` wrote; raises `ValueError` or `OSError` for anything else."""
    block: History = decode(History, parse(read_at_most(path, LARGEST)), "history")
    if any(len(column) != EPOCHS for column in block.values()):
        raise ValueError(f"a block of the history has {EPOCHS} epochs")
    return block
