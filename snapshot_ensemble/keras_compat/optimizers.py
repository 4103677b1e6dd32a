"""The optimizers of a model, and the variables that they were built for."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
from keras.src.saving import saving_lib

from snapshot_ensemble.keras_compat.context_patch import ContextPatch
from snapshot_ensemble.keras_compat.optimizer_rate import copy_of_optimizer

# What a `LossScaleOptimizer` changes at each step.
_SCALING = ("step_counter", "dynamic_scale")


def optimizers_of(model: keras.Model) -> list[Any]:
    """The model's optimizers; a model with a custom training step may have several."""
    own = [o for value in list(vars(model).values()) for o in _optimizers_in(value)]
    # A model inside another one need not be compiled.
    own = [o for o in (getattr(model, "optimizer", None), *own) if o is not None]
    every = list({id(optimizer): optimizer for optimizer in own}.values())
    # The optimizer inside a `LossScaleOptimizer` comes first: the outer one needs its variables.
    inner = [o.inner_optimizer for o in every if hasattr(o, "inner_optimizer")]
    return [*inner, *(o for o in every if not any(o is i for i in inner))]


def _optimizers_in(value: Any, depth: int = 3) -> Iterator[keras.Optimizer]:
    """The optimizers that an attribute holds, also in lists and dicts."""
    if isinstance(value, keras.Optimizer):
        yield value
    elif depth and isinstance(value, (list, tuple, dict)):
        for item in list(value.values() if isinstance(value, dict) else value):
            yield from _optimizers_in(item, depth - 1)


def wraps_others(optimizer: Any) -> bool:
    """Whether an optimizer hands the gradients to others, which have their own rates."""
    # Keras 3.12 has none.
    if isinstance(optimizer, getattr(keras.optimizers, "MultiOptimizer", ())):
        return True
    return any(True for value in list(vars(optimizer).values()) for _ in _optimizers_in(value))


def calls_counted(optimizer: Any) -> tuple[float, ...]:
    """A value that changes whenever gradients are applied.

    `iterations` stands still while gradients are accumulated, and when a `LossScaleOptimizer`
    skips gradients that are not finite.
    """
    counters = (optimizer._iterations, *(getattr(optimizer, name, 0) for name in _SCALING))
    return tuple(float(keras.ops.convert_to_numpy(counter)) for counter in counters)


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
            yield name, _left_without_optimizers(value)


def _left_without_optimizers(value: Any) -> Any:
    """A container without the optimizers in it; other values as they are."""
    if not any(True for _ in _optimizers_in(value)):
        return value
    if isinstance(value, dict):
        value = value.values()  # Keras takes no notice of the keys.
    kept = (item for item in value if not isinstance(item, keras.Optimizer))
    return [_left_without_optimizers(item) for item in kept]


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
