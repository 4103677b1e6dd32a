"""The callbacks that carry out a plan, and the one `model.fit` that they run in."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.checks import counted
from snapshot_ensemble.keras_compat.train_step import notice_first_batch
from snapshot_ensemble.storage.interrupts import interrupts_deferred
from snapshot_ensemble.storage.snapshot import Snapshot
from snapshot_ensemble.training.callback_state import check_states
from snapshot_ensemble.training.cutting_short import described
from snapshot_ensemble.training.dataset_passes import Passes
from snapshot_ensemble.training.epoch_steps import EpochSteps, epoch_steps
from snapshot_ensemble.training.fit_arguments import OWN_COLUMNS, check_names, flat_callbacks
from snapshot_ensemble.training.last_good import LastGood
from snapshot_ensemble.training.loss_ratios import scale_of
from snapshot_ensemble.training.member_checks import not_finite
from snapshot_ensemble.training.optimizer_checks import OptimizerSteps
from snapshot_ensemble.training.run import Run
from snapshot_ensemble.training.state import build


class CycleCallback(keras.callbacks.Callback):
    """Carries out a plan: sets the learning rate, restarts cycles and takes snapshots.

    It must be the first callback. Then a snapshot has the trained weights, even if another
    callback replaces them, and all other callbacks see `learning_rate` and `cycle` in `logs`.

    Args:
        run: The run.
        steps_of: Turns the number of steps that Keras reports into those that it takes.
        passes: The passes over the training data.
    """

    def __init__(
        self, run: Run, steps_of: Callable[[int | None], EpochSteps], passes: Passes
    ) -> None:
        super().__init__()
        self._run, self._steps_of, self._passes = run, steps_of, passes
        self._message: str | None = None
        self._last_good: LastGood | None = None  # Only if training keeps going.
        self._unchecked: OptimizerSteps | None = None  # Until the first epoch has ended.

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        run = self._run
        run.restarter.share = 1.0  # The restarts of an earlier run are over.
        if run.state is not None:
            run.state.restore_model(self.model)
            run.restarter.share = (run.progress.history.get("shrink") or [1.0])[-1]
        run.begin_steps(self._steps_of((self.params or {}).get("steps")))
        if run.steps.nominal is None and run.plan[0].span == 1:
            warnings.warn(
                "The number of steps in an epoch is not known, so the first epoch runs at one "
                "learning rate, and the first cycle, which is one epoch long, does not anneal. "
                "Pass `steps_per_epoch`, or make the first cycle longer.",
                stacklevel=2,
            )
        if run.keep_going:
            self._last_good = LastGood.of(self.model)
        self._unchecked = OptimizerSteps(self.model)

    def get_state(self) -> list[Any] | None:
        """What a resumed run needs of this callback."""
        return None if self._last_good is None else self._last_good.packed(self.model)

    def set_state(self, state: list[Any]) -> None:
        """Takes what `get_state` returned in the interrupted run."""
        if self._run.keep_going:
            self._last_good = LastGood.unpacked(self.model, state)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._log()
        run = self._run
        if (decision := run.decide(epoch, scale_of(self.model))) is not None:
            self._message = described(decision)
            self._log()
        cycle = run.cycle_of(epoch)
        if run.is_restart(epoch):
            share = run.restarter.restart(self.model, run.progress, run.unfinished())
            if share < 1:
                self._message = (
                    f"Restart with shrink={share:.3g}: weights are mixed with a new draw"
                )
                self._log()
        begin = cycle.first_epoch - cycle.offset  # Of its cosine.
        steps = run.steps.of(begin, begin + cycle.span - 1)
        run.rate.begin_epoch(cycle, epoch - run.first_epoch - begin, steps)
        self._passes.up_to(epoch - run.first_epoch)
        if run.on_first_batch is not None:
            notice_first_batch(self.model, run.on_first_batch)
            run.on_first_batch = None

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        # Ctrl-C in between would leave an epoch without its snapshot, or the other way round.
        with interrupts_deferred():
            self._end_epoch(epoch, {} if logs is None else logs)

    def _end_epoch(self, epoch: int, logs: dict[str, Any]) -> None:
        run = self._run
        if self._unchecked is not None:
            self._unchecked.check(run.rate.steps_taken)
            check_names(logs)  # Those of a training step's own logs are known only now.
            self._unchecked = None
        cycle = run.cycle_of(epoch)
        number = run.cycles_before + cycle.index
        metrics = {name: float(value) for name, value in logs.items() if np.ndim(value) == 0}
        steps = run.rate.steps_taken
        in_plan = epoch - run.first_epoch
        # Another callback may have stopped training before the last batch.
        is_complete = not self.model.stop_training or [steps] == run.steps.of(in_plan, in_plan)
        if run.steps.nominal is None:
            run.steps.nominal = steps or None
        progress = run.progress
        # For the callbacks that come after this one, too.
        logs |= {"learning_rate": run.rate.last, "cycle": number}
        columns: dict[str, float] = {}
        if run.restarter.share < 1 or "shrink" in progress.history:
            # There is no such column as long as every restart was warm, as in the paper.
            progress.history.setdefault("shrink", [1.0] * len(progress.history.get("cycle", ())))
            columns["shrink"] = run.restarter.share
        progress.record_epoch({**logs, **columns})
        progress.done.epochs += 1
        progress.done.steps += steps
        if in_plan == cycle.last_epoch and cycle.is_kept and is_complete:
            if cause := not_finite(self.model, metrics):
                self._reject(number, cause)
            else:
                self._keep(number, metrics, cycle.ends_at_floor)

    def _reject(self, number: int, cause: str) -> None:
        run = self._run
        run.progress.done.cycles = number + 1
        if self._last_good is None:
            prevented = (
                "Try a lower peak (`lr_init`) or `clipnorm` in the optimizer, or continue in such "
                "cases with `keep_going=True`."
            )
        else:
            prevented = self._last_good.restore(self.model)
        if prevented:
            self.model.stop_training = True
            consequence = f"Training stops. {prevented}"
        else:
            self._last_good = LastGood.of(self.model)
            consequence = "The next cycle starts from the state before this one."
        warnings.warn(
            f"Cycle {number} gives no member: {cause}. Kept: "
            f"{counted(len(run.store.snapshots), 'member')}. {consequence}",
            stacklevel=2,
        )

    def _keep(self, number: int, metrics: dict[str, float], is_annealed: bool) -> None:
        run = self._run
        done = run.progress.done
        epoch = done.epochs - 1
        snapshot = Snapshot(
            index=len(run.store.snapshots),
            cycle=number,
            epoch=epoch,
            step=done.steps,
            learning_rate=run.rate.last,
            metrics=metrics,
            is_annealed=is_annealed,
        )
        before = done.cycles
        done.cycles = number + 1
        try:
            with run.rate.lifted():
                run.store.add(self.model, snapshot)
        except BaseException:
            done.cycles = before
            raise
        if run.max_snapshots is not None:
            run.store.keep_newest(run.max_snapshots)
        if run.keep_going:
            self._last_good = LastGood.of(self.model)
        shown = " - ".join(f"{name}: {value:.4f}" for name, value in metrics.items())
        self._message = (
            f"Snapshot of cycle {number} (epoch {epoch + 1}, "
            f"learning rate {run.rate.last:.3g}) - {shown}"
        )

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self._log()

    def _log(self) -> None:
        # Delayed until the progress bar has ended its line.
        message, self._message = self._message, None
        if message is None or (self.params or {}).get("verbose") == 0:
            return
        if keras.config.is_interactive_logging_enabled():
            print(message, flush=True)
        else:
            logging.getLogger("snapshot_ensemble").info(message)


class StateCallback(keras.callbacks.Callback):
    """Saves the state of training. It must be the last callback, to include the others' state.

    Args:
        run: The run.
        callbacks: The callbacks whose state is saved.
    """

    def __init__(self, run: Run, callbacks: Sequence[Any]) -> None:
        super().__init__()
        self._run, self._callbacks = run, list(callbacks)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        if self._run.state is not None:
            self._run.state.restore_callbacks()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if not self.model.stop_training and self._run.is_state_due(epoch):
            self._run.save_state(self.model, self._callbacks, epoch + 1)


def train(
    model: keras.Model, run: Run, *, x: Any, y: Any, arguments: dict[str, Any]
) -> keras.callbacks.History:
    """Runs a plan, or the rest of an interrupted one, in one `model.fit`.

    Args:
        model: A compiled model.
        run: The run.
        x: As for `model.fit`.
        y: As for `model.fit`.
        arguments: The other arguments of `model.fit`, without `epochs`.

    Returns:
        The `History` of `model.fit`, including the epochs before an interruption.
    """
    _build(model, run, x)
    arguments = {**arguments, "initial_epoch": run.next_epoch}
    own = flat_callbacks(arguments.pop("callbacks", None))
    earlier = _own_columns(own)
    passes = Passes(x if run.save_every is not None else None)

    def steps_of(nominal: int | None) -> EpochSteps:
        return epoch_steps(model, x, arguments, nominal)

    cycles = CycleCallback(run, steps_of, passes)
    with_state = [*own, cycles]
    if run.save_every is not None:
        check_states(own)
    callbacks = [cycles, *own, StateCallback(run, with_state)]
    with run.rate.installed(), passes.counted():
        if run.state is not None:
            run.state.check_for(model, with_state)
        # For a run that has ended this runs no epoch; it only builds the model and restores the
        # state.
        result = model.fit(x, y, epochs=run.epochs, callbacks=callbacks, **arguments)
        result = _check_fitted(result, model, run)
        if run.save_every is not None and not (run.state and run.state.position.finished):
            run.save_state(model, with_state, run.epochs, finished=True)
    passes.end(run.epochs_done)
    return _complete(result, run, earlier)


def _check_fitted(result: Any, model: keras.Model, run: Run) -> keras.callbacks.History:
    """The `History` that Keras recorded, whatever a `fit` of the user's own returns."""
    if not run.epochs_done:
        raise ValueError(
            "No epoch was recorded: the model's own `fit` has not passed its callbacks on to "
            f"`keras.Model.fit`. Received: model={model.name!r} of class {type(model).__name__}. "
            "Let it call `super().fit` with all of its arguments."
        )
    return result if isinstance(result, keras.callbacks.History) else model.history


