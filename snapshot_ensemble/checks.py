"""Checks of numeric arguments, and how counts are printed."""

import math
import operator
from typing import Any

import numpy as np


def whole_number(name: str, value: Any, least: int) -> int:
    """`value` as an `int` of at least `least`; otherwise an error that names the argument."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be a whole number. Received: {name}={value!r}") from None
    if number < least:
        raise ValueError(f"`{name}` must be at least {least}. Received: {name}={value!r}")
    return number


def real_number(name: str, value: Any, *, positive: bool) -> float:
    """`value` as a finite `float` above (or at) 0; otherwise an error that names the argument."""
    try:
        if isinstance(value, (bool, np.bool_, str)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"`{name}` must be a number. Received: {name}={value!r}") from None
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        wanted = "above 0" if positive else "at least 0"
        raise ValueError(f"`{name}` must be finite and {wanted}. Received: {name}={value!r}")
    return number


def counted(number: int, noun: str) -> str:
    """`1 member`, `2 members`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
