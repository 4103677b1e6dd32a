"""Which of Keras's layers are known to compute each row of a batch from that row alone."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.keras_compat.layer_graph import graph_of, input_ranks
from snapshot_ensemble.keras_compat.stock_layers import is_stock_activation, is_stock_layer

_PLAIN = {
    *("InputLayer", "Identity", "Masking", "Embedding", "Dense", "Activation", "Flatten"),
    *("Permute", "RepeatVector", "Reshape", "ReLU", "LeakyReLU", "ELU", "PReLU"),
    *("Dropout", "AlphaDropout", "GaussianDropout", "GaussianNoise", "ActivityRegularization"),
    *("LSTMCell", "GRUCell", "SimpleRNNCell", "ConvLSTMCell"),
    *("CategoryEncoding", "Discretization", "Hashing", "IntegerLookup", "StringLookup"),
    *(
        f"{kind}{rank}D"
        for kind in (
            *("Conv", "DepthwiseConv", "SeparableConv", "SpatialDropout"),
            *("AveragePooling", "MaxPooling", "GlobalAveragePooling", "GlobalMaxPooling"),
            *("AdaptiveAveragePooling", "AdaptiveMaxPooling"),
            *("Cropping", "UpSampling", "ZeroPadding"),
        )
        for rank in (1, 2, 3)
    ),
    *(f"Conv{rank}DTranspose" for rank in (1, 2, 3)),
}
_MERGING = {"Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum"}
_RECURRENT = {"RNN", "LSTM", "GRU", "SimpleRNN", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"}
# These work along the rows of a batch of rank 2.
_ATTENTION = {"Attention", "AdditiveAttention", "GroupedQueryAttention"}
# The first axis is that of the rows, and these may work along it.
_WITH_AXES = {
    "BatchNormalization": "axis",
    "LayerNormalization": "axis",
    "RMSNormalization": "axis",
    "GroupNormalization": "axis",
    "UnitNormalization": "axis",
    "Normalization": "axis",
    "Softmax": "axis",
    "Concatenate": "axis",
    "Dot": "axes",
}


# Conditions for layers that run others, or that take more than one kind of argument.
_COMPOSED: dict[str, Callable[[Any, list[list[int]]], bool]] = {
    "Bidirectional": lambda layer, calls: all(
        _layer_treats_rows_apart(inner, calls)
        for inner in (layer.forward_layer, layer.backward_layer)
    ),
    "TimeDistributed": lambda layer, calls: _layer_treats_rows_apart(
        layer.layer, [[rank - 1 for rank in ranks] for ranks in calls]
    ),
    **dict.fromkeys(_RECURRENT, lambda layer, _: _layer_treats_rows_apart(layer.cell, [])),
    **dict.fromkeys(_ATTENTION, lambda _, calls: min(map(min, calls), default=0) > 2),
    "StackedRNNCells": lambda layer, _: all(
        _layer_treats_rows_apart(cell, []) for cell in layer.cells
    ),
    "MultiHeadAttention": lambda layer, calls: _avoids_rows(layer.attention_axes, calls),
    "EinsumDense": lambda layer, _: _keeps_first_axis(layer.equation),
    "Rescaling": lambda layer, _: not np.ndim(layer.scale) and not np.ndim(layer.offset),
    # A batch of rank 3 would be one image.
    "Resizing": lambda _, calls: all(ranks == [4] for ranks in calls),
    "CenterCrop": lambda _, calls: all(ranks == [4] for ranks in calls),
}


def _avoids_rows(axes: Any, calls: list[list[int]]) -> bool:
    """Whether none of these axes is the first one, in calls on inputs of these ranks."""
    axes = [axis for axis in keras.tree.flatten(axes) if axis is not None]
    ranks = {rank for ranks in calls for rank in ranks}
    return bool(ranks) and all(axis % rank for axis in axes for rank in ranks)


def _keeps_first_axis(equation: str) -> bool:
    """Whether the rows of an einsum of a batch and a kernel are rows of the result."""
    batch, kernel, result = equation.replace("->", ",").replace(" ", "").split(",")
    return batch[0].isalpha() and batch[0] == result[0] and batch[0] not in batch[1:] + kernel


def _activations(layer: Any) -> list[Any]:
    named = (value for name, value in vars(layer).items() if "activation" in name)
    return [value for value in named if callable(value)]


def _is_known(activation: Any) -> bool:
    return is_stock_activation(activation) or _layer_treats_rows_apart(activation, [])


def treats_rows_apart(operation: Any) -> bool:
    """Whether the output of a layer of a graph for a row depends on no other row of its batch.

    False if that is not known: for layers of the user's own, and for operations.
    """
    if isinstance(operation, keras.Model):
        return graph_of(operation) is not None
    return _layer_treats_rows_apart(operation, input_ranks(operation))


def _layer_treats_rows_apart(layer: Any, calls: list[list[int]]) -> bool:
    """As above, for calls on inputs of these ranks."""
    if not is_stock_layer(layer) or not all(map(_is_known, _activations(layer))):
        return False
    if getattr(layer, "stateful", False) or getattr(layer, "quantization_mode", None):
        return False
    if any(rank < 2 for ranks in calls for rank in ranks):
        return False  # Some layers take a vector for a single row.
    name = type(layer).__name__
    if name in _WITH_AXES:
        return _avoids_rows(getattr(layer, _WITH_AXES[name]), calls)
    if name in _MERGING:
        return all(len(set(ranks)) == 1 for ranks in calls)
    return name in _PLAIN or (name in _COMPOSED and _COMPOSED[name](layer, calls))
