"""The training step that Keras compiles, and the function that it is compiled into."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf


@contextlib.contextmanager
def before_each_step(model: keras.Model, action: Callable[[], None]) -> Iterator[None]:
    """Runs `action` inside the compiled training function, at the start of each step."""
    step = model.train_step
    overridden = "train_step" in vars(model)

    def train_step(data: Any) -> Any:
        # Only if there is a batch: with data of unknown length, the last call gets none.
        with tf.control_dependencies(_tensors(data)):
            action()
        return step(data)

    model.train_step = train_step
    model.train_function = None  # The old function was traced without `action`.
    try:
        yield
    finally:
        if overridden:
            model.train_step = step
        else:
            del model.train_step
        model.train_function = None


def _tensors(data: Any) -> list[Any]:
    return [part for part in tf.nest.flatten(data, expand_composites=True) if tf.is_tensor(part)]


@contextlib.contextmanager
def next_fit_noticed(model: keras.Model, action: Callable[[], None]) -> Iterator[None]:
    """Runs `action` when the next `fit` of this model begins, before it builds its function."""
    make_train_function = model.make_train_function

    def make(force: bool = False) -> Any:
        if not force:
            action()
        return make_train_function(force=force)

    # Bypasses Keras's attribute tracking, which would register the change.
    object.__setattr__(model, "make_train_function", make)
    try:
        yield
    finally:
        vars(model).pop("make_train_function", None)


def remake_train_function(model: keras.Model) -> None:
    """Retraces the training step during `fit`; Keras itself builds it only at the start."""
    type(model).make_train_function(model, force=True)
