"""How well the ensemble knows what not to answer: risk and coverage, and data from elsewhere.

Each score is higher where the ensemble is less sure.
"""

import math
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from snapshot_ensemble.checks import real_number
from snapshot_ensemble.evaluation.held_out import HeldOut
from snapshot_ensemble.evaluation.metrics import class_logs, item_errors, items_of
from snapshot_ensemble.evaluation.uncertainty import uncertainty
from snapshot_ensemble.inference.blocks import in_blocks
from snapshot_ensemble.inference.combining import combine_stack
from snapshot_ensemble.inference.member_pool import MemberPool, PredictArguments
from snapshot_ensemble.inference.task_words import Output
from snapshot_ensemble.storage.record import Spread

# The share of the rows from elsewhere that a threshold must recognise.
RECALL = 0.95
POINTS = 200


class Refusals(NamedTuple):
    """What is measured of each score, by name; with several outputs, the output's name comes first.

    Attributes:
        scores: `aurc` and, where they were asked for, `coverage`, `auroc` and `fpr95`.
        curves: `(2, points)`, coverage and risk.
    """

    scores: dict[str, dict[str, float]]
    curves: dict[str, np.ndarray]


def checked_risk(risk: Any) -> float | None:
    """The risk as a number of at least 0, or None; or an error."""
    return None if risk is None else real_number("risk", risk, positive=False)


def risk_coverage(
    errors: np.ndarray, scores: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean error of what is answered, as one item after another is, the surest first.

    Items of equal score share their mean error, so that their order does not matter.

    Args:
        errors: `(items,)`.
        scores: `(items,)`.
        weights: `(items,)`; they sum to 1.

    Returns:
        For each item that has a weight, in this order: the share answered, the mean error of these,
        and whether a threshold can end here, since the next score is another one.
    """
    some = np.flatnonzero(weights > 0)
    some = some[np.argsort(scores[some], kind="stable")]
    weights, errors, scores = weights[some], errors[some], scores[some]
    is_last = np.append(np.diff(scores) > 0, True)
    group = np.cumsum(is_last) - is_last
    mean = np.bincount(group, weights * errors) / np.bincount(group, weights)
    covered = np.cumsum(weights)
    return covered, np.cumsum(weights * mean[group]) / covered, is_last


def aurc(covered: np.ndarray, risk: np.ndarray) -> float:
    """The area under the curve: the mean risk over all coverages."""
    return float(np.diff(covered, prepend=0.0) @ risk)


def coverage_at(risk: float, covered: np.ndarray, risks: np.ndarray, is_last: np.ndarray) -> float:
    """The largest share that can be answered at a risk of at most this; 0 if there is none."""
    return float(np.max(covered, initial=0.0, where=is_last & (risks <= risk)))


def auroc(known: np.ndarray, other: np.ndarray) -> float:
    """The probability that a score of `other` is above one of `known`; ties count half."""
    ordered = np.sort(known)
    below = np.searchsorted(ordered, other, "left") + np.searchsorted(ordered, other, "right")
    return float(below.mean() / (2 * len(known)))


def fpr95(known: np.ndarray, other: np.ndarray) -> float:
    """The share of `known` that is flagged, too, where 95 % of `other` are."""
    threshold = np.sort(other)[::-1][math.ceil(RECALL * len(other) - 1e-9) - 1]
    return float((known >= threshold).mean())


def scores_of(
    stack: np.ndarray, meaning: Output, temperature: float, spread: Spread | None
) -> dict[str, np.ndarray]:
    """The scores of one output, from that of each member, in the shape of its uncertainty."""

    def of_rows(members: list[np.ndarray]) -> dict[str, Any]:
        parts = uncertainty(members, [meaning], [spread])
        names = [name for name in ("total", "epistemic") if name in parts]
        found = {name: parts[name] for name in names or ["std"]}
        if not meaning.is_classes:
            return found
        combined = combine_stack(ops.stack(members), "mean", meaning, None, temperature)
        logs = class_logs(ops.cast(combined, "float64"), meaning)
        return {"max_probability": -ops.expm1(ops.max(logs, axis=-1)), **found}

    return in_blocks(of_rows, list(stack))


def refusals(
    pool: MemberPool, held: HeldOut, ood: Any, risk: float | None, arguments: PredictArguments
) -> Refusals:
    """What is measured of each score, for the mean of the members that predict by default.

    Args:
        pool: The members.
        held: The predictions of all of them, and the targets.
        ood: Inputs from elsewhere, or None.
        risk: At which the coverage is measured, or None.
        arguments: As for `model.predict`.
    """
    learned, indices, other = pool.learned, pool.default_indices(), None
    if ood is not None:
        stacked = pool.predict(ood, pool.side_by_side(indices), arguments)
        other = [np.moveaxis(array, 1, 0) for array in keras.tree.flatten(stacked)]
    found = Refusals({}, {})
    for i, number in enumerate(held.numbers):
        meaning, truth = held.meanings[i], held.truths[i]
        stack = held.outputs[i][indices]
        spread = None if learned.spreads is None else learned.spreads[number]
        combined = combine_stack(stack, "mean", meaning, None, learned.temperature)
        errors = item_errors(items_of(combined, meaning), truth)
        scores = scores_of(stack, meaning, learned.temperature, spread)
        elsewhere = None
        if other is not None:
            elsewhere = scores_of(other[number], meaning, learned.temperature, spread)
        for score, values in scores.items():
            name = score if len(held.names) == 1 else f"{held.names[i]} {score}"
            curve = risk_coverage(errors, values.reshape(-1).astype("float64"), truth.weights)
            row = {"aurc": aurc(*curve[:2])}
            if risk is not None:
                row["coverage"] = coverage_at(risk, *curve)
            if elsewhere is not None:
                pair = [rows.reshape(len(rows), -1).mean(1) for rows in (values, elsewhere[score])]
                row |= {"auroc": auroc(*pair), "fpr95": fpr95(*pair)}
            points = np.unique(np.linspace(0, len(curve[0]) - 1, POINTS).astype(int))
            found.scores[name] = row
            found.curves[name] = np.stack([part[points] for part in curve[:2]])
    return found


def sentences(scores: dict[str, dict[str, float]]) -> list[str]:
    """What `refusals` has found, for a reader."""
    said = []
    for name, format_, what in (
        ("aurc", "{:.4f}", "Area under the risk-coverage curve, least sure refused first"),
        ("coverage", "{:.1%}", "Answered at the stated risk"),
        ("auroc", "{:.4f}", "AUROC against data from elsewhere"),
        ("fpr95", "{:.1%}", "Known rows refused where 95% of those from elsewhere are (FPR95)"),
    ):
        values = [
            f"{format_.format(row[name])} by {score}"
            for score, row in scores.items()
            if name in row
        ]
        if values:
            said.append(f"{what}: {', '.join(values)}.")
    return said
