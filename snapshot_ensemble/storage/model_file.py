"""The `.keras` file of a model, loaded again when it was written to see whether it is right.

A file holds a model's configuration and what its layers save. Whatever is neither, such as a
constant that a layer draws in its constructor, is lost.
"""

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import keras

from snapshot_ensemble.keras_compat.layer_graph import all_layers
from snapshot_ensemble.keras_compat.optimizers import optimizers_hidden
from snapshot_ensemble.keras_compat.random_seed import generators_restored, seeds_drawn_apart
from snapshot_ensemble.keras_compat.stateless_call import scopes_left
from snapshot_ensemble.storage.file_headers import check_weight_file
from snapshot_ensemble.storage.snapshot import SnapshotError, Weights
from snapshot_ensemble.storage.weight_delta import same
from snapshot_ensemble.storage.weight_files import get_weights, set_weights

# Takes the model, the weights of a member, and a model that was made from a file and has them.
ComputesTheSame = Callable[[keras.Model, Weights, keras.Model], bool]

OTHER_OUTPUTS = (
    "when it was saved, it was loaded again and did not give the model's outputs, because "
    "something of the model is neither in its config nor in its weights."
)


def load_model(
    path: str | os.PathLike[str],
    custom_objects: dict[str, Any] | None = None,
    *,
    compile: bool = True,
) -> keras.Model:
    """Loads a model, with new optimizer slots.

    Raises:
        SnapshotError: If it cannot be loaded; the message begins with what can be done.
    """
    try:
        check_weight_file(path)
        # The file holds no optimizer slots.
        with optimizers_hidden(), seeds_drawn_apart():
            return keras.models.load_model(path, custom_objects, compile=compile, safe_mode=True)
    except Exception as error:
        raise SnapshotError(_explained(path, str(error))) from error


def _explained(path: str | os.PathLike[str], error: str) -> str:
    missing = re.search(r"Could not locate (class|function) '([^']+)'", error)
    if missing is None:
        return (
            f"'{path}' cannot be loaded: {error}\nIf it uses classes or functions of your own, "
            "pass them as `custom_objects=`, or the model itself as `model=`."
        )
    kind, name = missing.groups()
    return (
        f"{kind.capitalize()} {name!r} is not known. Pass `custom_objects={{{name!r}: {name}}}`, "
        f"or the model itself as `model=`. Received: '{path}', which cannot be loaded without."
    )


def fault_of(
    model: keras.Model,
    path: str | os.PathLike[str],
    weights: Weights,
    computes_the_same: ComputesTheSame,
) -> tuple[str, bool | None]:
    """Loads the file of a model that was just written, and compares the two.

    Neither the model nor the random generators change.

    Args:
        model: The model.
        path: The file.
        weights: The weights that the model had when it was saved.
        computes_the_same: Compares the outputs.

    Returns:
        Why the file cannot stand for the model, as a sentence, empty if it can; and True if the
        file gives the weights back bit for bit, None if that is not known.
    """
    with scopes_left(), generators_restored():
        try:
            loaded = load_model(path, custom_objects_of(model), compile=False)
        except SnapshotError as error:
            cause = f"{type(error.__cause__).__name__}: {str(error.__cause__).strip()}"
            why = cause.splitlines()[0][:300].rstrip(".")
            return f"when it was saved, it could not be loaded again: {why}.", None
        read = get_weights(loaded)
        is_exact = len(read) == len(weights) and all(map(same, read, weights))
        try:
            if not is_exact:
                set_weights(loaded, weights)
            is_right = computes_the_same(model, weights, loaded)
        except ValueError:  # It has other variables.
            is_right = False
    if is_right:
        return "", is_exact or None
    return OTHER_OUTPUTS, is_exact or None


def custom_objects_of(model: keras.Model) -> dict[str, Any]:
    """The classes and functions of the user's that the layers of a model hold, by name."""
    found: dict[str, Any] = {}
    for layer in all_layers(model):
        for value in _values(layer):
            custom = value if callable(value) and hasattr(value, "__name__") else type(value)
            if not str(custom.__module__).startswith(("keras.", "builtins", "tensorflow.")):
                found.setdefault(custom.__name__, custom)
    return found


def _values(layer: Any) -> Iterator[Any]:
    yield layer
    for value in vars(layer).values():
        yield value
        if isinstance(value, dict):
            yield from value.values()
        elif isinstance(value, (list, tuple)):
            yield from value
