"""Batch normalisation: finding the layers, and recording the statistics of each batch."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import ops

from snapshot_ensemble.keras_compat.layer_graph import all_layers
from snapshot_ensemble.keras_compat.twins import twin_of, twins_called

STATISTICS = ("count", "mean", "variance")


def normalizing_layers(model: keras.Model) -> list[Any]:
    """The layers with moving batch statistics, except frozen ones."""
    needed = ("moving_mean", "moving_variance", "momentum")
    layers = [layer for layer in all_layers(model) if layer.trainable]
    return [layer for layer in layers if all(hasattr(layer, name) for name in needed)]


@contextlib.contextmanager
def recorded_by_batch(layers: Sequence[Any]) -> Iterator[list[list[dict[str, Any]]]]:
    """Makes these layers, and no others, work as in training, and records their statistics.

    Twins with momentum 0 are called instead of them, so that the scope they run in holds the
    statistics of the last batch only. Yields a list for each layer, to which each call adds a dict
    with the statistics and the number of items.
    """
    calls: list[list[dict[str, Any]]] = [[] for _ in layers]
    twins = {}
    for layer, seen in zip(layers, calls, strict=True):
        twins[id(layer)] = twin = twin_of(layer, momentum=0.0)
        vars(twin)["call"] = _in_training(twin, seen)
    with twins_called(twins):
        yield calls


def _in_training(layer: Any, seen: list[dict[str, Any]]) -> Callable[..., Any]:
    call = layer.call

    def call_in_training(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = call(inputs, *args, **{**kwargs, "training": True})
        kept = layer.moving_mean.value, layer.moving_variance.value
        mask = kwargs.get("mask")
        if mask is None:
            count = ops.cast(ops.size(inputs), "float64") / kept[0].shape[0]
        else:
            count = ops.sum(ops.cast(mask, "float64"))
        seen.append(dict(zip(STATISTICS, (count, *kept), strict=True)))
        return outputs

    return call_in_training
