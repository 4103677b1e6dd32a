"""The learning rate inside an optimizer: a variable, a schedule or a function."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras


def rate_holder(optimizer: Any) -> Any:
    """The optimizer that has the learning rate: a `LossScaleOptimizer` only wraps it."""
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return optimizer


def held_rate(optimizer: Any) -> Any:
    """What an optimizer holds as its rate, not the number that it comes to now."""
    return rate_holder(optimizer)._learning_rate


@contextlib.contextmanager
def rate_replaced(optimizer: Any, variable: keras.Variable) -> Iterator[None]:
    """Lets the optimizer hold a plain variable in place of a schedule or function.

    The setter of `learning_rate` refuses a number once there was a schedule.
    """
    optimizer = rate_holder(optimizer)
    own = optimizer._learning_rate
    optimizer._learning_rate = variable
    # Its place is that in an optimizer made with a number, which the order in files depends on.
    variables = optimizer._variables
    variables.insert(1, variables.pop())
    try:
        yield
    finally:
        optimizer._learning_rate = own
        optimizer._untrack_variable(variable)


@contextlib.contextmanager
def rate_shown(optimizer: Any, rate: Any) -> Iterator[None]:
    """Shows another rate (a schedule, say) in place of the held one, while a model is saved."""
    optimizer = rate_holder(optimizer)
    variable = optimizer._learning_rate
    optimizer._learning_rate = rate
    try:
        yield
    finally:
        optimizer._learning_rate = variable
