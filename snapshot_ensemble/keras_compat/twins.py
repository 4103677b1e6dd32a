"""Objects that share the variables of the user's objects, but not their attributes.

Code that changes attributes for a while changes those of a twin. Code that runs in another thread
at the same time, such as training, never sees the change.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import keras

from snapshot_ensemble.keras_compat.context_patch import ContextPatch


def twin_of(original: Any, **attributes: Any) -> Any:
    """An object of the same class with the same attributes, except for the ones given.

    Args:
        original: A layer, model or optimizer.
        **attributes: Attributes that are different. Keras does not track them.
    """
    twin = object.__new__(type(original))
    vars(twin).update(vars(original) | attributes)
    return twin


def _call_twin(twins: Mapping[int, Any], original: Any, layer: Any, *args: Any, **kw: Any) -> Any:
    return original(twins.get(id(layer), layer), *args, **kw)


_calling_layers = ContextPatch(keras.layers.Layer, "__call__", _call_twin)


@contextlib.contextmanager
def twins_called(twins: Mapping[int, Any]) -> Iterator[None]:
    """Inside the context, calls of layers go to their twins.

    Args:
        twins: The twins by the `id` of the layer.
    """
    if not twins:
        yield
        return
    with _calling_layers.active(twins):
        yield
