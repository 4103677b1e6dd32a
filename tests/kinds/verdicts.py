"""Judges what a method did: right, refused by a sentence, wrong, or an error from the depths."""

import contextlib
import dataclasses
import pathlib
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

import snapshot_ensemble
from snapshot_ensemble import SnapshotError

PACKAGE = pathlib.Path(snapshot_ensemble.__file__).parent
REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError, ImportError, SnapshotError)
# What a verdict is written as in the table.
MARKS = {
    "right": "✓",
    "refused": "r",
    "as Keras": "k",
    "skipped": "-",
    "wrong": "WRONG",
    "raw error": "RAW",
}
BAD = ("wrong", "raw error")


class Skip(Exception):  # noqa: N818  It is not an error.
    """Raised where a cell has no meaning, or its runtime is not installed."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one cell.

    Attributes:
        what: A key of `MARKS`.
        detail: The message, or how the result differs.
    """

    what: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Operation:
    """A method of the ensemble and its independent value; functions of a case.

    Attributes:
        name: The column.
        expected: What Keras or NumPy gives.
        actual: What the package gives.
        compare: Raises `AssertionError` if they differ; of the case and both.
        in_keras: Run if the package refuses: whether Keras can do as much for one model.
        may_warn: A result that differs counts as refused if a warning with this in it says so.
    """

    name: str
    expected: Callable[[Any], Any]
    actual: Callable[[Any], Any]
    compare: Callable[[Any, Any, Any], None]
    in_keras: Callable[[Any], Any] | None = None
    may_warn: str = ""


def judge(operation, case):
    """The verdict on one operation."""
    with _whole_tracebacks():
        expected, keras_error, _ = _attempt(operation.expected, case)
        if isinstance(keras_error, Skip):
            return Verdict("skipped", str(keras_error))
        actual, error, said = _attempt(operation.actual, case)
        if error is not None:
            return _of_error(error, keras_error, operation, case)
        if keras_error is not None:
            return Verdict("wrong", f"Keras refuses: {_line(keras_error)}")
        _, difference, _ = _attempt(lambda case: operation.compare(case, actual, expected), case)
    return _of_difference(difference, operation.may_warn, said)


@contextlib.contextmanager
def _whole_tracebacks():
    """With Keras's own frames in tracebacks; without, its errors seem to come from others."""
    was = keras.config.is_traceback_filtering_enabled()
    keras.config.disable_traceback_filtering()
    try:
        yield
    finally:
        if was:
            keras.config.enable_traceback_filtering()


def _attempt(function, case):
    """What a function returns, the error that it raises, and its warnings."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            return function(case), None, said
        except Exception as error:  # Whatever a cell raises is its result.
            return None, error, said


def _of_difference(difference, may_warn, said):
    if difference is None:
        return Verdict("right")
    for each in said:
        if may_warn and may_warn in str(each.message):
            return Verdict("refused", f"a warning: {each.message}"[:300])
    return Verdict("wrong", _line(difference))


def _of_error(error, keras_error, operation, case):
    if isinstance(error, Skip):
        return Verdict("skipped", str(error))
    if keras_error is None and operation.in_keras is not None:
        _, keras_error, _ = _attempt(operation.in_keras, case)
    if isinstance(error, AssertionError):
        return Verdict("wrong", _line(error))
    if keras_error is not None and _line(error) == _line(keras_error):
        return Verdict("as Keras", _line(error))
    if not is_sentence(error):
        return Verdict("raw error", _line(error))
    return Verdict("refused" if keras_error is None else "as Keras", _line(error))


def is_sentence(error):
    """Whether an exception is one of the package's own, with a message that says something."""
    if not isinstance(error, REFUSALS):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    is_own = bool(frames) and pathlib.Path(frames[-1].filename).is_relative_to(PACKAGE)
    message = str(error).strip()
    return is_own and ("Received:" in message or (" " in message and "." in message))


def _line(error):
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    shown = " ".join(lines[:6]) if isinstance(error, AssertionError) else " ".join(lines[:2])
    return f"{type(error).__name__}: {shown}"[:300]


def assert_bitwise(case, actual, expected):
    """Two nested lists of arrays are equal bit for bit."""
    flat = [keras.tree.flatten(each) for each in (actual, expected)]
    assert len(flat[0]) == len(flat[1]), f"{len(flat[0])} arrays, not {len(flat[1])}"
    for one, other in zip(*flat, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other), strict=True)


def assert_alike(case, actual, expected):
    """Two structures of arrays are equal up to rounding, relative to the largest value."""
    keras.tree.assert_same_structure(actual, expected)
    pairs = zip(keras.tree.flatten(actual), keras.tree.flatten(expected), strict=True)
    for one, other in pairs:
        one, other = np.asarray(one), np.asarray(other)  # noqa: PLW2901
        assert one.shape == other.shape, f"shape {one.shape}, not {other.shape}"
        if other.dtype.kind in "iubOSU":
            np.testing.assert_array_equal(one, other)
            continue
        scale = max(1.0, float(np.nanmax(np.abs(other), initial=0)))
        np.testing.assert_allclose(one, other, rtol=0, atol=case.kind.tolerance * scale)
