"""Keras's weight files, written in memory."""

import io

import keras
from keras.src.saving import saving_lib

from snapshot_ensemble.keras_compat.optimizers import optimizers_hidden


def weights_file(model: keras.Model) -> io.BytesIO:
    """A `.weights.h5` file with only the model's weights, not its optimizers' slots.

    `model.save_weights` lets HDF5 write to the disk, which ends the process if the disk is full.
    """
    content = io.BytesIO()
    store = saving_lib.H5IOStore(content, mode="w")
    try:
        with optimizers_hidden():
            saving_lib._save_state(
                model,
                weights_store=store,
                assets_store=None,
                inner_path="",
                visited_saveables=set(),
            )
    finally:
        store.close()
    return content
