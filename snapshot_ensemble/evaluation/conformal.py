"""Conformal prediction: sets of classes and intervals of values with a coverage guarantee."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from snapshot_ensemble.checks import real_number
from snapshot_ensemble.evaluation.conformal_scores import (
    LEAST_SCALE,
    RankedClasses,
    class_set,
    interval,
    lac,
    least_rows,
    penalty_of,
    quantile,
    stacked,
)
from snapshot_ensemble.evaluation.gathering import gather
from snapshot_ensemble.evaluation.held_out import HeldOut
from snapshot_ensemble.evaluation.metrics import class_logs, items_of
from snapshot_ensemble.evaluation.uncertainty import Spreads, uncertainty
from snapshot_ensemble.inference.blocks import in_blocks
from snapshot_ensemble.inference.combining import combine_outputs
from snapshot_ensemble.inference.graphs import Combiner
from snapshot_ensemble.inference.member_pool import MemberPool, PredictArguments
from snapshot_ensemble.inference.output_specs import names_of
from snapshot_ensemble.inference.task_words import Output
from snapshot_ensemble.losses import mean_and_log_variance
from snapshot_ensemble.storage.record import (
    CLASS_METHODS,
    VALUE_METHODS,
    Conformal,
    ConformalRule,
    Spread,
)

# The share of the rows on which RAPS chooses its penalty, which then do not count for its quantile.
_TUNING = 0.2


# Learning


def conformalize(
    pool: MemberPool,
    x: Any,
    y: Any,
    confidence_level: Any,
    method: Any,
    combine: str,
    members: Any,
    sample_weight: Any,
    arguments: PredictArguments,
) -> Conformal:
    """Implements `SnapshotEnsemble.conformalize`."""
    level = _checked_level(confidence_level)
    _check_methods(method)
    indices, weights = pool.combination(combine, members)
    held = gather(pool, x, y, sample_weight, arguments, indices=indices)
    if held.sample_weight is not None:
        raise ValueError(
            "Conformal prediction has no sample weights: all rows must come from where new rows "
            "come from. Received: sample_weight. Leave it out, and rows that should not count."
        )
    learned = pool.learned
    methods = _methods_of(method, held, learned.spreads)
    combined = held.unpacked(held.combined(combine, weights, learned.temperature))
    conformal = Conformal(level, combine, indices, [])
    rules: list[ConformalRule | None] = [None] * (len(held.numbers) + len(held.rest))
    for i, number in enumerate(held.numbers):
        scored = Scored.of(held, i, combined[i], learned.spreads)
        rules[number] = _learned_rule(scored, methods[i], conformal.levels)
    return dataclasses.replace(conformal, rules=rules)


def _checked_level(confidence_level: Any) -> float | list[float]:
    is_single = np.ndim(confidence_level) == 0
    given = [confidence_level] if is_single else list(confidence_level)
    levels = [real_number("confidence_level", level, positive=True) for level in given]
    if not levels or max(levels) >= 1 or len(set(levels)) < len(levels):
        raise ValueError(
            "`confidence_level` must be a number between 0 and 1, or a list of different ones. "
            f"Received: confidence_level={confidence_level!r}"
        )
    return levels[0] if is_single else levels


def _check_methods(method: Any) -> None:
    for leaf in keras.tree.flatten(method):
        if leaf is not None and leaf not in (*CLASS_METHODS, *VALUE_METHODS):
            raise ValueError(
                f"`method` must be one of {CLASS_METHODS} for classes, or {VALUE_METHODS} for "
                f"values. Received: method={method!r}"
            )


def _methods_of(method: Any, held: HeldOut, spreads: Spreads) -> list[str]:
    """The method for each output that has targets."""
    flat = keras.tree.flatten(method)
    if isinstance(method, dict):
        flat = [method.get(name) for name in held.names]
    elif len(flat) == 1:
        flat *= len(held.names)
    if len(flat) != len(held.names):
        raise ValueError(
            f"`method` must be one name, or one for each of the outputs {held.names}. "
            f"Received: method={method!r}"
        )
    chosen = []
    for i, (name, meaning) in enumerate(zip(flat, held.meanings, strict=True)):
        allowed = _allowed(meaning, spreads is not None)
        if name == "total" and "total" not in allowed and not meaning.is_classes:
            raise ValueError(
                "How far values lie from their prediction is not known. Received: method='total'. "
                "Call `calibrate(x, y)` on other held-out data first, or train with `GaussianNLL`."
            )
        if name is not None and name not in allowed:
            raise ValueError(
                f"Output '{held.names[i]}' is {meaning.task}, for which `method` can be one of "
                f"{allowed}. Received: method={method!r}"
            )
        if name == "epistemic" and len(held.outputs[i]) == 1:
            raise ValueError(
                "One member does not disagree with itself. Received: method='epistemic' with one "
                "member. Use 'absolute', or set `members=` to several."
            )
        chosen.append(name or allowed[0])
    return chosen


def _allowed(meaning: Output, has_spread: bool) -> tuple[str, ...]:
    """The methods for an output, the default first."""
    if meaning.is_classes:
        return CLASS_METHODS
    is_known = has_spread or meaning.is_gaussian
    return ("total", "absolute", "epistemic") if is_known else ("absolute", "epistemic")


class Scored(NamedTuple):
    """One output's predictions for rows with targets.

    Attributes:
        name: The output's name.
        items: Probabilities `(items, classes)`, or values `(items,)`.
        targets: The index of each true class, or the true values: `(items,)`.
        kept: `(rows, items of a row and unit, units)`; which of them count.
        scales: The scale of each value by method, `(items,)`.
        has_units: Whether each unit has a quantile of its own.
    """

    name: str
    items: np.ndarray
    targets: np.ndarray
    kept: np.ndarray
    scales: Callable[[str], Any]
    has_units: bool

    @classmethod
    def of(cls, held: HeldOut, number: int, combined: Any, spreads: Spreads) -> "Scored":
        meaning, truth = held.meanings[number], held.truths[number]
        stack, name = held.outputs[number], held.names[number]
        items, targets = items_of(combined, meaning), truth.targets
        if meaning.is_classes:
            items = np.exp(items)
            if not np.isin(targets[truth.weights > 0], (0, 1)).all():
                raise ValueError(
                    "A set covers a class or does not, so each target must be one class. Received: "
                    f"`y` of output '{name}' with shares of classes."
                )
            targets = targets.argmax(axis=-1)
        if meaning.is_gaussian:
            combined, items = mean_and_log_variance(combined)[0], items[:, 0]
        shape = np.shape(combined)
        units = 1 if meaning.task == "multiclass" or len(shape) < 2 else shape[-1]
        kept = (truth.weights > 0).reshape(shape[0], -1, units)

        spread = None if spreads is None else spreads[held.numbers[number]]

        def scales(method: str) -> Any:
            scale = in_blocks(lambda own: scale_of(method, own, meaning, spread), list(stack))
            return scale.reshape(-1).astype("float64")

        has_units = meaning.is_classes and meaning.task != "multiclass"
        return cls(name, items, targets, kept, scales, has_units)


def scale_of(
    method: str,
    members: list[Any],
    meaning: Output,
    spread: Spread | None,
    dtype: str = "float64",
) -> Any:
    """What the errors of values are divided by, from each member's output."""
    parts = uncertainty(members, [meaning], [spread], dtype)
    name = "std" if method == "epistemic" and "std" in parts else method
    return ops.maximum(parts[name], LEAST_SCALE)


