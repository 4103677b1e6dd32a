"""Conformity scores, their quantiles, and the sets and intervals that follow from them.

Arrays and graph tensors alike, except for the scores and quantiles, which are learned from arrays.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from snapshot_ensemble.storage.record import ConformalRule

# What RAPS chooses from: the values of its paper.
PENALTIES = (0.001, 0.01, 0.1, 0.2, 0.5)
# Relative: other runtimes and batch sizes round differently, and sets must not get smaller by it.
_ROUNDING = 1e-6
# The least scale of a value, so that members that agree give no score of infinity.
LEAST_SCALE = 1e-8


def quantile(scores: np.ndarray, kept: np.ndarray, level: float) -> float:
    """The smallest score that is high enough for a new row.

    Rows are exchangeable, the items of a row need not be. With `n` rows and `F_i(q)` the share of
    the items of row `i` whose score is at most `q`, it is the smallest `q` with
    `sum_i F_i(q) >= level * (n + 1)`. With one item a row, it is the score of rank
    `ceil(level * (n + 1))`.

    Args:
        scores: `(rows, items)`.
        kept: Which of them count, of the same shape. A row without any is left out.
        level: The confidence level.

    Returns:
        The quantile; infinity if there are too few rows.
    """
    counts = kept.sum(axis=1)
    rows = int((counts > 0).sum())
    weights = (kept / np.maximum(counts, 1)[:, None])[kept]
    order = np.argsort(scores[kept])
    reached = np.cumsum(weights[order])
    # Neither sums of shares nor products of levels are exact.
    index = int(np.searchsorted(reached, level * (rows + 1) - 1e-9 * max(rows, 1)))
    return float(scores[kept][order][index]) if index < len(order) else math.inf


def least_rows(level: float) -> int:
    """The least number of rows for which a quantile is finite."""
    return math.ceil(level / (1 - level) - 1e-9)


class RankedClasses:
    """The classes of items, ranked by probability, and how the true one lies among them.

    Args:
        probabilities: `(items, classes)`.
        labels: `(items,)`, the index of each true class.
    """

    def __init__(self, probabilities: np.ndarray, labels: np.ndarray) -> None:
        order = np.argsort(probabilities, axis=-1)
        ascending = np.take_along_axis(probabilities, order, axis=-1)
        place = (order == labels[:, None]).argmax(axis=-1)[:, None]
        rest = np.take_along_axis(np.cumsum(ascending, axis=-1), place, axis=-1)[:, 0]
        own = np.take_along_axis(ascending, place, axis=-1)[:, 0]
        # 1 for the most probable class.
        self.ranks = probabilities.shape[-1] - place[:, 0]
        # A random share of the true class's own probability is taken off, with a fixed seed.
        shares = np.random.default_rng(0).random(len(own))
        self.aps = 1 - (rest - (1 - shares) * own)
        self.whole = 1 - (rest - own)  # Nothing is taken off.

    def penalties(self, penalty: float, free: int) -> np.ndarray:
        """What RAPS adds to a score: a penalty for each class beyond those that are free."""
        return penalty * np.maximum(self.ranks - free, 0)


def lac(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """One minus the probability of the true class."""
    return 1 - np.take_along_axis(probabilities, labels[:, None], axis=-1)[:, 0]


def class_set(probabilities: Any, rule: ConformalRule, level: int, has_units: bool) -> Any:
    """Which classes are in the set.

    Args:
        probabilities: The classes on the last axis and, if `has_units`, the units before them.
        rule: The rule of this output.
        level: The number of the confidence level.
        has_units: Whether each unit has a quantile of its own, as for binary and multilabel.

    Returns:
        Bools in the shape of the probabilities.
    """
    dtype = probabilities.dtype
    quantiles = np.asarray(rule.quantiles[level])
    # What is left of 1 can be compared closely where the classes in the set are nearly all of it.
    least = (1 - quantiles)[:, None] if has_units else 1 - quantiles
    if rule.method == "lac":
        return probabilities >= ops.cast(least - _ROUNDING * np.abs(least), dtype)
    classes = probabilities.shape[-1]
    ascending = -ops.top_k(-probabilities, classes)[0]
    rest = ops.cumsum(ascending, axis=-1)
    if rule.method == "raps":
        before = np.arange(classes - 1, -1, -1)  # How many classes are more probable.
        least = least + rule.penalties[level] * np.maximum(before - rule.free[level], 0)
    is_in = rest >= ops.cast(least - _ROUNDING * np.abs(least), dtype)
    last = ops.min(ops.where(is_in, ascending, ops.ones_like(ascending)), axis=-1, keepdims=True)
    return probabilities >= last * (1 - _ROUNDING)


def penalty_of(
    probabilities: np.ndarray, ranked: RankedClasses, kept: np.ndarray, level: float, units: int
) -> tuple[float, int]:
    """What gives RAPS the smallest sets on rows of their own: its penalty, and the free classes.

    Args:
        probabilities: `(items, classes)`.
        ranked: The same items.
        kept: `(rows, items of a row and unit, units)`; which of them count.
        level: The confidence level.
        units: The number of units.
    """

    def quantiles(scores: np.ndarray) -> list[float]:
        shaped = scores.reshape(kept.shape)
        found = [quantile(shaped[..., i], kept[..., i], level) for i in range(units)]
        return [value if math.isfinite(value) else float(scores.max()) for value in found]

    free = int(max(quantiles(ranked.ranks)))
    sizes = []
    for penalty in PENALTIES:
        found = quantiles(ranked.whole + ranked.penalties(penalty, free))
        rule = ConformalRule("raps", [found], [penalty], [free])
        shape = (-1, units, probabilities.shape[-1])
        sets = np.asarray(class_set(probabilities.reshape(shape), rule, 0, True))
        sizes.append(sets[kept.reshape(-1, units)].sum())
    return PENALTIES[int(np.argmin(sizes))], free


def interval(values: Any, scale: Any, rule: ConformalRule, level: int) -> tuple[Any, Any]:
    """The lower and upper bounds: `value -+ quantile * scale`.

    Args:
        values: The predictions, with the units on the last axis.
        scale: In the same shape, or None for 1.
        rule: The rule of this output.
        level: The number of the confidence level.
    """
    reach = ops.cast(np.asarray(rule.quantiles[level]), values.dtype)
    if len(values.shape) < 2:
        reach = reach[0]
    reach = reach if scale is None else reach * ops.cast(scale, values.dtype)
    return values - reach, values + reach


def stacked(levels: Sequence[Any], is_single: bool) -> Any:
    """One array, or those of all levels on a new last axis."""
    return levels[0] if is_single else ops.stack(list(levels), axis=-1)
