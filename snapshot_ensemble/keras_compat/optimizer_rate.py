"""The learning rate inside an optimizer: a variable, a schedule or a function."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras


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


@contextlib.contextmanager
def rate_shown(optimizer: Any, rate: Any) -> Iterator[None]:
    """Lets an optimizer hold another rate, such as a schedule, while a model is saved."""
    optimizer = rate_holder(optimizer)
    variable = optimizer._learning_rate
    optimizer._learning_rate = rate
    try:
        yield
    finally:
        optimizer._learning_rate = variable
