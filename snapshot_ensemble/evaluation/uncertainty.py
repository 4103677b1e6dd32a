"""How unsure an ensemble is, and how much of it is that its members disagree."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from snapshot_ensemble.evaluation import metrics
from snapshot_ensemble.evaluation.held_out import HeldOut
from snapshot_ensemble.evaluation.metrics import LOG_FLOOR, class_logs
from snapshot_ensemble.inference.combining import combine_outputs
from snapshot_ensemble.inference.member_pool import Combiner, MemberPool, PredictArguments
from snapshot_ensemble.inference.output_specs import Output


def predict_uncertainty(pool: MemberPool, x: Any, members: Any, arguments: PredictArguments) -> Any:
    """What `SnapshotEnsemble.predict_uncertainty` returns; see there."""

    def combine(outputs: list[Any]) -> Any:
        meanings = pool.meanings(outputs[0])
        mean = combine_outputs(outputs, "mean", meanings)
        return {"mean": mean, "spread": uncertainty(outputs, meanings)}

    combiner = Combiner(pool.default_indices(members), ("uncertainty",), combine)
    predicted = pool.predict(x, combiner, arguments)
    return keras.tree.map_structure_up_to(
        predicted["mean"],
        lambda mean, spread: {"mean": mean, **spread},
        predicted["mean"],
        predicted["spread"],
    )


def error_without_least_sure(held: HeldOut) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The error among the items that remain as the least sure ones are set aside.

    Args:
        held: The members' predictions, and the truth. The first output counts.

    Returns:
        For each kind of uncertainty the shares that are set aside, and the error of the mean of the
        members on the rest: the share of wrong classes, or the mean squared error.
    """
    members, meaning, truth = held.members(), held.meanings[0], held.truths[0]
    mean = keras.tree.flatten(combine_outputs(members, "mean", held.meanings))[0]
    errors = metrics.item_errors(metrics.items_of(mean, meaning), truth)
    curves = {}
    spread = uncertainty([keras.tree.flatten(outputs)[0] for outputs in members], [meaning])
    for name, values in spread.items():
        order = np.argsort(np.asarray(values).reshape(-1), kind="stable")
        weights = truth.weights[order]
        kept = np.cumsum(weights)
        error = np.cumsum(weights * errors[order]) / np.maximum(kept, np.finfo(float).tiny)
        curves[name] = (1 - kept, error)
    return curves


def uncertainty(members: list[Any], meanings: list[Output]) -> Any:
    """What the members' spread says, for arrays and in the graph.

    With the members' probabilities `p_m` and `H(p) = -sum p log p` in nats:
    `total = H(mean p_m)`, `aleatoric = mean H(p_m)`, `epistemic = total - aleatoric`, which is
    the mutual information of the class and the member.

    Args:
        members: Each member's outputs, all of one structure.
        meanings: What each flat output means.

    Returns:
        In that structure a dict for each output: `total`, `aleatoric`, `epistemic`; of a
        regression `std`.
    """
    flat = [keras.tree.flatten(outputs) for outputs in members]
    spreads = []
    for i, meaning in enumerate(meanings):
        # In float64: the epistemic part is a small difference.
        stack = ops.stack([ops.cast(outputs[i], "float64") for outputs in flat])
        spreads.append(_spread(stack, meaning))
    return keras.tree.pack_sequence_as(members[0], spreads)


def _spread(stack: Any, meaning: Output) -> dict[str, Any]:
    if not meaning.is_classes:
        return {"std": ops.cast(ops.std(stack, axis=0), "float32")}
    logs = class_logs(stack, meaning)
    of_mean = ops.logsumexp(logs, axis=0) - math.log(logs.shape[0])
    aleatoric = ops.mean(_entropy(logs), axis=0)
    # Never below 0, by Jensen; only rounding would have it so.
    epistemic = ops.maximum(_entropy(of_mean) - aleatoric, 0)
    parts = {"total": aleatoric + epistemic, "aleatoric": aleatoric, "epistemic": epistemic}
    return {name: ops.cast(part, "float32") for name, part in parts.items()}


def _entropy(logs: Any) -> Any:
    return -ops.sum(ops.exp(logs) * ops.maximum(logs, LOG_FLOOR), axis=-1)
