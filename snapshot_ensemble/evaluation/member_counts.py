"""How the score of the mean depends on the number of members, added from either end."""

import math

import numpy as np

from snapshot_ensemble.evaluation import metrics
from snapshot_ensemble.evaluation.held_out import HeldOut


def curves_by_members(held: HeldOut, backwards: bool) -> tuple[dict[str, list[float]], np.ndarray]:
    """The errors and losses of the means of 1, 2, … members, and each row's share of the losses.

    Args:
        held: The members' predictions and the targets.
        backwards: Whether members are added from the last one instead of the first one.

    Returns:
        The curves by name, and an array `(members, rows)` whose rows sum to the losses.
    """
    curves: dict[str, list[float]] = {}
    parts = np.zeros((len(held.outputs[0]), held.rows))
    names = ["error"] if len(held.names) == 1 else [f"{name}_error" for name in held.names]
    for items, truth, weight, name in zip(
        held.items, held.truths, held.loss_weights, names, strict=True
    ):
        ordered = items[::-1] if backwards else items
        counts = np.arange(1, len(items) + 1).reshape(-1, *[1] * (items.ndim - 1))
        if items.ndim == 2:
            means = np.cumsum(ordered, axis=0) / counts
        else:
            means = np.logaddexp.accumulate(ordered, axis=0) - np.log(counts)
        curves[name] = [metrics.error(mean, truth) for mean in means]
        for k, mean in enumerate(means):
            losses = weight * truth.weights * metrics.losses(mean, truth)
            parts[k] += losses.reshape(held.rows, -1).sum(axis=1)
    curves["loss"] = parts.sum(axis=1).tolist()
    return curves, parts


def good_counts(parts: np.ndarray) -> list[int]:
    """The numbers of members whose loss is within one standard error of the lowest.

    The standard error is that of the paired difference between the rows' losses.
    """
    best = int(np.argmin(parts.sum(axis=1)))
    counts = []
    for k, part in enumerate(parts):
        difference = part - parts[best]
        rows = len(difference)
        error = math.sqrt(rows) * np.std(difference, ddof=1) if rows > 1 else 0.0
        if k == best or (rows > 1 and difference.sum() <= error):
            counts.append(k + 1)
    return counts


def most_members(held: HeldOut) -> int:
    """The largest number of last members whose mean is within one standard error of the best."""
    return max(good_counts(curves_by_members(held, backwards=True)[1]))
