"""The learning rate inside an optimizer: a variable, a schedule or a function."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

from snapshot_ensemble.keras_compat.context_patch import ContextPatch
from snapshot_ensemble.keras_compat.twins import twin_of


def rate_holder(optimizer: Any) -> Any:
    """The optimizer that has the learning rate, inside any `LossScaleOptimizer`."""
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return optimizer


def held_rate(optimizer: Any) -> Any:
    """The variable, schedule or function that an optimizer holds as its rate, not its value."""
    return rate_holder(optimizer)._learning_rate


@contextlib.contextmanager
def rate_replaced(optimizer: Any, variable: keras.Variable) -> Iterator[None]:
    """Lets the optimizer hold a plain variable in place of a schedule or function.

    The setter of `learning_rate` refuses a number if the optimizer has a schedule.
    """
    optimizer = rate_holder(optimizer)
    own = optimizer._learning_rate
    optimizer._learning_rate = variable
    # Second, as in an optimizer created with a number: files depend on this order.
    variables = optimizer._variables
    variables.insert(1, variables.pop())
    try:
        yield
    finally:
        optimizer._learning_rate = own
        optimizer._untrack_variable(variable)


def _config_with_rate(shown: Any, original: Any, optimizer: Any) -> Any:
    holder, rate = shown
    if optimizer is not holder:
        return original(optimizer)
    config = original(twin_of(optimizer, _learning_rate=rate))
    return {**config, "learning_rate": rate} if isinstance(rate, float) else config


_describing = ContextPatch(keras.Optimizer, "get_config", _config_with_rate)


@contextlib.contextmanager
def rate_shown(optimizer: Any, rate: Any) -> Iterator[None]:
    """Gives an optimizer's config another rate: a float, a schedule or a function.

    Only in the caller's context: another thread may be training with the optimizer's own rate.
    """
    with _describing.active((rate_holder(optimizer), rate)):
        yield


def copy_of_optimizer(optimizer: keras.Optimizer) -> keras.Optimizer:
    """A new optimizer with the same settings; the original if it has no usable config."""
    holder, rate = _describing.value or (optimizer, rate_holder(optimizer)._learning_rate)
    schedule = keras.optimizers.schedules.LearningRateSchedule
    is_function = callable(rate) and not isinstance(rate, (keras.Variable, schedule))
    try:
        if holder is not optimizer or not is_function:
            return type(optimizer).from_config(optimizer.get_config())
        # A function is handed over as it is: Keras warns if it has to describe a lambda.
        with rate_shown(optimizer, 0.0):
            config = optimizer.get_config()
        return type(optimizer).from_config({**config, "learning_rate": rate})
    except Exception:
        return optimizer
