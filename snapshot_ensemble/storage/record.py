"""What an ensemble keeps besides its snapshots, in memory and in the manifest of a directory.

To store a new field, add it here and nowhere else.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Self

from snapshot_ensemble.storage.snapshot import Snapshot
from snapshot_ensemble.storage.typed_json import Count, Number

History = dict[str, list[Number]]
# The conformity scores of classes and of values.
CLASS_METHODS = ("lac", "aps", "raps")
VALUE_METHODS = ("absolute", "epistemic", "total")


@dataclasses.dataclass(frozen=True)
class EarlyExit:
    """When the members that have run for a row are enough; stage k has run the first k + 1.

    Attributes:
        order: The indices of the members, in the order in which they run.
        temperatures: For each stage but the last, of the mean of the members so far.
        thresholds: For each stage but the last, the doubt up to which a row is settled.
        scales: For each flat output, what its doubt is divided by; 0 for one that has none.
    """

    order: list[Count]
    temperatures: list[float]
    thresholds: list[float]
    scales: list[float]

    def check_for(self, count: int) -> None:
        """Raises `ValueError` unless it fits this number of members."""
        stages = len(self.order) - 1
        are_indices = len(set(self.order)) == stages + 1 and max(self.order, default=count) < count
        lengths = {len(self.temperatures), len(self.thresholds)}
        are_finite = all(map(math.isfinite, [*self.temperatures, *self.thresholds, *self.scales]))
        are_scales = min(self.scales, default=0) >= 0 < max(self.scales, default=0)
        if not (are_indices and lengths == {stages} and are_finite and are_scales) or any(
            temperature <= 0 for temperature in self.temperatures
        ):
            raise ValueError(f"`early_exit` is not valid for {count} members")


@dataclasses.dataclass(frozen=True)
class Spread:
    """How far values of one output lie from their prediction.

    Their variance is `(scale * std)^2 + floor^2`, with the standard deviation over the members.

    Attributes:
        scale: The factor of the standard deviation.
        floors: For each unit, the part that is the same for all rows, in the unit of the values.
    """

    scale: float
    floors: list[float]

    def __post_init__(self) -> None:
        if not all(math.isfinite(x) and x >= 0 for x in (self.scale, *self.floors)):
            raise ValueError(f"`spreads` must be at least 0. Received: spreads={self!r}")


@dataclasses.dataclass(frozen=True)
class ConformalRule:
    """What belongs to the set or interval of one output.

    Attributes:
        method: The conformity score.
        quantiles: For each confidence level, the quantile of the scores of each unit.
        penalties: For RAPS, for each level what each further class of a set adds to its score.
        free: For RAPS, for each level the number of classes that add nothing.
    """

    method: str
    quantiles: list[list[float]]
    penalties: list[float] = dataclasses.field(default_factory=list)
    free: list[Count] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Conformal:
    """How prediction sets and intervals are made of predictions.

    Attributes:
        confidence_level: One level or several, between 0 and 1.
        combine: The combination that was conformalized.
        members: The indices of its members.
        rules: The rule of each flat output; None for one without targets.
    """

    confidence_level: float | list[float]
    combine: str
    members: list[Count]
    rules: list[ConformalRule | None]

    @property
    def levels(self) -> list[float]:
        level = self.confidence_level
        return level if isinstance(level, list) else [level]

    def check_for(self, count: int) -> None:
        """Raises `ValueError` unless it fits this number of members."""
        levels = len(self.levels)
        is_valid = bool(self.levels) and all(0 < level < 1 for level in self.levels)
        is_valid &= 0 < len(set(self.members)) == len(self.members)
        is_valid &= max(self.members, default=count) < count
        for rule in self.rules:
            if rule is not None:
                widths = {len(units) for units in rule.quantiles}
                numbers = [*rule.penalties, *(q for units in rule.quantiles for q in units)]
                is_valid &= len(rule.quantiles) == levels and len(widths) == 1 and 0 not in widths
                is_valid &= {len(rule.penalties), len(rule.free)} <= {0, levels}
                is_valid &= all(math.isfinite(number) and number >= 0 for number in numbers)
                is_valid &= rule.method in CLASS_METHODS + VALUE_METHODS
                is_valid &= rule.method != "raps" or len(rule.penalties) == levels
        if not is_valid:
            raise ValueError(f"`conformal` is not valid for {count} members")


@dataclasses.dataclass(frozen=True)
class Learned:
    """What was learned about the members on held-out data; reset when the members change.

    Attributes:
        weights: The member weights of `combine="weighted"`, one per member, summing to 1.
        temperature: The divisor of the logarithms of the combined probabilities.
        members: The members that predict by default: None for all, an int for the last that many,
            or a list of indices.
        early_exit: When the members that have run for a row are enough; None if not learned.
        conformal: How prediction sets and intervals are made; None if not learned.
        spreads: For each flat output, how far values lie from their prediction, if it has values
            and no distribution; None if not learned.
    """

    weights: list[float] | None = None
    temperature: float = 1.0
    members: Count | list[Count] | None = None
    early_exit: EarlyExit | None = None
    conformal: Conformal | None = None
    spreads: list[Spread | None] | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"`temperature` must be above 0. Received: temperature={self.temperature!r}"
            )

    def check_for(self, count: int) -> None:
        """Raises `ValueError` unless it fits this number of members."""
        weights = self.weights
        if weights is not None and not (
            len(weights) == count > 0 and min(weights) >= 0 and abs(sum(weights) - 1) <= 1e-6
        ):
            raise ValueError(f"`weights` are not valid for {count} members")
        if isinstance(self.members, list):
            are_valid = bool(self.members) and all(index < count for index in self.members)
        else:
            are_valid = self.members is None or 0 < self.members <= count
        if not are_valid:
            raise ValueError(f"`members` are not valid for {count} members")
        for learned in (self.early_exit, self.conformal):
            if learned is not None:
                learned.check_for(count)

    def check_outputs(self, count: int) -> None:
        """Raises `ValueError` unless it fits a model with this number of flat outputs."""
        lists = {
            "early_exit": None if self.early_exit is None else self.early_exit.scales,
            "conformal": None if self.conformal is None else self.conformal.rules,
            "spreads": self.spreads,
        }
        for name, values in lists.items():
            if values is not None and len(values) != count:
                raise ValueError(
                    f"`{name}` is not for the outputs of this model. Received: {len(values)} "
                    f"outputs instead of {count}"
                )


@dataclasses.dataclass
class Counts:
    """How much training has been done, over all runs."""

    cycles: Count
    epochs: Count
    steps: Count
    runs: Count

    @classmethod
    def zero(cls) -> Self:
        """The counts before the first run."""
        return cls(0, 0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Decision:
    """Whether a run's long cycle was cut short for several, and the losses that decided it.

    Attributes:
        epoch: The epoch before which it was decided, counted from 0 over all runs.
        is_cut: Whether several cycles follow; otherwise the run stays one cosine.
        first_loss: The training loss of the run's first epoch; None if it is not known, as below.
        loss: The training loss of the last epoch so far.
        val_loss: The lowest validation loss so far.
        is_pretrained: Whether layers were trained before the first `fit`. Then the run stays one
            cosine, whatever the losses are.
    """

    epoch: Count
    is_cut: bool
    first_loss: float | None = None
    loss: float | None = None
    val_loss: float | None = None
    is_pretrained: bool = False


@dataclasses.dataclass
class Progress:
    """How far training has come.

    Attributes:
        history: A column for each metric, with one value per epoch.
        done: The numbers of finished cycles, epochs, steps and runs.
        run_epochs: The number of epochs of each run that has ended.
        saves_state: Whether the last run saves states to resume from.
        pretrained: The indices of the parts of the model that were trained before the first run
            (see `training.shrink_perturb`); None until that is known.
        decisions: What `cycles="auto"` has decided, for each run that has come so far.
    """

    history: History = dataclasses.field(default_factory=dict)
    done: Counts = dataclasses.field(default_factory=Counts.zero)
    run_epochs: list[Count] = dataclasses.field(default_factory=list)
    saves_state: bool = dataclasses.field(default=False, metadata={"json": "saves"})
    pretrained: list[Count] | None = dataclasses.field(default=None, metadata={"json": "spared"})
    decisions: list[Decision] = dataclasses.field(default_factory=list)

    def check_for(self, snapshots: Sequence[Snapshot]) -> None:
        """Raises `ValueError` unless its numbers agree with each other and with the snapshots."""
        done, earlier = self.done, self.run_epochs
        for name, column in {"cycle": [], **self.history}.items():
            if len(column) != done.epochs:
                raise ValueError(
                    f"`history` must have a value for each epoch. Received: {len(column)} values "
                    f"of {name!r} for {done.epochs} epochs"
                )
        shares = self.history.get("shrink", [])
        if not all(isinstance(share, (int, float)) and 0 <= share <= 1 for share in shares):
            raise ValueError(f"`shrink` must be from 0 to 1. Received: shrink={shares}")
        if sum(earlier) > done.epochs or len(earlier) > done.runs + 1 or done.cycles > done.epochs:
            raise ValueError(f"`done` does not add up. Received: done={done}, run_epochs={earlier}")
        ends = {"cycle": done.cycles, "epoch": done.epochs, "step": done.steps + 1}
        for own in snapshots:
            for name, end in ends.items():
                value = getattr(own, name)
                if value is not None and value >= end:
                    raise ValueError(
                        f"`{name}` of a snapshot must be below {end}. Received: {name}={value}"
                    )

    def copy(self) -> Self:
        """A copy that can change without changing this one.

        It has no epoch that is not counted yet: an interrupt may come just before that.
        """
        epochs = self.done.epochs
        return dataclasses.replace(
            self,
            history={name: column[:epochs] for name, column in self.history.items()},
            done=dataclasses.replace(self.done),
            run_epochs=list(self.run_epochs),
            decisions=list(self.decisions),
        )

    def go_back_to(self, done: Counts) -> None:
        """Drops everything after these counts."""
        self.done = dataclasses.replace(done)
        self.history = {name: column[: done.epochs] for name, column in self.history.items()}
        # One that was made just then is made again.
        self.decisions = [own for own in self.decisions if own.epoch < done.epochs]

    def record_epoch(self, values: dict[str, Any]) -> None:
        """Adds an epoch; a metric without a value in it gets a `None`."""
        epochs = len(self.history.get("cycle", ()))
        if new := {name: [None] * epochs for name in values if name not in self.history}:
            # A new dict: another thread may be going through the old one.
            self.history = {**self.history, **new}
        for name, column in self.history.items():
            column.append(values.get(name))

    def columns(self, first: int, last: int) -> dict[str, list[Any]]:
        """The history of epochs `first` to `last - 1` as in Keras, without `None`s."""
        return {
            name: [value for value in column[first:last] if value is not None]
            for name, column in self.history.items()
        }


@dataclasses.dataclass
class Record:
    """Everything that is kept besides the snapshots.

    Attributes:
        settings: Arguments of the ensemble's constructor.
        learned: What was learned about the members.
        progress: How far training has come.
    """

    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    learned: Learned = dataclasses.field(default_factory=Learned)
    progress: Progress = dataclasses.field(default_factory=Progress)
