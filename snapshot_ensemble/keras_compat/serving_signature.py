"""The inputs that a model was built with, as Keras's exporters see them."""

from typing import Any

import keras


def input_signature(model: keras.Model) -> Any:
    """A structure of input specs like the structure of the model's inputs."""
    from keras.src.export.export_utils import get_input_signature  # noqa: PLC0415  Slow to load.

    (signature,) = get_input_signature(model)
    return signature
