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
    """

    index: int
    cycle: int | None = None
    epoch: int | None = None
    step: int | None = None
    learning_rate: float | None = None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    chain: int | None = None


def renumbered(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """The snapshots with `index` set to their position in the list."""
    return [dataclasses.replace(s, index=index) for index, s in enumerate(snapshots)]
