"""Cycles of a plan, and the learning rate of each of their steps."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from snapshot_ensemble.tables import text_table


def anneal(t: Any, n: Any, lr_max: Any, lr_min: Any, warmup: Any = 0) -> Any:
    """The learning rate at step `t` of a cycle of `n` steps.

    The same formula is used for plans, plots and training, so that what is shown is what training
    uses:

        lr_min + (lr_max - lr_min) * t / warmup                                           t < warmup
        lr_min + (lr_max - lr_min) / 2 * (1 + cos(pi * (t - warmup) / (n - warmup)))      otherwise

    Args:
        t: Step within the cycle, from 0 to `n - 1`; float64, any shape.
        n: Number of steps of the cycle.
        lr_max: The peak.
        lr_min: The floor.
        warmup: Number of steps of linear warmup.

    Returns:
        float64, the shape of `t`.
    """
    span = lr_max - lr_min
    rise = lr_min + span * t / np.maximum(warmup, 1)
    fall = lr_min + span / 2 * (1 + np.cos(math.pi * (t - warmup) / (n - warmup)))
    return np.where(t < warmup, rise, fall)


@dataclasses.dataclass(frozen=True)
class Cycle:
    """One annealing cycle of a plan.

    Attributes:
        index: Number of the cycle, from 0.
        first_epoch: Its first epoch, from 0.
        last_epoch: Its last epoch, inclusive.
        lr_max: The learning rate at its first step (after `warmup`).
        lr_min: The floor that it anneals to.
        warmup: Epochs of linear warmup from `lr_min` to `lr_max` at its start.
        shrink: The share of the weights that is carried over into it, as passed by the user.
        is_decided: Whether it will be run like this. If not, it may be cut short after one of the
            epochs `Plan.due`, and other cycles follow.
        span: The epochs that its cosine is made for; more than its length if it is only a part of
            it. Defaults to its length.
        offset: The epochs of its cosine that came before it. Defaults to `0`.
        is_kept: Whether a snapshot is taken when it ends. Defaults to `True`.
    """

    index: int
    first_epoch: int
    last_epoch: int
    lr_max: float
    lr_min: float
    warmup: int = 0
    # Plans compare equal if their learning rates do, whatever a restart does to the weights.
    shrink: float | str = dataclasses.field(default=1.0, compare=False)
    is_decided: bool = dataclasses.field(default=True, compare=False)
    span: int = 0
    offset: int = 0
    is_kept: bool = True

    def __post_init__(self) -> None:
        if not self.span:
            object.__setattr__(self, "span", self.length)

    @property
    def length(self) -> int:
        """Number of epochs."""
        return self.last_epoch - self.first_epoch + 1

    @property
    def ends_at_floor(self) -> bool:
        """Whether its cosine ends when it does, so that the next cycle begins with a restart."""
        return self.offset + self.length == self.span

    def rates(self, steps_per_epoch: int) -> np.ndarray:
        """The learning rate of every step, float64 of shape `(length * steps_per_epoch,)`."""
        n, warmup = self.span * steps_per_epoch, self.warmup * steps_per_epoch
        t = np.arange(self.length * steps_per_epoch, dtype="float64")
        return anneal(t + self.offset * steps_per_epoch, n, self.lr_max, self.lr_min, warmup)


class Plan(list[Cycle]):
    """A list of `Cycle`s that prints as a table."""

    def __str__(self) -> str:
        rows: list[tuple[str, ...]]
        rows = [("cycle", "epochs", "length", "peak rate", "floor", "warmup")]
        for c in self:
            epochs = f"{c.first_epoch}-{c.last_epoch}"
            rates = (f"{c.lr_max:.4g}", f"{c.lr_min:.4g}")
            rows.append((str(c.index), epochs, str(c.length), *rates, str(c.warmup or "")))
        if any(c.shrink != 1 for c in self):
            shares = ("" if c.shrink == 1 else str(c.shrink) for c in self)
            rows = [(*row, share) for row, share in zip(rows, ("shrink", *shares), strict=True)]
        parts = [
            "" if c.span == c.length else f"{c.offset + 1}-{c.offset + c.length} of {c.span}"
            for c in self
        ]
        if any(parts):
            parts = ["part of its cosine", *parts]
            rows = [(*row, part) for row, part in zip(rows, parts, strict=True)]
        return text_table(rows, "r") + ("" if self.is_decided else f"\n{self._undecided()}")

    def _undecided(self) -> str:
        first, last = self.due[0] - 1, self.due[-1] - 1
        *ends, end = (str(cycle.last_epoch) for cycle in self.decided()[len(self) - 1 :])
        return (
            f"If the network begins to memorise after one of the epochs {first}-{last}: then up to "
            f"{self.MORE} cycles.\n"
            f"Otherwise: snapshots after the epochs {', '.join(ends)} and {end}."
        )

    __repr__ = __str__

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def with_shrink(self, shrink: Any, *, restarts_first: bool) -> "Plan":
        """The same cycles, with the share of the weights that each restart carries over.

        Args:
            shrink: As for `SnapshotEnsemble`.
            restarts_first: Whether the first cycle also begins with a restart, as it does when
                earlier cycles exist.
        """
        shown = str(shrink) if isinstance(shrink, Mapping) else shrink
        return Plan(
            dataclasses.replace(cycle, shrink=shown) if number or restarts_first else cycle
            for number, cycle in enumerate(self)
        )

    # How many cycles follow one that is cut short: up to so many, of at least so many epochs (but
    # two in any case, since one would be one run that has lost its start).
    MORE, LEAST = 5, 3
    # The tenths of a cycle after which a snapshot is taken if it is not cut short. The last one is
    # that of an ordinary run.
    TENTHS = (6, 7, 8, 9, 10)

    @property
    def is_decided(self) -> bool:
        """Whether all of its cycles will be run as they are here."""
        return self[-1].is_decided

    @property
    def due(self) -> range:
        """The epochs at whose start its last cycle may be cut short: from a fifth to a half."""
        first, length = self[-1].first_epoch, self[-1].length
        return range(first + length // 5, first + length // 2 + 1)

    def decided(self) -> "Plan":
        """The plan with its last cycle in parts of one cosine, with a snapshot after each."""
        *before, rest = self
        ends = sorted({round(rest.length * tenths / 10) for tenths in self.TENTHS} - {0})
        plan = Plan(before)
        for number, (begin, end) in enumerate(itertools.pairwise([0, *ends])):
            part = dataclasses.replace(
                rest,
                index=rest.index + number,
                first_epoch=rest.first_epoch + begin,
                last_epoch=rest.first_epoch + end - 1,
                span=rest.length,
                offset=begin,
                is_decided=True,
            )
            plan.append(part)
        return plan

    def cut_short(self, first: int) -> "Plan":
        """The plan with its last cycle cut short, and more cycles of equal lengths from an epoch.

        The first of these goes on with the weights of the one that was cut short, and has its
        number.
        """
        *before, rest = self
        cut = dataclasses.replace(rest, last_epoch=first - 1, is_decided=True, is_kept=False)
        plan = Plan([*before, cut])
        epochs = rest.last_epoch + 1 - first
        cycles = min(self.MORE, max(2, epochs // self.LEAST))
        for index, length in enumerate(equal_lengths(epochs, cycles)):
            last = first + length - 1
            plan.append(Cycle(rest.index + index, first, last, rest.lr_max, rest.lr_min))
            first = last + 1
        return plan


def equal_lengths(epochs: int, cycles: int) -> list[int]:
    """Lengths that differ by at most one epoch and sum to `epochs`; the longer ones come last."""
    length, longer = divmod(epochs, cycles)
    return [length] * (cycles - longer) + [length + 1] * longer
