"""What is wrong with a member: numbers that are not finite, far worse than the others."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.storage.snapshot import Snapshot


def not_finite(model: keras.Model, metrics: dict[str, float]) -> str:
    """What of a cycle's end is NaN or infinite, in words; empty if nothing is."""
    if not math.isfinite(metrics.get("loss", 0.0)):
        return f"its loss is {metrics['loss']}"
    for variable in model.weights:
        if keras.backend.is_float_dtype(variable.dtype):
            value = keras.ops.convert_to_numpy(variable.value).astype("float64")
            if not np.isfinite(value).all():
                return f"its weights are not finite ({variable.path})"
    return ""


def warn_of_stragglers(snapshots: Sequence[Snapshot], history: dict[str, list[Any]]) -> None:
    """Names the members that are far worse than the others on the validation data.

    Far worse: their validation loss is more than twice the median of the others, and nearer to that
    of the first epoch, when hardly anything was learned.
    """
    losses = {s.index: s.metrics["val_loss"] for s in snapshots if "val_loss" in s.metrics}
    known = [loss for loss in history.get("val_loss", ()) if loss is not None]
    if len(losses) < 3 or min(losses.values()) <= 0:
        return
    far = []
    for index, loss in losses.items():
        others = float(np.median([other for i, other in losses.items() if i != index]))
        if not loss <= max(2 * others, (others + known[0]) / 2):
            far.append(f"member {index} (val_loss {loss:.4g}, median of the others {others:.4g})")
    if far:
        warnings.warn(
            f"Far worse than the others on the validation data: {', '.join(far)}. Leave out by "
            "`members=`, or let `fit_weights` or `report` on held-out data tell.",
            stacklevel=4,
        )