def _build(model: keras.Model, run: Run, x: Any) -> None:
    """Builds the model before its first step, if its state is needed then."""
    with model.distribute_strategy.scope():
        if run.state is not None:
            build(model, x)
        elif run.keep_going:
            # Some data cannot be read before training. Then it shows when a cycle has failed.
            with contextlib.suppress(Exception):
                build(model, x)


def _own_columns(callbacks: Sequence[Any]) -> dict[str, list[Any]]:
    """What `fit` has added to a `History` that the user passes again."""
    given = [c.history for c in callbacks if isinstance(c, keras.callbacks.History)]
    return {name: list(given[-1].get(name, ())) for name in OWN_COLUMNS} if given else {}


def _complete(
    result: keras.callbacks.History, run: Run, earlier: dict[str, list[Any]]
) -> keras.callbacks.History:
    """The `History` of the whole run, including its epochs before an interruption."""
    history, epochs = run.progress.history, run.epochs_done
    done = run.progress.done.epochs
    if run.state is None:
        for name in OWN_COLUMNS & set(history):
            # Another callback may have put values of its own into the logs.
            result.history[name] = earlier.get(name, []) + history[name][done - epochs :]
        return result
    result.epoch = [run.first_epoch + i for i in range(epochs)]
    result.history |= run.progress.columns(done - epochs, done)
    return result
