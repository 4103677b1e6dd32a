"""One `fit` as a transaction: it claims the directory or resumes, trains, and commits."""

import dataclasses
from typing import Any

import keras

from snapshot_ensemble.checks import whole_number
from snapshot_ensemble.schedules import Plan
from snapshot_ensemble.storage.record import Counts, Progress
from snapshot_ensemble.storage.store import SnapshotStore
from snapshot_ensemble.training.dataset_passes import Passes
from snapshot_ensemble.training.fingerprint import check_same, fingerprint
from snapshot_ensemble.training.fit_arguments import is_validated
from snapshot_ensemble.training.learning_rate import AnnealedRate
from snapshot_ensemble.training.loop import train
from snapshot_ensemble.training.run import Run
from snapshot_ensemble.training.shrink_perturb import Restarter
from snapshot_ensemble.training.state import TrainingState


@dataclasses.dataclass
class FitSession:
    """One `fit`, from its arguments to its commit.

    Whatever ends it before the first new snapshot or state is safe leaves the store, its record and
    the directory as they were.

    Attributes:
        model: The compiled model.
        store: Where snapshots are kept.
        settings: Arguments of the ensemble's constructor, to be kept beside the snapshots.
        rate: The learning rate of the model's optimizer.
        restarter: Changes the weights where a cycle begins.
        plan: The cycles to run.
        directory: As the user gave it, or None for memory.
        next_run: The number of the run that this is, if it resumes: a script with several `fit`
            goes through the runs of a directory one by one.
        max_snapshots: Keep the newest that many.
        resume: As for `SnapshotEnsemble.fit`.
        overwrite: As for `SnapshotEnsemble.fit`.
        save_every: As for `SnapshotEnsemble.fit`.
        keep_going: As for `SnapshotEnsemble.fit`.
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

    def __post_init__(self) -> None:
        self.has_trained = False  # Not if the run had ended before.
        if self.save_every is not None:
            self.save_every = whole_number("save_every", self.save_every, 1)
        if self.resume and (self.overwrite or self.directory is None):
            why = "`overwrite=True` starts anew" if self.overwrite else "that needs a `directory`"
            raise ValueError(
                f"`resume=True` resumes a run that was interrupted, and {why}. Received: "
                f"resume=True, overwrite={self.overwrite}, directory={self.directory}"
            )

    def run(self, x: Any, y: Any, arguments: dict[str, Any]) -> keras.callbacks.History:
        """Trains.

        Args:
            x: As for `model.fit`.
            y: As for `model.fit`.
            arguments: The other arguments of `model.fit`, without `epochs`.

        Returns:
            The `History` of the whole run.
        """
        with self.store.transaction(resume=self.resume, overwrite=self.overwrite):
            # What was interrupted may have been about to replace what is still here.
            anew = self.overwrite or (self.resume and self.store.replacing)
            progress = self._begin(anew, is_validated(arguments))
            if not self.resume or anew:
                self.next_run = progress.done.runs
            same = fingerprint(self.model, self.plan, self.restarter.shrink, x, arguments)
            state = self._state_to_resume(progress, same) if self.resume and not anew else None
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
                fingerprint=same,
                state=state,
            )
            history = train(self.model, run, x=x, y=y, arguments=arguments)
            self.has_trained = True
            progress.run_epochs = [*progress.run_epochs[: run.number], run.epochs_done]
            self.next_run = progress.done.runs = run.number + 1
            self.store.commit()
        return history

    def _begin(self, anew: bool, validated: bool) -> Progress:
        """The progress that this run adds to; the one before stays as it is until all is safe."""
        if anew:
            self.store.restart()
        record = self.store.record
        progress = Progress() if anew else record.progress.copy()
        progress.pretrained = self.restarter.prepare(
            self.model, record.progress.pretrained, is_validated=validated
        )
        record.progress, record.settings = progress, self.settings
        return progress

    def _state_to_resume(self, progress: Progress, same: dict[str, Any]) -> TrainingState | None:
        """The state of this run in the directory; None if another run was the last to save one.

        Progress and snapshots go back to the moment of the state.
        """
        path = self.store.state
        state = None if path is None else TrainingState.read(path, self.store.base)
        if state is not None:
            progress.run_epochs = state.position.epochs_of_runs()
            if state.position.run == self.next_run:
                check_same(state.position.fingerprint, same, self.directory)
                self._go_back_to(state.position.done, progress)
                return state
        self._check_unsaved(progress, Counts.zero() if state is None else state.position.done)
        return None

    def _check_unsaved(self, progress: Progress, saved: Counts) -> None:
        """Goes back to the last state if a run was killed before its own; else it must not be lost.

        Raises:
            ValueError: If the run has epochs and keeps no state to resume from.
        """
        done = progress.done
        if done.epochs <= saved.epochs or self.next_run != done.runs:
            return
        if progress.saves_state and done.cycles <= saved.cycles + 1:
            # It was killed between its first snapshot and the state of the same epoch.
            self._go_back_to(dataclasses.replace(saved, runs=self.next_run), progress)
            return
        raise ValueError(
            "The directory holds no state of training to resume from. Received: "
            f"resume=True, directory='{self.directory}'. `fit` saves one with `save_every`. "
            "Start anew with `overwrite=True`, or add cycles by "
            "`SnapshotEnsemble.load(directory).fit(...)`."
        )

    def _go_back_to(self, done: Counts, progress: Progress) -> None:
        progress.go_back_to(done)
        self.store.take_back(done.cycles)

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
