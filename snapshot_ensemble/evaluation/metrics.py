"""Scores of predictions: log-likelihood, Brier score, calibration error and diversity.

Classes are scored as float64 log-probabilities with the classes on the last axis. A unit of a
binary or multilabel output counts as two classes, no and yes, so that the same formulas apply.
"""

import math
from typing import Any

import numpy as np
from keras import ops

from snapshot_ensemble.evaluation.targets import Truth
from snapshot_ensemble.inference.blocks import in_blocks
from snapshot_ensemble.inference.combining import log_of, log_of_complement
from snapshot_ensemble.inference.task_words import Output
from snapshot_ensemble.losses import gaussian_nll, mean_and_log_variance

BINS = 15
# Probabilities below the smallest normal float32 are raised to it, so that logarithms are finite.
LOG_FLOOR = math.log(float(np.finfo("float32").tiny))


def class_logs(output: Any, meaning: Output) -> Any:
    """Log-probabilities of an output with the classes on the last axis; any leading axes.

    Args:
        output: Probabilities or logits, as an array or tensor.
        meaning: What the output means.

    Returns:
        The same shape for a multiclass output; for others with a new last axis of no and yes.
    """
    if meaning.task == "multiclass":
        return ops.log_softmax(output if meaning.logits else log_of(output), axis=-1)
    if meaning.logits:
        return ops.stack([ops.log_sigmoid(-output), ops.log_sigmoid(output)], axis=-1)
    return ops.stack([log_of_complement(output), log_of(output)], axis=-1)


def items_of(output: Any, meaning: Output) -> np.ndarray:
    """One prediction's items in float64.

    `(items, classes)` log-probabilities, `(items, 2)` means and log-variances, or `(items,)`.
    """
    output = np.asarray(output)
    if meaning.is_gaussian:
        halves = mean_and_log_variance(output.astype("float64"))
        return np.stack([half.reshape(-1) for half in halves], axis=-1)
    if not meaning.is_classes:
        return output.astype("float64").reshape(-1)
    return in_blocks(lambda rows: _floored_logs(rows, meaning), output)


def _floored_logs(output: np.ndarray, meaning: Output) -> np.ndarray:
    wide = output.astype("float64")
    if meaning.task != "multiclass" and not meaning.logits:
        # The largest value below 1 depends on the dtype in which the sigmoid was computed.
        wide = np.minimum(wide, 1 - float(np.finfo(output.dtype).epsneg) / 2)
    logs = np.asarray(class_logs(wide, meaning))
    return np.maximum(logs.reshape(-1, logs.shape[-1]), LOG_FLOOR)


def losses(items: np.ndarray, truth: Truth) -> np.ndarray:
    """Each item's negative log-likelihood in nats, or its squared error; any leading axes."""
    if truth.is_gaussian:
        return np.asarray(gaussian_nll(truth.targets, items[..., 0], items[..., 1]))
    if truth.targets.ndim == 1:
        return np.square(items - truth.targets)
    return -np.einsum("...ij,ij->...i", items, truth.targets)


def loss(items: np.ndarray, truth: Truth) -> float:
    """The weighted mean of `losses`."""
    return float(truth.weights @ losses(items, truth))


def brier_score(logs: np.ndarray, truth: Truth, meaning: Output) -> float:
    """The squared distance of probabilities from the truth, summed over the classes.

    For binary and multilabel outputs it is `(p - y)^2`, half of that sum, as is customary.
    """
    errors = np.exp(logs)
    errors -= truth.targets
    squares = np.einsum("ij,ij->i", errors, errors)
    return float(truth.weights @ squares) / (1 if meaning.task == "multiclass" else 2)


def _correctness(logs: np.ndarray, truth: Truth) -> np.ndarray:
    """The target probability of each item's most probable class: 0 or 1 for hard targets."""
    return truth.targets[np.arange(len(truth.targets)), logs.argmax(-1)]


def item_errors(items: np.ndarray, truth: Truth) -> np.ndarray:
    """Each item's classification error (0 or 1 for hard targets), or its squared error."""
    if truth.targets.ndim == 1:
        return np.square(values_of(items, truth) - truth.targets)
    return 1 - _correctness(items, truth)


def values_of(items: np.ndarray, truth: Truth) -> np.ndarray:
    """The predicted values: of distributions, their means; any leading axes."""
    return items[..., 0] if truth.is_gaussian else items


def error(items: np.ndarray, truth: Truth) -> float:
    """The share of items whose most probable class is wrong, or the mean squared error."""
    return float(truth.weights @ item_errors(items, truth))


def reliability(logs: np.ndarray, truth: Truth, bins: int = BINS) -> np.ndarray:
    """Mean confidence and accuracy in bins of equal mass.

    Returns:
        `(bins, 3)`: the mean probability of the most probable class, the accuracy, and the share of
        all items in the bin. There are no more bins than items.
    """
    # Rounded, so that rounding errors do not split items of equal confidence.
    confidence = np.exp(logs.max(-1)).round(12)
    order = np.lexsort((truth.weights, confidence))
    confidence, weights = confidence[order], truth.weights[order]
    right = weights * _correctness(logs, truth)[order]
    # Items of equal confidence share their mean accuracy, so their order does not matter.
    level_of = np.cumsum(np.diff(confidence, prepend=confidence[0]) > 0)
    mass = np.bincount(level_of, weights)
    right = np.bincount(level_of, right)
    right = np.divide(right, mass, out=np.zeros_like(right), where=mass > 0)[level_of]
    # An item belongs to the bin that contains the midpoint of its mass.
    middle = np.cumsum(weights) - weights / 2
    count = min(bins, len(order))
    bin_of = np.minimum((middle * count).astype(int), count - 1)
    mass = np.bincount(bin_of, weights, count)
    sums = [np.bincount(bin_of, weights * v, count) for v in (confidence, right)]
    filled = mass > 0
    return np.stack([*(s[filled] / mass[filled] for s in sums), mass[filled]], axis=1)


def calibration_error(logs: np.ndarray, truth: Truth, bins: int = BINS) -> float:
    """The expected calibration error of the most probable class, over bins of equal mass.

    `sum over bins of mass * |accuracy - mean confidence|` (Naeini et al., 2015; equal mass:
    Nguyen & O'Connor, 2015).
    """
    confidence, right, mass = reliability(logs, truth, bins).T
    return float(mass @ np.abs(confidence - right))


def disagreement(items: np.ndarray, truth: Truth) -> np.ndarray:
    """How much each pair of members disagrees.

    Args:
        items: Those of each member, as from `items_of`.
        truth: Its `weights` weigh the items; its targets are not used.

    Returns:
        `(members, members)`: the share of items whose predicted classes differ; for values the
        mean squared difference. Those of blocks of items add up.
    """
    items = values_of(items, truth)
    matrix = np.zeros((len(items), len(items)))
    labels = items if items.ndim == 2 else items.argmax(-1)
    for i, one in enumerate(labels):
        differences = np.square(labels[:i] - one) if items.ndim == 2 else labels[:i] != one
        matrix[i, :i] = differences @ truth.weights
    return matrix + matrix.T


def mean_of_pairs(matrix: np.ndarray) -> float:
    """The mean over all pairs of different members; 0 for one member."""
    count = len(matrix)
    return float(matrix.sum() / (count * (count - 1))) if count > 1 else 0.0
