"""Temperature scaling of the combined probabilities, fitted on held-out data."""

import math
from typing import Any

import numpy as np

from snapshot_ensemble.checks import real_number
from snapshot_ensemble.evaluation.held_out import HeldOut
from snapshot_ensemble.evaluation.metrics import items_of, loss
from snapshot_ensemble.evaluation.spread import spreads_of
from snapshot_ensemble.evaluation.targets import Truth
from snapshot_ensemble.inference.blocks import row_blocks

# The lowest and the highest temperature that can be learned.
TEMPERATURES = (0.05, 20.0)
# How strongly 1 is expected, in units of the loss of one item. Without it, a few rows that are all
# right would give the lowest temperature.
PRIOR = 4.0
# With more items than this, a sample of them gives the first guess.
MANY = 2**14


def learn_temperature(items: list[np.ndarray], truths: list[Truth], shares: list[float]) -> float:
    """The temperature with the lowest negative log-likelihood and prior, between 0.05 and 20.

    The prior of `1 / T` is a gamma distribution whose mode is 1, so what is minimised for n items
    is `n * NLL(T) + PRIOR * (1 / T + log(T))`. If they have weights, n is the number of equally
    weighted items that would estimate as exactly, `sum(weights)^2 / sum(weights^2)`.

    Args:
        items: Log-probabilities `(items, classes)` of each classification output, or means and
            log-variances `(items, 2)` of a normal distribution, whose variance is multiplied.
        truths: The targets of each of these outputs.
        shares: The loss weight of each of these outputs.
    """
    inverse = 1.0
    for step in (64, 1) if sum(map(len, items)) > MANY else (1,):
        chosen = [logs[::step] for logs in items]
        sample = [truth.every(step) for truth in truths]
        inverse = _best_inverse(chosen, sample, shares, inverse)
    return float(np.clip(1 / inverse, *TEMPERATURES))


def _best_inverse(
    items: list[np.ndarray], truths: list[Truth], shares: list[float], start: float
) -> float:
    """The inverse temperature with the lowest loss, which is convex in it, by Newton's method."""
    parts = list(zip(items, truths, shares, strict=True))
    masses = [share * _masses(truth) for _, truth, share in parts if not truth.is_gaussian]
    fixed = sum(share * loss(logs, truth) for logs, truth, share in parts if not truth.is_gaussian)
    squares, mass_of_values = _normal_parts(parts)
    expected = _prior(truths, shares)
    squares, mass_of_values = squares + expected, mass_of_values + 2 * expected
    items = [logs for logs, truth in zip(items, truths, strict=True) if not truth.is_gaussian]
    inverse, low, high, stretch, before = start, 0.0, math.inf, 1.0, 0.0
    for _ in range(100):
        slope = fixed + squares - mass_of_values / (2 * inverse)
        curvature = mass_of_values / (2 * inverse**2)
        for logs, mass in zip(items, masses, strict=True):
            mean, variance = _moments(logs, mass, inverse)
            slope, curvature = slope + mean, curvature + variance
        # Also if all classes are equally probable, so that any value is as good.
        if abs(slope) <= 1e-15 * abs(fixed):
            break
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        # Where the slope only fades away, Newton's steps are all of one length: lengthen them.
        stretch = 2 * stretch if before * slope > 0 and abs(before) < 4 * abs(slope) else 1.0
        step = stretch * slope / max(curvature, 1e-300)
        target = float(np.clip(inverse - step, 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]))
        if abs(target - inverse) <= 1e-6 * inverse:  # Then the next step would be about 1e-12.
            return target
        before = slope
        inverse = target if low < target < high else math.sqrt(low * high)
    return inverse


def _prior(truths: list[Truth], shares: list[float]) -> float:
    """The weight of the prior beside the losses of the outputs, which are means."""
    weights = np.concatenate([s * t.weights for t, s in zip(truths, shares, strict=True)])
    return PRIOR * float(np.square(weights).sum() / max(weights.sum(), 1e-300))


def _normal_parts(parts: list[tuple[np.ndarray, Truth, float]]) -> tuple[float, float]:
    """Half the mean squared standardized error of distributions of values, and their mass."""
    squares = mass = 0.0
    for items, truth, share in parts:
        if truth.is_gaussian:
            standardized = np.square(truth.targets - items[:, 0]) * np.exp(-items[:, 1])
            squares += share * float(truth.weights @ standardized) / 2
            mass += share * float(truth.weights.sum())
    return squares, mass


def _masses(truth: Truth) -> np.ndarray:
    """The weight of each item times the sum of its targets, which may differ from 1 slightly."""
    return truth.weights * truth.targets.sum(axis=-1)


def _moments(logs: np.ndarray, masses: np.ndarray, inverse: float) -> tuple[float, float]:
    """The mean and variance of the tempered classes' log-probabilities, summed over the items."""
    mean = variance = 0.0
    for rows in row_blocks(len(logs), logs.size):
        powers = np.exp(inverse * logs[rows])
        totals = powers.sum(axis=-1)
        powers *= logs[rows]
        means = powers.sum(axis=-1) / totals
        powers *= logs[rows]
        mean += float(masses[rows] @ means)
        variance += float(masses[rows] @ (powers.sum(axis=-1) / totals - np.square(means)))
    return mean, variance


def tempered_loss(logs: np.ndarray, truth: Truth, temperature: float) -> float:
    """The negative log-likelihood of log-probabilities, or distributions, at a temperature."""
    if truth.is_gaussian:
        return loss(logs + np.array([0, math.log(temperature)]), truth)
    inverse, masses = 1 / temperature, _masses(truth)
    total = inverse * loss(logs, truth)
    for rows in row_blocks(len(logs), logs.size):
        total += float(masses[rows] @ np.log(np.exp(inverse * logs[rows]).sum(axis=-1)))
    return total


def calibrated(held: HeldOut, combined: Any) -> tuple[float, dict[str, Any]]:
    """What is fitted to combined outputs.

    Args:
        held: The members' predictions and the targets.
        combined: The combined outputs.

    Returns:
        The temperature or, if all outputs are values, the scale of the first one; and what was
        learned, by its name in `Learned`.
    """
    held.check_for_fitting()
    outputs = held.unpacked(combined)
    learned: dict[str, Any] = {"temperature": _temperature_of(held, outputs)}
    spreads = spreads_of(held, outputs)
    if any(spread is not None for spread in spreads):
        learned["spreads"] = spreads
    if any(meaning.has_temperature for meaning in held.meanings):
        return learned["temperature"], learned
    return next(spread.scale for spread in spreads if spread is not None), learned


def _temperature_of(held: HeldOut, outputs: list[Any]) -> float:
    chosen = [i for i, meaning in enumerate(held.meanings) if meaning.has_temperature]
    if not chosen:
        return 1.0
    items = [items_of(outputs[i], held.meanings[i]) for i in chosen]
    truths = [held.truths[i] for i in chosen]
    temperature = learn_temperature(items, truths, [held.loss_weights[i] for i in chosen])
    return real_number("temperature", temperature, positive=True)
