"""What the mean of the last, or of the first, 1, 2, … members is worth."""

import math

import numpy as np

from snapshot_ensemble.evaluation import metrics
from snapshot_ensemble.evaluation.held_out import HeldOut


def curves_by_members(held: HeldOut, backwards: bool) -> tuple[dict[str, list[float]], np.ndarray]:
    """Errors of the means of 1, 2, … members, and each row's part of their loss."""
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
            each = weight * truth.weights * metrics.losses(mean, truth)
            parts[k] += each.reshape(held.rows, -1).sum(axis=1)
    curves["loss"] = parts.sum(axis=1).tolist()
    return curves, parts


def good_counts(parts: np.ndarray) -> list[int]:
    """The numbers of members whose loss is within a standard error of the least."""
    best = int(np.argmin(parts.sum(axis=1)))
    found = []
    for k, part in enumerate(parts):
        apart = part - parts[best]
        error = math.sqrt(len(apart)) * np.std(apart, ddof=1) if len(apart) > 1 else 0.0
        if k == best or (len(apart) > 1 and apart.sum() <= error):
            found.append(k + 1)
    return found


def most_members(held: HeldOut) -> int:
    """The largest number of last members whose mean is as good as the best such mean."""
    return max(good_counts(curves_by_members(held, backwards=True)[1]))
