"""What Keras attaches to tensors: masks, and the logits of a softmax or sigmoid."""

from typing import Any

import keras

_ACTIVATIONS = ("Softmax", "Sigmoid")


def logits_behind(tensor: Any) -> Any:
    """The logits that Keras's cross-entropies use in place of probabilities, or None.

    Losses cast outputs of another dtype than Keras's default, and then the logits are lost.
    """
    if keras.backend.is_keras_tensor(tensor) or isinstance(tensor, keras.Variable):
        return None
    dtype = getattr(tensor, "dtype", None)
    if dtype is None or getattr(dtype, "name", dtype) != keras.config.floatx():
        return None
    logits = getattr(tensor, "_keras_logits", None)
    if logits is None:
        operation: Any = getattr(tensor, "op", None)  # Only tensors of a TensorFlow graph have one.
        if getattr(operation, "type", None) in _ACTIVATIONS:
            [logits] = operation.inputs
    return logits


def with_logits(tensor: Any, logits: Any) -> Any:
    """Probabilities with these logits and no others; with None, without logits."""
    if logits is not None:
        tensor._keras_logits = logits
    elif logits_behind(tensor) is not None:
        tensor = keras.ops.copy(tensor)
    return tensor


def attached_to(tensor: Any) -> tuple[Any, Any]:
    """The logits and the mask of a tensor; None where it has none."""
    return logits_behind(tensor), getattr(tensor, "_keras_mask", None)


def attach(tensor: Any, attached: tuple[Any, Any]) -> Any:
    """The tensor with what `attached_to` returned, which a graph's function does not return."""
    logits, mask = attached
    if mask is not None:
        tensor._keras_mask = mask
    return with_logits(tensor, logits)
