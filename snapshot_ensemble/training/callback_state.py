"""The state of callbacks, as JSON and arrays from which equal values are made again."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.keras_compat.stock_callbacks import changed_by_training
from snapshot_ensemble.storage.typed_json import LARGEST, at_least_zero, decode
from snapshot_ensemble.storage.weight_delta import from_bits

Arrays = dict[str, np.ndarray]
# Levels of containers in a state. JSON has two for each.
DEEPEST = 30


def _operation(name: str) -> Any:
    found = getattr(keras.ops, name)
    if not _is_operation(found):
        raise ValueError(f"`{name}` is not an operation of Keras")
    return found


def _is_operation(value: Any) -> bool:
    """Whether it is a Keras operation, such as a comparison."""
    return callable(value) and getattr(keras.ops, getattr(value, "__name__", ""), None) is value


# Scalars that JSON lacks, and how they are written and read.
_WRITTEN: dict[type, Callable[[Any], str]] = {int: hex, float: repr, bytes: bytes.hex}
_READ: dict[str, Callable[[str], Any]] = {
    "int": lambda text: int(text, 16),
    "float": float,
    "bytes": bytes.fromhex,
    "operation": _operation,
}
# Containers that JSON has as lists.
_LISTED: dict[str, Callable[[Any], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "items": dict,
}


def states_of(callbacks: Sequence[Any], arrays: Arrays) -> list[list[Any]]:
    """The class name and the state of each callback; adds the arrays in them to `arrays`.

    Raises:
        TypeError: If a callback's `get_state` returns something that cannot be saved.
    """
    return [[type(c).__name__, _packed(c, _state_of(c), arrays)] for c in callbacks]


def check_states(callbacks: Sequence[Any]) -> None:
    """Raises `TypeError` if a callback's `get_state` returns something that cannot be saved."""
    for callback in callbacks:
        state = None
        # Before training, a `get_state` may lack what it returns later.
        with contextlib.suppress(Exception):
            state = _state_of(callback)
        _packed(callback, state, {})


def restorers(
    model: keras.Model, callbacks: Sequence[Any], states: Sequence[Any], arrays: Arrays
) -> list[tuple[Any, Any]]:
    """The callbacks to restore, with their checked states; nothing is changed yet.

    Args:
        model: The model.
        callbacks: The callbacks. One of another class than when the state was saved is left out.
        states: What `states_of` returned.
        arrays: The arrays that it added, by name.

    Raises:
        Exception: Of any class, if the states are not what `states_of` returned.
    """
    found = []
    for callback, (kind, packed) in zip(callbacks, states, strict=False):
        if type(callback).__name__ == kind and packed is not None:
            state = unpack(packed, arrays)
            if not _has_own(callback):
                state = _checked(model, callback, state)
            found.append((callback, state))
    return found


def restore(callback: Any, state: Any) -> None:
    """Restores a callback."""
    if _has_own(callback):
        callback.set_state(state)
    else:
        for name, value in state.items():
            setattr(callback, name, value)


def _has_own(callback: Any) -> bool:
    return hasattr(callback, "get_state") and hasattr(callback, "set_state")


def _state_of(callback: Any) -> Any:
    """The result of `get_state`, or what training has changed in one of Keras's callbacks."""
    if _has_own(callback):
        return callback.get_state()
    kinds = changed_by_training(callback)
    if kinds is None:
        return None
    # Some are set when training begins.
    values = {name: getattr(callback, name) for name in kinds if hasattr(callback, name)}
    # Metrics may be NumPy's numbers or tensors.
    return {n: np.asarray(v).item() if hasattr(v, "__array__") else v for n, v in values.items()}


def _checked(model: keras.Model, callback: Any, state: dict[str, Any]) -> dict[str, Any]:
    """What training changes of a state; others of its values, of older versions, are left out."""
    kinds = changed_by_training(callback) or {}
    checked = {n: decode(kind, state[n], n) for n, kind in kinds.items() if n in state}
    for name, value in checked.items():
        if type(value) is int:
            at_least_zero(value, name)
    if best := checked.get("best_weights"):
        own = [(tuple(variable.shape), str(variable.dtype)) for variable in model.weights]
        if [(array.shape, str(array.dtype)) for array in best] != own:
            raise ValueError("`best_weights` are those of another model")
    return checked


def _packed(callback: Any, state: Any, arrays: Arrays) -> Any:
    try:
        return pack(state, arrays)
    except TypeError as error:
        name = type(callback).__name__
        raise TypeError(
            f"The state of a callback cannot be saved. Received: {name}.get_state() with {error}. "
            "It may hold None, booleans, numbers, text, bytes, lists, tuples, sets, dicts and "
            "NumPy arrays. Convert it, or pass `save_every=None`, which saves no state."
        ) from None


def pack(value: Any, arrays: Arrays, depth: int = 0) -> Any:
    """A value as JSON; arrays are copied into `arrays`, and the JSON names them.

    Raises:
        TypeError: If an equal value could not be made of it; the message is the type.
    """
    kind = type(value)
    if depth > DEEPEST:
        raise TypeError(f"{kind.__name__} nested more than {DEEPEST} levels deep")
    is_in_json = (kind is int and abs(value) <= LARGEST) or (kind is float and math.isfinite(value))
    if is_in_json or kind in (bool, str, type(None)):
        return value
    if kind in _WRITTEN:
        return {kind.__name__: _WRITTEN[kind](value)}
    if kind is np.ndarray or isinstance(value, np.generic):
        return _pack_array(value, arrays)
    if _is_operation(value):
        return {"operation": value.__name__}
    return _pack_container(value, kind, lambda inner: [pack(i, arrays, depth + 1) for i in inner])


def _pack_container(value: Any, kind: type, pack_all: Callable[[Any], list[Any]]) -> Any:
    if kind is list:
        return pack_all(value)
    if kind in (tuple, set, frozenset):
        return {kind.__name__: pack_all(value)}
    if kind is dict and all(type(key) is str for key in value):
        return {"dict": dict(zip(value, pack_all(value.values()), strict=True))}
    if kind is dict:
        return {"items": pack_all(value.items())}
    raise TypeError(f"a value of type {kind.__module__}.{kind.__qualname__}")


def _pack_array(value: Any, arrays: Arrays) -> dict[str, str]:
    dtype = value.dtype
    if dtype.hasobject or issubclass(dtype.type, np.void):
        raise TypeError(f"an array of dtype {dtype}")
    name = f"callback_{len(arrays)}"
    # A copy, since it is written while training continues, which may change it in place.
    arrays[name] = np.array(value)
    packed = {"array" if isinstance(value, np.ndarray) else "scalar": name}
    return {**packed, "dtype": dtype.name} if dtype.kind == "V" else packed  # bfloat16


def unpack(value: Any, arrays: Arrays) -> Any:
    """The value that `pack` was given; raises an exception of any class for other JSON."""
    if isinstance(value, list):
        return [unpack(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    tag, content = next(iter(value.items()))
    if tag in ("array", "scalar"):
        array = arrays[content]
        array = from_bits(array, np.dtype(value["dtype"])) if "dtype" in value else array
        return array if tag == "array" else array[()]
    if tag in _READ:
        return _READ[tag](content)
    if tag == "dict":
        return {name: unpack(item, arrays) for name, item in content.items()}
    return _LISTED[tag](unpack(content, arrays))
