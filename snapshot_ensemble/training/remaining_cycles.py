"""How many cycles the rest of a run is split into, as the losses of its first cycle show.

A network that is still learning gains most from one long cycle, which ends as well as one ordinary
run. One that has begun to memorise its training data gains from several, whose members differ.
"""

import math
from collections.abc import Mapping
from typing import Any

from snapshot_ensemble.checks import counted
from snapshot_ensemble.schedules import AutoCycles
from snapshot_ensemble.storage.record import Decision

# The network is still learning if its training loss is less than this far below its validation
# loss, as a fraction of that.
MIN_GAP = 0.25
# Without validation data: if its training loss is above this fraction of that of its first epoch.
MAX_LEFT = 0.05


def decide(history: Mapping[str, list[Any]], first: int, last: int) -> Decision:
    """Decides from the epochs of a first cycle.

    Args:
        history: Columns `loss` and `val_loss`, one value per epoch.
        first: The first epoch of the cycle.
        last: The epoch after its last one.
    """
    losses, val_losses = (history.get(name, [])[first:last] for name in ("loss", "val_loss"))
    loss, val_loss = _last(losses), None
    if validated := [i for i, value in enumerate(val_losses) if _is_known(value)]:
        # Not every epoch may be validated; losses of different epochs cannot be compared.
        loss, val_loss = losses[validated[-1]], val_losses[validated[-1]]
    first_loss = losses[0] if losses and _is_known(losses[0]) else None
    several = _has_memorised(first_loss, loss, val_loss)
    return Decision(last, AutoCycles.CYCLES - 1 if several else 1, first_loss, loss, val_loss)


def described(decision: Decision) -> str:
    """A sentence for a person: what was decided, and why."""
    loss, val_loss, first_loss = decision.loss, decision.val_loss, decision.first_loss
    if loss is None:
        why = "no finite loss is known"
    elif val_loss is not None:
        why = f"val_loss {val_loss:.4f} against loss {loss:.4f}"
    elif first_loss is not None:
        why = f"loss {loss:.4f} against {first_loss:.4f} in the first epoch"
    else:
        why = f"loss {loss:.4f}, without validation data"
    return f"The rest of the epochs: {counted(decision.cycles, 'cycle')} ({why})"


def _has_memorised(first_loss: float | None, loss: float | None, val_loss: float | None) -> bool:
    if loss is None or not math.isfinite(loss):
        return False
    if val_loss is not None:
        return val_loss - loss > MIN_GAP * abs(val_loss)
    return first_loss is not None and first_loss > 0 and loss <= MAX_LEFT * first_loss


def _is_known(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _last(values: list[Any]) -> float | None:
    return next((value for value in reversed(values) if _is_known(value)), None)
