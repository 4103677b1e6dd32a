"""One run: a plan through one `model.fit`, and a snapshot at the end of each cycle."""

import dataclasses
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.checks import counted
from snapshot_ensemble.schedules import Cycle, Plan
from snapshot_ensemble.storage.snapshot import Snapshot, SnapshotSink
from snapshot_ensemble.training.dataset_passes import Passes
from snapshot_ensemble.training.fit_arguments import flat_callbacks, steps_in_epoch
from snapshot_ensemble.training.learning_rate import AnnealedRate
from snapshot_ensemble.training.shrink_perturb import Restarter
from snapshot_ensemble.training.state import StateKeeper, TrainingState, build, variables_of


@dataclasses.dataclass
class Run:
    """One run of a plan: what is given, and how far it has come.

    Attributes:
        plan: The cycles, their epochs counted from 0.
        number: Of the runs in this place, from 0.
        first_epoch: Keras's number of the plan's first epoch.
        store: Takes the snapshots.
        rate: The learning rate of the model's optimizer.
        history: Grows by one value an epoch, also if the run breaks off.
        done: Numbers of `cycles`, `epochs` and `steps` so far; grow as training goes.
        max_snapshots: Keep the newest that many.
        keep_going: Whether to go on after a cycle that ends in numbers that are not finite.
        save_every: After how many epochs the state is kept; None: never.
        fingerprint: What must be the same for the run to go on after a break.
        earlier: Number of epochs of each run before this one.
        state: The state of a broken run to go on from, or None.
        restarter: Changes the weights where a cycle begins.
    """

    plan: Plan
    number: int
    first_epoch: int
    store: SnapshotSink
    rate: AnnealedRate
    history: dict[str, list[Any]]
    done: dict[str, int]
    max_snapshots: int | None
    keep_going: bool
    save_every: int | None
    fingerprint: dict[str, Any]
    earlier: list[int]
    state: TrainingState | None = None
    restarter: Restarter = dataclasses.field(default_factory=Restarter)

    def __post_init__(self) -> None:
        self.steps: int | None = None  # In an epoch, once it is known.
        self.cycles_before = self.done["cycles"]
        self.epochs_before = self.done["epochs"]
        if self.state is not None:
            self.steps = self.state.facts["steps"]
            self.cycles_before = self.state.facts["cycles_before"]
            self.epochs_before -= self.state.facts["epochs"]

    def cycle_of(self, epoch: int) -> Cycle:
        """The cycle that Keras's epoch belongs to."""
        place = epoch - self.first_epoch
        return next(cycle for cycle in self.plan if place <= cycle.last_epoch)

    @property
    def epochs(self) -> int:
        """What `model.fit` is told as `epochs`."""
        return self.first_epoch + self.plan[-1].last_epoch + 1

    @property
    def next_epoch(self) -> int:
        """Keras's number of the epoch to begin with."""
        if self.state is None:
            return self.first_epoch
        return self.epochs if self.state.facts["finished"] else self.state.facts["next_epoch"]

    def facts(self, next_epoch: int, finished: bool) -> dict[str, Any]:
        """What a state says beside the arrays."""
        return {
            "run": self.number,
            "fingerprint": self.fingerprint,
            "next_epoch": next_epoch,
            "finished": finished,
            "steps": self.steps,
            "cycles_before": self.cycles_before,
            "epochs": self.done["epochs"] - self.epochs_before,
            "earlier": self.earlier,
            "done": dict(self.done),
        }

    def is_due(self, epoch: int) -> bool:
        """Whether the state is kept after an epoch; that after the last is kept by `train`."""
        if self.save_every is None or epoch == self.epochs - 1:
            return False
        place = epoch - self.first_epoch
        return (place + 1) % self.save_every == 0 or place == self.cycle_of(epoch).last_epoch

    def keep_state(
        self, model: keras.Model, callbacks: list[Any], next_epoch: int, finished: bool = False
    ) -> None:
        """Keeps the state of this moment."""
        state = TrainingState.of(model, callbacks, self.facts(next_epoch, finished))
        self.store.keep_state(state.write)


