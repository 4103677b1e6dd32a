"""Splits a budget of epochs into cycles."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from snapshot_ensemble.checks import real_number, whole_number
from snapshot_ensemble.cycles import Cycle, Plan, equal_lengths


class Schedule:
    """Base class of the schedules: splits a budget of epochs into cycles."""

    lr_init: float | None
    lr_min: float
    lr_multiplier: float = 1.0
    warmup: int = 0

    def __init__(self, lr_init: float | None, lr_min: float):
        self.lr_init = None if lr_init is None else real_number("lr_init", lr_init, positive=True)
        self.lr_min = real_number("lr_min", lr_min, positive=False)
        if self.lr_init is not None:
            self._peak(None)

    def lengths(self, epochs: int) -> list[int]:
        """The length of each cycle, in epochs; they sum to `epochs`."""
        raise NotImplementedError

    def default_epochs(self) -> int:
        """The number of epochs to train for by default."""
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        raise NotImplementedError

    def shortened(self, epochs: int) -> "Schedule":
        """This schedule, with fewer or shorter cycles if it cannot split so few epochs."""
        raise NotImplementedError

    def _peak(self, lr_init: float | None) -> float:
        peak = self.lr_init if lr_init is None else real_number("lr_init", lr_init, positive=True)
        if peak is None:
            raise ValueError(
                "The schedule has no peak learning rate. Received: lr_init=None. "
                "Pass the rate of the first step of a cycle, such as lr_init=0.1."
            )
        if self.lr_min > peak:
            raise ValueError(
                "`lr_min`, the floor, must not be above `lr_init`, the peak. "
                f"Received: lr_min={self.lr_min}, lr_init={peak}"
            )
        return peak

    def plan(self, epochs: int, lr_init: float | None = None) -> Plan:
        """The cycles of a budget.

        Args:
            epochs: The budget. Every epoch belongs to a cycle.
            lr_init: The peak, for a schedule that has none.

        Returns:
            A list of `Cycle`s that prints as a table.

        Raises:
            ValueError: If the budget cannot be split into whole cycles.
        """
        epochs = whole_number("epochs", epochs, 1)
        peak = self._peak(self.lr_init if lr_init is None else lr_init)
        plan, first = Plan(), 0
        for index, length in enumerate(self.lengths(epochs)):
            scale = self.lr_multiplier**index
            warmup = self.warmup if index == 0 else 0
            last = first + length - 1
            plan.append(Cycle(index, first, last, peak * scale, self.lr_min * scale, warmup))
            first = last + 1
        return plan

    def rates(self, epochs: int, steps_per_epoch: int) -> np.ndarray:
        """The learning rate of every step of a budget.

        Args:
            epochs: The budget in epochs.
            steps_per_epoch: Steps (batches) per epoch.

        Returns:
            A float64 array of shape `(epochs * steps_per_epoch,)`.
        """
        steps = whole_number("steps_per_epoch", steps_per_epoch, 1)
        return np.concatenate([cycle.rates(steps) for cycle in self.plan(epochs)])


class EqualCycles(Schedule):
    """`cycles` cycles whose lengths differ by at most one epoch; the longer ones come last."""

    def __init__(self, cycles: int = 5, lr_init: float | None = None, lr_min: float = 0.0):
        self.cycles = whole_number("cycles", cycles, 1)
        super().__init__(lr_init, lr_min)

    def lengths(self, epochs: int) -> list[int]:
        if epochs < self.cycles:
            raise ValueError(
                "There must be at least one epoch for each cycle. "
                f"Received: epochs={epochs}, cycles={self.cycles}. "
                f"Train for {self.cycles} epochs or more, or ask for {epochs} cycles or fewer."
            )
        return equal_lengths(epochs, self.cycles)

    def default_epochs(self) -> int:
        return 10 * self.cycles

    def get_config(self) -> dict[str, Any]:
        return {"cycles": self.cycles, "lr_init": self.lr_init, "lr_min": self.lr_min}

    def shortened(self, epochs: int) -> Schedule:
        return EqualCycles(min(self.cycles, epochs), self.lr_init, self.lr_min)


class AutoCycles(Schedule):
    """One cosine, which may be cut short for more cycles after a fifth to a half of it.

    If it is not, snapshots are taken in its last two fifths. With fewer than ten epochs it is one
    cycle with one snapshot: anything else would be too short.
    """

    LEAST = 10

    def __init__(self, lr_init: float | None = None, lr_min: float = 0.0):
        super().__init__(lr_init, lr_min)

    def lengths(self, epochs: int) -> list[int]:
        return [epochs]

    def plan(self, epochs: int, lr_init: float | None = None) -> Plan:
        [cycle] = super().plan(epochs, lr_init)
        return Plan([dataclasses.replace(cycle, is_decided=epochs < self.LEAST)])

    def default_epochs(self) -> int:
        return 50

    def get_config(self) -> dict[str, Any]:
        return {"cycles": "auto", "lr_init": self.lr_init, "lr_min": self.lr_min}

    def shortened(self, epochs: int) -> Schedule:
        return self  # It can split any budget.


class CosineAnnealing(Schedule):
    """Cosine annealing with warm restarts, in whole epochs.

    Within a cycle of `n` steps the learning rate of step `t = 0 ... n-1` is

        lr_min + (lr_max - lr_min) / 2 * (1 + cos(pi * t / n))

    Cycle `k` is `round(cycle_length * cycle_length_multiplier**k)` epochs long (Python's `round`:
    halves go to the even number), and its peak and floor are `lr_multiplier**k` times those of
    the first cycle. Epochs left over at the end of a budget extend the last cycle, so training
    always ends at the floor.

    Example:

    >>> from snapshot_ensemble import CosineAnnealing
    >>> schedule = CosineAnnealing(cycle_length=10, cycle_length_multiplier=2.0, lr_init=0.1)
    >>> schedule.plan(75)
    cycle  epochs  length  peak rate  floor  warmup
        0     0-9      10        0.1      0
        1   10-29      20        0.1      0
        2   30-74      45        0.1      0
    >>> schedule.rates(epochs=10, steps_per_epoch=2)[:3].round(6)
    array([0.1     , 0.099384, 0.097553])

    Args:
        cycle_length: Length of the first cycle in epochs. Defaults to `10`.
        cycle_length_multiplier: Factor by which each cycle is longer than the one before.
            Defaults to `1.0`.
        lr_init: The learning rate at the start of the first cycle. Defaults to `None`: the rate
            that the model was compiled with.
        lr_min: The learning rate that the first cycle anneals to. Defaults to `0.0`.
        lr_multiplier: Factor by which the peak and the floor are multiplied from one cycle to the
            next. Defaults to `1.0`.
        warmup: Epochs of linear warmup from `lr_min` at the start of the first cycle, which then
            anneals over its remaining epochs. Defaults to `0`.

    Raises:
        ValueError: If a value is negative, not finite, or `lr_min` is above `lr_init`.
        TypeError: If a value is not a number.

    References:
        - [Loshchilov & Hutter, 2017](https://arxiv.org/abs/1608.03983), equation 5
        - [Huang, Li, Pleiss et al., 2017](https://arxiv.org/abs/1704.00109), equation 2
    """

    def __init__(
        self,
        cycle_length: int = 10,
        cycle_length_multiplier: float = 1.0,
        lr_init: float | None = None,
        lr_min: float = 0.0,
        lr_multiplier: float = 1.0,
        warmup: int = 0,
    ):
        self.cycle_length = whole_number("cycle_length", cycle_length, 1)
        self.cycle_length_multiplier = real_number(
            "cycle_length_multiplier", cycle_length_multiplier, positive=True
        )
        self.lr_multiplier = real_number("lr_multiplier", lr_multiplier, positive=True)
        self.warmup = whole_number("warmup", warmup, 0)
        if self.warmup >= self.cycle_length:
            raise ValueError(
                "`warmup` must be shorter than the first cycle. "
                f"Received: warmup={self.warmup}, cycle_length={self.cycle_length}"
            )
        super().__init__(lr_init, lr_min)

    def _length(self, index: int) -> int:
        # From the unrounded product, so that rounding errors do not accumulate.
        length = round(self.cycle_length * self.cycle_length_multiplier**index)
        if length < 1:
            raise ValueError(
                f"Cycle {index} would be less than one epoch long. Received: "
                f"cycle_length={self.cycle_length}, "
                f"cycle_length_multiplier={self.cycle_length_multiplier}. "
                f"Train for fewer epochs ({sum(map(self._length, range(index)))} fill the cycles "
                "before it), or use a longer `cycle_length` or a higher multiplier."
            )
        return length

    def lengths(self, epochs: int) -> list[int]:
        lengths: list[int] = []
        left = epochs
        while left and (length := self._length(len(lengths))) <= left:
            lengths.append(length)
            left -= length
        if not lengths:
            raise ValueError(
                "The budget must hold at least one whole cycle. "
                f"Received: epochs={epochs}, cycle_length={self.cycle_length}. "
                f"Train for {self.cycle_length} epochs or more, or use a shorter `cycle_length`."
            )
        lengths[-1] += left
        return lengths

    def default_epochs(self) -> int:
        return sum(map(self._length, range(5)))

    def get_config(self) -> dict[str, Any]:
        names = ("cycle_length", "cycle_length_multiplier", "lr_init", "lr_min")
        return {name: getattr(self, name) for name in (*names, "lr_multiplier", "warmup")}

    def shortened(self, epochs: int) -> Schedule:
        length = min(self.cycle_length, epochs)
        warmup = min(self.warmup, length - 1)
        return CosineAnnealing(**{**self.get_config(), "cycle_length": length, "warmup": warmup})


def as_schedule(
    cycles: Any, schedule: CosineAnnealing | None, lr_init: float | None, lr_min: float
) -> Schedule:
    """The given schedule, or that of `cycles` if there is none."""
    if schedule is None:
        if isinstance(cycles, str) and cycles != "auto":
            raise ValueError(
                f"`cycles` must be a whole number or 'auto'. Received: cycles={cycles!r}"
            )
        is_auto = isinstance(cycles, str)
        return AutoCycles(lr_init, lr_min) if is_auto else EqualCycles(cycles, lr_init, lr_min)
    if not isinstance(schedule, CosineAnnealing):
        raise TypeError(
            "`schedule` must be a `CosineAnnealing`, which defines where its cycles end. "
            f"Received: schedule={schedule!r}"
        )
    if lr_init is not None or lr_min:
        raise ValueError(
            "A `schedule` has its own learning rates. Received: "
            f"schedule=CosineAnnealing(...), lr_init={lr_init}, lr_min={lr_min}. "
            "Pass the rates to `CosineAnnealing`."
        )
    return schedule


def plan_of_fit(
    schedule: Schedule,
    epochs: int | None,
    initial_epoch: int | None,
    lr_init: float,
    max_epochs: int | None = None,
) -> Plan:
    """The cycles of the epochs from `initial_epoch` to `epochs`, as `model.fit` counts them.

    Args:
        schedule: What splits them.
        epochs: The number of the last epoch, counted from 1; None for the default budget.
        initial_epoch: How many epochs are left out.
        lr_init: The peak, for a schedule that was made without one.
        max_epochs: Keras's limit of `epochs` for debugging. The cycles are then as many and as
            long as it allows. Defaults to `None`: no limit.
    """
    first = whole_number("initial_epoch", initial_epoch or 0, 0)
    if epochs is None:
        budget = schedule.default_epochs()
    else:
        budget = whole_number("epochs", epochs, 1) - first
    if budget < 1:
        raise ValueError(
            "`epochs` is the number of the final epoch, as in Keras, and must be above "
            f"`initial_epoch`. Received: epochs={epochs}, initial_epoch={first}"
        )
    if max_epochs and max_epochs < first + budget:
        budget = max_epochs - first
        if budget < 1:
            raise ValueError(
                "`keras.config.max_epochs()` must be above `initial_epoch`. Received: "
                f"max_epochs={max_epochs}, initial_epoch={first}. Remove the limit with "
                "`keras.config.set_max_epochs(None)`."
            )
        schedule = schedule.shortened(budget)
    return schedule.plan(budget, lr_init)


def settings_of(schedule: Schedule) -> dict[str, Any]:
    """The arguments of `SnapshotEnsemble` that give the same schedule, as JSON values."""
    if not isinstance(schedule, CosineAnnealing):
        return {"schedule": None, **schedule.get_config()}
    return {"schedule": schedule.get_config()}


def arguments_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `SnapshotEnsemble`, with the schedule that `settings_of` has described."""
    schedule = settings["schedule"]
    return {**settings, "schedule": None if schedule is None else CosineAnnealing(**schedule)}
