"""What is true of each output, item by item, out of targets as Keras takes them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from snapshot_ensemble.inference.output_specs import Output


@dataclasses.dataclass(frozen=True)
class Truth:
    """What is true of one output, item by item: a row, a label of a row, a pixel, a unit.

    Attributes:
        targets: Of classes `(items, classes)`, the probability of each, mostly 0 or 1; of a
            regression `(items,)`, the values.
        weights: `(items,)`, how much each item counts; they sum to 1.
    """

    targets: np.ndarray
    weights: np.ndarray


def numbers(leaf: Any, what: str) -> np.ndarray:
    """An array of finite numbers, or an error that names it."""
    array = np.asarray(leaf)
    if array.dtype.kind not in "biuf":
        try:
            array = array.astype("float64")
        except (TypeError, ValueError):
            raise TypeError(
                f"`{what}` must be numbers. Received: {what} of dtype {array.dtype}"
            ) from None
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"`{what}` must be finite. Received: {what} with NaN or infinity")
    return array


def read_truth(
    target: np.ndarray, weight: Any, mask: Any, meaning: Output, shape: Sequence[int]
) -> Truth:
    """The truth of one output.

    Args:
        target: As Keras takes it: for classes integers or a probability for each.
        weight: The sample weights, or None.
        mask: Keras's mask, or None.
        meaning: What the output means.
        shape: Its shape, rows first.

    Raises:
        ValueError: If the target cannot be one of this output.
    """
    of_items = tuple(shape[:-1]) if meaning.task == "multiclass" else tuple(shape)
    counts = np.ones(of_items)
    for factor, name in ((weight, "sample_weight"), (mask, "mask")):
        if factor is not None:
            counts *= _beside(factor, of_items, name)
    if meaning.ignored is not None and target.shape != tuple(shape):
        ignored = target == meaning.ignored
        target = np.where(ignored, 0, target)
        counts *= ~_beside(ignored, of_items, "y")
    if (counts < 0).any() or not counts.any():
        raise ValueError(
            "`sample_weight` must be at least 0 and not 0 everywhere. "
            f"Received: sample_weight from {counts.min()} to {counts.max()}"
        )
    if meaning.task == "multiclass":
        targets = _classes(target, of_items, shape[-1])
    else:
        targets = _beside(target, of_items, "y", exact=True).astype("float64").reshape(-1)
        if meaning.is_classes:
            if targets.min() < 0 or targets.max() > 1:
                raise ValueError(
                    f"`y` of a {meaning.task} output must lie from 0 to 1. Received: y from "
                    f"{targets.min()} to {targets.max()}"
                )
            targets = np.stack([1 - targets, targets], axis=-1)
    return Truth(targets, counts.reshape(-1) / counts.sum())


def _beside(array: Any, shape: tuple[int, ...], name: str, exact: bool = False) -> np.ndarray:
    """The array in a shape: a last axis of one more or less does not matter, as in Keras."""
    array = np.asarray(array)
    if array.ndim == len(shape) + 1 and array.shape[-1] == 1:
        array = array[..., 0]
    while array.ndim < len(shape) and (not exact or shape[array.ndim :] == (1,)):
        array = array[..., None]
    fits = array.shape == shape or (
        not exact
        and len(array.shape) == len(shape)
        and all(a in (1, b) for a, b in zip(array.shape, shape, strict=True))
    )
    if not fits:
        raise ValueError(
            f"`{name}` does not fit the model's output. Received: {name} of shape {array.shape}, "
            f"where {shape} is needed"
        )
    return np.broadcast_to(array, shape)


def _classes(target: np.ndarray, of_items: tuple[int, ...], classes: int) -> np.ndarray:
    """`(items, classes)` from integers or from a probability for each class."""
    if target.shape == (*of_items, classes):
        targets = target.reshape(-1, classes).astype("float64")
        if targets.min() < 0 or np.abs(targets.sum(-1) - 1).max() > 1e-3:
            raise ValueError(
                "`y` must have for each row probabilities that sum to 1. Received: y from "
                f"{targets.min()} to {targets.max()}, with sums from {targets.sum(-1).min()} to "
                f"{targets.sum(-1).max()}"
            )
        return targets
    labels = _beside(target, of_items, "y", exact=True).reshape(-1)
    whole = labels.astype("int64")
    if (whole != labels).any() or whole.min() < 0 or whole.max() >= classes:
        raise ValueError(
            f"`y` must be whole numbers from 0 to {classes - 1}, the model's classes. "
            f"Received: y from {labels.min()} to {labels.max()}"
        )
    return np.eye(classes)[whole]


def few(found: Sequence[int]) -> str:
    """The first of them, in words."""
    shown = ", ".join(str(number) for number in found[:5])
    return shown if len(found) <= 5 else f"{shown} and {len(found) - 5} more"
