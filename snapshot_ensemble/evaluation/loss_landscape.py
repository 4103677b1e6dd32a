"""The members in the space of weights: the loss between them, and their principal components."""

from typing import Any

import numpy as np

from snapshot_ensemble.checks import counted
from snapshot_ensemble.evaluation.weight_averaging import Averager
from snapshot_ensemble.inference.member_pool import MemberPool, PredictArguments


def losses_between_members(
    pool: MemberPool, x: Any, y: Any, points: int, batch_size: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Positions along the path through the members, and the loss at each of them.

    Position 1.25 is a quarter of the way from member 1 to member 2.

    All weights are interpolated, including the moving statistics of batch normalisation.

    Args:
        pool: At least two members.
        x: As for `model.evaluate`.
        y: As for `model.evaluate`.
        points: Number of points for each segment.
        batch_size: As for `model.predict`.
    """
    if len(pool) < 2:
        raise ValueError(
            f"Interpolation needs at least two members. Received: {counted(len(pool), 'member')}."
        )
    averager = Averager(pool, x, y, PredictArguments(batch_size, verbose=0))
    members = pool.weights(range(len(pool)))
    positions = np.linspace(0, len(members) - 1, (len(members) - 1) * points + 1)
    losses = []
    for position in positions:
        first = min(int(position), len(members) - 2)
        fraction = position - first
        pairs = zip(members[first], members[first + 1], strict=True)
        weights = [((1 - fraction) * a + fraction * b).astype(a.dtype) for a, b in pairs]
        losses.append(averager.loss(weights))
    return positions, np.asarray(losses)


def principal_components(pool: MemberPool) -> tuple[np.ndarray, np.ndarray]:
    """Each member's first two principal components, and the share of the variance of each."""
    trained = [variable.trainable for variable in pool.model.weights]
    rows = []
    for weights in pool.weights(range(len(pool))):
        flat = [w.astype("float64").ravel() for w, t in zip(weights, trained, strict=True) if t]
        rows.append(np.concatenate(flat))
    centred = np.stack(rows) - np.mean(rows, axis=0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    return left[:, :2] * sizes[:2], sizes**2 / max((sizes**2).sum(), 1e-300)
