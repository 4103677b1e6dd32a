"""The optimizers of a model, and the variables that they were built for."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
from keras.src.saving import saving_lib

from snapshot_ensemble.keras_compat.context_patch import ContextPatch
from snapshot_ensemble.keras_compat.optimizer_rate import copy_of_optimizer


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
        twin = copy_of_optimizer(optimizer)
        if twin is optimizer:
            return None
        twin.build(variables)
    except Exception:  # A user's own class may raise anything.
        return None
    return twin


def initial_values(optimizer: Any) -> list[Any]:
    """The values that the variables of a built optimizer have before its first step."""
    new = type(optimizer).from_config(optimizer.get_config())
    new.build(built_for(optimizer))
    return [keras.ops.convert_to_numpy(variable.value) for variable in new.variables]


def _without_optimizers(_: Any, original: Any, saveable: Any) -> Iterator[tuple[str, Any]]:
    for name, value in original(saveable):
        if not isinstance(value, keras.Optimizer):
            yield name, value


_walking = ContextPatch(saving_lib, "_walk_saveable", _without_optimizers)


@contextlib.contextmanager
def optimizers_hidden() -> Iterator[None]:
    """Hides the optimizers of models, whose slots Keras would otherwise save, load or expect.

    This includes optimizers of models inside, such as a backbone that was trained before, and
    others that a model with a training step of its own has. They stay in their models: another
    thread may be training with them.
    """
    with _walking.active(True):
        yield
