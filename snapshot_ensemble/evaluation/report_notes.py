"""What a report remarks on its scores, in sentences."""

from collections.abc import Sequence

import keras
import numpy as np

from snapshot_ensemble.checks import counted
from snapshot_ensemble.evaluation.left_out import left_out, why_not_compiled
from snapshot_ensemble.storage.record import Learned
from snapshot_ensemble.storage.snapshot import Snapshot


def notes_on_members(
    alone: list[float], from_last: list[float], worth: int, learned: Learned
) -> list[str]:
    """Whether the members are worth it, and what to do if some make the mean worse.

    Args:
        alone: The loss of each member.
        from_last: The losses of the means of the last 1, 2, … members.
        worth: The smallest number of last members whose mean is as good as the best one.
        learned: What was learned about the members.
    """
    count, best = len(alone), int(np.argmin(alone))
    notes = [
        f"Worth it: {worth} of {counted(count, 'member')}. The mean of the last {worth} is within "
        "one standard error of the best such mean."
    ]
    if from_last[-1] > alone[best] * (1 + 1e-9) + 1e-12:  # Worse by more than rounding.
        k = int(np.argmin(from_last)) + 1
        advice = [] if k == count else [f"members={k} (the last {k}: {from_last[k - 1]:.4f})"]
        is_weighted = learned.weights is not None
        advice.append("combine='weighted'" if is_weighted else "fit_weights on held-out data")
        notes.append(
            f"The mean of all members (loss {from_last[-1]:.4f}) is worse than member {best} "
            f"alone ({alone[best]:.4f}). Try {' or '.join(advice)}."
        )
    if learned.members is not None:
        notes.append(_note_on_default(learned.members))
    return notes


def _note_on_default(members: int | list[int]) -> str:
    """Which members predict by default, and what is left of uncertainty if it is one."""
    chosen = members if isinstance(members, list) else [-1] * members
    if len(chosen) == 1:
        which = "the last member" if chosen == [-1] else f"member {chosen[0]}"
        return (
            f"By default, {which} predicts alone, so there is no disagreement and `epistemic` (or "
            "`std`) is 0. Pass `members=` to combine more, or train with a number for `cycles`."
        )
    which = f"members {members}" if isinstance(members, list) else f"the last {members} members"
    return f"By default, predictions combine {which}."


def notes_on_one_cosine(snapshots: Sequence[Snapshot], learned: Learned) -> list[str]:
    """What is left of uncertainty if members that predict are of one cosine."""
    members, count = learned.members, len(snapshots)
    chosen = members if isinstance(members, list) else range(count)[-(members or count) :]
    if len(chosen) < 2 or all(snapshots[index].is_annealed for index in chosen):
        return []
    return [
        "Members that predict by default are of one cosine, without a restart between them. They "
        "differ little, so `epistemic` (or `std`) is lower than that of members of several cycles. "
        "If you need it, train with a number for `cycles`."
    ]


def notes_on_compiled(model: keras.Model) -> list[str]:
    """Remarks on the columns of the compiled loss and metrics."""
    if (why := why_not_compiled(model)) is not None:
        return [f"There are no columns for the compiled loss and metrics, since {why}."]
    sentence = left_out(model)
    return [] if sentence is None else [sentence]
