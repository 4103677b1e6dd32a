"""What only a TensorFlow graph needs: loops, assertions, and calls of NumPy while it runs."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

# What a graph raises if an assertion in it does not hold.
AssertionInGraphError = tf.errors.InvalidArgumentError

# Within it, tensors and variables can be made that outlive the graph being traced.
outside_graphs = tf.init_scope


def in_graph(function: Callable[..., Any]) -> Any:
    """The function compiled into a graph, which batches of other sizes share."""
    return tf.function(function, autograph=False, reduce_retracing=True)


def loop(condition: Callable[[Any], Any], step: Callable[[Any], Any], start: int) -> None:
    """Runs `step`, which takes a number and returns the next, one after another."""
    tf.while_loop(condition, lambda number: [step(number)], [start], parallel_iterations=1)


def in_batches(function: Callable[[Any], Any], inputs: Any, rows: int) -> Any:
    """What a function of a batch returns for all rows, of which it gets some at a time.

    Args:
        function: Takes and returns structures of tensors with rows on their first axes.
        inputs: At least one row, inside a graph.
        rows: The most rows in a batch.
    """
    flat = keras.tree.flatten(inputs)
    structure: list[Any] = []

    def of_batch(*tensors: Any) -> Any:
        outputs = function(keras.tree.pack_sequence_as(inputs, tensors))
        structure[:] = [outputs]
        return keras.tree.flatten(outputs)

    specs = [tf.TensorSpec([None, *tensor.shape[1:]], tensor.dtype) for tensor in flat]
    traced = tf.function(of_batch, autograph=False).get_concrete_function(*specs)
    total = tf.shape(flat[0])[0]

    def step(number: Any, results: Any) -> Any:
        batch = [tensor[number * rows : (number + 1) * rows] for tensor in flat]
        written = zip(results, traced(*batch), strict=True)
        return number + 1, [result.write(number, output) for result, output in written]

    empty = [
        tf.TensorArray(
            output.dtype, -(-total // rows), infer_shape=False, element_shape=output.shape
        )
        for output in traced.outputs
    ]
    _, results = tf.while_loop(
        lambda number, _: number * rows < total, step, (0, empty), parallel_iterations=1
    )
    return keras.tree.pack_sequence_as(structure[0], [result.concat() for result in results])


def is_in_graph(tensor: Any) -> bool:
    """Whether it is a tensor whose value is known only when a graph runs."""
    return tf.is_tensor(tensor) and not hasattr(tensor, "numpy")


def first_if_equal(tensors: Sequence[Any], message: str) -> Any:
    """The first of these tensors; if they differ when the graph runs, an error."""
    first = tensors[0]
    same = [tf.reduce_all(_equal(tensor, first)) for tensor in tensors[1:]]
    with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(same), [message])]):
        return tf.identity(first)


def _equal(one: Any, other: Any) -> Any:
    same = tf.equal(one, other)
    if one.dtype.is_floating:
        same |= tf.math.is_nan(one) & tf.math.is_nan(other)
    return same


def unstacked(tensor: Any, axis: int) -> list[Any]:
    """The parts of a tensor along an axis of known size."""
    return list(tf.unstack(tensor, axis=axis))


def zeros_after(function: Callable[..., None], tensors: Sequence[Any]) -> Any:
    """Calls a function of arrays when the graph runs, and returns a zero for each row."""

    def call(*arrays: Any) -> Any:
        function(*arrays)
        return np.zeros(len(arrays[0]), "int8")

    zeros = tf.numpy_function(call, list(tensors), tf.int8)
    zeros.set_shape([None])
    return zeros
