"""The training step that Keras compiles, and the function that it is compiled into."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

# How many batches may be held in memory at once.
_MOST_BATCHES = 8


@contextlib.contextmanager
def before_each_step(model: keras.Model, action: Callable[[], None]) -> Iterator[None]:
    """Runs `action` inside the compiled training function, at the start of each step."""
    step = model.train_step
    overridden = "train_step" in vars(model)

    def train_step(data: Any) -> Any:
        with only_with(data):
            action()
        return step(data)

    model.train_step = train_step
    model.train_function = None  # The old function was traced without `action`.
    try:
        yield
    finally:
        if overridden:
            model.train_step = step
        else:
            del model.train_step
        model.train_function = None


@contextlib.contextmanager
def only_with(data: Any) -> Iterator[None]:
    """Operations inside the context run only if there is a batch.

    With data of unknown length, the last call of a compiled function gets none. Operations that
    need nothing of it, such as counting a step, would still run.
    """

    def create(creator: Callable[..., Any], **arguments: Any) -> Any:
        # Metrics make their variables at the first batch. XLA refuses those that depend on it.
        with tf.control_dependencies(None):
            return creator(**arguments)

    with tf.control_dependencies(_tensors(data)), tf.variable_creator_scope(create):
        yield


def _tensors(data: Any) -> list[Any]:
    return [part for part in tf.nest.flatten(data, expand_composites=True) if tf.is_tensor(part)]


def is_traced() -> bool:
    """Whether the running code is being made into a graph, as a training step is."""
    return bool(tf.inside_function())


@contextlib.contextmanager
def next_fit_noticed(model: keras.Model, action: Callable[[], None]) -> Iterator[None]:
    """Runs `action` when the next `fit` of this model begins, before it builds its function."""
    make_train_function = model.make_train_function

    def make(force: bool = False) -> Any:
        if not force:
            action()
        return make_train_function(force=force)

    # Bypasses Keras's attribute tracking, which would register the change.
    object.__setattr__(model, "make_train_function", make)
    try:
        yield
    finally:
        vars(model).pop("make_train_function", None)


def remake_train_function(model: keras.Model) -> None:
    """Retraces the training step during `fit`; Keras itself builds it only at the start."""
    type(model).make_train_function(model, force=True)


def notice_first_batch(model: keras.Model, action: Callable[[Any], None]) -> None:
    """Hands the next batch that `fit` trains on to `action`; called once `fit` has begun.

    No additional batch is read: the first call of the training function gets an iterator over the
    batches that it was about to take, which have been taken for it. With a distribution strategy,
    with many steps per execution, and for data that such an iterator cannot hold, `action` is not
    called.
    """
    train = model.train_function
    count = int(model.steps_per_execution)

    def train_on_first(iterator: Any) -> Any:
        model.train_function = train
        taken: list[Any] = []
        again = _iterator_over(taken, iterator)
        if again is None:
            return train(iterator)
        taken.extend(itertools.islice(iterator, count))
        if taken:
            action(taken[0])
        return train(again)

    if train is not None and count <= _MOST_BATCHES:
        model.train_function = train_on_first


def _iterator_over(batches: list[Any], like: Any) -> Any:
    """An iterator of the same type as another one; None if there cannot be one.

    The type must be the same, since the training function would be traced again for another one.
    """
    if type(like) is not type(iter(tf.data.Dataset.range(0))):
        return None
    try:
        dataset = tf.data.Dataset.from_generator(
            lambda: iter(batches), output_signature=like.element_spec
        )
        return iter(dataset)
    except (TypeError, ValueError):
        return None


class StepValues:
    """A list of numbers, of which each training step takes the next one.

    A step only looks its number up and counts itself. Must be created in the scope of the model's
    distribution strategy.
    """

    def __init__(self) -> None:
        # Keras's own variables cannot change their shape.
        self._values = tf.Variable(
            np.zeros(1),
            trainable=False,
            shape=tf.TensorShape([None]),
            dtype="float64",
            name="step_values",
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )
        self._last = _counter("last_step")
        self._step = _counter("step")

    def begin(self, values: Sequence[float] | np.ndarray) -> None:
        """Sets the numbers of the next steps. Further steps get the last one again."""
        self._values.assign(np.asarray(values, "float64"))
        self._last.assign(len(values) - 1)
        self._step.assign(0)

    def take(self) -> tf.Tensor:
        """The number of this step, a float64 scalar; inside a graph or not."""
        step = self._step.read_value()
        value = tf.gather(self._values, tf.minimum(step, self._last))
        with tf.control_dependencies([value]):
            self._step.assign_add(1, read_value=False)
        return value

    @property
    def taken(self) -> int:
        """How many steps have taken a number since `begin`."""
        return int(self._step.numpy())


def _counter(name: str) -> tf.Variable:
    return tf.Variable(
        0,
        trainable=False,
        dtype="int64",
        name=name,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )
