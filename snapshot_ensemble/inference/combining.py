"""Combinations of the members' outputs, for arrays and graph tensors alike.

Every function takes a stack with the members on its first axis. Classes are combined in
probability space. Logits are combined as log-probabilities (for sigmoids: log-odds) by log-sum-exp,
which is the same without loss of precision near 0 and 1.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from snapshot_ensemble.checks import whole_number
from snapshot_ensemble.inference.passing import passed_through
from snapshot_ensemble.keras_compat.logits import logits_behind, with_logits
from snapshot_ensemble.keras_compat.masks import mask_of, set_mask
from snapshot_ensemble.losses import mean_and_log_variance

# Raises the winner of a tied vote above the other tied classes: large enough to be visible in
# float32, also in a logarithm, and far less than one vote.
_TIE = 1e-6
_TINY = float(np.finfo("float32").tiny)


def _broadcastable(weights: Any, stack: Any) -> np.ndarray:
    """Weights in the stack's dtype and rank: plain arrays, which every exporter supports."""
    dtype = keras.backend.standardize_dtype(stack.dtype)
    return np.asarray(weights, dtype).reshape([-1] + [1] * (len(stack.shape) - 1))


def _mean(stack: Any, weights: Any) -> Any:
    if weights is None:
        return ops.mean(stack, axis=0)
    return ops.sum(stack * _broadcastable(weights, stack), axis=0)


def _log_mean(log_stack: Any, weights: Any) -> Any:
    """The logarithm of the mean of exponentials."""
    if weights is None:
        return ops.logsumexp(log_stack, axis=0) - math.log(log_stack.shape[0])
    with np.errstate(divide="ignore"):
        # A weight of 0 becomes -inf, which contributes nothing to the log-sum.
        log_weights = np.log(_broadcastable(weights, log_stack))
    return ops.logsumexp(log_stack + log_weights, axis=0)


def _one_hot_of_largest(scores: Any, classes: int) -> Any:
    """1 for the largest value on the last axis (the first one of a tie), 0 for the others."""
    # Not with `argmax`: Keras implements it with bit casts, which exporters do not support.
    largest = ops.top_k(scores, 1)[1]
    return ops.one_hot(ops.squeeze(largest, axis=-1), classes, dtype=scores.dtype)


def mean(stack: Any, task: str, logits: bool, weights: Any = None) -> Any:
    """The (weighted) mean of the members' probabilities, of their values or distributions."""
    if task == "gaussian":
        return mixture(stack, weights)
    if not logits:
        return _mean(stack, weights)
    if task == "multiclass":
        return _log_mean(ops.log_softmax(stack, axis=-1), weights)
    return _log_mean(ops.log_sigmoid(stack), weights) - _log_mean(ops.log_sigmoid(-stack), weights)


def mixture(stack: Any, weights: Any = None) -> Any:
    """The mean and log-variance of a mixture of normal distributions.

    The mean is that of the members' means. The variance is the mean of their variances plus the
    variance of their means.
    """
    means, logs = mean_and_log_variance(stack)
    center = _mean(means, weights)
    within = _log_mean(logs, weights)
    # Zero where members agree, so that its logarithm would have no gradient.
    between = ops.log(ops.maximum(_mean(ops.square(means - center), weights), _TINY))
    return ops.concatenate([center, within + ops.softplus(between - within)], axis=-1)


def _vote_classes(stack: Any, logits: bool) -> Any:
    """The share of members that vote for each class; the last axis holds the classes."""
    classes = stack.shape[-1]
    votes = _one_hot_of_largest(stack, classes)
    share = ops.mean(votes, axis=0)
    # Only the order matters for breaking ties, so log-probabilities will do.
    order = mean(stack, "multiclass", logits)
    at_top = share >= ops.max(share, axis=-1, keepdims=True)
    lowest = ops.min(order, axis=-1, keepdims=True) - 1
    winner = _one_hot_of_largest(ops.where(at_top, order, lowest), classes)
    tied = ops.sum(ops.cast(at_top, stack.dtype), axis=-1, keepdims=True) > 1
    raised = share * (1 + _TIE * winner)
    raised = raised / ops.sum(raised, axis=-1, keepdims=True)
    return ops.where(tied, raised, share)


