"""Whether two models have the same layers, settings and weights."""

import hashlib
import json
from collections.abc import Collection
from typing import Any

import keras
import numpy as np

# What depends on the process, not on the model.
_NAMES = frozenset({"name", "inbound_nodes", "input_layers", "output_layers", "build_config"})


def digest_of(model: keras.Model, left_out: Collection[str] = ()) -> str:
    """A hash of the layers' classes and settings, without names, which depend on the process.

    Args:
        model: A model.
        left_out: The names of further settings that do not count.
    """
    name = type(model).__name__
    try:
        config = _without(model.get_config(), _NAMES.union(left_out))
        text = json.dumps([name, config], sort_keys=True, default=_described)
    except Exception:  # Optional for a subclass; variable shapes are compared anyway.
        text = json.dumps([name, None])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _described(value: Any) -> Any:
    """What identifies a setting that JSON cannot represent: an array's contents, or a class."""
    if keras.ops.is_tensor(value):
        value = keras.ops.convert_to_numpy(value)
    if isinstance(value, (np.ndarray, np.generic)):
        # The bytes of an array of objects would be addresses.
        has_bytes = value.dtype != object
        content = hashlib.sha256(value.tobytes()).hexdigest() if has_bytes else value.tolist()
        return [str(value.dtype), list(value.shape), content]
    return value.hex() if isinstance(value, bytes) else type(value).__name__


def _without(value: Any, names: Collection[str]) -> Any:
    if isinstance(value, dict):
        return {str(k): _without(v, names) for k, v in value.items() if k not in names}
    if isinstance(value, (list, tuple)):
        return [_without(item, names) for item in value]
    return value


def difference(one: keras.Model, other: keras.Model) -> str:
    """How the second of two built models differs from the first; empty if it does not.

    Names and seeds do not count, nor do the weights' values.
    """
    if type(one).__name__ != type(other).__name__:
        return f"its class is {type(other).__name__}, not {type(one).__name__}"
    if len(one.weights) != len(other.weights):
        return f"it has {len(other.weights)} weights, not {len(one.weights)}"
    for own, its in zip(one.weights, other.weights, strict=True):
        kinds = [f"shape {tuple(v.shape)} and dtype {v.dtype}" for v in (own, its)]
        if kinds[0] != kinds[1]:
            return f"its weight '{its.path}' has {kinds[1]}, not {kinds[0]}"
    if digest_of(one, ("seed",)) != digest_of(other, ("seed",)):
        return "its layers have other settings"
    return ""
