"""What a compiled loss says about the output that it is applied to."""

import functools
from typing import Any

import keras

from snapshot_ensemble.losses import GaussianNLL

_LOSSES = {
    "categorical": (
        "categorical_crossentropy",
        "sparse_categorical_crossentropy",
        "categorical_focal_crossentropy",
    ),
    "binary": ("binary_crossentropy", "binary_focal_crossentropy"),
    "regression": (
        "mean_squared_error",
        "mean_absolute_error",
        "mean_absolute_percentage_error",
        "mean_squared_logarithmic_error",
        "huber",
        "log_cosh",
        "poisson",
        "cosine_similarity",
    ),
}
_FAMILY = {
    getattr(keras.losses, name): family
    for family, names in _LOSSES.items()
    for function in names
    for name in (function, "".join(word.title() for word in function.split("_")))
}
_FAMILY[GaussianNLL] = "gaussian"
# Keras chooses one of its cross-entropies by the shapes of the output and the targets.
_BY_SHAPE = ("crossentropy", "ce")


def family_of(loss: Any, units: int | None) -> tuple[str | None, bool | None]:
    """The family of a loss, and its `from_logits`, or None where it says neither.

    Args:
        loss: In any form that `compile` takes for one output.
        units: The size of the output's last axis, if it is known.
    """
    if isinstance(loss, functools.partial):
        family, logits = family_of(loss.func, units)
        return family, loss.keywords.get("from_logits", logits)
    if isinstance(loss, str):
        if loss.lower() in _BY_SHAPE:
            return ("binary" if units == 1 else "categorical"), False
        loss = keras.losses.get(loss)
    if isinstance(loss, type) and issubclass(loss, keras.losses.Loss):
        loss = loss()
    if isinstance(loss, keras.losses.Loss):
        kinds = (_FAMILY[kind] for kind in type(loss).__mro__ if kind in _FAMILY)
        family = next(kinds, None)
        logits = getattr(loss, "from_logits", None)
    else:
        family, logits = _FAMILY.get(loss), None
    if logits is None and family in ("categorical", "binary"):
        logits = False
    return family, None if logits is None else bool(logits)


def is_mean_over_rows(loss: Any) -> bool:
    """Whether it is one of Keras's own losses that are the mean of each row's loss."""
    if isinstance(loss, str) and loss.lower() in _BY_SHAPE:
        return True
    loss = keras.losses.get(loss)
    if not isinstance(loss, keras.losses.Loss):
        return loss in _FAMILY
    # A label that is ignored changes the number of rows that a mean is divided by.
    is_mean = loss.reduction == "sum_over_batch_size"
    return type(loss) in _FAMILY and is_mean and getattr(loss, "ignore_class", None) is None


def per_output(given: Any, outputs: Any, names: list[str] | None) -> list[list[Any]]:
    """What a structure that `compile` accepts holds for each flat output.

    Args:
        given: Losses or loss weights. An output may have several of them, in a list.
        outputs: The structure of outputs, symbolic or not.
        names: The outputs' names, if they have any.

    Returns:
        A list for each flat output; empty if there is nothing, or only `None`, for it.
    """
    flat = keras.tree.flatten(outputs)
    if isinstance(given, dict) and not isinstance(outputs, dict):
        if names is None or len(names) != len(flat):
            return [[] for _ in flat]
        given = [given.get(name) for name in names]
        if len(given) == 1:
            [given] = given
    return _spread(given, outputs)


def _spread(given: Any, outputs: Any) -> list[list[Any]]:
    """As Keras does it, from the outermost structure inwards."""
    flat = keras.tree.flatten(outputs)
    if isinstance(given, dict):
        parts = outputs if isinstance(outputs, dict) else {}
        # `keras.tree` sorts the keys of dicts.
        return [one for key in sorted(parts) for one in _spread(given.get(key), parts[key])]
    if not isinstance(given, (list, tuple)):
        return [[] if given is None else [given] for _ in flat]
    if len(given) == len(flat) and not any(map(keras.tree.is_nested, given)):
        return [one for leaf in given for one in _spread(leaf, None)]
    if isinstance(outputs, (list, tuple)):
        if len(given) != len(outputs):
            return [[] for _ in flat]
        return [one for pair in zip(given, outputs, strict=True) for one in _spread(*pair)]
    # Several losses of one output, or of all.
    several = [_spread(one, outputs) for one in given]
    return [
        [leaf for leaves in of_output for leaf in leaves]
        for of_output in zip(*several, strict=True)
    ]
