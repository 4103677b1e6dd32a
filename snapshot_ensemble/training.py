"""One run: a plan through one `model.fit`, and a snapshot at the end of each cycle."""

import inspect
import logging
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.annealing import AnnealedRate
from snapshot_ensemble.schedules import Cycle, Plan
from snapshot_ensemble.snapshots import Snapshot, SnapshotStore

RATE_SETTERS = (keras.callbacks.LearningRateScheduler, keras.callbacks.ReduceLROnPlateau)


class CycleCallback(keras.callbacks.Callback):
    """Walks a plan: sets each epoch's place, and keeps a snapshot where a cycle ends.

    Goes first among the callbacks, so that a snapshot has the weights that were trained, whatever
    another callback puts in their place, and all others see `learning_rate` in `logs`.
    """

    def __init__(
        self,
        plan: Plan,
        rate: AnnealedRate,
        store: SnapshotStore,
        *,
        first_epoch: int,
        history: dict[str, list[Any]],
        done: dict[str, int],
        steps: Callable[[int | None], int | None],
        max_snapshots: int | None,
    ) -> None:
        super().__init__()
        self._rate, self._store, self._history, self._done = rate, store, history, done
        self._first_epoch, self._steps_of, self._max = first_epoch, steps, max_snapshots
        self._cycle_of = [cycle for cycle in plan for _ in range(cycle.length)]
        self._cycles_before = done["cycles"]
        self._steps: int | None = None
        self._message: str | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._steps = self._steps_of((self.params or {}).get("steps"))
        if self._steps is None and self._cycle_of[0].length == 1:
            warnings.warn(
                "The number of steps in an epoch is not known, so the first epoch runs at one "
                "learning rate, and the first cycle, which is one epoch long, does not anneal. "
                "Pass `steps_per_epoch`, or make the first cycle longer.",
                stacklevel=2,
            )

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._log()
        cycle = self._cycle_of[epoch - self._first_epoch]
        self._rate.begin_epoch(cycle, epoch - self._first_epoch - cycle.first_epoch, self._steps)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        logs = {} if logs is None else logs
        cycle = self._cycle_of[epoch - self._first_epoch]
        number = self._cycles_before + cycle.index
        metrics = {name: float(value) for name, value in logs.items() if np.ndim(value) == 0}
        steps = self._rate.steps_taken
        # Another callback may have stopped training before the last batch.
        whole = not self.model.stop_training or steps == self._steps
        if self._steps is None:
            self._steps = steps or None
        self._done["epochs"] += 1
        self._done["steps"] += steps
        logs["learning_rate"] = self._rate.last
        self._record({**logs, "cycle": number})
        if epoch - self._first_epoch == cycle.last_epoch and whole:
            self._keep(cycle, number, metrics)

    def _record(self, values: dict[str, Any]) -> None:
        """Adds an epoch; what is not there every epoch (`validation_freq`) leaves gaps."""
        epochs = len(self._history.get("cycle", ()))
        for name in {**self._history, **values}:
            column = self._history.setdefault(name, [None] * epochs)
            column.append(values.get(name))

    def _keep(self, cycle: Cycle, number: int, metrics: dict[str, float]) -> None:
        snapshot = Snapshot(
            index=len(self._store.snapshots),
            cycle=number,
            epoch=self._done["epochs"] - 1,
            step=self._done["steps"],
            learning_rate=self._rate.last,
            metrics=metrics,
        )
        self._done["cycles"] = number + 1
        try:
            with self._rate.lifted():
                self._store.add(self.model, snapshot)
        except BaseException:
            self._done["cycles"] = number
            raise
        if self._max is not None:
            self._store.keep_newest(self._max)
        shown = " - ".join(f"{name}: {value:.4f}" for name, value in metrics.items())
        self._message = (
            f"Snapshot of cycle {number} (epoch {snapshot.epoch + 1}, "
            f"learning rate {snapshot.learning_rate:.3g}) - {shown}"
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


def check_callbacks(callbacks: Any) -> None:
    """Raises `ValueError` if a callback would set the learning rate, which the plan sets."""
    for callback in flat_callbacks(callbacks):
        if isinstance(callback, RATE_SETTERS):
            name = type(callback).__name__
            raise ValueError(
                "The learning rate is set by the ensemble's schedule, so no callback may set it. "
                f"Received: callbacks with {name}. Leave {name} out, or choose the rates by "
                "`schedule`, `lr_init` and `lr_min`."
            )


def check_fit_arguments(model: keras.Model, arguments: dict[str, Any]) -> None:
    """Raises `TypeError` for an argument that the model's `fit` does not have."""
    parameters = inspect.signature(model.fit).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in arguments.items():
        if name not in parameters and not takes_any:
            known = ", ".join(sorted(set(parameters) - {"x", "y", "epochs"}))
            raise TypeError(
                f"`fit` has no argument `{name}`. Received: {name}={value!r}. "
                f"Beside x, y and epochs it takes: {known}"
            )


def steps_in_epoch(model: keras.Model, x: Any, arguments: dict[str, Any], steps: int) -> int:
    """How many steps Keras will take in an epoch that it says has `steps`.

    With `steps_per_epoch` it takes whole executions of `steps_per_execution`, as long as there
    is data: 16 steps, 7 an execution, are 21.
    """
    size = model.steps_per_execution
    if arguments.get("steps_per_epoch") is None or steps % size == 0:
        return steps
    rounded = -(-steps // size) * size
    split = arguments.get("validation_split") if arguments.get("validation_data") is None else 0
    held = _batches(x, arguments.get("batch_size"), split or 0)
    return rounded if held is None else min(rounded, held)


def _batches(x: Any, batch_size: int | None, split: float) -> int | None:
    """Number of batches in one pass over `x`; None if it is not known, or has no end."""
    if hasattr(x, "cardinality"):  # tf.data.Dataset
        count = int(x.cardinality())
        return count if count >= 0 else None
    if isinstance(x, keras.utils.PyDataset):
        return x.num_batches
    arrays = keras.tree.flatten(x)
    if arrays and hasattr(arrays[0], "shape"):
        return -(-int(arrays[0].shape[0] * (1 - split)) // (batch_size or 32))
    return None


def flat_callbacks(callbacks: Any) -> list[keras.callbacks.Callback]:
    """All callbacks one by one, out of lists and `CallbackList`s however nested."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = callbacks.callbacks
    elif isinstance(callbacks, keras.callbacks.Callback) or callbacks is None:
        return [callbacks] if callbacks else []
    return [flat for callback in keras.tree.flatten(callbacks) for flat in flat_callbacks(callback)]


def train(
    model: keras.Model,
    plan: Plan,
    store: SnapshotStore,
    rate: AnnealedRate,
    *,
    x: Any,
    y: Any,
    arguments: dict[str, Any],
    history: dict[str, list[Any]],
    done: dict[str, int],
    max_snapshots: int | None,
) -> keras.callbacks.History:
    """Runs a plan through one `model.fit`.

    Args:
        model: A compiled model.
        plan: The cycles, their epochs counted from 0.
        store: Takes the snapshots.
        rate: The learning rate of the model's optimizer.
        x: As for `model.fit`.
        y: As for `model.fit`.
        arguments: The other arguments of `model.fit`, without `epochs`.
        history: Grows by one value an epoch, also if the run breaks off.
        done: Numbers of `cycles`, `epochs` and `steps` so far; grow as training goes.
        max_snapshots: Keep the newest that many.

    Returns:
        What `model.fit` returns.
    """
    arguments = dict(arguments)
    first_epoch = arguments.get("initial_epoch", 0)

    def steps(known: int | None) -> int | None:
        return None if known is None else steps_in_epoch(model, x, arguments, known)

    callback = CycleCallback(
        plan,
        rate,
        store,
        first_epoch=first_epoch,
        history=history,
        done=done,
        steps=steps,
        max_snapshots=max_snapshots,
    )
    callbacks = [callback, *flat_callbacks(arguments.pop("callbacks", None))]
    with rate.installed():
        epochs = first_epoch + plan[-1].last_epoch + 1
        result = model.fit(x, y, epochs=epochs, callbacks=callbacks, **arguments)
    result.history.setdefault("cycle", []).extend(history["cycle"][-len(result.epoch) :])
    return result
