"""Detects members that are not finite, or far worse than the others."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.storage.snapshot import Snapshot


def not_finite(model: keras.Model, metrics: dict[str, float]) -> str:
    """Says what is NaN or infinite at the end of a cycle; empty if nothing is."""
    if not math.isfinite(metrics.get("loss", 0.0)):
        return f"its loss is {metrics['loss']}"
    for variable in model.weights:
        if keras.backend.is_float_dtype(variable.dtype):
            value = keras.ops.convert_to_numpy(variable.value).astype("float64")
            if not np.isfinite(value).all():
                return f"its weights are not finite ({variable.path})"
    return ""


def warn_of_stragglers(snapshots: Sequence[Snapshot], history: dict[str, list[Any]]) -> None:
    """Warns of members that are far worse than the others on the validation data.

    Far worse means that the validation loss is more than twice the median of the others, and
    closer to the validation loss of the first epoch than to that median.
    """
    losses = {s.index: s.metrics["val_loss"] for s in snapshots if "val_loss" in s.metrics}
    known = [loss for loss in history.get("val_loss", ()) if loss is not None]
    if len(losses) < 3 or min(losses.values()) <= 0:
        return
    stragglers = []
    for index, loss in losses.items():
        others = float(np.median([other for i, other in losses.items() if i != index]))
        if not loss <= max(2 * others, (others + known[0]) / 2):
            stragglers.append(
                f"member {index} (val_loss {loss:.4g}, median of the others {others:.4g})"
            )
    if stragglers:
        warnings.warn(
            f"Far worse than the others on the validation data: {', '.join(stragglers)}. Leave "
            "them out with `members=`, or compare members with `report` on held-out data.",
            stacklevel=4,
        )
