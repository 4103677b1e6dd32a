"""The API of snapshot_ensemble 1.0: callbacks for `model.fit(callbacks=[...])`."""

import contextlib
import math
import os
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras

from snapshot_ensemble.checks import whole_number
from snapshot_ensemble.keras_compat.train_step import next_fit_noticed, remake_train_function
from snapshot_ensemble.schedules import CosineAnnealing
from snapshot_ensemble.storage.record import Progress
from snapshot_ensemble.storage.snapshot import Snapshot, Weights, renumbered
from snapshot_ensemble.storage.weight_files import save_weights
from snapshot_ensemble.training.dataset_passes import Passes
from snapshot_ensemble.training.epoch_steps import EpochSteps
from snapshot_ensemble.training.learning_rate import AnnealedRate
from snapshot_ensemble.training.loop import CycleCallback
from snapshot_ensemble.training.run import Run
from snapshot_ensemble.training.shrink_perturb import Restarter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OPTIONS = {"num_snapshots": 10, "dirpath": "Ensemble/", "model_prefix": "Model"}


class Ring:
    """Weight files `Model-1.weights.h5`, …, of which the newest replace the oldest.

    Args:
        directory: Path of the directory. It is created when something is written.
        prefix: Prefix of the file names.
        size: The maximum number of files.
    """

    def __init__(self, directory: str | os.PathLike[str], prefix: str, size: int) -> None:
        self._directory, self._prefix, self._size = pathlib.Path(directory), prefix, size
        self.snapshots: list[Snapshot] = []
        self.version = 0

    @property
    def paths(self) -> list[pathlib.Path]:
        """The files, oldest snapshot first."""
        first = self.version - len(self.snapshots)
        return [self._path(number) for number in range(first, self.version)]

    def _path(self, number: int) -> pathlib.Path:
        return self._directory / f"{self._prefix}-{number % self._size + 1}.weights.h5"

    def add(self, model: keras.Model, snapshot: Snapshot) -> None:
        path = self._path(self.version)
        path.parent.mkdir(parents=True, exist_ok=True)
        # To a temporary file first, so that an existing file stays intact until the new one is.
        temporary = path.with_name(f"writing-{path.name}")
        try:
            save_weights(model, temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        self.version += 1
        self.snapshots = renumbered([*self.snapshots, snapshot][-self._size :])

    def keep_newest(self, count: int) -> None:
        pass  # There are never more than `size` snapshots.

    def keep_state(self, write: Callable[[str, Weights | None], None]) -> None:
        pass  # Version 1.0 saved no state of training.


class SnapshotEnsembleCallback(keras.callbacks.Callback):
    """Anneals the learning rate along cosines and saves the weights at the end of each cycle.

    The callback of snapshot_ensemble 1.0, implemented with the plan and the in-graph learning
    rate of `SnapshotEnsemble`. New code should use `SnapshotEnsemble`, which also predicts. The
    plan is that of `CosineAnnealing` over the epochs that `fit` is given: epochs left over extend
    the last cycle, which is saved as well. With fewer epochs than `cycle_length` there is one
    cycle.

    After training, the optimizer has its own learning rate again. If `fit` ends in an exception,
    the rate is restored when the model is next trained.

    Example:

    >>> callback = SnapshotEnsembleCallback(cycle_length=2, cycle_length_multiplier=1.0)
    >>> history = model.fit(x, y, epochs=6, callbacks=[callback], verbose=0)
    >>> ens = SnapshotEnsemble.from_weights(model, callback.paths)
    >>> len(ens)
    3

    Args:
        cycle_length: Epochs in the first cycle. Defaults to `10`.
        cycle_length_multiplier: Factor by which each cycle is longer than the one before. Defaults
            to `1.5`.
        lr_init: The learning rate at the start of the first cycle. Defaults to `0.01`.
        lr_min: The learning rate at the end of the first cycle. Defaults to `1e-6`.
        lr_multiplier: Factor by which both bounds are multiplied from one cycle to the next.
            Defaults to `0.9`.
        ensemble: Whether snapshots are saved. Defaults to `True`.
        ensemble_options: A dict with any of `num_snapshots`, how many of the newest snapshots are
            kept (defaults to `10`), `dirpath`, the directory (defaults to `"Ensemble/"`), and
            `model_prefix`, the prefix of the file names (defaults to `"Model"`). The files are
            `Ensemble/Model-1.weights.h5` and so on; after `num_snapshots` of them the first is
            overwritten.

    Raises:
        ValueError: If a value is invalid, or `ensemble_options` has an unknown key.

    References:
        - [Huang, Li, Pleiss et al., 2017](https://arxiv.org/abs/1704.00109)
        - [Loshchilov & Hutter, 2017](https://arxiv.org/abs/1608.03983)
    """

    # `SnapshotEnsemble.fit` refuses callbacks that say so.
    sets_learning_rate = True

    def __init__(
        self,
        cycle_length: int = 10,
        cycle_length_multiplier: float = 1.5,
        lr_init: float = 0.01,
        lr_min: float = 1e-6,
        lr_multiplier: float = 0.9,
        ensemble: bool = True,
        ensemble_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.schedule = CosineAnnealing(
            cycle_length, cycle_length_multiplier, lr_init, lr_min, lr_multiplier
        )
        self.ensemble = ensemble
        self.options = snapshot_options(ensemble_options)
        self._ring = Ring(
            self.options["dirpath"], self.options["model_prefix"], self.options["num_snapshots"]
        )
        self._progress = Progress()
        self._cycles: CycleCallback | None = None
        self._installed = contextlib.ExitStack()

    @property
    def paths(self) -> list[pathlib.Path]:
        """The saved weight files, oldest first."""
        return self._ring.paths

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if self._cycles is None:
            self._cycles = self._begin(epoch)
        self._cycles.on_epoch_begin(epoch, logs)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if self._cycles is not None:
            self._cycles.on_epoch_end(epoch, logs)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._installed.close()  # After a `fit` that ended in an exception.
        self._cycles = None

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._cycles is not None:
            self._cycles.on_train_end(logs)
        self._installed.close()
        self._cycles = None

    def _begin(self, first_epoch: int) -> CycleCallback:
        """Makes the plan, which needs the number of the first epoch."""
        model, epochs = self.model, self.params["epochs"] - first_epoch
        rate, config = AnnealedRate(model), self.schedule.get_config()
        config["cycle_length"] = min(config["cycle_length"], epochs)
        run = Run(
            plan=CosineAnnealing(**config).plan(epochs),
            first_epoch=first_epoch,
            store=self._ring if self.ensemble else _DiscardedSnapshots("", "", 1),
            rate=rate,
            restarter=Restarter(),
            progress=self._progress,
        )
        cycles = CycleCallback(run, EpochSteps, Passes(None))
        cycles.set_model(model)
        cycles.set_params(self.params)
        cycles.on_train_begin()
        # If this `fit` ends in an exception, the next one restores the rate before it starts.
        self._installed.enter_context(next_fit_noticed(model, self._installed.close))
        self._installed.enter_context(rate.installed())
        remake_train_function(model)
        return cycles


class _DiscardedSnapshots(Ring):
    """A store that keeps nothing."""

    def add(self, model: keras.Model, snapshot: Snapshot) -> None:
        pass


def snapshot_options(given: dict[str, Any] | None) -> dict[str, Any]:
    """A new dict with the options of 1.0, defaults filled in."""
    unknown = set(given or {}) - set(_OPTIONS)
    if unknown:
        raise ValueError(
            f"`ensemble_options` may have the keys {', '.join(map(repr, _OPTIONS))}. Received: "
            f"ensemble_options={given!r}"
        )
    options = {**_OPTIONS, **(given or {})}
    options["num_snapshots"] = whole_number("num_snapshots", options["num_snapshots"], 1)
    return options


def GenerateSnapshotCallbacks(  # noqa: N802  The name in version 1.0.
    cycle_length: int = 10,
    cycle_length_multiplier: float = 1.5,
    lr_init: float = 0.01,
    lr_min: float = 1e-6,
    lr_multiplier: float = 0.9,
    ensemble: bool = True,
    ensemble_options: dict[str, Any] | None = None,
) -> list[keras.callbacks.Callback]:
    """A `SnapshotEnsembleCallback`, and a checkpoint of the weights with the lowest `val_loss`.

    The checkpoint is written to `Ensemble/Model-Best.weights.h5`; it needs validation data in
    `fit`.

    Example:

    >>> callbacks = GenerateSnapshotCallbacks(cycle_length=5)
    >>> history = model.fit(x, y, validation_split=0.1, callbacks=callbacks, verbose=0)

    Args:
        cycle_length: As for `SnapshotEnsembleCallback`.
        cycle_length_multiplier: As for `SnapshotEnsembleCallback`.
        lr_init: As for `SnapshotEnsembleCallback`.
        lr_min: As for `SnapshotEnsembleCallback`.
        lr_multiplier: As for `SnapshotEnsembleCallback`.
        ensemble: As for `SnapshotEnsembleCallback`.
        ensemble_options: As for `SnapshotEnsembleCallback`.

    Returns:
        A list of two callbacks for `model.fit`.

    Raises:
        ValueError: As for `SnapshotEnsembleCallback`.
    """
    snapshots = SnapshotEnsembleCallback(
        cycle_length,
        cycle_length_multiplier,
        lr_init,
        lr_min,
        lr_multiplier,
        ensemble,
        ensemble_options,
    )
    name = f"{snapshots.options['model_prefix']}-Best.weights.h5"
    best = keras.callbacks.ModelCheckpoint(
        os.path.join(snapshots.options["dirpath"], name),  # noqa: PTH118  Keras needs a string.
        monitor="val_loss",
        mode="min",
        save_best_only=True,
        save_weights_only=True,
        # Otherwise the first value counts as the best so far, even if it is NaN.
        initial_value_threshold=math.inf,
    )
    return [snapshots, best]


def VisualizeLR(  # noqa: N802  The name in version 1.0.
    epochs: int = 500,
    cycle_length: int = 10,
    cycle_length_multiplier: float = 1.5,
    lr_init: float = 0.01,
    lr_min: float = 1e-6,
    lr_multiplier: float = 0.9,
) -> "Figure":
    """Plots the learning rates that `SnapshotEnsembleCallback` would set.

    Example:

    >>> VisualizeLR(epochs=100).savefig("rates.png")

    Args:
        epochs: The budget. Defaults to `500`.
        cycle_length: As for `SnapshotEnsembleCallback`.
        cycle_length_multiplier: As for `SnapshotEnsembleCallback`.
        lr_init: As for `SnapshotEnsembleCallback`.
        lr_min: As for `SnapshotEnsembleCallback`.
        lr_multiplier: As for `SnapshotEnsembleCallback`.

    Returns:
        A matplotlib `Figure`.

    Raises:
        ValueError: If a value is invalid.
    """
    # Not made by pyplot, which would show the figure a second time in a notebook.
    from matplotlib.figure import Figure  # noqa: PLC0415  Slow to import.

    from snapshot_ensemble.plots import plot_schedule  # noqa: PLC0415

    schedule = CosineAnnealing(
        min(cycle_length, epochs), cycle_length_multiplier, lr_init, lr_min, lr_multiplier
    )
    figure = Figure(figsize=(6, 4), layout="constrained")
    plot_schedule(schedule, epochs, ax=figure.subplots())
    return figure