def _learned_rule(scored: Scored, method: str, levels: Sequence[float]) -> ConformalRule:
    kept, tuning = scored.kept, None
    if method == "raps":
        chosen = np.random.default_rng(0).permutation(len(kept))[: round(_TUNING * len(kept))]
        tuning = np.zeros(len(kept), bool)
        tuning[chosen] = True
        kept = kept & ~tuning[:, None, None]
    units, least = kept.shape[-1], least_rows(max(levels))
    if _rows_of_units(kept) < least:
        least = least if tuning is None else math.ceil(least / (1 - _TUNING))
        raise ValueError(
            f"A confidence level of {max(levels):g} needs at least {least} rows. Received: "
            f"{_rows_of_units(scored.kept)} rows for output '{scored.name}' with method={method!r}"
        )
    if method not in ("aps", "raps"):
        scores = (
            lac(scored.items, scored.targets) if method == "lac" else _residuals(scored, method)
        )
        return ConformalRule(method, _quantiles([scores] * len(levels), kept, levels))
    ranked = RankedClasses(scored.items, scored.targets)
    if tuning is None:
        return ConformalRule(method, _quantiles([ranked.aps] * len(levels), kept, levels))
    of_tuning = scored.kept & tuning[:, None, None]
    pairs = [penalty_of(scored.items, ranked, of_tuning, level, units) for level in levels]
    found = _quantiles([ranked.aps + ranked.penalties(*pair) for pair in pairs], kept, levels)
    penalties, free = zip(*pairs, strict=True)
    return ConformalRule(method, found, list(penalties), list(free))


def _rows_of_units(kept: np.ndarray) -> int:
    """How many rows count, for the unit for which they are fewest."""
    return int(kept.any(axis=1).sum(axis=0).min())


def _residuals(scored: Scored, method: str) -> np.ndarray:
    errors = np.abs(scored.targets - scored.items)
    return errors if method == "absolute" else errors / scored.scales(method)


def _quantiles(
    scores: Sequence[np.ndarray], kept: np.ndarray, levels: Sequence[float]
) -> list[list[float]]:
    """The quantile of each unit, for each level with scores of its own."""
    units = range(kept.shape[-1])
    shaped = [of_level.reshape(kept.shape) for of_level in scores]
    return [
        [quantile(of_level[..., unit], kept[..., unit], level) for unit in units]
        for of_level, level in zip(shaped, levels, strict=True)
    ]


