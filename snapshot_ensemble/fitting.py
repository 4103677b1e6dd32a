"""How one `fit` begins and ends: whose the directory is, what goes on, what is there afterwards."""

import contextlib
from typing import Any

import keras

from snapshot_ensemble.keeping import Keeper
from snapshot_ensemble.storage.directory import DirectoryStore
from snapshot_ensemble.storage.manifest import NAME as MANIFEST
from snapshot_ensemble.training import loop as training
from snapshot_ensemble.training.dataset_passes import Passes
from snapshot_ensemble.training.fingerprint import check_same
from snapshot_ensemble.training.fit_arguments import validation_of
from snapshot_ensemble.training.state import TrainingState

# What changes when the ensemble takes another place.
_OF_A_DIRECTORY = ("_store", "_directory_is_own", "history", "_done", "_runs", "_earlier", "_saves")


class Fitter(Keeper):
    """An ensemble that runs plans, in its directory or in memory, and goes on with broken runs."""

    _earlier: list[int]  # The number of epochs of each run.

    def _open(self, resume: bool, overwrite: bool) -> None:
        """Makes the directory this ensemble's own, as far as it may."""
        if resume and (overwrite or self.directory is None):
            why = "and `overwrite=True` starts anew" if overwrite else "which needs a `directory`"
            raise ValueError(
                f"`resume=True` goes on with a run that was broken off, {why}. Received: "
                f"resume=True, overwrite={overwrite}, directory={self.directory}"
            )
        if self.directory is None or self._directory_is_own:
            return
        free = DirectoryStore.is_free(self.directory)
        if resume and (self.directory / MANIFEST).exists() and not free:
            self._adopt(DirectoryStore.open(self.directory))
            self._runs = 0
        else:
            self._store = DirectoryStore.create(self.directory, overwrite)
        self._directory_is_own = True
        self._describe_to(self._store)

    def _state_of(self, number: int) -> TrainingState | None:
        """The state of a run in the directory; None if another run was the last to keep one."""
        path = self._store.state
        state = None if path is None else TrainingState.read(path, self._store.base)
        self._earlier = [] if state is None else state.epochs_of_runs()
        if state is not None and state.run == number:
            return state
        done = dict.fromkeys(self._done, 0) if state is None else state.done
        begun = self._done["epochs"] > done["epochs"] and number == self._done["runs"]
        if begun and self._saves and self._done["cycles"] <= done["cycles"] + 1:
            # It was killed between its first snapshot and the state of the same epoch.
            self._forget_after({**done, "runs": number})
        elif begun:
            raise ValueError(
                "The directory holds no state of training to go on from. Received: "
                f"resume=True, directory='{self.directory}'. `fit` keeps one with `save_every`. "
                "Start anew with `overwrite=True`, or add cycles by "
                "`SnapshotEnsemble.load(directory).fit(...)`."
            )
        return None

    def _go_back_to(self, state: TrainingState, same: dict[str, Any]) -> None:
        check_same(state.facts["fingerprint"], same, self.directory)
        self._forget_after(state.done)

    def _forget_after(self, done: dict[str, int]) -> None:
        """Forgets what came after so many epochs and cycles."""
        self._done = dict(done)
        self.history = {name: column[: done["epochs"]] for name, column in self.history.items()}
        self._store.take_back(done["cycles"])

    def _ended_run(self, number: int, x: Any) -> keras.callbacks.History:
        """What `fit` returns for a run that ended before the last one began."""
        self._runs = number + 1
        first = sum(self._earlier[:number])
        epochs = self._earlier[number] if number < len(self._earlier) else 0
        Passes(x).end(epochs)
        result = keras.callbacks.History()
        result.set_model(self.model)
        result.epoch = list(range(epochs))
        result.history = {
            name: [value for value in column[first : first + epochs] if value is not None]
            for name, column in self.history.items()
        }
        return result

    def _train(
        self, run: training.Run, before: Any, *, x: Any, y: Any, arguments: dict[str, Any]
    ) -> keras.callbacks.History:
        """Runs it; `before` is what there was, if that is to be replaced."""
        members = self._members_now()
        try:
            result = training.train(self.model, run, x=x, y=y, arguments=arguments)
        except BaseException:
            with contextlib.suppress(OSError):  # What is raised already matters more.
                self._store.settle()
            with contextlib.suppress(OSError):
                if before is not None and self._members_now() == members:
                    # Nothing took the place of what there was, so that it is still there.
                    store = self._store
                    vars(self).update({name: before[name] for name in _OF_A_DIRECTORY})
                    store.restart(False)
                elif len(self):
                    self._store.commit()
            raise
        self._runs = self._done["runs"] = run.number + 1
        self._earlier = [*run.earlier, run.done["epochs"] - run.epochs_before]
        self._store.commit()
        training.warn_of_stragglers(self.snapshots, self.history)
        self._choose_members_by(validation_of(x, y, arguments))
        return result

    def _choose_members_by(self, validation: dict[str, Any] | None) -> None:
        """Lets validation data choose which members predict, if it can be done."""
        everyone = list(range(len(self)))
        if validation is None or len(everyone) < 2 or self._is_too_large(everyone):
            return
        # What was trained counts more than the choice: without one, all members predict.
        with contextlib.suppress(TypeError, ValueError):
            self.choose_members(**validation, verbose=0)
