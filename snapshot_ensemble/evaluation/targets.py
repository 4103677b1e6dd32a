"""Targets, in any form that Keras accepts, as an array of items for each output."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.inference.task_words import Output


@dataclasses.dataclass(frozen=True)
class Truth:
    """The targets of one output, by item: a row, a label of a row, a pixel or a unit.

    Attributes:
        targets: For classes `(items, classes)`, the probability of each class, which is 0 or 1
            for hard labels; for regression `(items,)`, the values.
        weights: `(items,)`, the weight of each item; they sum to 1.
        total: What they summed to before they were divided by it.
        is_gaussian: Whether what predicts the values is distributions, not values.
    """

    targets: np.ndarray
    weights: np.ndarray
    total: float = 1.0
    is_gaussian: bool = False

    def of_rows(self, rows: slice, count: int) -> "Truth":
        """The targets of some of `count` rows; the weights stay as they are."""
        targets, weights = (of_rows(items, rows, count) for items in (self.targets, self.weights))
        return dataclasses.replace(self, targets=targets, weights=weights)

    def every(self, step: int) -> "Truth":
        """The targets of every `step`-th item; the weights stay as they are."""
        return dataclasses.replace(self, targets=self.targets[::step], weights=self.weights[::step])


def of_rows(items: np.ndarray, rows: slice, count: int) -> np.ndarray:
    """The items of some of `count` rows."""
    return items.reshape(count, -1, *items.shape[1:])[rows].reshape(-1, *items.shape[1:])


def of_slice(structure: Any, rows: slice) -> Any:
    """Some rows of all arrays of a structure, which may be None."""
    return keras.tree.map_structure(lambda leaf: None if leaf is None else leaf[rows], structure)


def is_structure(given: Any) -> bool:
    """Whether it is a structure of arrays; a list of numbers is one array."""
    if isinstance(given, dict):
        return True
    return isinstance(given, (list, tuple)) and all(
        leaf is None or hasattr(leaf, "shape") for leaf in given
    )


def has_target(y: Any, names: Sequence[str], number: int) -> bool:
    """Whether `y` has a target for this one of all flat outputs."""
    if isinstance(y, dict):
        return y.get(names[number]) is not None
    if len(names) == 1 or not is_structure(y):
        return len(names) == 1
    flat = keras.tree.flatten(y)
    return len(flat) == len(names) and flat[number] is not None


def by_output(given: Any, what: str, names: Sequence[str], numbers: Sequence[int]) -> list[Any]:
    """The part of targets or sample weights that belongs to each output with targets.

    Args:
        given: Any structure that Keras accepts.
        what: The argument's name.
        names: The name of each flat output.
        numbers: Which of these have targets.
    """
    count = len(names)
    if count == 1 and not isinstance(given, dict):
        leaves = keras.tree.flatten(given) if is_structure(given) else [given]
        flat = leaves if len(leaves) == 1 else [np.asarray(given)]
    elif isinstance(given, dict):
        flat = [given.get(name) for name in names]
    elif what == "sample_weight" and not is_structure(given):
        flat = [given] * count
    else:
        flat = keras.tree.flatten(given)
    # As in Keras, there may be only those of the outputs that are scored.
    chosen = flat if len(flat) == len(numbers) < count else [flat[i] for i in numbers[: len(flat)]]
    if len(flat) not in (count, len(numbers)) or any(leaf is None for leaf in chosen):
        raise ValueError(
            f"`{what}` must have one array for each of the model's {count} outputs "
            f"{list(names)}. Received: {what} of {type(given).__name__} with {len(flat)}"
        )
    return chosen


def as_numbers(leaf: Any, what: str) -> np.ndarray:
    """The leaf as an array of finite numbers, or an error that names it."""
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
    target: np.ndarray,
    weight: Any,
    mask: Any,
    meaning: Output,
    shape: Sequence[int],
    may_be_empty: bool = False,
) -> Truth:
    """Reads the targets of one output.

    Args:
        target: As Keras accepts it: for classes, integers or a probability for each class.
        weight: The sample weights, or None.
        mask: The Keras mask, or None.
        meaning: What the output means.
        shape: The shape of the output, rows first.
        may_be_empty: Whether all items may have the weight 0.

    Raises:
        ValueError: If the targets or sample weights do not fit this output.
    """
    item_shape = tuple(shape[:-1]) if meaning.task == "multiclass" else tuple(shape)
    if meaning.is_gaussian:
        item_shape = (*shape[:-1], shape[-1] // 2)
    counts = np.ones(item_shape)
    for factor, name in ((weight, "sample_weight"), (mask, "mask")):
        if factor is not None:
            counts *= _broadcast(factor, item_shape, name)
    if meaning.ignored is not None and target.shape != tuple(shape):
        ignored = target == meaning.ignored
        target = np.where(ignored, 0, target)
        counts *= ~_broadcast(ignored, item_shape, "y")
    if (counts < 0).any() or not (may_be_empty or counts.any()):
        raise ValueError(
            "`sample_weight` must be at least 0 and not 0 everywhere. "
            f"Received: sample_weight from {counts.min()} to {counts.max()}"
        )
    if meaning.task == "multiclass":
        targets = _class_targets(target, item_shape, shape[-1])
    else:
        targets = _broadcast(target, item_shape, "y", exact=True).astype("float64").reshape(-1)
        if meaning.is_classes:
            if targets.min() < 0 or targets.max() > 1:
                raise ValueError(
                    f"`y` of a {meaning.task} output must lie between 0 and 1. Received: y from "
                    f"{targets.min()} to {targets.max()}"
                )
            targets = np.stack([1 - targets, targets], axis=-1)
    total = float(counts.sum())
    return Truth(targets, counts.reshape(-1) / (total or 1.0), total, meaning.is_gaussian)


def _broadcast(array: Any, shape: tuple[int, ...], name: str, exact: bool = False) -> np.ndarray:
    """Broadcasts to a shape; as in Keras, a trailing axis of size 1 may be missing or extra."""
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


def _class_targets(target: np.ndarray, item_shape: tuple[int, ...], classes: int) -> np.ndarray:
    """Targets `(items, classes)` from integer labels or from a probability for each class."""
    if target.shape == (*item_shape, classes):
        targets = target.reshape(-1, classes).astype("float64")
        if targets.min() < 0 or np.abs(targets.sum(-1) - 1).max() > 1e-3:
            raise ValueError(
                "Each row of `y` must hold probabilities that sum to 1. Received: y from "
                f"{targets.min()} to {targets.max()}, with sums from {targets.sum(-1).min()} to "
                f"{targets.sum(-1).max()}"
            )
        return targets
    labels = _broadcast(target, item_shape, "y", exact=True).reshape(-1)
    integers = labels.astype("int64")
    if (integers != labels).any() or integers.min() < 0 or integers.max() >= classes:
        raise ValueError(
            f"`y` must be integer class labels from 0 to {classes - 1}. "
            f"Received: y from {labels.min()} to {labels.max()}"
        )
    return np.eye(classes)[integers]


def shortened(indices: Sequence[int]) -> str:
    """At most five indices as text, and the number of those left out."""
    shown = ", ".join(str(number) for number in indices[:5])
    return shown if len(indices) <= 5 else f"{shown} and {len(indices) - 5} more"
