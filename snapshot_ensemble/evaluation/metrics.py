"""How good predictions are: likelihood, Brier score, calibration, diversity.

Classes are scored as log-probabilities with the classes on the last axis, in float64. A unit of a
binary or multilabel output is two of them, no and yes: one formula does for all.
"""

import math
from typing import Any

import numpy as np
from keras import ops

from snapshot_ensemble.evaluation.targets import Truth
from snapshot_ensemble.inference.combining import log_of, log_of_rest
from snapshot_ensemble.inference.output_specs import Output

BINS = 15
# Probabilities below the smallest positive float32 count as that: zero cannot be told from them.
LOG_FLOOR = math.log(float(np.finfo("float32").tiny))


def class_logs(output: Any, meaning: Output) -> Any:
    """Log-probabilities of an output, the classes on the last axis; any leading axes.

    Args:
        output: Probabilities or logits, array or tensor.
        meaning: What they are.

    Returns:
        Of a multiclass output the same shape, else a new last axis with no and yes.
    """
    if meaning.task == "multiclass":
        return ops.log_softmax(output if meaning.logits else log_of(output), axis=-1)
    if meaning.logits:
        return ops.stack([ops.log_sigmoid(-output), ops.log_sigmoid(output)], axis=-1)
    return ops.stack([log_of_rest(output), log_of(output)], axis=-1)


def items_of(output: Any, meaning: Output) -> np.ndarray:
    """One prediction's items in float64: `(items, classes)` log-probabilities, or `(items,)`."""
    output = np.asarray(output)
    if not meaning.is_classes:
        return output.astype("float64").reshape(-1)
    wide = output.astype("float64")
    if meaning.task != "multiclass" and not meaning.logits:
        # How close to 1 it can come is a matter of the type that it was worked out in.
        wide = np.minimum(wide, 1 - float(np.finfo(output.dtype).epsneg) / 2)
    logs = np.asarray(class_logs(wide, meaning))
    return np.maximum(logs.reshape(-1, logs.shape[-1]), LOG_FLOOR)


def losses(items: np.ndarray, truth: Truth) -> np.ndarray:
    """Each item's negative log-likelihood in nats, or its squared error."""
    if items.ndim == 1:
        return np.square(items - truth.targets)
    return -np.sum(truth.targets * items, axis=-1)


def loss(items: np.ndarray, truth: Truth) -> float:
    """The weighted mean of `losses`."""
    return float(truth.weights @ losses(items, truth))


def brier_score(logs: np.ndarray, truth: Truth, meaning: Output) -> float:
    """The squared distance of probabilities from the truth, summed over the classes.

    Of a yes or no it is `(p - y)^2`, half of that sum, as is the custom.
    """
    squares = np.sum(np.square(np.exp(logs) - truth.targets), axis=-1)
    return float(truth.weights @ squares) / (1 if meaning.task == "multiclass" else 2)


def _right(logs: np.ndarray, truth: Truth) -> np.ndarray:
    """How right the likeliest class of each item is: 0 or 1, of soft targets between."""
    return np.take_along_axis(truth.targets, logs.argmax(-1)[:, None], axis=-1)[:, 0]


def item_errors(items: np.ndarray, truth: Truth) -> np.ndarray:
    """How wrong the most probable class of each item is, 0 or 1; of values the squared error."""
    return losses(items, truth) if items.ndim == 1 else 1 - _right(items, truth)


def error(items: np.ndarray, truth: Truth) -> float:
    """The share of items whose most probable class is wrong; of values the mean squared error."""
    return float(truth.weights @ item_errors(items, truth))


def reliability(logs: np.ndarray, truth: Truth, bins: int = BINS) -> np.ndarray:
    """Mean confidence and accuracy in bins of equal mass.

    Returns:
        `(bins, 3)`: the mean probability of the likeliest class, the share of these that are
        right, and the share of all items in the bin. There are no more bins than items.
    """
    confidence = np.exp(logs.max(-1))
    # Items of equal confidence are alike, so that their order does not matter.
    levels, place = np.unique(confidence, return_inverse=True)
    mass = np.bincount(place, truth.weights)
    right = np.bincount(place, truth.weights * _right(logs, truth))
    right = np.divide(right, mass, out=np.zeros_like(right), where=mass > 0)[place]
    order = np.lexsort((truth.weights, place))
    # An item belongs to the bin that the middle of its mass falls into.
    middle = np.cumsum(truth.weights[order]) - truth.weights[order] / 2
    count = min(bins, len(order))
    which = np.minimum((middle * count).astype(int), count - 1)
    weights = truth.weights[order]
    mass = np.bincount(which, weights, count)
    sums = [np.bincount(which, weights * v[order], count) for v in (levels[place], right)]
    filled = mass > 0
    return np.stack([*(s[filled] / mass[filled] for s in sums), mass[filled]], axis=1)


def calibration_error(logs: np.ndarray, truth: Truth, bins: int = BINS) -> float:
    """The expected calibration error of the likeliest class, over bins of equal mass.

    `sum over bins of mass * |accuracy - mean confidence|` (Naeini et al., 2015; equal mass:
    Nguyen & O'Connor, 2015).
    """
    confidence, right, mass = reliability(logs, truth, bins).T
    return float(mass @ np.abs(confidence - right))


def disagreement(items: np.ndarray, truth: Truth) -> np.ndarray:
    """How far each pair of members is apart.

    Args:
        items: `(members, items, classes)` log-probabilities, or `(members, items)` values.
        truth: Its weights count the items.

    Returns:
        `(members, members)`: the share of items for which the pair's likeliest classes differ;
        of values the root of their mean squared difference.
    """
    if items.ndim == 2:
        return np.stack([np.sqrt(np.square(items - one) @ truth.weights) for one in items])
    labels = items.argmax(-1)
    return np.stack([(labels != one) @ truth.weights for one in labels])


def mean_of_pairs(matrix: np.ndarray) -> float:
    """The mean over all pairs of different members; 0 for one member."""
    count = len(matrix)
    return float(matrix.sum() / (count * (count - 1))) if count > 1 else 0.0