# Predicting


def sets_of(combined: Any, meaning: Output, conformal: Conformal, rule: ConformalRule) -> Any:
    """The sets of one classification output, for arrays and graph tensors."""
    p = ops.exp(class_logs(combined, meaning))
    has_units = meaning.task != "multiclass"
    sets = [class_set(p, rule, level, has_units) for level in range(len(conformal.levels))]
    if meaning.task == "binary" and combined.shape[-1] == 1 and len(combined.shape) > 1:
        sets = [ops.squeeze(one, axis=-2) for one in sets]
    return stacked(sets, not isinstance(conformal.confidence_level, list))


def bounds_of(
    values: Any, scale: Any, conformal: Conformal, rule: ConformalRule
) -> tuple[Any, Any]:
    """The lower and upper bounds of one output of values, for arrays and graph tensors."""
    is_single = not isinstance(conformal.confidence_level, list)
    pairs = [interval(values, scale, rule, level) for level in range(len(conformal.levels))]
    lower, upper = (stacked(bounds, is_single) for bounds in zip(*pairs, strict=True))
    return lower, upper


def learned_for(pool: MemberPool, for_classes: bool) -> Conformal:
    """What `conformalize` has learned; raises `ValueError` if that is nothing of this kind."""
    pool.indices()
    conformal = pool.learned.conformal
    name, other = ("predict_set", "predict_interval")[:: 1 if for_classes else -1]
    if conformal is None:
        raise ValueError(
            f"`{name}` needs quantiles, and none are learned for these members, weights and "
            "temperature. Call `conformalize(x, y)` on held-out data first."
        )
    kinds = {rule.method in CLASS_METHODS for rule in conformal.rules if rule is not None}
    if for_classes not in kinds:
        raise ValueError(
            f"`{name}` is for {'classes' if for_classes else 'values'}, and the model has none "
            f"with targets. Received: model={pool.model.name!r}. Use `{other}`."
        )
    return conformal


def _combiner(pool: MemberPool, conformal: Conformal) -> Combiner:
    """A combiner of the prediction, and of what the errors of its values are divided by."""
    _, weights = pool.combination(conformal.combine, conformal.members)
    temperature, spreads = pool.learned.temperature, pool.learned.spreads

    def combine(outputs: list[Any]) -> Any:
        meanings, names = pool.meanings(outputs[0]), names_of(pool.model, outputs[0])
        flat = [keras.tree.flatten(member) for member in outputs]
        combined = combine_outputs(
            outputs, conformal.combine, meanings, weights, temperature, names
        )
        result = {"combined": combined}
        for i, rule in enumerate(conformal.rules):
            if rule is not None and rule.method in ("epistemic", "total"):
                spread = None if spreads is None else spreads[i]
                own = [member[i] for member in flat]
                result[f"scale {i}"] = scale_of(rule.method, own, meanings[i], spread)
        return result

    name = ("conformal", repr(conformal), temperature, repr(spreads))
    return Combiner(conformal.members, name, combine)


def predict_set(pool: MemberPool, x: Any, arguments: PredictArguments) -> Any:
    """Implements `SnapshotEnsemble.predict_set`."""
    conformal = learned_for(pool, True)
    combiner = pool.combiner(conformal.combine, conformal.members)
    combined = pool.predict_combined(x, combiner, arguments)
    sets = []
    for output, meaning, rule in _with_rules(pool, combined, conformal):
        is_in = rule is not None and meaning.is_classes

        def of_rows(rows: Any, meaning: Output = meaning, rule: Any = rule) -> Any:
            return sets_of(rows.astype("float64"), meaning, conformal, rule)

        sets.append(in_blocks(of_rows, output) if is_in else None)
    return keras.tree.pack_sequence_as(combined, sets)


def predict_interval(pool: MemberPool, x: Any, arguments: PredictArguments) -> tuple[Any, Any]:
    """Implements `SnapshotEnsemble.predict_interval`."""
    conformal = learned_for(pool, False)
    result = pool.predict_combined(x, _combiner(pool, conformal), arguments)
    combined = result["combined"]
    bounds: list[tuple[Any, Any]] = []
    for i, (output, meaning, rule) in enumerate(_with_rules(pool, combined, conformal)):
        if rule is None or meaning.is_classes:
            bounds.append((None, None))
            continue
        values = mean_and_log_variance(output)[0] if meaning.is_gaussian else output
        found = bounds_of(values, result.get(f"scale {i}"), conformal, rule)
        bounds.append((np.asarray(found[0]), np.asarray(found[1])))
    lower, upper = (
        keras.tree.pack_sequence_as(combined, list(ends)) for ends in zip(*bounds, strict=True)
    )
    return lower, upper


def _with_rules(
    pool: MemberPool, combined: Any, conformal: Conformal
) -> Iterator[tuple[Any, Output, ConformalRule | None]]:
    flat = keras.tree.flatten(combined)
    return zip(flat, pool.meanings(combined), conformal.rules, strict=True)
