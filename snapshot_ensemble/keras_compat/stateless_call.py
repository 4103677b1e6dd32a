"""A model run with other weights than its own."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from snapshot_ensemble.keras_compat.context_patch import ContextPatch
from snapshot_ensemble.keras_compat.layer_graph import all_layers


def _call_traced_afresh(_: Any, original: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    return original(function._clone(None), *args, **kwargs)


# Left alone, a `tf.function` on a method of a user's layer would keep the weights of the first
# member that it was traced with, for all the others.
_calling_functions = ContextPatch(type(tf.function(lambda: None)), "__call__", _call_traced_afresh)


@contextlib.contextmanager
def _normalizing(model: keras.Model) -> Iterator[None]:
    """Lets `Normalization` layers work with the weights of the scope, which they hold twice."""
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
    """Lets the model run with these weights; its own are not touched.

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
