"""Dataclasses to JSON and back, with a check that each value has the type of its field.

A stored field is defined once, in its dataclass: reading and writing use its name, type and
default. `metadata={"json": name}` gives it another name in JSON.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np

# Bounds for what is read: no value that is written comes close to them.
LARGEST, DEEPEST = 2**63 - 1, 100


def parse(text: bytes) -> Any:
    """The value of a JSON text; raises `ValueError` if it is none, or nested too deeply."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(DEEPEST):
        dicts = (item for node in level if isinstance(node, dict) for item in node.values())
        level = [*dicts, *(item for node in level if isinstance(node, list) for item in node)]
        if not level:
            return value
    raise ValueError(f"it is nested more than {DEEPEST} levels deep")


def at_least_zero(value: Any, name: str) -> Any:
    """The number, or `ValueError` if it is below 0."""
    if value < 0:
        raise ValueError(f"`{name}` must be at least 0. Received: {name}={value!r}")
    return value


def number(value: Any, name: str) -> Any:
    """A number or a list of numbers from JSON; None stays None."""
    if isinstance(value, list):
        return [number(item, name) for item in value]
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    return value if value is None else _typed(value, (int, float), name)


Count = Annotated[int, at_least_zero]
# A metric of one epoch; None in an epoch without it (`validation_freq`).
Number = Annotated[Any, number]


def encode(value: Any) -> Any:
    """A copy of a value as JSON types; NaN and infinities, which JSON lacks, become strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {_key(field): encode(getattr(value, field.name)) for field in fields}
    if isinstance(value, typing.Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if hasattr(value, "__array__"):
        return encode(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


def decode(kind: Any, value: Any, name: str) -> Any:
    """A value of a given type, from JSON.

    Args:
        kind: A dataclass, a plain type, a list, dict, union or `Annotated` with a check.
        value: The value as read from JSON.
        name: Its name in error messages.

    Raises:
        ValueError: If the value is not of the type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is not None:
        return _decode_generic(origin, arguments, value, name)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, _typed(value, dict, name))
    if kind is float:
        return _typed(number(value, name), (int, float), name)
    return _typed(value, kind, name)


def _decode_generic(origin: Any, arguments: tuple[Any, ...], value: Any, name: str) -> Any:
    if origin is Annotated:
        check: Callable[[Any, str], Any] = arguments[1]
        return check(decode(arguments[0], value, name), name)
    if origin is list:
        return [decode(arguments[0], item, name) for item in _typed(value, list, name)]
    if origin is dict:
        items = _typed(value, dict, name).items()
        return {key: decode(arguments[1], item, str(key)) for key, item in items}
    return _decode_union(arguments, value, name)


def _decode_union(kinds: tuple[Any, ...], value: Any, name: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    errors = []
    for kind in kinds:
        if kind is not types.NoneType:
            try:
                return decode(kind, value, name)
            except ValueError as error:
                errors.append(error)
    raise errors[-1]


def _decode_dataclass(kind: Any, content: dict[str, Any]) -> Any:
    kinds = typing.get_type_hints(kind, include_extras=True)
    values = {}
    for field in dataclasses.fields(kind):
        key = _key(field)
        if key in content:
            values[field.name] = decode(kinds[field.name], content[key], key)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"`{key}` is missing")
    return kind(**values)


def _key(field: Any) -> str:
    return str(field.metadata.get("json", field.name))


def _typed(value: Any, kind: Any, name: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"`{name}` has the wrong type. Received: {name}={_short(value)}")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"`{name}` must be at most {LARGEST}. Received: {name}={_short(value)}")
    return value


def _short(value: Any) -> str:
    """The value for an error message, which a huge value must not fill."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
