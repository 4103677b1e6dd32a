"""The description of a snapshot, and the error for damaged ones."""

import dataclasses
from collections.abc import Sequence

import numpy as np

Weights = list[np.ndarray]


class SnapshotError(Exception):
    """A file or directory of snapshots is damaged or invalid; the message names the file."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A stored member of an ensemble: when in training its weights were saved.

    A value is `None` if it is not known, as for weights from other training.

    Attributes:
        index: Its number among the members, from 0: `ensemble[index]` is its model.
        cycle: Number of the cycle that it ends, from 0, counted over all calls of `fit`.
        epoch: Number of the epoch that it ends, from 0, counted over all calls of `fit`.
        step: Training steps (batches) taken when it was saved.
        learning_rate: The learning rate of the last of these steps.
        metrics: The training and validation metrics of its epoch, by name.
        chain: In an ensemble that was merged of several runs, the number of its run, from 0.
            `cycle`, `epoch` and `step` are counted within that run.
        is_annealed: Whether the learning rate had reached its floor. It had not in the earlier
            snapshots of a run that `cycles="auto"` leaves one cosine.
    """

    index: int
    cycle: int | None = None
    epoch: int | None = None
    step: int | None = None
    learning_rate: float | None = None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    chain: int | None = None
    is_annealed: bool = True


def annealed(snapshots: Sequence[Snapshot]) -> int | list[int] | None:
    """The members that predict until some are chosen: those whose rate had reached its floor.

    Returns:
        As `Learned.members`: `None` for all, the number of the last ones, or a list.
    """
    indices = [i for i, s in enumerate(snapshots) if s.is_annealed] or [len(snapshots) - 1]
    if len(indices) >= len(snapshots):
        return None
    are_last = indices[0] == len(snapshots) - len(indices)
    return len(indices) if are_last else indices


def renumbered(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """The snapshots with `index` set to their position in the list."""
    return [dataclasses.replace(s, index=index) for index, s in enumerate(snapshots)]
