"""The default batch size of predictions."""

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from snapshot_ensemble.inference.losses import is_mean_over_rows
from snapshot_ensemble.inference.rows_apart import treats_rows_apart
from snapshot_ensemble.keras_compat.compile_arguments import compile_arguments
from snapshot_ensemble.keras_compat.layer_graph import all_layers, calls_of, graph_of
from snapshot_ensemble.keras_compat.stock_layers import has_own_predict_step, is_stock_metric

# Keras's default, and the largest useful size: beyond it the overhead per batch is negligible.
KERAS, MOST = 32, 1024
# In bytes: an upper bound on the largest tensor of a batch, so that what one layer passes to the
# next stays in the processor's cache.
CACHE = 2**20


def are_arrays(x: Any) -> bool:
    """Whether data can be read repeatedly, in the same order and in batches of any size."""
    return all(isinstance(leaf, (np.ndarray, tf.Tensor)) for leaf in keras.tree.flatten(x))


def batch_size_for(
    model: keras.Model,
    x: Any,
    *,
    batch_size: int | None = None,
    steps: int | None = None,
    callbacks: Any = None,
    **_: Any,
) -> dict[str, int]:
    """The arguments to add to `predict`; none if the user depends on the size of batches."""
    if batch_size is not None or steps is not None or callbacks or not are_arrays(x):
        return {}
    # At least eight batches: TensorFlow warns of retracing if a traced graph is hardly used.
    eighth = len(keras.tree.flatten(x)[0]) // 8
    return {"batch_size": max(KERAS, min(rows_at_once(model), eighth))}


def batches_at_once(
    model: keras.Model,
    x: Any,
    *,
    batch_size: int | None = None,
    steps: int | None = None,
    callbacks: Any = None,
    **_: Any,
) -> int:
    """How many batches of a given size to read at once, to be run one after another in the graph.

    Keras takes about a millisecond for a batch, which is more than some small models need.
    """
    if batch_size is None or steps is not None or callbacks or not are_arrays(x):
        return 1
    if tf.distribute.has_strategy() or (rows := rows_at_once(model)) == KERAS:
        return 1
    eighth = len(keras.tree.flatten(x)[0]) // 8
    return max(1, min(rows, eighth) // batch_size)


def rows_at_once(model: keras.Model) -> int:
    """The batch size with the lowest cost per row.

    Running a graph once costs as much as a small dense layer's work on hundreds of rows, so models
    of small layers get more rows than Keras's 32: a power of two up to 1024, as long as the largest
    tensor between layers fits into a cache. It stays 32 if a row's output might depend on the other
    rows of its batch, that is, for all models but graphs of layers that `rows_apart` lists.

    Args:
        model: A built model of any kind.
    """
    graph = graph_of(model)
    if graph is None or has_own_predict_step(model):
        return KERAS
    largest = 1
    for inner in (graph, *filter(None, map(graph_of, all_layers(model)))):
        for operation in inner.operations:
            if not treats_rows_apart(operation):
                return KERAS
            for arguments, outputs in calls_of(operation):
                if arguments.get("training"):
                    return KERAS
                for tensor in outputs:
                    if tensor.shape[:1] != (None,) or None in tensor.shape[1:]:
                        return KERAS
                    largest = max(largest, 4 * math.prod(tensor.shape[1:]))  # Bytes of float32.
    rows_in_cache = 2 ** int(math.log2(max(CACHE / largest, 1)))
    return min(max(rows_in_cache, KERAS), MOST)


def batch_size_for_scores(model: keras.Model, x: Any, **arguments: Any) -> dict[str, int]:
    """The arguments to add to `evaluate`: as `batch_size_for`, if that leaves its result as it is.

    The mean over what a mask leaves of a batch has another denominator in each batch, and Keras
    averages the losses of several outputs over the batches, not over the rows.
    """
    graph = graph_of(model)
    masks = any(
        isinstance(layer, keras.layers.Masking) or getattr(layer, "mask_zero", False)
        for layer in all_layers(model)
    )
    if graph is None or keras.tree.is_nested(graph.output) or masks or not scores_add_up(model):
        return {}
    return batch_size_for(model, x, **arguments)


def scores_add_up(model: keras.Model) -> bool:
    """Whether the loss and all metrics are Keras's own sums over rows, for a single output.

    Without a mask, they are then the same in batches of any size.
    """
    arguments = compile_arguments(model)
    scores = keras.tree.flatten([arguments["metrics"], arguments["weighted_metrics"]])
    losses = keras.tree.flatten(arguments["loss"])
    return (
        len(losses) == 1
        and is_mean_over_rows(losses[0])
        and all(score is None or is_stock_metric(score) for score in scores)
    )
