"""The arguments of `model.fit`: checks, and the validation data."""

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from snapshot_ensemble.checks import counted
from snapshot_ensemble.keras_compat.compile_arguments import compile_arguments
from snapshot_ensemble.storage.snapshot import Snapshot
from snapshot_ensemble.training.optimizer_checks import check_one_optimizer

# What `fit` adds to the history.
OWN_COLUMNS = {"cycle", "learning_rate", "shrink"}
RATE_SETTERS = (keras.callbacks.LearningRateScheduler, keras.callbacks.ReduceLROnPlateau)


def check_callbacks(callbacks: Any) -> None:
    """Raises `ValueError` for callbacks that set the learning rate or restore the model."""
    for callback in flat_callbacks(callbacks):
        if isinstance(callback, keras.callbacks.BackupAndRestore):
            raise ValueError(
                "`BackupAndRestore` restores the model, but not the snapshots or the position in "
                "the schedule. Received: callbacks with BackupAndRestore. Leave it out, and resume "
                "an interrupted run with `fit(..., resume=True)` and a `directory`."
            )
        if isinstance(callback, RATE_SETTERS) or getattr(callback, "sets_learning_rate", False):
            name = type(callback).__name__
            raise ValueError(
                "The learning rate is set by the ensemble's schedule, so no callback may set it. "
                f"Received: callbacks with {name}. Leave {name} out, or choose the rates with "
                "`schedule`, `lr_init` and `lr_min`."
            )


def check_not_merged(snapshots: Sequence[Snapshot], overwrite: bool) -> None:
    """Raises `ValueError` if training would go on with members of several chains."""
    chains = {snapshot.chain for snapshot in snapshots} - {None}
    if chains and not overwrite:
        raise ValueError(
            "A merged ensemble does not train further: no single run has come to its members. "
            f"Received: an ensemble with {counted(len(chains), 'chain')}. Train a chain by itself "
            "and merge again, or replace all members with `overwrite=True`."
        )


def _check_strategy(model: keras.Model) -> None:
    strategy = model.distribute_strategy
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        raise ValueError(
            "Keras cannot train with `fit` over several machines: `MultiWorkerMirroredStrategy` "
            "fails there (keras-team/keras, issue 20585). Received: "
            f"model={model.name!r}, made in the scope of {type(strategy).__name__}. Train "
            "independent chains instead, one a machine or more, with "
            "`snapshot_ensemble.ray.fit_chains`, and on each machine `MirroredStrategy` for "
            "several devices."
        )


def check_fit_arguments(model: keras.Model, arguments: dict[str, Any]) -> None:
    """Checks all that is known before training.

    Raises:
        ValueError: For callbacks that set the learning rate or restore the model, several
            machines or optimizers, and metrics whose names are taken.
        TypeError: For an argument that `model.fit` lacks.
    """
    parameters = inspect.signature(model.fit).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in arguments.items():
        if name not in parameters and not takes_any:
            known = ", ".join(sorted(set(parameters) - {"x", "y", "epochs"}))
            raise TypeError(
                f"`fit` has no argument `{name}`. Received: {name}={value!r}. "
                f"Besides x, y and epochs it takes: {known}"
            )
    check_callbacks(arguments.get("callbacks"))
    _check_strategy(model)
    check_one_optimizer(model)
    check_names(_metric_names(model))


def check_names(names: Iterable[str]) -> None:
    """Raises `ValueError` for metrics whose names are those of columns that `fit` adds."""
    if taken := sorted(OWN_COLUMNS & set(names)):
        raise ValueError(
            "`fit` adds columns of these names to the history, so no metric may have them. "
            f"Received: {', '.join(taken)}. Rename the metric, as in "
            f"`name='my_{taken[0]}'`."
        )


def _metric_names(model: keras.Model) -> list[str]:
    """The names of metrics that are known before training."""
    names = [metric.name for metric in model.metrics]
    compiled = compile_arguments(model)
    # With several outputs, Keras puts the output's name before the metric's.
    if len(getattr(model, "outputs", None) or [None]) == 1:
        given = [compiled.get(name) for name in ("metrics", "weighted_metrics")]
        for metric in keras.tree.flatten(given):
            own = metric if isinstance(metric, str) else getattr(metric, "name", None)
            names.append(str(own or getattr(metric, "__name__", "")))
    return names


def flat_callbacks(callbacks: Any) -> list[keras.callbacks.Callback]:
    """All callbacks as a flat list, from lists and `CallbackList`s at any depth."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = callbacks.callbacks
    elif isinstance(callbacks, keras.callbacks.Callback) or callbacks is None:
        return [callbacks] if callbacks else []
    return [flat for callback in keras.tree.flatten(callbacks) for flat in flat_callbacks(callback)]


def has_validation(arguments: dict[str, Any]) -> bool:
    """Whether `fit` with these arguments has validation data."""
    return arguments.get("validation_data") is not None or bool(arguments.get("validation_split"))


def validation_of(x: Any, y: Any, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The validation data of `fit` as arguments of `choose_members`.

    None if there are none, or if they can be read only once.
    """
    given, split = arguments.get("validation_data"), arguments.get("validation_split") or 0
    if given is None and split:
        given = _last_rows((x, y, arguments.get("sample_weight")), split)
    size = arguments.get("validation_batch_size") or arguments.get("batch_size")
    if isinstance(given, (tuple, list)):
        names = ("x", "y", "sample_weight")
        return {**dict(zip(names, given, strict=False)), "batch_size": size}
    if isinstance(given, (tf.data.Dataset, keras.utils.PyDataset)):
        return {"x": given, "steps": arguments.get("validation_steps")}
    return None


def _last_rows(arrays: Any, share: float) -> Any:
    """The last rows of each array, which Keras holds out for `validation_split`."""
    rows = next(len(array) for array in keras.tree.flatten(arrays) if array is not None)
    first = math.floor(rows * (1.0 - share))
    return keras.tree.map_structure(lambda a: None if a is None else a[first:], arrays)
