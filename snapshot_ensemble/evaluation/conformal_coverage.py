"""How often prediction sets and intervals cover the targets, and how large they are."""

import dataclasses

import numpy as np

from snapshot_ensemble.evaluation.conformal import Scored
from snapshot_ensemble.evaluation.conformal_scores import class_set, interval
from snapshot_ensemble.evaluation.held_out import HeldOut
from snapshot_ensemble.inference.combining import weights_of
from snapshot_ensemble.storage.record import ConformalRule, Learned


def coverage(held: HeldOut, learned: Learned) -> dict[str, dict[str, float]]:
    """How often sets and intervals cover the targets, and how large they are.

    Args:
        held: The predictions of all members, and the targets.
        learned: What was learned about the members.

    Returns:
        For each output and level `coverage`, its 95 % interval from `low` to `high`, and the mean
        `size`: of a set its number of classes, of an interval its width.
    """
    conformal = learned.conformal
    if conformal is None:
        return {}
    some = [output[conformal.members] for output in held.outputs]
    held, weights = dataclasses.replace(held, outputs=some), None
    if conformal.combine == "weighted":
        weights = weights_of(np.asarray(learned.weights), conformal.members)
    combined = held.unpacked(held.combined(conformal.combine, weights, learned.temperature))
    found = {}
    for i, number in enumerate(held.numbers):
        if (rule := conformal.rules[number]) is None:
            continue
        scored = Scored.of(held, i, combined[i], learned.spreads)
        for k, level in enumerate(conformal.levels):
            name = f"{level:g}" if len(held.names) == 1 else f"{scored.name} {level:g}"
            found[name] = _measured(scored, rule, k)
    return found


def _measured(scored: Scored, rule: ConformalRule, level: int) -> dict[str, float]:
    kept = scored.kept
    units = kept.shape[-1]
    if scored.items.ndim == 2:
        p = scored.items.reshape(-1, units, scored.items.shape[-1])
        sets = np.asarray(class_set(p, rule, level, True)).reshape(scored.items.shape)
        covered = np.take_along_axis(sets, scored.targets[:, None], axis=-1)[:, 0]
        sizes = sets.sum(axis=-1).astype("float64")
    else:
        scale = None if rule.method == "absolute" else scored.scales(rule.method)
        shape = (-1, units)
        scale = None if scale is None else scale.reshape(shape)
        bounds = interval(scored.items.reshape(shape), scale, rule, level)
        lower, upper = (np.asarray(bound).reshape(-1) for bound in bounds)
        covered = (lower <= scored.targets) & (scored.targets <= upper)
        sizes = upper - lower
    counts = kept.sum(axis=(1, 2))
    rows, of_rows = counts > 0, np.maximum(counts, 1)
    shares = np.where(kept, covered.reshape(kept.shape), 0).sum(axis=(1, 2)) / of_rows
    mean_sizes = np.where(kept, sizes.reshape(kept.shape), 0).sum(axis=(1, 2)) / of_rows
    low, high = binomial_interval(float(shares[rows].sum()), int(rows.sum()))
    measured = {"coverage": shares[rows].mean(), "low": low, "high": high}
    return {name: float(v) for name, v in {**measured, "size": mean_sizes[rows].mean()}.items()}


def binomial_interval(successes: float, trials: int, level: float = 0.95) -> tuple[float, float]:
    """The interval of Clopper and Pearson for the probability of success."""
    from scipy import stats  # noqa: PLC0415  It takes long to import.

    tail, failures = (1 - level) / 2, trials - successes
    low = stats.beta.ppf(tail, successes, failures + 1) if successes > 0 else 0.0
    high = stats.beta.ppf(1 - tail, successes + 1, failures) if failures > 0 else 1.0
    return float(low), float(high)


def sentences(found: dict[str, dict[str, float]]) -> list[str]:
    """What `coverage` has found, for a reader."""
    return [
        f"Sets and intervals at {name}: {row['coverage']:.1%} of the targets are covered (95% "
        f"interval {row['low']:.1%} to {row['high']:.1%}); mean size {row['size']:.4g}."
        for name, row in found.items()
    ]
