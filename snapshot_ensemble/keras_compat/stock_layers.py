"""Distinguishes Keras's own classes from users' subclasses."""

from typing import Any

import keras


def is_stock_layer(operation: Any) -> bool:
    """Whether it is an instance of one of Keras's own layer classes."""
    return isinstance(operation, keras.layers.Layer) and type(operation).__module__.startswith(
        "keras.src.layers."
    )


def is_stock_callback(callback: Any) -> bool:
    """Whether it is an instance of one of Keras's own callback classes."""
    return type(callback).__module__.startswith("keras.")


def has_own_predict_step(model: keras.Model) -> bool:
    """Whether a model overrides `predict_step`."""
    return type(model).predict_step is not keras.Model.predict_step
