"""A `.keras` file that was saved without its optimizer's variables."""

import json
import os
import zipfile
from typing import Any

import keras


def load_without_slots(
    path: str | os.PathLike[str], custom_objects: dict[str, Any] | None = None
) -> keras.Model:
    """Loads a model, compiled as it was, with a new optimizer. Nothing in the file is executed."""
    # Compiled while it is loaded, it would miss its optimizer's variables, and say so.
    model = keras.models.load_model(
        path, custom_objects=custom_objects, compile=False, safe_mode=True
    )
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
    with keras.saving.custom_object_scope(custom_objects or {}):
        model.compile_from_config(config["compile_config"])
    return model
