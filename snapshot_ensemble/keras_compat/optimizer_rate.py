"""The learning rate inside an optimizer: a variable, a schedule or a function."""

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
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
    _hold(optimizer, variable)
    try:
        yield
    finally:
        optimizer._learning_rate = own
        with _moving(optimizer._variables):
            optimizer._untrack_variable(variable)


def put_rate_back(optimizer: Any, variable: keras.Variable) -> None:
    """Gives an optimizer its variable back where a schedule or function has replaced it."""
    optimizer = rate_holder(optimizer)
    if optimizer._learning_rate is not variable:
        _hold(optimizer, variable)


def _hold(optimizer: Any, variable: keras.Variable) -> None:
    optimizer._learning_rate = variable
    # Second, as in an optimizer created with a number: files depend on this order.
    with _moving(optimizer._variables) as variables:
        variables.insert(1, variables.pop())


@contextlib.contextmanager
def _moving(variables: Any) -> Iterator[Any]:
    """Lets items of a list be moved or removed as if they had been appended in their new order.

    TensorFlow otherwise never again saves a model whose optimizer has this list.
    """
    was_moved = variables._non_append_mutation
    yield variables
    variables._non_append_mutation = was_moved
    variables._update_snapshot()


@contextlib.contextmanager
def writes_filtered(variable: keras.Variable, allows: Callable[[], bool]) -> Iterator[None]:
    """Asks `allows` before each `variable.assign`, and leaves it out if that returns False.

    The setter of `optimizer.learning_rate`, `assign_add` and `assign_sub` call it, too.
    """

    def assign(value: Any) -> Any:
        return keras.Variable.assign(variable, value) if allows() else variable.value

    variable.assign = assign
    try:
        yield
    finally:
        vars(variable).pop("assign", None)


def assign_unfiltered(variable: keras.Variable, value: Any) -> None:
    """Assigns a value also where writes are filtered."""
    keras.Variable.assign(variable, value)


def calling_callback() -> Any:
    """The callback whose code is running, or that Keras has called; None if there is none."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        # A function given to a `LambdaCallback` has no `self`, but the list that calls it does.
        for name in ("self", "callback"):
            found = frame.f_locals.get(name)
            is_list = isinstance(found, keras.callbacks.CallbackList)
            if isinstance(found, keras.callbacks.Callback) and not is_list:
                return found
        frame = frame.f_back
    return None


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
