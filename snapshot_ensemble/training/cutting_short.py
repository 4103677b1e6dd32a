"""Whether a run has begun to memorise its training data, so that several cycles pay.

A network that is still learning gains nothing from restarts within a short budget: it is left to be
one ordinary run. One that memorises gains from several members, which differ. One that was trained
before the first `fit`, on other data, is fine-tuned in one ordinary run: restarts would lose what
it brings.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

from snapshot_ensemble.storage.record import Decision
from snapshot_ensemble.training.loss_ratios import Scale, plain

# A network has begun to memorise if its training loss is further than this below the lowest
# validation loss so far, as a fraction of that, ...
MIN_GAP = 0.5
# ... or if it is further than this below, and the last epochs have lowered the validation loss by
# less than this share of what they have lowered the training loss by, both relative to what they
# were. (A slow network falls behind on validation data while it is still learning.)
MIN_LAGGING_GAP, MIN_SHARE = 0.1, 1 / 3
# Without validation data: if its training loss is below this fraction of that of its first epoch.
MAX_LEFT = 0.05
# In so many epochs in a row: the rate is still high, so single epochs are noisy.
EPOCHS = 2


def decide(
    history: Mapping[str, list[Any]], first: int, last: int, scale: Scale = plain
) -> Decision:
    """Decides from the epochs of a run so far.

    Args:
        history: Columns `loss` and `val_loss`, one value per epoch.
        first: The first epoch of the run.
        last: The epoch after its last one so far.
        scale: Turns losses into numbers whose ratios mean something.
    """
    losses, val_losses = (history.get(name, [])[first:last] for name in ("loss", "val_loss"))
    known = [value if _is_known(value) else math.inf for value in val_losses]
    lowest = list(itertools.accumulate(known, min)) or [math.inf] * len(losses)
    first_loss = losses[0] if losses and _is_known(losses[0]) else None
    recent = list(zip(losses, lowest, strict=True))[-EPOCHS:]
    gap = MIN_LAGGING_GAP if _is_lagging(losses, known, scale) else MIN_GAP
    memorised = [_has_memorised(first_loss, *losses, scale, gap) for losses in recent]
    loss, val_loss = (
        value if _is_known(value) else None for value in (recent or [(None,) * 2])[-1]
    )
    return Decision(last, len(memorised) == EPOCHS and all(memorised), first_loss, loss, val_loss)


def described(decision: Decision) -> str:
    """A sentence for a person: what was decided, and why."""
    loss, val_loss, first_loss = decision.loss, decision.val_loss, decision.first_loss
    if loss is None:
        why = "the loss is not finite"
    elif val_loss is not None:
        why = f"loss {loss:.4f}, lowest val_loss {val_loss:.4f}"
    else:
        why = f"loss {loss:.4f}, in the first epoch {first_loss or math.nan:.4f}"
    if decision.is_pretrained:
        return f"It was trained before: one cosine to the end ({why})"
    if decision.is_cut:
        return f"It begins to memorise: several cycles in the rest ({why})"
    return f"It is still learning: one cosine to the end ({why})"


def _is_lagging(losses: list[Any], val_losses: list[float], scale: Scale) -> bool:
    """Whether the last epochs have taught little that holds for the validation data."""
    before, recent = (
        min(map(scale, part), default=math.inf)
        for part in (val_losses[:-EPOCHS], val_losses[-EPOCHS:])
    )
    ends = losses[-EPOCHS - 1 :: EPOCHS]
    if len(ends) < 2 or not all(map(_is_known, [*ends, before, recent])):
        return False
    return _fall(before, min(before, recent)) < MIN_SHARE * _fall(*map(scale, ends))


def _fall(before: float, after: float) -> float:
    return (before - after) / abs(before) if before else 0.0


def _has_memorised(
    first_loss: float | None, loss: float, val_loss: float, scale: Scale, gap: float
) -> bool:
    if not _is_known(loss):
        return False
    loss, val_loss = scale(loss), scale(val_loss)
    first_loss = None if first_loss is None else scale(first_loss)
    if math.isfinite(val_loss):
        return val_loss - loss > gap * abs(val_loss)
    return first_loss is not None and first_loss > 0 and loss <= MAX_LEFT * first_loss


def _is_known(value: Any) -> bool:
    return value is not None and math.isfinite(value)
