"""The optimizers of a model, and the variables that they were built for."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

from snapshot_ensemble.keras_compat.layer_graph import all_layers
from snapshot_ensemble.keras_compat.quiet import warnings_ignored


def optimizers_of(model: keras.Model) -> list[Any]:
    """The model's optimizers; a model with a custom training step may have several."""
    own = [v for v in vars(model).values() if isinstance(v, keras.Optimizer)]
    every = [model.optimizer, *(optimizer for optimizer in own if optimizer is not model.optimizer)]
    # The optimizer inside a `LossScaleOptimizer` comes first: the outer one needs its variables.
    inner = [o.inner_optimizer for o in every if hasattr(o, "inner_optimizer")]
    return [*inner, *every]


def built_for(optimizer: Any) -> list[Any]:
    """The variables that an optimizer was built for."""
    return list(getattr(optimizer, "_trainable_variables", []))


def models_with_optimizers(model: keras.Model) -> list[keras.Model]:
    """The model and the models inside it, as far as they are compiled."""
    inside = [layer for layer in all_layers(model) if isinstance(layer, keras.Model)]
    return [inner for inner in inside if getattr(inner, "optimizer", None) is not None]


def initial_values(optimizer: Any) -> list[Any]:
    """The values that the variables of a built optimizer have before its first step."""
    with warnings_ignored():  # Of functions in a config, which is not read from a file here.
        new = type(optimizer).from_config(optimizer.get_config())
    new.build(built_for(optimizer))
    return [keras.ops.convert_to_numpy(variable.value) for variable in new.variables]


@contextlib.contextmanager
def optimizers_hidden(model: keras.Model) -> Iterator[None]:
    """Hides the optimizers, whose slots Keras would otherwise save with the weights, or expect.

    This includes optimizers of models inside, such as a backbone that was trained before.
    """
    models = models_with_optimizers(model)
    optimizers = [inner.optimizer for inner in models]
    try:
        for inner in models:
            # Bypasses Keras's attribute tracking, which would register the change.
            object.__setattr__(inner, "optimizer", None)
        yield
    finally:
        for inner, optimizer in zip(models, optimizers, strict=True):
            object.__setattr__(inner, "optimizer", optimizer)
