"""The mask that Keras attaches to a tensor."""

from typing import Any


def mask_of(tensor: Any) -> Any:
    """The mask of a tensor, or None."""
    return getattr(tensor, "_keras_mask", None)


def set_mask(tensor: Any, mask: Any) -> None:
    """Attaches a mask to a tensor."""
    tensor._keras_mask = mask
