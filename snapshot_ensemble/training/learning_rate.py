"""The learning rate of a run, computed in the training graph."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from snapshot_ensemble.schedules import Cycle, anneal


def innermost(optimizer: Any) -> Any:
    """The optimizer that has the learning rate: a `LossScaleOptimizer` only wraps it."""
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return optimizer


def compiled_rate(model: keras.Model) -> float:
    """The learning rate that the model was compiled with; of a schedule, that of step 0."""
    rate = innermost(model.optimizer)._learning_rate
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        rate = rate(0)
    elif callable(rate):
        rate = rate()
    return float(ops.convert_to_numpy(rate))


class AnnealedRate:
    """The learning rate of a model's optimizer, computed in its training graph.

    While `installed`, every training step first assigns the optimizer's rate from a counter of
    steps that it then raises, both inside the compiled function: exact under
    `steps_per_execution`, `jit_compile`, gradient accumulation and loss scaling, whatever
    `optimizer.iterations` says. Python is asked once an epoch, by `begin_epoch`.

    The optimizer holds a plain variable all the while, so that a checkpoint written in
    mid-training is that of an ordinary optimizer.
    """

    def __init__(self, model: keras.Model) -> None:
        self.model = model
        self._own: Any = None
        with model.distribute_strategy.scope():
            # First step, length and warmup of the cycle in steps; its peak and its floor.
            self._position = _variable(np.zeros(5), "float64")
            self._step = _variable(0, "int64")

    def begin_epoch(self, cycle: Cycle, epoch: int, steps: int | None) -> None:
        """Takes the place of an epoch in its cycle.

        Args:
            cycle: The cycle.
            epoch: The epoch within the cycle, from 0.
            steps: Steps in an epoch. If they are not known yet, the whole epoch runs at the mean
                of the rates that the cycle has for it.
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
        return innermost(self.model.optimizer)  # Another one after a new `compile`.

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
        # An epoch that turns out longer than was known stays at the end of its cycle.
        t = ops.minimum(first + ops.cast(self._step.value, "float64"), n - 1)
        rate = anneal(t, n, lr_max, lr_min, warmup, xp=ops)
        variable = self._optimizer.learning_rate
        variable.assign(ops.cast(rate, variable.dtype))
        self._step.assign_add(1)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Puts the rate into the model, and takes it out again whatever happens."""
        model, step = self.model, self.model.train_step
        overridden = "train_step" in vars(model)

        def train_step(data: Any) -> Any:
            # Not before there is a batch: the last call on data of unknown length finds none.
            with tf.control_dependencies(_tensors(data)):
                self._assign()
            return step(data)

        with self._plain_variable():
            model.train_step = train_step
            model.train_function = None  # It was traced with the other step.
            try:
                yield
            finally:
                if overridden:
                    model.train_step = step
                else:
                    del model.train_step
                model.train_function = None

    @contextlib.contextmanager
    def held(self) -> Iterator[Callable[[float], None]]:
        """Lets the caller set the rate from step to step, instead of the graph."""
        with self._plain_variable():
            yield self._optimizer.learning_rate.assign

    @contextlib.contextmanager
    def _plain_variable(self) -> Iterator[None]:
        """Lets the optimizer hold its rate in a variable, and afterwards what it held before."""
        optimizer = self._optimizer
        own = optimizer._learning_rate
        if isinstance(own, keras.Variable):
            self._own = float(own.numpy())
            try:
                yield
            finally:
                own.assign(self._own)
                self._own = None
            return
        self._own = own
        # The setter refuses a number once there was a schedule. The new variable has the place
        # that it has in an optimizer made with a number, which the order in files depends on.
        with self.model.distribute_strategy.scope():
            optimizer._learning_rate = variable = _variable(0.0, keras.config.floatx())
        variables = optimizer._variables
        variables.insert(1, variables.pop())
        try:
            yield
        finally:
            optimizer._learning_rate = own
            optimizer._untrack_variable(variable)
            self._own = None

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Shows the optimizer's own rate for a moment, for saving the model as it was compiled."""
        if self._own is None:  # Not installed.
            yield
            return
        optimizer, variable, rate = self._optimizer, self._optimizer._learning_rate, self.last
        if isinstance(self._own, float):
            variable.assign(self._own)
        else:
            optimizer._learning_rate = self._own
        try:
            yield
        finally:
            optimizer._learning_rate = variable
            variable.assign(rate)


def _tensors(data: Any) -> list[Any]:
    return [part for part in tf.nest.flatten(data, expand_composites=True) if tf.is_tensor(part)]


def _variable(value: Any, dtype: str) -> keras.Variable:
    return keras.Variable(
        value, dtype=dtype, trainable=False, aggregation="only_first_replica", name="learning_rate"
    )
