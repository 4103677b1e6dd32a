"""Replaces the initializers of layers that are built in a context."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras.src.initializers.random_initializers import RandomInitializer

from snapshot_ensemble.keras_compat.context_patch import ContextPatch


def _add_weight(replace: Any, original: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
    initializer = keras.initializers.get(kwargs.get("initializer"))
    dtype = keras.backend.standardize_dtype(kwargs.get("dtype") or layer.variable_dtype)
    if initializer is None and "float" in dtype:
        initializer = keras.initializers.GlorotUniform()  # Keras's default.
    if not args and isinstance(initializer, RandomInitializer):
        kwargs["initializer"] = replace(initializer)
    return original(layer, *args, **kwargs)


_adding_weights = ContextPatch(keras.layers.Layer, "add_weight", _add_weight)


@contextlib.contextmanager
def random_initializers_replaced(replace: Callable[[Any], Any]) -> Iterator[None]:
    """Replaces random initializers, for weights that are created inside the context.

    Args:
        replace: Takes one of Keras's random initializers and returns another initializer. Other
            initializers are not replaced: they may hold data, such as a table of embeddings.
    """
    with _adding_weights.active(replace):
        yield
