"""Detects members that are not finite, or far worse than the others."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.storage.snapshot import Snapshot
from snapshot_ensemble.training.loss_ratios import Scale, plain


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


def warn_of_stragglers(
    snapshots: Sequence[Snapshot], history: dict[str, list[Any]], scale: Scale = plain
) -> None:
    """Warns of members that are far worse than the others on the validation data.

    Those whose rate had not reached its floor are worse anyway, and do not count. Far worse means
    that the validation loss is not finite, or that it is more than twice the median of at least
    two others and closer to that of the first epoch than to that median.
    """
    annealed = [s for s in snapshots if s.is_annealed]
    losses = {s.index: s.metrics["val_loss"] for s in annealed if "val_loss" in s.metrics}
    finite = {index: scale(loss) for index, loss in losses.items() if math.isfinite(loss)}
    column = history.get("val_loss", ())
    known = (scale(loss) for loss in column if loss is not None and math.isfinite(loss))
    first = next(known, math.inf)
    can_compare = len(finite) >= 3 and min(finite.values()) > 0
    stragglers = []
    for index, loss in losses.items() if finite else ():
        others = [i for i in finite if i != index] or [index]
        median = float(np.median([finite[i] for i in others if i in finite]))
        is_worse = can_compare and scale(loss) > max(2 * median, (median + first) / 2)
        if index not in finite or is_worse:
            usual = float(np.median([losses[i] for i in others]))
            stragglers.append(
                f"member {index} (val_loss {loss:.4g}, median of the others {usual:.4g})"
            )
    if stragglers:
        warnings.warn(
            f"Far worse than the others on the validation data: {', '.join(stragglers)}. Leave "
            "them out with `members=`, or compare members with `report` on held-out data.",
            stacklevel=4,
        )
