"""The uncertainty of an ensemble, split into an aleatoric and an epistemic part."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from snapshot_ensemble.evaluation import metrics
from snapshot_ensemble.evaluation.held_out import HeldOut
from snapshot_ensemble.evaluation.metrics import LOG_FLOOR, class_logs
from snapshot_ensemble.inference.blocks import in_blocks
from snapshot_ensemble.inference.combining import combine_outputs
from snapshot_ensemble.inference.graphs import Combiner
from snapshot_ensemble.inference.member_pool import MemberPool, PredictArguments
from snapshot_ensemble.inference.output_specs import names_of
from snapshot_ensemble.inference.task_words import Output
from snapshot_ensemble.losses import mean_and_log_variance
from snapshot_ensemble.storage.record import Spread

Spreads = list[Spread | None] | None


def predict_uncertainty(pool: MemberPool, x: Any, members: Any, arguments: PredictArguments) -> Any:
    """Implements `SnapshotEnsemble.predict_uncertainty`."""
    spreads = pool.learned.spreads

    def combine(outputs: list[Any]) -> Any:
        meanings = pool.meanings(outputs[0])
        mean = combine_outputs(outputs, "mean", meanings, names=names_of(pool.model, outputs[0]))
        return {"mean": mean, "spread": uncertainty(outputs, meanings, spreads)}

    name = ("uncertainty", repr(spreads))
    combiner = Combiner(pool.default_indices(members), name, combine)
    predicted = pool.predict_combined(x, combiner, arguments)
    return keras.tree.map_structure_up_to(
        predicted["mean"],
        lambda mean, spread: {"mean": mean, **spread},
        predicted["mean"],
        predicted["spread"],
    )


def error_without_least_sure(
    held: HeldOut, spreads: Spreads = None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The error on the remaining items as the most uncertain ones are set aside.

    Args:
        held: The members' predictions and the targets; only the first output is used.
        spreads: What was learned about the spread of each flat output.

    Returns:
        For each kind of uncertainty the shares that are set aside, and the error of the members'
        mean on the rest: the error rate, or the mean squared error.
    """
    meaning, truth = held.meanings[0], held.truths[0]
    mean = held.unpacked(held.combined("mean"))[0]
    errors = metrics.item_errors(metrics.items_of(mean, meaning), truth)
    curves = {}
    own = None if spreads is None else [spreads[held.numbers[0]]]
    stack = list(held.outputs[0])
    spread = in_blocks(lambda outputs: uncertainty(outputs, [meaning], own), stack)
    for name, values in spread.items():
        if name == "mean" or (name == "std" and len(spread) > 1):
            continue
        order = np.argsort(np.asarray(values).reshape(-1), kind="stable")
        weights = truth.weights[order]
        kept = np.cumsum(weights)
        error = np.cumsum(weights * errors[order]) / np.maximum(kept, np.finfo(float).tiny)
        curves[name] = (1 - kept, error)
    return curves


def uncertainty(
    members: list[Any], meanings: list[Output], spreads: Spreads = None, dtype: str = "float64"
) -> Any:
    """The uncertainty that follows from the members' outputs, for arrays and graph tensors.

    With the members' probabilities `p_m` and `H(p) = -sum p log p` in nats:
    `total = H(mean p_m)`, `aleatoric = mean H(p_m)`, `epistemic = total - aleatoric`, which is
    the mutual information between the class and the member. For distributions of values with means
    `mu_m` and variances `s2_m`, the standard deviations `epistemic^2 = var mu_m`,
    `aleatoric^2 = mean s2_m`, and `total^2`, their sum.

    Args:
        members: Each member's outputs, all of one structure.
        meanings: What each flat output means.
        spreads: What was learned about the spread of each flat output.
        dtype: In which to compute. Defaults to `"float64"`, since the epistemic part is a small
            difference of two entropies.

    Returns:
        A dict for each output, in the same structure: `total`, `aleatoric` and `epistemic` for
        classes and distributions, which also have the `mean` of their values; `std` for regression
        and, with a spread, these three, too; nothing for what is passed through.
    """
    flat = [keras.tree.flatten(outputs) for outputs in members]
    parts: list[dict[str, Any]] = []
    for i, meaning in enumerate(meanings):
        if meaning.is_passed:
            parts.append({})
            continue
        stack = ops.stack([ops.cast(outputs[i], dtype) for outputs in flat])
        parts.append(_parts(stack, meaning, None if spreads is None else spreads[i]))
    return keras.tree.pack_sequence_as(members[0], parts)


def _parts(stack: Any, meaning: Output, spread: Spread | None) -> dict[str, Any]:
    if not meaning.is_classes:
        parts = _parts_of_values(stack, meaning, spread)
        return {name: ops.cast(part, "float32") for name, part in parts.items()}
    logs = class_logs(stack, meaning)
    of_mean = ops.logsumexp(logs, axis=0) - math.log(logs.shape[0])
    aleatoric = ops.mean(_entropy(logs), axis=0)
    # Non-negative by Jensen's inequality; rounding can make it slightly negative.
    epistemic = ops.maximum(_entropy(of_mean) - aleatoric, 0)
    parts = {"total": aleatoric + epistemic, "aleatoric": aleatoric, "epistemic": epistemic}
    return {name: ops.cast(part, "float32") for name, part in parts.items()}


def _parts_of_values(stack: Any, meaning: Output, spread: Spread | None) -> dict[str, Any]:
    """The standard deviations, in the unit of the values."""
    if meaning.is_gaussian:
        means, logs = mean_and_log_variance(stack)
        aleatoric, epistemic = ops.mean(ops.exp(logs), axis=0), ops.var(means, axis=0)
        known = {"mean": ops.mean(means, axis=0)}
    else:
        known = {"std": ops.std(stack, axis=0)}
        if spread is None:
            return known
        epistemic = ops.square(spread.scale * known["std"])
        floors = ops.cast(np.square(spread.floors), stack.dtype)
        aleatoric = ops.zeros_like(epistemic) + (floors if len(stack.shape) > 2 else floors[0])
    parts = {"total": aleatoric + epistemic, "aleatoric": aleatoric, "epistemic": epistemic}
    return known | {name: ops.sqrt(part) for name, part in parts.items()}


def _entropy(logs: Any) -> Any:
    return -ops.sum(ops.exp(logs) * ops.maximum(logs, LOG_FLOOR), axis=-1)
