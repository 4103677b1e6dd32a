"""The loss along the straight line from each member to the next."""

from typing import Any

import numpy as np

from snapshot_ensemble.checks import counted
from snapshot_ensemble.evaluation.weight_averaging import Averager
from snapshot_ensemble.inference.member_pool import MemberPool


def losses_between_members(
    pool: MemberPool, x: Any, y: Any, points: int, batch_size: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Positions (member numbers, and shares of the way to the next) and the losses there.

    All weights are taken from the line, the statistics of batch normalisation too.

    Args:
        pool: At least two members.
        x: As for `model.evaluate`.
        y: As for `model.evaluate`.
        points: Number of points from one member to the next.
        batch_size: As for `model.predict`.
    """
    if len(pool) < 2:
        raise ValueError(
            "There is no line between fewer than two members. Received: "
            f"{counted(len(pool), 'member')}."
        )
    judge = Averager(pool, x, y, batch_size)
    members = pool.weights(range(len(pool)))
    positions = np.linspace(0, len(members) - 1, (len(members) - 1) * points + 1)
    losses = []
    for position in positions:
        first = min(int(position), len(members) - 2)
        share = position - first
        pairs = zip(members[first], members[first + 1], strict=True)
        losses.append(judge.loss([((1 - share) * a + share * b).astype(a.dtype) for a, b in pairs]))
    return positions, np.asarray(losses)
