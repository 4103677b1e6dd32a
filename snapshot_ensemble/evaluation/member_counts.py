"""How the score of the mean depends on the number of members, added from either end."""

import math
from collections.abc import Sequence
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

    Args:
        parts: `(members, rows)`: each row's share of the loss of the mean of 1, 2, … members.
    """
    sums, errors = parts.sum(axis=1), paired_errors(parts)
    best = int(np.argmin(sums))
    return [int(k) + 1 for k in np.flatnonzero(sums - sums[best] <= errors[best])]


def paired_errors(parts: np.ndarray) -> np.ndarray:
    """The standard error of each difference of two losses, from those of the same rows.

    Args:
        parts: As for `good_counts`.

    Returns:
        `(members, members)`; 0 for a single row.
    """
    rows = parts.shape[1]
    if rows < 2:
        return np.zeros((len(parts),) * 2)
    spreads = [np.std(parts - part, axis=1, ddof=1) for part in parts]
    return math.sqrt(rows) * np.asarray(spreads)


def most_members(held: HeldOut, snapshots: Sequence[Snapshot]) -> int:
    """The number of last members that predict, by some held-out data; see `chosen_count`."""
    parts = curves_by_members(held, -1)[0].losses
    return chosen_count(parts.sum(axis=1), paired_errors(parts), snapshots)


def chosen_count(losses: np.ndarray, errors: np.ndarray, snapshots: Sequence[Snapshot]) -> int:
    """The number of last members that predict.

    The largest one within one standard error of the best. Members whose rate had not reached its
    floor are worse than those after them, and hardly differ from these: they, and those before
    them, are added only where that lowers the loss by more than one standard error.

    Args:
        losses: The losses of the means of the last 1, 2, … members.
        errors: The standard errors of their paired differences, a square matrix.
        snapshots: The members.
    """
    annealed = [True, *(snapshot.is_annealed for snapshot in snapshots[-2::-1])]
    end = annealed.index(False) if False in annealed else len(annealed)
    chosen = _most_like(int(np.argmin(losses[:end])), end, losses, errors)
    best = int(np.argmin(losses))
    if best >= end and losses[chosen] - losses[best] > errors[best, chosen]:
        end = next((k for k in range(best + 1, len(annealed)) if not annealed[k]), len(annealed))
        chosen = _most_like(best, end, losses, errors)
    return chosen + 1


def _most_like(best: int, end: int, losses: np.ndarray, errors: np.ndarray) -> int:
    """The last index before `end` whose loss is within one standard error of that of `best`."""
    alike = (k for k in range(best, end) if losses[k] - losses[best] <= errors[best, k])
    return max(alike, default=best)  # None if losses are not numbers.
