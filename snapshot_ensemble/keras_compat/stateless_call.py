"""Runs a model with weights other than its own."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from snapshot_ensemble.keras_compat.context_patch import ContextPatch
from snapshot_ensemble.keras_compat.layer_graph import all_layers


def _call_retraced(_: Any, original: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    return original(function._clone(None), *args, **kwargs)


# Without retracing, a `tf.function` on a method of a user's layer would use the weights of the
# first member for all others.
_calling_functions = ContextPatch(type(tf.function(lambda: None)), "__call__", _call_retraced)


@contextlib.contextmanager
def _normalizing(model: keras.Model) -> Iterator[None]:
    """Makes `Normalization` layers use the weights of the scope instead of their copies."""
    layers = [x for x in all_layers(model) if isinstance(x, keras.layers.Normalization)]
    own = [(layer.mean, layer.variance) for layer in layers]
    try:
        for layer in layers:
            layer.finalize_state()
        yield
    finally:
        for layer, (mean, variance) in zip(layers, own, strict=True):
            layer.mean, layer.variance = mean, variance


@contextlib.contextmanager
def with_weights(model: keras.Model, weights: Sequence[Any]) -> Iterator[None]:
    """Makes the model run with these weights, without changing its own.

    Args:
        model: A built model of any kind.
        weights: Arrays, tensors or variables, in the order of `model.weights`.
    """
    mapping = list(zip(model.weights, weights, strict=True))
    with (
        keras.StatelessScope(state_mapping=mapping),
        _calling_functions.active(True),
        _normalizing(model),
    ):
        yield
