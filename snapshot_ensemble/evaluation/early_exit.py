"""Learns on held-out data which member runs first, and when a row needs no further one."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from snapshot_ensemble.evaluation.calibration import learn_temperature
from snapshot_ensemble.evaluation.held_out import HeldOut
from snapshot_ensemble.evaluation.metrics import item_errors, items_of, losses
from snapshot_ensemble.inference.batch_size import are_arrays
from snapshot_ensemble.inference.early_exit import doubts
from snapshot_ensemble.inference.member_pool import MemberPool
from snapshot_ensemble.inference.member_states import first_values
from snapshot_ensemble.inference.rebuilt import are_close, in_half_precision, outputs_on
from snapshot_ensemble.inference.sample import first_rows, made_up_batch
from snapshot_ensemble.keras_compat.composites import rows_of
from snapshot_ensemble.keras_compat.layer_states import recurrent_states
from snapshot_ensemble.storage.record import EarlyExit

# Which quantiles of the doubts are tried as thresholds.
_QUANTILES = np.linspace(0, 1, 200)


class _Stage(NamedTuple):
    """What the mean of the first members gives; the losses of all rows add up to the loss.

    Attributes:
        losses: `(2, rows)`, each row's part of the loss and of the error.
        doubts: `(outputs, rows)`.
        temperature: Of these members.
    """

    losses: np.ndarray
    doubts: np.ndarray
    temperature: float


def learn_early_exit(
    held: HeldOut, indices: list[int], temperature: float, tolerance: float
) -> tuple[EarlyExit, float]:
    """The order, temperatures and thresholds of the cascade of least cost, and that cost.

    Args:
        held: The members' predictions and the targets.
        indices: The index of each of these members.
        temperature: Of the mean of all of them, which `calibrate` has learned.
        tolerance: How many standard errors of the paired difference the loss and the error may be
            above those of all members.
    """
    held.check_for_fitting()
    order = _order(held)
    stages = _stages(held, order, [*[None] * (len(order) - 1), temperature])
    # Several outputs are as unsure as each other when each is divided by its mean.
    means = stages[max(len(stages) - 2, 0)].doubts.mean(axis=1)
    own_scales = np.where((means > 0) & (len(means) > 1), means, 1.0)
    by_number = dict(zip(held.numbers, own_scales, strict=True))
    scales = [float(by_number.get(i, 0.0)) for i in range(len(held.numbers) + len(held.rest))]
    doubt = _scaled(stages, own_scales)
    thresholds = _thresholds(doubt, np.stack([stage.losses for stage in stages]), tolerance)
    learned = EarlyExit(
        order=[indices[number] for number in order],
        temperatures=[stage.temperature for stage in stages[:-1]],
        thresholds=thresholds,
        scales=scales,
    )
    stage_of_rows = _settled_at(doubt, np.asarray(thresholds))
    return learned, float(1 + stage_of_rows.mean())


class CostCurve(NamedTuple):
    """Members run a row, and the loss; each is `(2, points)`.

    Attributes:
        shared: With one threshold for all stages, from never to always.
        learned: With the learned thresholds, one point.
        first: The mean of the first member, of the first two, and so on, for all rows.
    """

    shared: np.ndarray
    learned: np.ndarray
    first: np.ndarray


def cost_curve(held: HeldOut, early_exit: EarlyExit, temperature: float) -> CostCurve:
    """What a cascade costs and gives with its own and with other thresholds.

    Args:
        held: The targets, and the predictions of the members in the order of the cascade.
        early_exit: The cascade.
        temperature: Of the mean of all members.
    """
    temperatures = [*early_exit.temperatures, temperature]
    stages = _stages(held, range(len(temperatures)), temperatures)
    doubt = _scaled(stages, np.array([early_exit.scales[number] for number in held.numbers]))
    losses = np.stack([stage.losses[0] for stage in stages])

    def point(thresholds: np.ndarray) -> tuple[float, float]:
        stage = _settled_at(doubt, thresholds)
        return 1 + stage.mean(), losses[stage, np.arange(held.rows)].sum()

    counts = np.arange(1, len(stages) + 1)
    shared = [point(thresholds) for thresholds in _shared_thresholds(doubt)]
    return CostCurve(
        np.transpose([(counts[-1], losses[-1].sum()), *reversed(shared)]),
        np.transpose([point(np.asarray(early_exit.thresholds))]),
        np.stack([counts, losses.sum(axis=1)]),
    )


def check_rows_apart(pool: MemberPool, x: Any) -> None:
    """Raises `ValueError` if what members predict for a row depends on the rows around it."""
    why = _why_not_apart(pool, x)
    if why is not None:
        raise ValueError(
            "Early exit needs rows that do not depend on each other, since later members see only "
            f"some of them. Received: model={pool.model.name!r}, where {why}. Predict without "
            "`early_exit`."
        )


def _why_not_apart(pool: MemberPool, x: Any) -> str | None:
    model = pool.model
    if recurrent_states(model):
        return "a stateful layer carries its state on from row to row"
    # Wrapped, since a list of two inputs would be taken for inputs and targets.
    sample = first_rows(model, (x,)) if are_arrays(x) else pool.sample
    sample = made_up_batch(model) if sample is None else sample
    (weights,) = pool.weights(pool.indices()[:1])
    states, others = (first_values(model, index) for index in (0, 1))
    together = outputs_on(model, weights, sample, states)
    if together is None or not are_close(together, outputs_on(model, weights, sample, others)):
        return None  # Not known, since the model cannot predict the batch or draws random numbers.
    alone = outputs_on(model, weights, rows_of(sample, [0]), states)
    if alone is None:
        return "a batch must have one size"
    if not are_close(rows_of(together, [0]), alone, in_half_precision(model)):
        return "a row alone and the same row in a batch are predicted differently"
    return None


def _order(held: HeldOut) -> list[int]:
    """The members in the order in which each lowers the loss of the mean the most."""
    left, order = list(range(len(held.outputs[0]))), list[int]()
    while left:
        best = min(left, key=lambda number: _stage(held, [*order, number]).losses[0].sum())
        left.remove(best)
        order.append(best)
    return order


def _stage(held: HeldOut, numbers: Sequence[int], temperature: float | None = None) -> _Stage:
    """The mean of some members, with the temperature that fits it best unless one is given."""
    some = dataclasses.replace(held, outputs=[output[list(numbers)] for output in held.outputs])
    chosen = [i for i, meaning in enumerate(held.meanings) if meaning.has_temperature]
    if temperature is None:
        flat = held.unpacked(some.combined("mean"))
        items = [items_of(flat[i], held.meanings[i]) for i in chosen]
        truths = [held.truths[i] for i in chosen]
        shares = [held.loss_weights[i] for i in chosen]
        temperature = learn_temperature(items, truths, shares) if chosen else 1.0
    combined = held.unpacked(some.combined("mean", None, temperature))
    parts, unsure = np.zeros((2, held.rows)), []
    for output, stack, meaning, truth, share in zip(
        combined, some.outputs, held.meanings, held.truths, held.loss_weights, strict=True
    ):
        logs = items_of(output, meaning)
        each = share * truth.weights * np.stack([losses(logs, truth), item_errors(logs, truth)])
        parts += each.reshape(2, held.rows, -1).sum(axis=-1)
        unsure.append(np.asarray(doubts(output, stack, meaning), "float64"))
    return _Stage(parts, np.stack(unsure), temperature)


def _stages(
    held: HeldOut, order: Sequence[int], temperatures: Sequence[float | None]
) -> list[_Stage]:
    return [_stage(held, order[: k + 1], known) for k, known in enumerate(temperatures)]


def _scaled(stages: list[_Stage], scales: np.ndarray) -> np.ndarray:
    """Each row's largest scaled doubt at all stages but the last: `(stages - 1, rows)`."""
    some = scales > 0
    scaled = [(stage.doubts[some] / scales[some, None]).max(axis=0) for stage in stages[:-1]]
    return np.reshape(scaled, (len(scaled), stages[-1].losses.shape[1]))


