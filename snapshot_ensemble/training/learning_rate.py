"""The learning rate of a run, computed in the training graph."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from snapshot_ensemble.keras_compat.optimizer_rate import (
    held_rate,
    rate_holder,
    rate_replaced,
    rate_shown,
)
from snapshot_ensemble.keras_compat.train_step import before_each_step
from snapshot_ensemble.schedules import Cycle, anneal


def compiled_rate(model: keras.Model) -> float:
    """The learning rate that the model was compiled with; for a schedule, its rate at step 0."""
    return _at_start(held_rate(model.optimizer))


def _at_start(rate: Any) -> float:
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        rate = rate(0)
    elif callable(rate):
        rate = rate()
    return float(ops.convert_to_numpy(rate))


class AnnealedRate:
    """The learning rate of a model's optimizer, computed in its training graph.

    While `installed`, every training step first sets the optimizer's rate from a step counter and
    then increments the counter, both inside the compiled function. The rate is therefore exact
    with `steps_per_execution`, `jit_compile`, gradient accumulation and loss scaling, whatever
    `optimizer.iterations` is. Python code runs only once per epoch, in `begin_epoch`.

    The optimizer holds a plain variable during training, so that a checkpoint written by another
    callback is one of an ordinary optimizer.
    """

    def __init__(self, model: keras.Model) -> None:
        self.model = model
        self._own: Any = None
        with model.distribute_strategy.scope():
            # The epoch's first step in its cycle, the cycle's length and warmup (in steps), its
            # peak and its floor.
            self._position = _variable(np.zeros(5), "float64")
            self._step = _variable(0, "int64")

    def begin_epoch(self, cycle: Cycle, epoch: int, steps: int | None) -> None:
        """Sets where in its cycle the next epoch is.

        Args:
            cycle: The cycle.
            epoch: The epoch within the cycle, from 0.
            steps: Steps per epoch. If they are not known yet, the whole epoch runs at the mean of
                the rates that the cycle has for it.
        """
        if steps is None:
            mean = cycle.rates(1000)[epoch * 1000 : (epoch + 1) * 1000].mean()
            position = [0, 1, 0, mean, mean]
        else:
            n, warmup = cycle.length * steps, cycle.warmup * steps
            position = [epoch * steps, n, warmup, cycle.lr_max, cycle.lr_min]
        self._position.assign(np.asarray(position, "float64"))
        self._step.assign(0)

    @property
    def _optimizer(self) -> Any:
        return rate_holder(self.model.optimizer)  # A new `compile` replaces it.

    @property
    def compiled(self) -> float:
        """The learning rate that the model was compiled with, also while another is installed."""
        own = self._own
        return compiled_rate(self.model) if own is None else _at_start(own)

    @property
    def steps_taken(self) -> int:
        """Steps since `begin_epoch`."""
        return int(self._step.numpy())

    @property
    def last(self) -> float:
        """The learning rate of the latest step."""
        return float(self._optimizer.learning_rate.numpy())

    def _assign(self) -> None:
        first, n, warmup, lr_max, lr_min = ops.unstack(self._position.value, 5)
        # An epoch with more steps than expected stays at the rate of its cycle's last step.
        t = ops.minimum(first + ops.cast(self._step.value, "float64"), n - 1)
        rate = anneal(t, n, lr_max, lr_min, warmup, xp=ops)
        variable = self._optimizer.learning_rate
        variable.assign(ops.cast(rate, variable.dtype))
        self._step.assign_add(1)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Makes training use this rate; restores the optimizer's own rate in any case."""
        with self._in_a_variable(), before_each_step(self.model, self._assign):
            yield

    @contextlib.contextmanager
    def held(self) -> Iterator[Callable[[float], None]]:
        """Gives the caller a function that sets the rate, instead of setting it in the graph."""
        with self._in_a_variable():
            yield self._optimizer.learning_rate.assign

    @contextlib.contextmanager
    def _in_a_variable(self) -> Iterator[None]:
        """Lets the optimizer hold its rate in a variable, and restores what it held before."""
        optimizer = self._optimizer
        own = held_rate(optimizer)
        is_number = isinstance(own, keras.Variable)
        self._own = float(own.numpy()) if is_number else own
        try:
            if is_number:
                yield
            else:
                with self.model.distribute_strategy.scope():
                    variable = _variable(0.0, keras.config.floatx())
                with rate_replaced(optimizer, variable):
                    yield
        finally:
            if is_number:
                own.assign(self._own)
            self._own = None

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Shows the optimizer's own rate in its config, to copy or save the model as compiled.

        Training, in this or another thread, keeps its rate.
        """
        own = self._own
        with contextlib.nullcontext() if own is None else rate_shown(self._optimizer, own):
            yield


def _variable(value: Any, dtype: str) -> keras.Variable:
    return keras.Variable(
        value, dtype=dtype, trainable=False, aggregation="only_first_replica", name="learning_rate"
    )
