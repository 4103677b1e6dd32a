"""Losses that layers add while they run, and penalties on weights."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras

from snapshot_ensemble.keras_compat.context_patch import ContextPatch


def _add_loss(notice: Callable[[Any], None], original: Any, layer: Any, loss: Any) -> Any:
    notice(loss)
    return original(layer, loss)


_adding = ContextPatch(keras.layers.Layer, "add_loss", _add_loss)


@contextlib.contextmanager
def added_losses_noticed(notice: Callable[[Any], None]) -> Iterator[None]:
    """Calls `notice` with each loss that a layer adds, by `add_loss` or an activity regularizer.

    If the layer runs in a graph, that is when the graph is traced.
    """
    with _adding.active(notice):
        yield


def has_weight_penalties(model: keras.Model) -> bool:
    """Whether Keras adds the penalty of a regularizer of a weight to the model's loss."""
    variables = model.trainable_variables
    return any(getattr(variable, "regularizer", None) is not None for variable in variables)


def sum_of_added_losses(model: keras.Model) -> Any:
    """What Keras adds to the compiled loss: penalties, and the losses that layers added."""
    losses = [model._aggregate_additional_loss(loss) for loss in model.losses]
    return keras.ops.sum(keras.ops.stack(losses)) if losses else keras.ops.zeros(())
