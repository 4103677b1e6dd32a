"""Whether a run has overfitted, as the validation losses at the ends of its cycles show."""

import itertools
import math
from collections.abc import Collection, Mapping
from typing import Any

from snapshot_ensemble.training.loss_ratios import Scale, plain

# All thresholds are fractions of the loss that they are compared with.
# The training loss is at least this far below the validation loss.
MIN_GAP = 0.5
# The validation loss has risen by more than this above its lowest value so far, ...
MIN_RISE = 0.05
# ... or it has fallen by less than this since the cycles before.
MIN_FALL = 0.1
# The first cycle came this close to the lowest validation loss so far: one cycle is long enough to
# relearn what a restart removes.
MAX_FIRST_CYCLE_GAP = 0.3


def has_overfitted(
    history: Mapping[str, list[Any]], scale: Scale = plain, unfinished: Collection[int | None] = ()
) -> bool:
    """Whether a cycle has ended with a validation loss that training no longer lowers.

    It must also be far above the training loss: otherwise noise or the restarts themselves may
    have raised it. Epochs with a loss that is not finite do not count.

    Args:
        history: Columns `cycle`, `loss` and `val_loss`, one value per epoch.
        scale: Turns losses into numbers whose ratios mean something.
        unfinished: The cycles whose end is not that of their cosine, so that it does not count.
    """
    columns = (history.get(name, ()) for name in ("cycle", "loss", "val_loss"))
    epochs = [
        (cycle, *(scale(loss) for loss in losses))
        for cycle, *losses in zip(*columns, strict=False)
        if losses[-1] is not None
    ]
    are_finite = [all(map(math.isfinite, losses)) for _, *losses in epochs]
    last = {cycle: epoch for epoch, (cycle, *_) in enumerate(epochs) if cycle not in unfinished}
    ends = [epoch for epoch in last.values() if are_finite[epoch]]
    known = (
        row[-1] if is_finite else math.inf
        for row, is_finite in zip(epochs, are_finite, strict=True)
    )
    lowest = list(itertools.accumulate(known, min))
    for before, end in zip([None, *ends], ends, strict=False):
        _, loss, val_loss = epochs[end]
        has_risen = val_loss - lowest[end] > MIN_RISE * abs(lowest[end])
        has_stalled = before is not None and (
            lowest[before] - val_loss < MIN_FALL * abs(lowest[before])
        )
        has_gap = val_loss - loss > MIN_GAP * abs(val_loss)
        one_cycle_is_enough = lowest[ends[0]] - lowest[end] <= MAX_FIRST_CYCLE_GAP * abs(
            lowest[end]
        )
        if (has_risen or has_stalled) and has_gap and one_cycle_is_enough:
            return True
    return False
