"""Graphs of members, built once and used by all threads."""

import dataclasses
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from snapshot_ensemble.inference.early_exit import Stages
from snapshot_ensemble.inference.members_model import MembersModel
from snapshot_ensemble.keras_compat.stateless_call import OwnStates
from snapshot_ensemble.storage.snapshot import Weights


class Combiner(NamedTuple):
    """Which members run, and how their outputs are combined.

    Attributes:
        members: The indices of the members.
        name: The cache key of the graph, together with the members: equal names mean equal
            results. Its first item is the kind of result.
        combine: Takes the list of the members' outputs: arrays, tensors or symbolic tensors.
        rows: The most rows that members run on at once; None for all rows of a batch.
        stages: The stages of a cascade, in which not all members run for each row; or None.
    """

    members: list[int]
    name: tuple[Any, ...]
    combine: Callable[[list[Any]], Any]
    rows: int | None = None
    stages: Stages | None = None


@dataclasses.dataclass(eq=False)
class Graphs:
    """The graphs built of some members, and what they were built of.

    Attributes:
        built_for: Identifies the members and metrics.
        tensors: Each member's weights, by its index.
        states: Each member's states, by its index.
        first: For each index in `model.weights`, the first array and the tensor made from it.
        models: By the members and the combiner's name.
    """

    built_for: Any = None
    tensors: dict[int, list[Any]] = dataclasses.field(default_factory=dict)
    states: dict[int, OwnStates] = dataclasses.field(default_factory=dict)
    first: dict[int, tuple[weakref.ref[np.ndarray], Any]] = dataclasses.field(default_factory=dict)
    models: dict[Any, MembersModel] = dataclasses.field(default_factory=dict)

    def keep(self, key: Any, model: MembersModel) -> None:
        """Adds a model, in place of one for other member weights or another temperature."""
        size = 2 if key[1][0] in ("apart", "evaluate") else 1
        for other in list(self.models):
            if (other[0], other[1][:size], other[2]) == (key[0], key[1][:size], key[2]):
                del self.models[other]
        self.models[key] = model


class GraphCache:
    """The latest graphs, for all threads.

    The lock is held while graphs are built, not while they run.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.graphs = Graphs()


def key_of(combiner: Combiner) -> tuple[Any, ...]:
    """What graphs are kept by."""
    return tuple(combiner.members), combiner.name, combiner.rows


def as_tensors(arrays: Weights, first: dict[int, tuple[weakref.ref[np.ndarray], Any]]) -> list[Any]:
    """Arrays as tensors; an array that members share becomes one and the same tensor."""
    tensors = []
    for i, array in enumerate(arrays):
        known, tensor = first.get(i, (None, None))
        if known is None or known() is not array:
            tensor = ops.convert_to_tensor(array)
            if isinstance(array, np.ndarray):  # NumPy scalars have no weak references.
                first.setdefault(i, (weakref.ref(array), tensor))
        tensors.append(tensor)
    return tensors
