"""Copies of all snapshots of a store in another directory."""

import os
from typing import Any

import keras

from snapshot_ensemble.keras_compat.stateless_call import weights_shown
from snapshot_ensemble.storage.directory import DirectoryStore
from snapshot_ensemble.storage.model_file import ComputesTheSame
from snapshot_ensemble.storage.record import Record
from snapshot_ensemble.storage.view import View


def copy_snapshots(
    model: keras.Model,
    source: View,
    directory: str | os.PathLike[str],
    settings: dict[str, Any],
    overwrite: bool,
    computes_the_same: ComputesTheSame | None = None,
) -> None:
    """Copies a store into another directory, completely or not at all.

    Args:
        model: The model that the snapshots belong to. It is not changed.
        source: A view of the store.
        directory: Path of the other directory.
        settings: Arguments of the ensemble's constructor.
        overwrite: Whether the contents of the directory may be replaced.
        computes_the_same: As in `DirectoryStore`.
    """
    target = DirectoryStore(directory)
    target.computes_the_same = computes_the_same
    progress = source.progress()
    progress.saves_state = False  # No run can be resumed there.
    target.record = Record(settings=settings, progress=progress)
    with target.transaction(overwrite=overwrite):
        target.restart()
        for snapshot in source.snapshots:
            with weights_shown(model, source.weights(model, snapshot.index)):
                target.add(model, snapshot, commit=False)
        target.commit(source.learned)
