"""Runs a model with weights other than its own."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from snapshot_ensemble.keras_compat.context_patch import ContextPatch
from snapshot_ensemble.keras_compat.layer_graph import all_layers
from snapshot_ensemble.keras_compat.twins import twin_of, twins_called


def _call_retraced(_: Any, original: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    return original(function._clone(None), *args, **kwargs)


# Without retracing, a `tf.function` on a method of a user's layer would use the weights of the
# first member for all others.
_calling_functions = ContextPatch(type(tf.function(lambda: None)), "__call__", _call_retraced)

# The outermost call of a layer clears the losses that it and all layers inside it have collected.
# Another thread may be training with them. Inside a scope, Keras collects none.
_clearing_losses = ContextPatch(
    keras.layers.Layer, "_clear_losses", lambda _value, _original, _layer: None
)
_adding_losses = ContextPatch(
    keras.layers.Layer, "add_loss", lambda _value, _original, _layer, _loss: None
)
_finalizing = ContextPatch(
    keras.layers.Normalization, "finalize_state", lambda _value, _original, _layer: None
)


def _normalizing(model: keras.Model) -> dict[int, Any]:
    """Twins of `Normalization` layers, with the weights of the scope instead of their copies."""
    layers = [x for x in all_layers(model) if isinstance(x, keras.layers.Normalization)]
    twins = {id(layer): twin_of(layer) for layer in layers}
    for twin in twins.values():
        twin.finalize_state()
    return twins


@contextlib.contextmanager
def weights_shown(model: keras.Model, weights: Sequence[Any]) -> Iterator[None]:
    """Makes the model read and save as if it had these weights; only in the caller's context.

    Args:
        model: A built model of any kind.
        weights: Arrays, tensors or variables, in the order of `model.weights`.
    """
    with keras.StatelessScope(state_mapping=list(zip(model.weights, weights, strict=True))):
        yield


@contextlib.contextmanager
def assignments_kept_apart() -> Iterator[None]:
    """Values that are assigned inside the context are seen only there, and forgotten afterwards.

    A model can thus read a file while another thread trains it.
    """
    with keras.StatelessScope(), _finalizing.active(True):
        yield


@contextlib.contextmanager
def losses_left_alone() -> Iterator[None]:
    """Calls of layers inside the context neither add losses to the layers nor clear them.

    Another thread may be training with the losses.
    """
    with _clearing_losses.active(True), _adding_losses.active(True):
        yield


@contextlib.contextmanager
def with_weights(model: keras.Model, weights: Sequence[Any]) -> Iterator[None]:
    """Makes the model run with these weights, without changing its own.

    Args:
        model: A built model of any kind.
        weights: Arrays, tensors or variables, in the order of `model.weights`.
    """
    with (
        weights_shown(model, weights),
        _calling_functions.active(True),
        _clearing_losses.active(True),
        twins_called(_normalizing(model)),
    ):
        yield
