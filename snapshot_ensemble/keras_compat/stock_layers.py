"""Distinguishes Keras's own classes from users' subclasses."""

from typing import Any

import keras


def is_stock_layer(operation: Any) -> bool:
    """Whether it is an instance of one of Keras's own layer classes."""
    return isinstance(operation, keras.layers.Layer) and type(operation).__module__.startswith(
        "keras.src.layers."
    )


def is_stock_activation(function: Any) -> bool:
    """Whether it is one of the functions of `keras.activations`."""
    return getattr(function, "__module__", None) == "keras.src.activations.activations" and (
        callable(function) and hasattr(function, "__qualname__")
    )


def is_stock_metric(metric: Any) -> bool:
    """Whether it is one of Keras's own metrics, which are all sums over rows, or its name."""
    if isinstance(metric, str):
        return metric not in keras.saving.get_custom_objects()
    # This one wraps any function.
    is_wrapper = type(metric) is keras.metrics.MeanMetricWrapper
    return type(metric).__module__.startswith("keras.src.metrics.") and not is_wrapper


def is_stock_callback(callback: Any) -> bool:
    """Whether it is an instance of one of Keras's own callback classes."""
    return type(callback).__module__.startswith("keras.")


def has_own_predict_step(model: keras.Model) -> bool:
    """Whether a model overrides `predict_step`."""
    return type(model).predict_step is not keras.Model.predict_step


def has_own_train_step(model: keras.Model) -> bool:
    """Whether a model overrides what applies its gradients."""
    names = ("train_step", "make_train_function")
    stock = all(getattr(type(model), name) is getattr(keras.Model, name) for name in names)
    return not stock or any(name in vars(model) for name in names)