def _vote_yes(stack: Any, logits: bool) -> Any:
    """The share of members that vote yes, for each unit separately."""
    threshold = 0.0 if logits else 0.5
    share = ops.mean(ops.cast(stack > threshold, stack.dtype), axis=0)
    tied_yes = ops.logical_and(ops.equal(share, 0.5), mean(stack, "binary", logits) > threshold)
    return ops.where(tied_yes, share * (1 + _TIE), share)


def vote(stack: Any, task: str, logits: bool, weights: Any = None) -> Any:
    """The share of members that vote for each class.

    Ties are broken by the members' mean: the winner's share is raised by one millionth of itself,
    so that `argmax` (for binary and multilabel outputs, `> 0.5`) selects it.
    """
    if task == "multiclass":
        share = _vote_classes(stack, logits)
        return _log(share) if logits else share
    share = _vote_yes(stack, logits)
    return _log(share) - _log(1 - share) if logits else share


def _log(probabilities: Any) -> Any:
    return ops.log(ops.maximum(probabilities, keras.config.epsilon()))


def geometric(stack: Any, task: str, logits: bool, weights: Any = None) -> Any:
    """The geometric mean of the members' probabilities, normalised.

    This is the mean of log-probabilities (of log-odds for binary and multilabel). Probabilities of
    0 are raised to the smallest normal float32; those of binary and multilabel outputs are clipped
    to Keras's epsilon from 0 and 1.
    """
    if task == "multiclass":
        logs = ops.log_softmax(stack, axis=-1) if logits else log_of(stack)
        combined = ops.mean(logs, axis=0)
        return ops.log_softmax(combined, axis=-1) if logits else ops.softmax(combined, axis=-1)
    if logits:
        return ops.mean(stack, axis=0)
    epsilon = keras.config.epsilon()
    clipped = ops.clip(stack, epsilon, 1 - epsilon)
    return ops.sigmoid(ops.mean(ops.log(clipped) - ops.log(1 - clipped), axis=0))


def median(stack: Any, task: str, logits: bool, weights: Any = None) -> Any:
    """The middle value; for an even number of members, the mean of the two middle ones."""
    ordered = ops.sort(stack, axis=0)
    count = stack.shape[0]
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def temper(combined: Any, task: str, logits: bool, temperature: float) -> Any:
    """Combined probabilities with their logarithms divided by the temperature, normalised.

    For binary and multilabel, the log-odds are divided. The most probable class stays the same,
    even if rounding would make it equal to another one. A normal distribution's variance is
    multiplied by the temperature.
    """
    if task == "gaussian":
        center, logs = mean_and_log_variance(combined)
        return ops.concatenate([center, logs + math.log(temperature)], axis=-1)
    if task == "multiclass":
        logs = combined if logits else log_of(combined)
        tempered = (ops.log_softmax if logits else ops.softmax)(logs / temperature, axis=-1)
        classes = combined.shape[-1]
        winner = _one_hot_of_largest(combined, classes)
        kept = ops.sum(winner * _one_hot_of_largest(tempered, classes), axis=-1, keepdims=True)
        top = ops.max(tempered, axis=-1, keepdims=True)
        raised = ops.where(winner > 0, top + _TIE if logits else top * (1 + _TIE), tempered)
        return ops.where(kept > 0, tempered, raised)
    if logits:
        return combined / temperature
    tempered = ops.sigmoid((log_of(combined) - log_of_complement(combined)) / temperature)
    at_most = ops.where(combined < 0.5, ops.minimum(tempered, 0.5 - _TIE), tempered)
    return ops.where(combined > 0.5, ops.maximum(tempered, 0.5 + _TIE), at_most)


