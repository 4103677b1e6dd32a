"""What the scores of combined outputs leave out of those of a single member."""

import contextlib
import warnings
import weakref
from collections.abc import Iterator

import keras

from snapshot_ensemble.keras_compat.added_losses import added_losses_noticed, has_weight_penalties
from snapshot_ensemble.keras_compat.own_methods import (
    has_own,
    has_own_or_assigned,
    traced_predict_step,
)

_METHODS = ("test_step", "compute_loss", "compute_metrics")
# Models whose layers add losses. This shows only when a graph is traced.
_adds_losses: weakref.WeakSet[keras.Model] = weakref.WeakSet()


@contextlib.contextmanager
def watched(model: keras.Model) -> Iterator[None]:
    """Notices whether the model's layers add losses while its members run inside the block."""
    with added_losses_noticed(lambda _: _adds_losses.add(model)):
        yield


def left_out(model: keras.Model) -> str | None:
    """A sentence on what belongs to single members alone; None if there is nothing."""
    parts = [f"its own `{name}`" for name in _METHODS if has_own(model, name)]
    if has_weight_penalties(model):
        parts.append("the penalties on its weights (regularizers)")
    if model in _adds_losses:
        parts.append("the losses that its layers add (`add_loss`, activity regularizers)")
    if not parts:
        return None
    return (
        "The scores are the compiled loss and metrics of the predictions alone. They leave out "
        f"what belongs to a single model: {', '.join(parts)}. Use `ens[k].evaluate` for a "
        "member's scores with them."
    )


def why_not_compiled(model: keras.Model) -> str | None:
    """Why the compiled loss cannot be computed of combined predictions; None if it can."""
    if model.loss is None:
        return "the model was compiled without a loss"
    if has_own_or_assigned(model, "evaluate"):
        return "the model has its own `evaluate`"
    if has_own(model, "predict_step"):
        traced = traced_predict_step(model)
        if traced is None or not (traced.adds_nothing and traced.prepares_nothing):
            return "the model's own `predict_step` is not what its loss is computed of"
    return None


def check_evaluates(model: keras.Model) -> None:
    """Raises `ValueError` if `evaluate` would be wrong."""
    if (why := why_not_compiled(model)) is not None:
        raise ValueError(
            f"The combined outputs cannot be evaluated, since {why}. Received: "
            f"model={model.name!r} of class {type(model).__name__}. Use `ens[k].evaluate` for a "
            "member, or compute your scores from `ens.predict`."
        )


def warn_of_left_out(model: keras.Model) -> None:
    """Warns of what `evaluate` has left out."""
    if (sentence := left_out(model)) is not None:
        warnings.warn(sentence, stacklevel=4)
