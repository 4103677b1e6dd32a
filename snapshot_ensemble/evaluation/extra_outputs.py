"""What a served file can give beside the prediction: uncertainty, sets and intervals."""

from collections.abc import Callable, Sequence
from typing import Any

import keras

from snapshot_ensemble.evaluation.conformal import bounds_of, learned_for, scale_of, sets_of
from snapshot_ensemble.evaluation.uncertainty import uncertainty
from snapshot_ensemble.inference.graphs import Combiner
from snapshot_ensemble.inference.member_pool import MemberPool
from snapshot_ensemble.inference.output_specs import names_of
from snapshot_ensemble.inference.task_words import Output
from snapshot_ensemble.losses import mean_and_log_variance
from snapshot_ensemble.storage.record import Conformal, ConformalRule, Spread

PREDICTION = "prediction"
_UNCERTAINTY = ("total", "aleatoric", "epistemic", "std")
NAMES = (PREDICTION, *_UNCERTAINTY, "set", "interval")

# Takes the members' outputs and the combined ones; returns what each flat output gets, by suffix.
Extras = Callable[[list[Any], Any], list[dict[str, Any]]]


def check_outputs(outputs: Any) -> tuple[str, ...]:
    """The names as a tuple; raises `ValueError` for others than those that there are."""
    chosen = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(NAMES):
        raise ValueError(f"`outputs` must be some of {NAMES}. Received: outputs={outputs!r}")
    return chosen


def extras_of(pool: MemberPool, combiner: Combiner, outputs: tuple[str, ...]) -> Extras | None:
    """A function that computes the outputs beside the prediction; None if there are none.

    Args:
        pool: The members.
        combiner: Which of them are combined, and how.
        outputs: What `check_outputs` returned.

    Raises:
        ValueError: If members run in turn, or a set or interval is of another combination.
    """
    more = [name for name in outputs if name != PREDICTION]
    if not more:
        return None
    if combiner.stages is not None:
        raise ValueError(
            "With `early_exit=True` members run for some rows only, so that their disagreement is "
            f"not known. Received: outputs={outputs!r}. Leave out one of the two."
        )
    conformal = _conformal_for(pool, combiner, more)
    spreads = pool.learned.spreads

    def extras(members: list[Any], combined: Any) -> list[dict[str, Any]]:
        meanings = pool.meanings(members[0])
        flat = [keras.tree.flatten(outputs) for outputs in members]
        found = []
        for i, output in enumerate(keras.tree.flatten(combined)):
            own, spread = [of[i] for of in flat], None if spreads is None else spreads[i]
            parts = _uncertainty_of(own, meanings[i], spread)
            if conformal is not None and (rule := conformal.rules[i]) is not None:
                parts |= _conformal_of(output, own, meanings[i], spread, conformal, rule)
            wanted = {"lower", "upper", *more} if "interval" in more else set(more)
            found.append({name: part for name, part in parts.items() if name in wanted})
        _check_found(found, more, names_of(pool.model, members[0]))
        return found

    return extras


def _conformal_for(pool: MemberPool, combiner: Combiner, more: Sequence[str]) -> Conformal | None:
    """What sets and intervals are made of, if there are any among the outputs; or an error."""
    conformal = None
    for name in ("set", "interval"):
        if name in more:
            conformal = learned_for(pool, name == "set")
    if conformal is not None and (conformal.combine, conformal.members) != (
        combiner.name[0],
        combiner.members,
    ):
        raise ValueError(
            "Sets and intervals hold for the combination that was conformalized. Received: "
            f"combine={combiner.name[0]!r} of members {combiner.members}, where that was "
            f"{conformal.combine!r} of members {conformal.members}. Export that one, or call "
            "`conformalize` for this one."
        )
    return conformal


def _uncertainty_of(own: list[Any], meaning: Output, spread: Spread | None) -> dict[str, Any]:
    # In float32, since not all runtimes compute in float64.
    parts = uncertainty(own, [meaning], [spread], "float32")
    return {name: part for name, part in parts.items() if name in _UNCERTAINTY}


def _conformal_of(
    output: Any,
    own: list[Any],
    meaning: Output,
    spread: Spread | None,
    conformal: Conformal,
    rule: ConformalRule,
) -> dict[str, Any]:
    if meaning.is_classes:
        return {"set": sets_of(output, meaning, conformal, rule)}
    scale = None
    if rule.method != "absolute":
        scale = scale_of(rule.method, own, meaning, spread, "float32")
    values = mean_and_log_variance(output)[0] if meaning.is_gaussian else output
    lower, upper = bounds_of(values, scale, conformal, rule)
    return {"lower": lower, "upper": upper}


def _check_found(found: list[dict[str, Any]], more: Sequence[str], names: Sequence[str]) -> None:
    """Raises `ValueError` if no output has what was asked for."""
    given = {
        "interval" if name in ("lower", "upper") else name for parts in found for name in parts
    }
    if missing := [name for name in more if name not in given]:
        raise ValueError(
            f"No output of the model has {missing[0]!r}. Received: outputs={tuple(more)!r} for "
            f"{list(names)}. See what `predict_uncertainty` returns for this model."
        )
