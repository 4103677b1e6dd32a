"""The learning rate of a run, set in the training graph."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from snapshot_ensemble.cycles import Cycle, anneal
from snapshot_ensemble.keras_compat.optimizer_rate import (
    assign_unfiltered,
    held_rate,
    put_rate_back,
    rate_holder,
    rate_replaced,
    rate_shown,
    writes_filtered,
)
from snapshot_ensemble.keras_compat.train_step import StepValues, before_each_step
from snapshot_ensemble.training.optimizer_checks import check_one_optimizer
from snapshot_ensemble.training.rate_writers import RateWriters, check_not_replaced


def _at_start(rate: Any) -> float:
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        rate = rate(0)
    elif callable(rate):
        rate = rate()
    return float(ops.convert_to_numpy(rate))


class AnnealedRate:
    """The learning rate of a model's optimizer, set in its training graph.

    The rates of an epoch's steps are computed before it begins. While `installed`, every training
    step first looks its rate up, inside the compiled function. The rate is therefore exact with
    `steps_per_execution`, `jit_compile`, gradient accumulation and loss scaling, whatever
    `optimizer.iterations` is. Python code runs only once per epoch, in `begin_epoch`.

    The optimizer holds a plain variable during training, so that a checkpoint written by another
    callback is one of an ordinary optimizer.
    """

    def __init__(self, model: keras.Model) -> None:
        self.model = model
        self._own: Any = None
        with model.distribute_strategy.scope():
            self._rates = StepValues()

    def begin_epoch(self, cycle: Cycle, epoch: int, steps: Sequence[int] | None) -> None:
        """Sets where in its cycle the next epoch is.

        Args:
            cycle: The cycle.
            epoch: The epoch within the cosine of the cycle, from 0.
            steps: The steps of each epoch of that cosine. If they are not known yet, the whole
                epoch runs at the mean of the rates that it has for it.
        """
        check_not_replaced(held_rate(self._optimizer))
        given = steps or [1000] * cycle.span
        n, warmup = sum(given), sum(given[: cycle.warmup])
        # An epoch with more steps than expected goes on to the rate of its cosine's last step.
        t = np.arange(sum(given[:epoch]), n, dtype="float64")
        rates = anneal(t, n, cycle.lr_max, cycle.lr_min, warmup)
        self._rates.begin(rates if steps else rates[:1000].mean(keepdims=True))

    @property
    def _optimizer(self) -> Any:
        return rate_holder(self.model.optimizer)  # A new `compile` replaces it.

    @property
    def compiled(self) -> float:
        """The learning rate that the model was compiled with, also while another is installed.

        Raises:
            ValueError: If it is not above 0, as at the start of a schedule with warmup, or if the
                model has several optimizers.
        """
        check_one_optimizer(self.model)
        own = held_rate(self.model.optimizer) if self._own is None else self._own
        rate = _at_start(own)
        if not rate > 0:
            shown = (
                f"{rate:.3g}" if isinstance(own, (float, keras.Variable)) else type(own).__name__
            )
            peak = getattr(own, "warmup_target", None) or 0.1
            raise ValueError(
                "The rate that the model was compiled with cannot be the peak of a cycle, since it "
                f"starts at {rate:.3g}. Received: learning_rate={shown}. Pass the peak as "
                f"`lr_init`, such as lr_init={peak}."
            )
        return rate

    @property
    def steps_taken(self) -> int:
        """Steps since `begin_epoch`."""
        return self._rates.taken

    @property
    def last(self) -> float:
        """The learning rate of the latest step."""
        return float(self._optimizer.learning_rate.numpy())

    def _assign(self) -> None:
        check_not_replaced(held_rate(self._optimizer))
        variable = self._optimizer.learning_rate
        assign_unfiltered(variable, ops.cast(self._rates.take(), variable.dtype))

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Makes training use this rate; restores the optimizer's own rate in any case."""
        with self._in_a_variable():
            allows = RateWriters(self.model).allows
            with (
                writes_filtered(self._optimizer.learning_rate, allows),
                before_each_step(self.model, self._assign),
            ):
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
                put_rate_back(optimizer, own)
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
