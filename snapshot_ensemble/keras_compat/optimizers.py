"""The optimizers of a model, and the variables that they were built for."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

from snapshot_ensemble.keras_compat.layer_graph import all_layers


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


def built_twin(optimizer: Any, variables: list[Any]) -> Any:
    """A copy of an optimizer, built for these variables; None if it cannot be copied."""
    try:
        twin = type(optimizer).from_config(optimizer.get_config())
        twin.build(variables)
    except Exception:  # A user's own class may raise anything.
        return None
    return twin


@contextlib.contextmanager
def optimizers_hidden(model: keras.Model) -> Iterator[None]:
    """Hides the optimizers, whose slots Keras would otherwise save with the weights, or expect.

    This includes optimizers of models inside, such as a backbone that was trained before.
    """
    inside = [layer for layer in all_layers(model) if isinstance(layer, keras.Model)]
    models = [inner for inner in inside if getattr(inner, "optimizer", None) is not None]
    optimizers = [inner.optimizer for inner in models]
    try:
        for inner in models:
            # Bypasses Keras's attribute tracking, which would register the change.
            object.__setattr__(inner, "optimizer", None)
        yield
    finally:
        for inner, optimizer in zip(models, optimizers, strict=True):
            object.__setattr__(inner, "optimizer", optimizer)
