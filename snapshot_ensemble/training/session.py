"""One `fit` as a transaction: it claims the directory or resumes, trains, and commits."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras

from snapshot_ensemble.checks import whole_number
from snapshot_ensemble.cycles import Plan
from snapshot_ensemble.storage.interrupts import interrupts_deferred
from snapshot_ensemble.storage.record import Counts, Progress
from snapshot_ensemble.storage.store import SnapshotStore
from snapshot_ensemble.training.dataset_passes import Passes
from snapshot_ensemble.training.fingerprint import check_same, fingerprint
from snapshot_ensemble.training.fit_arguments import has_validation
from snapshot_ensemble.training.learning_rate import AnnealedRate
from snapshot_ensemble.training.loop import train
from snapshot_ensemble.training.run import Run
from snapshot_ensemble.training.shrink_perturb import Restarter
from snapshot_ensemble.training.state import TrainingState


@dataclasses.dataclass
class FitSession:
    """One `fit`, from its arguments to its commit.

    If it ends early, before the first new snapshot or state is on disk, the store, its record and
    the directory are left as they were.

    Attributes:
        model: The compiled model.
        store: Where snapshots are kept.
        settings: Arguments of the ensemble's constructor, which are stored with the snapshots.
        rate: The learning rate of the model's optimizer.
        restarter: Changes the weights at the start of a cycle.
        plan: The cycles to run.
        directory: The directory as passed by the user; None for memory.
        next_run: The number of the run to resume. A script with several `fit` calls goes through
            the runs of a directory one by one.
        max_snapshots: How many of the newest snapshots are kept; None: all.
        resume: As for `SnapshotEnsemble.fit`.
        overwrite: As for `SnapshotEnsemble.fit`.
        save_every: As for `SnapshotEnsemble.fit`.
        keep_going: As for `SnapshotEnsemble.fit`.
        on_first_batch: Called with the first batch that is trained on, or None.
    """

    model: keras.Model
    store: SnapshotStore
    settings: dict[str, Any]
    rate: AnnealedRate
    restarter: Restarter
    plan: Plan
    directory: Any
    next_run: int = 0
    max_snapshots: int | None = None
    resume: bool = False
    overwrite: bool = False
    save_every: int | None = 1
    keep_going: bool = False
    on_first_batch: Callable[[Any], None] | None = None

    def __post_init__(self) -> None:
        self.has_trained = False  # Stays so if the run had already ended.
        if self.save_every is not None:
            self.save_every = whole_number("save_every", self.save_every, 1)
        if self.resume and (self.overwrite or self.directory is None):
            why = "`overwrite=True` starts over" if self.overwrite else "that needs a `directory`"
            raise ValueError(
                f"`resume=True` resumes a run that was interrupted, but {why}. Received: "
                f"resume=True, overwrite={self.overwrite}, directory={self.directory}"
            )

    def run(self, x: Any, y: Any, arguments: dict[str, Any]) -> keras.callbacks.History:
        """Starts or resumes the run, and commits it.

        Args:
            x: As for `model.fit`.
            y: As for `model.fit`.
            arguments: The other arguments of `model.fit`, without `epochs`.

        Returns:
            The `History` of the whole run.
        """
        with self.store.transaction(resume=self.resume, overwrite=self.overwrite):
            # The interrupted run may have been about to replace the snapshots that are still there.
            starts_over = self.overwrite or (self.resume and self.store.replacing)
            progress = self._begin(starts_over, has_validation(arguments))
            if not self.resume or starts_over:
                self.next_run = progress.done.runs
            current = fingerprint(self.model, self.plan, self.restarter.shrink, x, arguments)
            state = None
            if self.resume and not starts_over:
                state = self._state_to_resume(progress, current)
            if self.resume and state is None and self.next_run < progress.done.runs:
                return self._history_of_ended_run(progress, x)
            progress.saves_state = self.directory is not None and self.save_every is not None
            run = Run(
                plan=self.plan,
                first_epoch=arguments.get("initial_epoch") or 0,
                store=self.store,
                rate=self.rate,
                restarter=self.restarter,
                progress=progress,
                number=self.next_run,
                max_snapshots=self.max_snapshots,
                keep_going=self.keep_going,
                save_every=self.save_every if progress.saves_state else None,
                fingerprint=current,
                state=state,
                view=self.store.view,
                on_first_batch=self.on_first_batch,
            )
            history = train(self.model, run, x=x, y=y, arguments=arguments)
            with interrupts_deferred():
                self.has_trained = True
                progress.run_epochs = [*progress.run_epochs[: run.number], run.epochs_done]
                self.next_run = progress.done.runs = run.number + 1
                self.store.commit()
        return history

    def _begin(self, starts_over: bool, validated: bool) -> Progress:
        """The progress that this run adds to: a copy, so that the old one can be restored."""
        if starts_over:
            self.store.restart()
        record = self.store.record
        progress = Progress() if starts_over else record.progress.copy()
        progress.pretrained = self.restarter.prepare(
            self.model, record.progress.pretrained, is_validated=validated
        )
        record.progress, record.settings = progress, self.settings
        return progress

    def _state_to_resume(self, progress: Progress, current: dict[str, Any]) -> TrainingState | None:
        """The saved state of this run; None if another run saved its state last.

        Progress and snapshots are rolled back to the time of the state.
        """
        path = self.store.state
        state = None if path is None else TrainingState.read(path, self.store.base)
        if state is not None:
            state.check_within(progress.done)
            progress.run_epochs = state.position.epochs_of_runs()
            if state.position.run == self.next_run:
                check_same(state.position.fingerprint, current, self.directory)
                self._go_back_to(state.position.done, progress)
                return state
        self._check_unsaved(progress, Counts.zero() if state is None else state.position.done)
        return None

    def _check_unsaved(self, progress: Progress, saved: Counts) -> None:
        """Rolls back to the last state if the run was killed before it saved its own.

        Raises:
            ValueError: If the run has finished epochs but saves no state to resume from.
        """
        done = progress.done
        if done.epochs <= saved.epochs or self.next_run != done.runs:
            return
        if progress.saves_state and done.cycles <= saved.cycles + 1:
            # The run was killed between its first snapshot and the state of the same epoch.
            self._go_back_to(dataclasses.replace(saved, runs=self.next_run), progress)
            return
        raise ValueError(
            "The directory has no state of training to resume from. Received: "
            f"resume=True, directory='{self.directory}'. `fit` saves one if `save_every` is set. "
            "Start over with `overwrite=True`, or add cycles with "
            "`SnapshotEnsemble.load(directory).fit(...)`."
        )

    def _go_back_to(self, done: Counts, progress: Progress) -> None:
        progress.go_back_to(done)
        self.store.take_back(done)

    def _history_of_ended_run(self, progress: Progress, x: Any) -> keras.callbacks.History:
        """What `fit` returns for a run that ended before the last one began."""
        number, run_epochs = self.next_run, progress.run_epochs
        self.next_run += 1
        first = sum(run_epochs[:number])
        epochs = run_epochs[number] if number < len(run_epochs) else 0
        Passes(x).end(epochs)
        result = keras.callbacks.History()
        result.set_model(self.model)
        result.epoch = list(range(epochs))
        result.history = progress.columns(first, first + epochs)
        return result