class CycleCallback(keras.callbacks.Callback):
    """Walks a plan: sets each epoch's place, and keeps a snapshot where a cycle ends.

    Goes first among the callbacks, so that a snapshot has the weights that were trained, whatever
    another callback puts in their place, and all others see `learning_rate` in `logs`.

    Args:
        run: The run.
        steps_of: What makes of Keras's number of steps the number that it will really take.
        passes: The passes over the data.
    """

    def __init__(
        self, run: Run, steps_of: Callable[[int | None], int | None], passes: Passes
    ) -> None:
        super().__init__()
        self._run, self._steps_of, self._passes = run, steps_of, passes
        self._message: str | None = None
        self._good: list[Any] = []

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        run = self._run
        if run.state is not None:
            run.state.restore_model(self.model)
            run.restarter.share = (run.history.get("shrink") or [1.0])[-1]
        known = self._steps_of((self.params or {}).get("steps"))
        run.steps = known if run.steps is None else run.steps
        if run.steps is None and run.plan[0].length == 1:
            warnings.warn(
                "The number of steps in an epoch is not known, so the first epoch runs at one "
                "learning rate, and the first cycle, which is one epoch long, does not anneal. "
                "Pass `steps_per_epoch`, or make the first cycle longer.",
                stacklevel=2,
            )
        if run.keep_going:
            self._good = training_values(self.model)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._log()
        run = self._run
        cycle = run.cycle_of(epoch)
        if epoch - run.first_epoch == cycle.first_epoch and run.cycles_before + cycle.index > 0:
            share = run.restarter.restart(self.model, run.history)
            if share < 1:
                self._message = f"Restart with {share:.3g} of the weights, the rest drawn anew"
                self._log()
        run.rate.begin_epoch(cycle, epoch - run.first_epoch - cycle.first_epoch, run.steps)
        self._passes.up_to(epoch - run.first_epoch)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        logs = {} if logs is None else logs
        run = self._run
        cycle = run.cycle_of(epoch)
        number = run.cycles_before + cycle.index
        metrics = {name: float(value) for name, value in logs.items() if np.ndim(value) == 0}
        steps = run.rate.steps_taken
        # Another callback may have stopped training before the last batch.
        whole = not self.model.stop_training or steps == run.steps
        if run.steps is None:
            run.steps = steps or None
        run.done["epochs"] += 1
        run.done["steps"] += steps
        logs["learning_rate"] = run.rate.last
        facts: dict[str, float] = {"cycle": number}
        if run.restarter.share < 1 or "shrink" in run.history:
            # No column for runs of which every restart was the paper's.
            run.history.setdefault("shrink", [1.0] * len(run.history.get("cycle", ())))
            facts["shrink"] = run.restarter.share
        record(run.history, {**logs, **facts})
        if epoch - run.first_epoch == cycle.last_epoch and whole:
            if cause := not_finite(self.model, metrics):
                self._refuse(number, cause)
            else:
                self._keep(number, metrics)

    def _refuse(self, number: int, cause: str) -> None:
        run = self._run
        goes_on = (
            "The next cycle begins where the last one ended."
            if run.keep_going
            else (
                "Training stops. Try a lower peak (`lr_init`) or `clipnorm` in the optimizer; "
                "`keep_going=True` goes on."
            )
        )
        warnings.warn(
            f"Cycle {number} gives no member: {cause}. Kept: "
            f"{counted(len(run.store.snapshots), 'member')}. {goes_on}",
            stacklevel=2,
        )
        run.done["cycles"] = number + 1
        if run.keep_going:
            for variable, value in zip(variables_of(self.model), self._good, strict=True):
                variable.assign(value)
        else:
            self.model.stop_training = True

    def _keep(self, number: int, metrics: dict[str, float]) -> None:
        run = self._run
        epoch = run.done["epochs"] - 1
        snapshot = Snapshot(
            index=len(run.store.snapshots),
            cycle=number,
            epoch=epoch,
            step=run.done["steps"],
            learning_rate=run.rate.last,
            metrics=metrics,
        )
        before = run.done["cycles"]
        run.done["cycles"] = number + 1
        try:
            with run.rate.lifted():
                run.store.add(self.model, snapshot)
        except BaseException:
            run.done["cycles"] = before
            raise
        if run.max_snapshots is not None:
            run.store.keep_newest(run.max_snapshots)
        if run.keep_going:
            self._good = training_values(self.model)
        shown = " - ".join(f"{name}: {value:.4f}" for name, value in metrics.items())
        self._message = (
            f"Snapshot of cycle {number} (epoch {epoch + 1}, "
            f"learning rate {run.rate.last:.3g}) - {shown}"
        )

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self._log()

    def _log(self) -> None:
        # One line, when the progress bar has ended its own.
        message, self._message = self._message, None
        if message is None or (self.params or {}).get("verbose") == 0:
            return
        if keras.config.is_interactive_logging_enabled():
            print(message, flush=True)
        else:
            logging.getLogger("snapshot_ensemble").info(message)


