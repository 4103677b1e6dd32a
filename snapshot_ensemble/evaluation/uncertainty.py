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


def predict_uncertainty(pool: MemberPool, x: Any, members: Any, arguments: PredictArguments) -> Any:
    """Implements `SnapshotEnsemble.predict_uncertainty`."""

    def combine(outputs: list[Any]) -> Any:
        meanings = pool.meanings(outputs[0])
        mean = combine_outputs(outputs, "mean", meanings, names=names_of(pool.model, outputs[0]))
        return {"mean": mean, "spread": uncertainty(outputs, meanings)}

    combiner = Combiner(pool.default_indices(members), ("uncertainty",), combine)
    predicted = pool.predict_combined(x, combiner, arguments)
    return keras.tree.map_structure_up_to(
        predicted["mean"],
        lambda mean, spread: {"mean": mean, **spread},
        predicted["mean"],
        predicted["spread"],
    )


def error_without_least_sure(held: HeldOut) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The error on the remaining items as the most uncertain ones are set aside.

    Args:
        held: The members' predictions and the targets; only the first output is used.

    Returns:
        For each kind of uncertainty the shares that are set aside, and the error of the members'
        mean on the rest: the error rate, or the mean squared error.
    """
    meaning, truth = held.meanings[0], held.truths[0]
    mean = held.unpacked(held.combined("mean"))[0]
    errors = metrics.item_errors(metrics.items_of(mean, meaning), truth)
    curves = {}
    spread = in_blocks(lambda outputs: uncertainty(outputs, [meaning]), list(held.outputs[0]))
    for name, values in spread.items():
        order = np.argsort(np.asarray(values).reshape(-1), kind="stable")
        weights = truth.weights[order]
        kept = np.cumsum(weights)
        error = np.cumsum(weights * errors[order]) / np.maximum(kept, np.finfo(float).tiny)
        curves[name] = (1 - kept, error)
    return curves


def uncertainty(members: list[Any], meanings: list[Output]) -> Any:
    """The uncertainty that follows from the members' outputs, for arrays and graph tensors.

    With the members' probabilities `p_m` and `H(p) = -sum p log p` in nats:
    `total = H(mean p_m)`, `aleatoric = mean H(p_m)`, `epistemic = total - aleatoric`, which is
    the mutual information between the class and the member.

    Args:
        members: Each member's outputs, all of one structure.
        meanings: What each flat output means.

    Returns:
        A dict for each output, in the same structure: `total`, `aleatoric` and `epistemic` for
        classes, `std` for regression, nothing for what is passed through.
    """
    flat = [keras.tree.flatten(outputs) for outputs in members]
    spreads: list[dict[str, Any]] = []
    for i, meaning in enumerate(meanings):
        if meaning.is_passed:
            spreads.append({})
            continue
        # In float64, since the epistemic part is a small difference of two entropies.
        stack = ops.stack([ops.cast(outputs[i], "float64") for outputs in flat])
        spreads.append(_spread(stack, meaning))
    return keras.tree.pack_sequence_as(members[0], spreads)


def _spread(stack: Any, meaning: Output) -> dict[str, Any]:
    if not meaning.is_classes:
        return {"std": ops.cast(ops.std(stack, axis=0), "float32")}
    logs = class_logs(stack, meaning)
    of_mean = ops.logsumexp(logs, axis=0) - math.log(logs.shape[0])
    aleatoric = ops.mean(_entropy(logs), axis=0)
    # Non-negative by Jensen's inequality; rounding can make it slightly negative.
    epistemic = ops.maximum(_entropy(of_mean) - aleatoric, 0)
    parts = {"total": aleatoric + epistemic, "aleatoric": aleatoric, "epistemic": epistemic}
    return {name: ops.cast(part, "float32") for name, part in parts.items()}


def _entropy(logs: Any) -> Any:
    return -ops.sum(ops.exp(logs) * ops.maximum(logs, LOG_FLOOR), axis=-1)
