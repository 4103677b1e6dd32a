"""The arguments of `model.fit`: what is refused, and what they say of the number of steps."""

import inspect
import math
from typing import Any

import keras
import tensorflow as tf

RATE_SETTERS = (keras.callbacks.LearningRateScheduler, keras.callbacks.ReduceLROnPlateau)


def check_callbacks(callbacks: Any) -> None:
    """Raises `ValueError` if a callback would set the learning rate, which the plan sets."""
    for callback in flat_callbacks(callbacks):
        if isinstance(callback, keras.callbacks.BackupAndRestore):
            raise ValueError(
                "`BackupAndRestore` puts back the model, and not the snapshots nor the place in "
                "the schedule. Received: callbacks with BackupAndRestore. Leave it out, and go on "
                "with a broken run by `fit(..., resume=True)` and a `directory`."
            )
        if isinstance(callback, RATE_SETTERS):
            name = type(callback).__name__
            raise ValueError(
                "The learning rate is set by the ensemble's schedule, so no callback may set it. "
                f"Received: callbacks with {name}. Leave {name} out, or choose the rates by "
                "`schedule`, `lr_init` and `lr_min`."
            )


def check_fit_arguments(model: keras.Model, arguments: dict[str, Any]) -> None:
    """Raises `TypeError` for an argument that `model.fit` does not have; checks the callbacks."""
    parameters = inspect.signature(model.fit).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in arguments.items():
        if name not in parameters and not takes_any:
            known = ", ".join(sorted(set(parameters) - {"x", "y", "epochs"}))
            raise TypeError(
                f"`fit` has no argument `{name}`. Received: {name}={value!r}. "
                f"Beside x, y and epochs it takes: {known}"
            )
    check_callbacks(arguments.get("callbacks"))


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


def is_validated(arguments: dict[str, Any]) -> bool:
    """Whether `fit` with these arguments has validation data."""
    return arguments.get("validation_data") is not None or bool(arguments.get("validation_split"))


def validation_of(x: Any, y: Any, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The validation data of `fit` as arguments of `choose_members`.

    None where there are none, or they can be read only once.
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
    """The last rows of each array, those that Keras takes for `validation_split`."""
    rows = next(len(array) for array in keras.tree.flatten(arrays) if array is not None)
    first = math.floor(rows * (1.0 - share))
    return keras.tree.map_structure(lambda a: None if a is None else a[first:], arrays)