def record(history: dict[str, list[Any]], values: dict[str, Any]) -> None:
    """Adds an epoch; what is not there every epoch (`validation_freq`) leaves gaps."""
    epochs = len(history.get("cycle", ()))
    for name in {**history, **values}:
        history.setdefault(name, [None] * epochs).append(values.get(name))


def training_values(model: keras.Model) -> list[np.ndarray]:
    """Copies of all that training changes."""
    return [keras.ops.convert_to_numpy(variable.value) for variable in variables_of(model)]


def not_finite(model: keras.Model, metrics: dict[str, float]) -> str:
    """What of a cycle's end is NaN or infinite, in words; empty if nothing is."""
    if not math.isfinite(metrics.get("loss", 0.0)):
        return f"its loss is {metrics['loss']}"
    for variable in model.weights:
        if keras.backend.is_float_dtype(variable.dtype):
            value = keras.ops.convert_to_numpy(variable.value).astype("float64")
            if not np.isfinite(value).all():
                return f"its weights are not finite ({variable.path})"
    return ""


def warn_of_stragglers(snapshots: Sequence[Snapshot], history: dict[str, list[Any]]) -> None:
    """Names the members that are far worse than the others on the validation data.

    Far worse: their validation loss is more than twice the median of the others, and nearer to that
    of the first epoch, when hardly anything was learned.
    """
    losses = {s.index: s.metrics["val_loss"] for s in snapshots if "val_loss" in s.metrics}
    known = [loss for loss in history.get("val_loss", ()) if loss is not None]
    if len(losses) < 3 or min(losses.values()) <= 0:
        return
    far = []
    for index, loss in losses.items():
        others = float(np.median([other for i, other in losses.items() if i != index]))
        if not loss <= max(2 * others, (others + known[0]) / 2):
            far.append(f"member {index} (val_loss {loss:.4g}, median of the others {others:.4g})")
    if far:
        warnings.warn(
            f"Far worse than the others on the validation data: {', '.join(far)}. Leave out by "
            "`members=`, or let `fit_weights` or `report` on held-out data tell.",
            stacklevel=4,
        )


def train(
    model: keras.Model, run: Run, *, x: Any, y: Any, arguments: dict[str, Any]
) -> keras.callbacks.History:
    """Runs a plan through one `model.fit`, or what a broken run has left of it.

    Args:
        model: A compiled model.
        run: The run.
        x: As for `model.fit`.
        y: As for `model.fit`.
        arguments: The other arguments of `model.fit`, without `epochs`.

    Returns:
        What `model.fit` returns, with the epochs before a break.
    """
    if run.state is not None:
        build(model, x)
    arguments = {**arguments, "initial_epoch": run.next_epoch}
    own = flat_callbacks(arguments.pop("callbacks", None))
    passes = Passes(x if run.save_every is not None else None)

    def steps_of(known: int | None) -> int | None:
        return None if known is None else steps_in_epoch(model, x, arguments, known)

    def keep_state(epoch: int) -> None:
        if run.is_due(epoch):
            run.keep_state(model, own, epoch + 1)

    callbacks = [
        CycleCallback(run, steps_of, passes),
        *own,
        StateKeeper(own, keep_state, run.state),
    ]
    with run.rate.installed(), passes.counted():
        # Of a run that has ended this is no epoch; it builds the model, and gives all its state.
        result = model.fit(x, y, epochs=run.epochs, callbacks=callbacks, **arguments)
        if run.save_every is not None and not (run.state and run.state.facts["finished"]):
            run.keep_state(model, own, run.epochs, finished=True)
    epochs = run.done["epochs"] - run.epochs_before
    passes.end(epochs)
    if run.state is None:
        for name in {"cycle", "shrink"} & set(run.history):
            result.history.setdefault(name, []).extend(run.history[name][-epochs:])
        return result
    result.epoch = [run.first_epoch + i for i in range(epochs)]
    for name, values in run.history.items():
        column = values[len(values) - epochs :]
        result.history[name] = [value for value in column if value is not None]
    return result
