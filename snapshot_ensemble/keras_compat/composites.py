"""Tensors that consist of several dense ones: ragged and sparse tensors."""

from typing import Any

import keras
import tensorflow as tf


def dense_parts(structure: Any) -> list[Any]:
    """The dense tensors of all leaves, a ragged or sparse tensor's among them."""
    return list(tf.nest.flatten(structure, expand_composites=True))


def rows_of(structure: Any, rows: Any) -> Any:
    """Some rows of all leaves of a structure.

    Args:
        structure: Arrays, or dense, ragged or sparse tensors.
        rows: The rows' numbers, which ascend.
    """
    return keras.tree.map_structure(lambda leaf: _rows_of(leaf, rows), structure)


def _rows_of(leaf: Any, rows: Any) -> Any:
    if not is_sparse(leaf):
        return tf.gather(leaf, rows)
    rows = tf.cast(rows, tf.int64)
    count = tf.size(rows, tf.int64)
    # One more than the new number of each row; 0 for those that are left out.
    numbers = tf.scatter_nd(rows[:, None], tf.range(1, count + 1), leaf.dense_shape[:1])
    of_entries = tf.gather(numbers, leaf.indices[:, 0])
    kept = tf.sparse.retain(leaf, of_entries > 0)
    places = tf.boolean_mask(of_entries, of_entries > 0)[:, None] - 1
    indices = tf.concat([places, kept.indices[:, 1:]], axis=1)
    shape = tf.concat([count[None], leaf.dense_shape[1:]], axis=0)
    result = tf.SparseTensor(indices, kept.values, shape)
    result.set_shape([None, *leaf.shape[1:]])
    return result


def is_sparse(leaf: Any) -> bool:
    """Whether it is a sparse tensor, which cannot be sliced like an array."""
    return isinstance(leaf, tf.SparseTensor)
