"""How many rows to predict at once where the user did not say."""

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from snapshot_ensemble.keras_compat.layer_graph import all_layers, calls_of, graph_of
from snapshot_ensemble.keras_compat.stock_layers import has_own_predict_step, is_stock_layer

# What Keras takes, and the most that is worth it: entering the graph costs nothing any more.
KERAS, MOST = 32, 1024
# In bytes: the largest tensor of a batch, so that what one layer leaves for the next stays in the
# processor's cache.
CACHE = 2**20


def are_arrays(x: Any) -> bool:
    """Whether data can be gone through again and again, in the same order and any batches."""
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
    """What to add to the arguments of `predict`: nothing where the user counts in batches."""
    if batch_size is not None or steps is not None or callbacks or not are_arrays(x):
        return {}
    # TensorFlow warns where graphs are traced and then hardly used: so in eight batches or more.
    share = len(keras.tree.flatten(x)[0]) // 8
    return {"batch_size": max(KERAS, min(rows_at_once(model), share))}


def rows_at_once(model: keras.Model) -> int:
    """The number of rows in a batch that a model predicts with the least cost a row.

    Entering a graph costs as much as a small dense layer's work on hundreds of rows, so small
    layers take more rows than the 32 of Keras: a power of two up to 1024, as long as the largest
    tensor between layers fits a cache. It is 32 for models in which a row's output might
    depend on its batch, and that is whatever is not known to be otherwise: all but graphs of
    Keras's own layers, run in inference mode.

    Args:
        model: A built model of any kind.
    """
    graph = graph_of(model)
    if graph is None or has_own_predict_step(model):
        return KERAS
    layers = all_layers(model)
    if not all(map(_keeps_rows_apart, layers)):
        return KERAS
    largest = 1
    for inner in (graph, *filter(None, map(graph_of, layers))):
        for operation in inner.operations:
            if not _keeps_rows_apart(operation):
                return KERAS
            for arguments, outputs in calls_of(operation):
                if arguments.get("training"):
                    return KERAS
                for tensor in outputs:
                    if tensor.shape[:1] != (None,) or None in tensor.shape[1:]:
                        return KERAS
                    largest = max(largest, 4 * math.prod(tensor.shape[1:]))  # Bytes of float32.
    fitting = 2 ** int(math.log2(max(CACHE / largest, 1)))
    return min(max(fitting, KERAS), MOST)


def _keeps_rows_apart(operation: Any) -> bool:
    """Whether it is one of Keras's own layers, of a kind that treats each row by itself."""
    if isinstance(operation, keras.Model):
        return graph_of(operation) is not None
    if isinstance(operation, keras.layers.Lambda) or getattr(operation, "stateful", False):
        return False
    return is_stock_layer(operation)
