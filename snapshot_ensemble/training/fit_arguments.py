"""The arguments of `model.fit`: checks, the number of steps, and the validation data."""

import inspect
import math
from typing import Any

import keras
import tensorflow as tf

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


def check_fit_arguments(model: keras.Model, arguments: dict[str, Any]) -> None:
    """Checks the callbacks, and raises `TypeError` for an argument that `model.fit` lacks."""
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


def steps_in_epoch(model: keras.Model, x: Any, arguments: dict[str, Any], steps: int) -> int:
    """The number of steps that Keras actually takes in an epoch of nominally `steps`.

    With `steps_per_epoch` it always runs whole executions of `steps_per_execution` steps, as long
    as there are data: 16 steps at 7 per execution become 21.
    """
    size = model.steps_per_execution
    if arguments.get("steps_per_epoch") is None or steps % size == 0:
        return steps
    rounded = -(-steps // size) * size
    split = arguments.get("validation_split") if arguments.get("validation_data") is None else 0
    held = _batches(x, arguments.get("batch_size"), split or 0)
    return rounded if held is None else min(rounded, held)


def _batches(x: Any, batch_size: int | None, split: float) -> int | None:
    """Number of batches in one pass over `x`; None if unknown or infinite."""
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
