"""Losses as numbers whose ratios mean something."""

import math
from collections.abc import Callable
from typing import Any

import keras

from snapshot_ensemble.inference.losses import family_of

# Turns a loss into such a number.
Scale = Callable[[float], float]
# The largest exponent that float64 can hold.
_MOST = 700.0


def plain(loss: float) -> float:
    """A loss that is 0 where there is nothing left to learn: as it is."""
    return loss


def density(loss: float) -> float:
    """The negative log-likelihood of a density, as the variance of errors that would give it.

    Such a loss has no zero: another unit of the targets adds a constant to it, and multiplies
    `exp(2 * loss)`.
    """
    return math.exp(min(2 * loss, _MOST)) if math.isfinite(loss) else loss


def scale_of(model: keras.Model) -> Scale:
    """How the compiled loss of a model is compared."""
    losses: list[Any] = [loss for loss in keras.tree.flatten(model.loss) if loss is not None]
    families = {family_of(loss, None)[0] for loss in losses}
    return density if families == {"gaussian"} else plain
