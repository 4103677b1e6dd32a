"""Copies of metrics, each with a state of its own."""

import copy
from typing import Any

import keras
import numpy as np
from keras.src.utils.tracking import Tracker


def copy_of_metric(metric: keras.Metric) -> keras.Metric:
    """A copy of a metric with variables of its own, reset; the metric needs no config.

    What is neither a variable, an array, a metric nor a container is shared with the original,
    such as the functions that the metric calls.
    """
    copied: keras.Metric = _copy(metric, {})
    copied.reset_state()
    return copied


def _copy(value: Any, made: dict[int, Any]) -> Any:
    """A deep copy; `made` has the copies so far, by the `id` of the original."""
    if id(value) in made:
        return made[id(value)]
    if isinstance(value, keras.Variable):
        made[id(value)] = copied = keras.Variable(
            # With a distribution strategy, the value is the sum of the replicas'.
            keras.ops.convert_to_numpy(keras.ops.copy(value.value)),
            dtype=value.dtype,
            trainable=value.trainable,
            aggregation=value.aggregation,
            name=value.name,
        )
        return copied
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, (keras.Metric, Tracker)):
        made[id(value)] = copied = object.__new__(type(value))
        vars(copied).update({name: _copy(item, made) for name, item in vars(value).items()})
        if isinstance(value, Tracker):
            stores = {name: store for name, (_, store) in copied.config.items()}
            copied.stored_ids = {name: {id(v) for v in store} for name, store in stores.items()}
        return copied
    return _copy_of_container(value, made)


def _copy_of_container(value: Any, made: dict[int, Any]) -> Any:
    if type(value) is tuple:
        return tuple(_copy(item, made) for item in value)
    if not isinstance(value, (list, dict, set)):
        return value
    # Keras's containers track what is added to them, so that items are replaced without its help.
    copied: Any = copy.copy(value)
    made[id(value)] = copied
    if hasattr(value, "__dict__"):
        vars(copied).update({name: _copy(item, made) for name, item in vars(value).items()})
    if isinstance(value, list):
        list.__setitem__(copied, slice(None), [_copy(item, made) for item in value])
    elif isinstance(value, dict):
        for key, item in value.items():
            dict.__setitem__(copied, key, _copy(item, made))
    return copied
