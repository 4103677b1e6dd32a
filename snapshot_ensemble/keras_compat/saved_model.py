"""Loads `.keras` files that were saved without the optimizer's variables."""

import json
import os
import zipfile
from typing import Any

import keras


def load_without_slots(
    path: str | os.PathLike[str], custom_objects: dict[str, Any] | None = None
) -> keras.Model:
    """Loads a model and compiles it with a new optimizer. No code in the file is executed."""
    # With `compile=True`, Keras would warn of the missing variables of the optimizer.
    model = keras.models.load_model(
        path, custom_objects=custom_objects, compile=False, safe_mode=True
    )
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
    with keras.saving.custom_object_scope(custom_objects or {}):
        model.compile_from_config(config["compile_config"])
    return model
