"""How the score of the mean depends on the number of members, added from either end."""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from snapshot_ensemble.evaluation import metrics
from snapshot_ensemble.evaluation.held_out import HeldOut
from snapshot_ensemble.inference.task_words import Output
from snapshot_ensemble.storage.snapshot import Snapshot


class Curve(NamedTuple):
    """The scores of the means of 1, 2, … members.

    Attributes:
        scores: The error of each output and the `loss`, by name, one value for each mean.
        losses: `(members, rows)`, each row's share of the loss, so that its rows sum to `loss`.
    """

    scores: dict[str, list[float]]
    losses: np.ndarray


def curves_by_members(held: HeldOut, *orders: int) -> list[Curve]:
    """The curve for each order in which members are added: 1 from the first, -1 from the last."""
    members, outputs = len(held.outputs[0]), len(held.outputs)
    losses = np.zeros((len(orders), members, held.rows))
    errors = np.zeros((len(orders), outputs, members))
    for block in held.blocks():
        for i, (items, truth) in enumerate(zip(block.items, block.truths, strict=True)):
            for k, order in enumerate(orders):
                means = combined_first(items[::order], held.meanings[i])
                errors[k, i] += metrics.item_errors(means, truth) @ truth.weights
                shares = held.loss_weights[i] * truth.weights * metrics.losses(means, truth)
                of_rows = losses[k, :, block.rows]
                of_rows += shares.reshape(*of_rows.shape, -1).sum(axis=-1)
    names = ["error"] if outputs == 1 else [f"{name}_error" for name in held.names]
    curves = []
    for of_outputs, parts in zip(errors.tolist(), losses, strict=True):
        scores = dict(zip(names, of_outputs, strict=True))
        curves.append(Curve({**scores, "loss": parts.sum(axis=1).tolist()}, parts))
    return curves


def combined_first(items: np.ndarray, meaning: Output) -> np.ndarray:
    """The items of the combinations of the first 1, 2, … members, from those of each member."""
    if meaning.is_gaussian:
        means, variances = items[..., 0], np.exp(items[..., 1])
        center = means.mean(axis=0)  # So that squares of large numbers do not cancel.
        shifts = means_of_first(means - center)
        squares = means_of_first(variances + np.square(means - center)) - np.square(shifts)
        logs = np.log(np.maximum(squares, np.finfo(float).tiny))
        return np.stack([center + shifts, logs], axis=-1)
    if not meaning.is_classes:
        return means_of_first(items)
    # Probabilities: in float64, even the smallest ones of float32 are exact.
    return np.log(means_of_first(np.exp(items)))


def means_of_first(values: np.ndarray) -> np.ndarray:
    """The means of the first 1, 2, … members."""
    counts = np.arange(1, len(values) + 1).reshape(-1, *[1] * (values.ndim - 1))
    return np.cumsum(values, axis=0) / counts


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


def most_members(held: HeldOut, snapshots: Sequence[Snapshot]) -> int:
    """The largest number of last members whose mean is within one standard error of the best.

    See `largest` for members whose rate had not reached its floor.
    """
    [from_last] = curves_by_members(held, -1)
    best = int(np.argmin(from_last.losses.sum(axis=1))) + 1
    return largest(good_counts(from_last.losses), best, snapshots)


def largest(good: Collection[int], best: int, snapshots: Sequence[Snapshot]) -> int:
    """The largest good number of last members.

    Those whose rate had not reached its floor are worse than the members after them, and hardly
    differ from these. They are added only where that lowers the loss.

    Args:
        good: The numbers that are within one standard error of the best.
        best: The number with the lowest loss.
        snapshots: The members.
    """
    largest = best
    for count in range(best + 1, len(snapshots) + 1):
        if not snapshots[-count].is_annealed:
            break
        if count in good:
            largest = count
    return largest
