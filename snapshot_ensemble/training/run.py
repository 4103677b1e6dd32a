"""One run of a plan: its settings, and how far it has come."""

import dataclasses
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import keras

from snapshot_ensemble.cycles import Cycle, Plan
from snapshot_ensemble.storage.record import Decision, Progress
from snapshot_ensemble.storage.store import SnapshotSink
from snapshot_ensemble.storage.view import View
from snapshot_ensemble.training.cutting_short import decide
from snapshot_ensemble.training.epoch_steps import EpochSteps
from snapshot_ensemble.training.learning_rate import AnnealedRate
from snapshot_ensemble.training.loss_ratios import Scale, plain
from snapshot_ensemble.training.shrink_perturb import Restarter
from snapshot_ensemble.training.state import RunPosition, TrainingState


@dataclasses.dataclass
class Run:
    """One run of a plan.

    Attributes:
        plan: The cycles, their epochs counted from 0.
        first_epoch: Keras's number of the plan's first epoch.
        store: Takes the snapshots.
        rate: The learning rate of the model's optimizer.
        restarter: Changes the weights at the start of a cycle.
        progress: Updated after every epoch, so it is up to date if the run is interrupted.
        number: The run's number among those of its store, from 0.
        max_snapshots: How many of the newest snapshots are kept; None: all.
        keep_going: Whether to continue after a cycle that ends with values that are not finite.
        save_every: After how many epochs the state is saved; None: never.
        fingerprint: What must be the same for the run to be resumed.
        state: The state of an interrupted run to resume from, or None.
        view: Returns the snapshots that there are, whose weights a saved state may leave out.
        on_first_batch: Called with the first batch that is trained on, or None.
    """

    plan: Plan
    first_epoch: int
    store: SnapshotSink
    rate: AnnealedRate
    restarter: Restarter
    progress: Progress
    number: int = 0
    max_snapshots: int | None = None
    keep_going: bool = False
    save_every: int | None = None
    fingerprint: dict[str, Any] = dataclasses.field(default_factory=dict)
    state: TrainingState | None = None
    view: Callable[[], View] | None = None
    on_first_batch: Callable[[Any], None] | None = None

    def __post_init__(self) -> None:
        self.steps = EpochSteps(None)
        self.cycles_before = self.progress.done.cycles
        self.epochs_before = self.progress.done.epochs
        if self.state is not None:
            self.cycles_before = self.state.position.cycles_before
            self.epochs_before -= self.state.position.epochs
        # What `model.fit` is given as `epochs` and `initial_epoch`.
        self.epochs = self.first_epoch + self.plan[-1].last_epoch + 1
        self.next_epoch = self.first_epoch
        if self.state is not None:
            position = self.state.position
            self.next_epoch = self.epochs if position.finished else position.next_epoch

    def begin_steps(self, steps: EpochSteps) -> None:
        """Takes the steps of the epochs; a resumed run may know them from the interrupted one."""
        steps.resumed_at = self.next_epoch - self.first_epoch
        if self.state is not None and self.state.position.steps is not None:
            steps.nominal = self.state.position.steps
        self.steps = steps

    def decide(self, epoch: int, scale: Scale = plain) -> Decision | None:
        """Decides the plan, if that is due at the start of an epoch, given by Keras's number.

        It depends on the epochs before alone, so a resumed run decides as the interrupted one did.
        """
        plan, progress, before = self.plan, self.progress, self.epochs_before
        if plan.is_decided:
            return None
        for due in plan.due:
            if due > epoch - self.first_epoch:
                return None
            decision = decide(progress.history, before, before + due, scale)
            if progress.pretrained:
                decision = dataclasses.replace(decision, is_cut=False, is_pretrained=True)
            if decision.is_cut:
                self.plan = plan.cut_short(due)
                break
        else:
            self.plan = plan.decided()
        earlier = [own for own in progress.decisions if own.epoch < decision.epoch]
        progress.decisions = [*earlier, decision]
        return decision

    def cycle_of(self, epoch: int) -> Cycle:
        """The cycle of an epoch, given by Keras's number."""
        in_plan = epoch - self.first_epoch
        return self.plan[bisect_left(self.plan, in_plan, key=lambda cycle: cycle.last_epoch)]

    def is_restart(self, epoch: int) -> bool:
        """Whether a cycle starts with an epoch of Keras's number, from where another has ended."""
        in_plan = epoch - self.first_epoch
        cycle = self.cycle_of(epoch)
        if in_plan != cycle.first_epoch or self.cycles_before + cycle.index == 0:
            return False
        # One that was cut short goes on.
        return not in_plan or self.cycle_of(epoch - 1).ends_at_floor

    def unfinished(self) -> set[int | None]:
        """The cycles whose end is not that of their cosine."""
        return {own.cycle for own in self.store.snapshots if not own.is_annealed}

    @property
    def epochs_done(self) -> int:
        """How many epochs of this run are done."""
        return self.progress.done.epochs - self.epochs_before

    def is_state_due(self, epoch: int) -> bool:
        """Whether the state is saved after an epoch; after the last one, `train` saves it."""
        if self.save_every is None or epoch == self.epochs - 1:
            return False
        in_plan = epoch - self.first_epoch
        return (in_plan + 1) % self.save_every == 0 or in_plan == self.cycle_of(epoch).last_epoch

    def save_state(
        self, model: keras.Model, callbacks: list[Any], next_epoch: int, finished: bool = False
    ) -> None:
        """Saves the current state of training."""
        position = RunPosition(
            run=self.number,
            fingerprint=self.fingerprint,
            next_epoch=next_epoch,
            finished=finished,
            steps=self.steps.nominal,
            cycles_before=self.cycles_before,
            epochs=self.epochs_done,
            run_epochs=self.progress.run_epochs[: self.number],
            done=dataclasses.replace(self.progress.done),
        )
        state = TrainingState.of(model, callbacks, position)
        if finished and self.view is not None and (view := self.view()).snapshots:
            # A run most often ends with the weights of its last snapshot.
            last = len(view.snapshots) - 1
            if (cycle := view.snapshots[last].cycle) is not None:
                state.leave_out(cycle, view.weights(model, last))
        self.store.keep_state(state.write)
