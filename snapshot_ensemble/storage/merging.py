"""One store of the snapshots of several runs."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import keras

from snapshot_ensemble.keras_compat.stateless_call import weights_shown
from snapshot_ensemble.storage.directory import DirectoryStore
from snapshot_ensemble.storage.memory import MemoryStore
from snapshot_ensemble.storage.record import Counts, Decision, Learned, Progress, Record
from snapshot_ensemble.storage.snapshot import Snapshot, annealed
from snapshot_ensemble.storage.view import View


def merged_snapshots(views: Sequence[View]) -> list[tuple[View, Snapshot, Snapshot]]:
    """The snapshots of all chains in the order of the merged ensemble.

    First come those that are furthest from the end of their chain, and last the last one of each
    chain. So the last members are the best trained ones, as in one run.

    Returns:
        For each its view, the snapshot in that view, and the merged one, whose `chain` is its
        number among all chains.
    """
    chains: list[list[tuple[View, Snapshot]]] = []
    for view in views:
        # What is merged may have been merged before.
        own: dict[int, list[tuple[View, Snapshot]]] = defaultdict(list)
        for snapshot in view.snapshots:
            own[snapshot.chain or 0].append((view, snapshot))
        chains += [own[number] for number in sorted(own)]
    ordered: list[tuple[View, Snapshot, Snapshot]] = []
    for left in range(max(map(len, chains)), 0, -1):
        for number, chain in enumerate(chains):
            if left <= len(chain):
                view, snapshot = chain[-left]
                merged = dataclasses.replace(snapshot, index=len(ordered), chain=number)
                ordered.append((view, snapshot, merged))
    return ordered


def merged_progress(parts: Sequence[Progress]) -> Progress:
    """The history of all runs, one after another."""
    merged = Progress(done=Counts.zero())
    is_mixed = any("shrink" in part.history for part in parts)
    for part in parts:
        before = merged.done.epochs
        for values in zip(*part.history.values(), strict=True):
            row = dict(zip(part.history, values, strict=True))
            # A run without this column had warm restarts alone.
            merged.record_epoch({"shrink": 1.0, **row} if is_mixed else row)
        for name, own in dataclasses.asdict(part.done).items():
            setattr(merged.done, name, getattr(merged.done, name) + own)
        merged.run_epochs += part.run_epochs
        merged.decisions += [_later(decision, before) for decision in part.decisions]
    return merged


def _later(decision: Decision, epochs: int) -> Decision:
    return dataclasses.replace(decision, epoch=decision.epoch + epochs)


def write_merged(
    store: MemoryStore | DirectoryStore,
    model: keras.Model,
    views: Sequence[View],
    settings: dict[str, Any],
    overwrite: bool = False,
) -> None:
    """Fills a store with the snapshots of several others, completely or not at all.

    Args:
        store: An empty store, or a directory that nobody has claimed.
        model: The model that all snapshots belong to. It is not changed.
        views: What is merged.
        settings: Arguments of the ensemble's constructor.
        overwrite: Whether the contents of the directory may be replaced.
    """
    progress = merged_progress([view.progress() for view in views])
    store.record = Record(settings=settings, progress=progress)
    with store.transaction(overwrite=overwrite):
        store.restart()
        ordered = merged_snapshots(views)
        for view, snapshot, merged in ordered:
            index = snapshot.index
            if isinstance(store, MemoryStore):
                store.add_weights(view.weights(model, index), merged)
            elif (file := view.whole_file(index)) is None or not store.take(*file, merged):
                with weights_shown(model, view.weights(model, index)):
                    store.add(model, merged, commit=False)
        store.commit(Learned(members=annealed([merged for *_, merged in ordered])))