def log_of(probabilities: Any) -> Any:
    """The logarithm; values below the smallest normal float32 are raised to it."""
    return ops.log(ops.maximum(probabilities, _TINY))


def log_of_complement(probabilities: Any) -> Any:
    """The logarithm of `1 - p`; for `p = 1`, of half the spacing of floats below 1.

    A sigmoid that is rounded to 1 may have been smaller by that much.
    """
    half_step = float(np.finfo(keras.backend.standardize_dtype(probabilities.dtype)).epsneg) / 2
    return ops.log(ops.maximum(1 - probabilities, half_step))


COMBINATIONS: dict[str, Callable[..., Any]] = {
    "mean": mean,
    "vote": vote,
    "weighted": mean,
    "geometric": geometric,
    "median": median,
}
_CLASSES_ONLY = ("vote", "geometric")
_VALUES_ONLY = ("median",)


def check_combine(combine: Any) -> None:
    """Raises `ValueError` unless `combine` names a combination."""
    if not isinstance(combine, str) or combine not in COMBINATIONS:
        raise ValueError(
            f"`combine` must be one of {tuple(COMBINATIONS)}. Received: combine={combine!r}"
        )


def check_meanings(combine: str, meanings: Sequence[Any]) -> None:
    """Raises `ValueError` if the combination is not defined for the task of an output."""
    for i, meaning in enumerate(meanings):
        if meaning.is_passed:
            continue
        if meaning.is_gaussian and combine not in ("mean", "weighted"):
            raise ValueError(
                "Members that predict a mean and a log-variance form a mixture. Received: "
                f"combine={combine!r} for output {i} of the model. Use 'mean' or 'weighted'."
            )
        if combine in _CLASSES_ONLY and not meaning.is_classes:
            raise ValueError(
                f"`combine={combine!r}` is for classes, and output {i} of the model is a "
                f"regression. Received: combine={combine!r}. Use 'mean', 'median' or 'weighted'."
            )
        if combine in _VALUES_ONLY and meaning.is_classes:
            raise ValueError(
                f"`combine={combine!r}` is for regression, and output {i} of the model is "
                f"{meaning.task}. Received: combine={combine!r}. Use 'mean', 'vote', 'geometric' "
                "or 'weighted'."
            )


def combine_outputs(
    members: Sequence[Any],
    combine: str,
    meanings: Sequence[Any],
    weights: Any = None,
    temperature: float = 1.0,
    names: Sequence[str] | None = None,
) -> Any:
    """Combines the members' outputs, which may be nested structures.

    Args:
        members: Each member's outputs, all in the same structure.
        combine: A key of `COMBINATIONS`.
        meanings: An `Output` (with `task` and `logits`) for each flat output.
        weights: For `"weighted"`: one per member, summing to 1.
        temperature: What the logarithms of combined probabilities are divided by.
        names: The name of each flat output, for messages.

    Returns:
        The combined outputs, at least float32, in the structure of one member's outputs. Outputs
        that are passed through are as they are.

    Raises:
        ValueError: If the combination is not defined for the task of an output, or an output that
            is passed through differs between members.
    """
    flat = [keras.tree.flatten(outputs) for outputs in members]
    check_meanings(combine, meanings)
    combined = []
    for i, meaning in enumerate(meanings):
        own = [outputs[i] for outputs in flat]
        if meaning.is_passed:
            combined.append(passed_through(own, str(i) if names is None else names[i]))
            continue
        stack = ops.stack([_at_least_float32(output) for output in own])
        together = combine_stack(stack, combine, meaning, weights, temperature)
        behind, logits = [logits_behind(output) for output in own], None
        if not any(one is None for one in behind):
            stack = ops.stack([_at_least_float32(one) for one in behind])
            logits = combine_logits(stack, combine, meaning, weights, temperature)
        # The loss is that of the logits where it is for one member, and only there.
        combined.append(with_logits(together, logits))
        # The mask keeps padding out of losses and metrics.
        if (mask := mask_of(flat[0][i])) is not None:
            set_mask(combined[-1], mask)
    return keras.tree.pack_sequence_as(members[0], combined)