def _settled_at(doubt: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """The stage at which each row is settled."""
    settled = doubt <= thresholds[:, None]
    # One more row, so that the last stage settles all, and there may be no other.
    return np.vstack([settled, np.ones((1, doubt.shape[1]), bool)]).argmax(axis=0)


def _thresholds(doubt: np.ndarray, parts: np.ndarray, tolerance: float) -> list[float]:
    """For each stage but the last, the highest threshold that the tolerance allows.

    First one threshold for all stages, since their doubts are calibrated alike, then a higher one
    for each stage in turn.

    Args:
        doubt: `(stages - 1, rows)`.
        parts: `(stages, 2, rows)`.
        tolerance: As for `learn_early_exit`.
    """
    stages, rows = doubt.shape

    def is_allowed(thresholds: np.ndarray) -> bool:
        stage = _settled_at(doubt, thresholds)
        differences = parts[stage, :, np.arange(rows)].T - parts[-1]
        above = differences.sum(axis=1)
        errors = np.sqrt(rows) * differences.std(axis=1, ddof=1)
        return bool((above <= tolerance * errors + 1e-12).all())

    never = np.full(stages, -1.0)
    thresholds = next(filter(is_allowed, _shared_thresholds(doubt)), never)
    for stage in np.flatnonzero(_can_settle(doubt)):
        for value in np.quantile(doubt[stage], _QUANTILES)[::-1]:
            higher = thresholds.copy()
            higher[stage] = value
            if value <= thresholds[stage]:
                break
            if is_allowed(higher):
                thresholds = higher
                break
    return [_amid(*pair) for pair in zip(doubt, thresholds, strict=True)]


def _can_settle(doubt: np.ndarray) -> np.ndarray:
    """Which stages can settle a row: of regressors, a single one never has any doubt."""
    return doubt.max(axis=1, initial=0) > 0


def _shared_thresholds(doubt: np.ndarray) -> list[np.ndarray]:
    """The same threshold for all stages, from always to nearly never."""
    values = np.quantile(doubt, _QUANTILES)[::-1] if len(doubt) else ()
    return [np.where(_can_settle(doubt), value, -1.0) for value in values]


def _amid(doubt: np.ndarray, threshold: float) -> float:
    """The middle of the gap between doubts that holds a threshold, so that rounding moves no row.

    The same model gives slightly other numbers in another batch or in an exported file.
    """
    settled = doubt <= threshold
    if not settled.any():
        return -1.0
    highest = doubt[settled].max()
    lowest = 2 * highest if settled.all() else doubt[~settled].min()
    return float((highest + lowest) / 2)
