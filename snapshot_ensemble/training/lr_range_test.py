"""The learning-rate range test, which suggests a peak."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.checks import real_number, whole_number
from snapshot_ensemble.training.fit_arguments import check_fit_arguments
from snapshot_ensemble.training.learning_rate import AnnealedRate
from snapshot_ensemble.training.optimizer_checks import OptimizerSteps
from snapshot_ensemble.training.state import RunPosition, TrainingState, build

# The loss is averaged over rates within a factor of about `SMOOTHED_OVER`. A test ends when the
# loss exceeds its initial value by a factor of `DIVERGED`.
SMOOTHED_OVER, DIVERGED = 1.5, 4.0


@dataclasses.dataclass(frozen=True)
class RangeTest:
    """The result of a range test.

    Attributes:
        rates: The learning rate of each step, float64 of shape `(steps,)`.
        losses: The loss of each step's batch, before the step; the same shape.
        smoothed: The losses averaged over neighbouring rates, the same shape.
        suggestion: The suggested peak.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    suggestion: float

    def __str__(self) -> str:
        return (
            f"suggested peak: {self.suggestion:.2g} (loss {self.smoothed[0]:.4g} at "
            f"{self.rates[0]:.2g}, minimum {self.smoothed.min():.4g} at "
            f"{self.rates[self.smoothed.argmin()]:.2g}, {self.smoothed[-1]:.4g} at "
            f"{self.rates[-1]:.2g})"
        )

    __repr__ = __str__


class _Sweep(keras.callbacks.Callback):
    """Sets the rate of each step and records its loss."""

    def __init__(self, rates: np.ndarray, set_rate: Any) -> None:
        super().__init__()
        self.rates, self.set_rate = rates, set_rate
        self.losses: list[float] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.set_rate(self.rates[len(self.losses)])

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.losses.append(float(logs["loss"]))
        self.model.reset_metrics()  # Keras reports the mean since the last reset.
        if len(self.losses) == len(self.rates) or self._has_diverged():
            self.model.stop_training = True

    def _has_diverged(self) -> bool:
        if not math.isfinite(self.losses[-1]):
            return True
        recent = self.losses[-5:]
        return len(recent) == 5 and min(recent) > DIVERGED * abs(float(np.median(self.losses[:5])))


def smooth(rates: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Smooths the losses with a Gaussian kernel over the logarithm of the rate."""
    logs = np.log(rates)
    weights = np.exp(-0.5 * ((logs[:, None] - logs) / math.log(SMOOTHED_OVER)) ** 2)
    return np.asarray(weights @ losses / weights.sum(axis=1))


def suggest(rates: np.ndarray, smoothed: np.ndarray) -> float:
    """The lowest rate at which nine tenths of the total fall of the loss are reached.

    Higher rates still lower the loss in a short test, but are too close to divergence for a long
    run.
    """
    lowest = int(smoothed.argmin())
    reached = smoothed <= smoothed[lowest] + 0.1 * (smoothed[0] - smoothed[lowest])
    return float(rates[int(reached.argmax())])


def range_test(
    model: keras.Model,
    rate: AnnealedRate,
    x: Any,
    y: Any,
    *,
    lr_min: float,
    lr_max: float,
    steps: int,
    **fit_arguments: Any,
) -> RangeTest:
    """Trains with a rate that grows from step to step, and then restores everything.

    Args:
        model: A compiled model.
        rate: The learning rate of its optimizer.
        x: As for `model.fit`.
        y: As for `model.fit`.
        lr_min: The rate of the first step.
        lr_max: The rate of the last step.
        steps: Number of steps; the rate grows by the same factor from each to the next.
        **fit_arguments: As for `model.fit`.

    Raises:
        ValueError: If a rate or the number of steps is invalid, or the loss never falls.
        TypeError: If `model.fit` has no such argument.
        RuntimeError: If another optimizer than the model's compiled one trains it.
    """
    rates = _rates(lr_min, lr_max, steps, fit_arguments)
    check_fit_arguments(model, fit_arguments)
    with _restored(model, x), rate.held() as set_rate:
        sweep, trained_by = _Sweep(rates, set_rate), OptimizerSteps(model)
        given = {"verbose": 0, **fit_arguments, "callbacks": [sweep]}
        model.fit(x, y, epochs=len(rates), **given)
        trained_by.check(len(sweep.losses))
    losses = np.asarray(sweep.losses)
    known = np.isfinite(losses)
    rates, losses = rates[: len(losses)][known], losses[known]
    smoothed = smooth(rates, losses)
    if not len(losses) or smoothed.min() >= smoothed[0]:
        raise ValueError(
            "The loss never falls, so there is no rate to suggest. Received: "
            f"lr_min={lr_min}, lr_max={lr_max}, steps={steps}. Use a lower `lr_min`, or check the "
            "data."
        )
    return RangeTest(rates, losses, smoothed, suggest(rates, smoothed))


def _rates(lr_min: Any, lr_max: Any, steps: Any, fit_arguments: dict[str, Any]) -> np.ndarray:
    """The rate of each step; raises an error for invalid arguments."""
    unsupported = {"epochs", "initial_epoch", "callbacks", "validation_data", "validation_split"}
    if given := sorted(unsupported & set(fit_arguments)):
        raise ValueError(
            "A range test takes a number of steps, and neither callbacks nor validation data. "
            f"Received: {', '.join(given)}. Leave out these arguments."
        )
    steps = whole_number("steps", steps, 10)
    lr_min = real_number("lr_min", lr_min, positive=True)
    lr_max = real_number("lr_max", lr_max, positive=True)
    if lr_min >= lr_max:
        raise ValueError(
            f"`lr_min` must be below `lr_max`. Received: lr_min={lr_min}, lr_max={lr_max}"
        )
    return np.geomspace(lr_min, lr_max, steps)


@contextlib.contextmanager
def _restored(model: keras.Model, x: Any) -> Iterator[None]:
    """Restores the model, its optimizer and the random generators afterwards."""
    build(model, x)
    if not model.optimizer.built:
        with model.distribute_strategy.scope():
            model.optimizer.build(model.trainable_variables)
    state, history = TrainingState.of(model, [], RunPosition()), vars(model).get("history")
    try:
        yield
    finally:
        state.restore_model(model)
        model.reset_metrics()
        model.stop_training = False
        model.history = history