def combine_logits(
    stack: Any, combine: str, meaning: Any, weights: Any = None, temperature: float = 1.0
) -> Any:
    """The logits of combined probabilities, from those that the members keep with theirs.

    A softmax does not show what is added to all of its logits. Here it is the members' mean, so
    that the logits of one member stay as they are, whatever a loss does with them.

    Returns:
        The logits, or None if they are not known: for votes, and for values.
    """
    if not meaning.is_classes:
        return stack[0] if stack.shape[0] == 1 else None
    if combine == "vote":
        return None
    combined = COMBINATIONS[combine](stack, meaning.task, True, weights)
    if meaning.task == "multiclass":
        combined += _mean(ops.logsumexp(stack, axis=-1, keepdims=True), weights)
    return combined / temperature


def combine_stack(
    stack: Any, combine: str, meaning: Any, weights: Any = None, temperature: float = 1.0
) -> Any:
    """Combines one output of all members, which are on the first axis; else as above."""
    stack = _at_least_float32(stack)
    combined = COMBINATIONS[combine](stack, meaning.task, meaning.logits, weights)
    if temperature == 1 or not meaning.has_temperature:
        return combined
    return temper(combined, meaning.task, meaning.logits, temperature)


def _at_least_float32(output: Any) -> Any:
    """Casts half precision to float32, since a mean in half precision loses digits."""
    output = ops.convert_to_tensor(output)
    dtype = keras.backend.standardize_dtype(output.dtype)
    return output if dtype == "float64" else ops.cast(output, "float32")


def check_members(members: Any, count: int) -> list[int]:
    """The indices that `members` selects out of `count` members, or an error."""
    if members is None:
        return list(range(count))
    if isinstance(members, (list, tuple, range, np.ndarray)):
        try:
            if any(isinstance(member, (bool, np.bool_)) for member in members):
                raise TypeError  # A boolean mask would be read as the indices 0 and 1.
            chosen = [range(count)[operator.index(member)] for member in members]
        except (IndexError, TypeError):
            raise ValueError(
                f"`members` must be indices from 0 to {count - 1}. Received: members={members!r}"
            ) from None
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(
                "`members` must contain at least one index and no duplicates. "
                f"Received: members={members!r}"
            )
        return chosen
    last = whole_number("members", members, 1)
    if last > count:
        raise ValueError(
            f"The ensemble has {count} members, so `members` can be at most {count}. "
            f"Received: members={members!r}"
        )
    return list(range(count - last, count))


def check_weights(weights: Any, count: int) -> np.ndarray:
    """`weights` as float64, normalised to sum to exactly 1, or an error."""
    try:
        array = np.asarray(weights, "float64")
    except (TypeError, ValueError):
        array = None
    if array is None or array.shape != (count,):
        raise ValueError(
            f"`weights` must be one number for each of the {count} members. "
            f"Received: weights={weights!r}"
        )
    if not np.isfinite(array).all() or (array < 0).any() or abs(array.sum() - 1) > 1e-6:
        raise ValueError(
            "`weights` must be finite, at least 0 and sum to 1. "
            f"Received: weights={weights!r}, summing to {array.sum()}. "
            "Divide them by their sum."
        )
    return array / array.sum()


def weights_of(weights: np.ndarray | None, chosen: list[int]) -> np.ndarray:
    """The weights of the chosen members, rescaled to sum to 1, or an error."""
    if weights is None:
        raise ValueError(
            "`combine='weighted'` needs weights. Received: weights=None. Call "
            "`fit_weights(x, y)` on held-out data, or set `weights` to one number per member, "
            "at least 0 and summing to 1."
        )
    weights = weights[chosen]
    if weights.sum() == 0:
        raise ValueError(f"The chosen members all have weight 0. Received: members={chosen}")
    return weights / weights.sum()
