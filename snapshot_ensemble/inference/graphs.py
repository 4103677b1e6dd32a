"""Graphs of members, built once and used by all threads."""

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from snapshot_ensemble.inference.cloning import compile_like
from snapshot_ensemble.inference.early_exit import Stages
from snapshot_ensemble.inference.member_states import own_states
from snapshot_ensemble.inference.members_model import MembersModel
from snapshot_ensemble.inference.one_by_one import OneByOne
from snapshot_ensemble.keras_compat.compile_arguments import compilation
from snapshot_ensemble.keras_compat.stateless_call import OwnStates
from snapshot_ensemble.storage.snapshot import Weights
from snapshot_ensemble.storage.view import View


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
        one_by_one: Has the weights of a single member; None before its first use, and while a
            thread uses it.
    """

    built_for: Any = None
    tensors: dict[int, list[Any]] = dataclasses.field(default_factory=dict)
    states: dict[int, OwnStates] = dataclasses.field(default_factory=dict)
    first: dict[int, tuple[weakref.ref[np.ndarray], Any]] = dataclasses.field(default_factory=dict)
    models: dict[Any, MembersModel] = dataclasses.field(default_factory=dict)
    one_by_one: OneByOne | None = None

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

    Args:
        model: The model whose weights the members are.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self.lock = threading.RLock()
        self.graphs = Graphs()

    def built_for(self, view: View) -> Any:
        """Identifies the members and the compiled metrics."""
        # A new `compile` changes the metrics and perhaps the loss.
        return view.version, compilation(self._model)

    def graphs_of(self, view: View) -> Graphs:
        """The graphs that were built for these members and the compiled metrics."""
        built_for = self.built_for(view)
        if self.graphs.built_for != built_for:
            self.graphs = Graphs(built_for)
        return self.graphs

    def emptied(self, view: View) -> Graphs:
        """Like `graphs_of`, with the members' states but without weights and models."""
        graphs = self.graphs_of(view)
        self.graphs = Graphs(graphs.built_for, states=graphs.states)
        return self.graphs

    def build(
        self, graphs: Graphs, view: View, combiner: Combiner, kind: type[MembersModel]
    ) -> MembersModel:
        """A model that runs the members; the graphs keep their weights."""
        for index in sorted(set(combiner.members) - set(graphs.tensors)):
            graphs.tensors[index] = as_tensors(view.weights(self._model, index), graphs.first)
        states = self._states(graphs, combiner.members)
        with self._model.distribute_strategy.scope():
            weights = [graphs.tensors[index] for index in combiner.members]
            own = [states[index].values for index in combiner.members]
            model = kind(
                self._model, weights, combiner.combine, own, combiner.rows, combiner.stages
            )
            compile_like(model, self._model)
            # XLA gives wrong results where a number of rows is known only as the graph runs.
            if combiner.stages is not None:
                model.jit_compile = False
        return model

    @contextlib.contextmanager
    def one_by_one(
        self, view: View, combiner: Combiner, kind: type[MembersModel]
    ) -> Iterator[Callable[[int, Callable[[Any], Any]], Any]]:
        """Lends a model that is one member after another; all other weights are dropped.

        Args:
            view: Holds the members.
            combiner: Gets a list of one member's outputs.
            kind: The class of the model.

        Yields:
            A function of a member's index and of a function of the model, which it calls while
            the model is this member.
        """
        with self.lock:
            one_by_one = self.graphs_of(view).one_by_one or OneByOne(self._model)
            graphs = self.emptied(view)
            states = self._states(graphs, combiner.members)
            model = one_by_one.model(combiner.name, combiner.combine, kind)
        yield lambda index, use: one_by_one.run(view, index, states[index], lambda: use(model))
        with self.lock:
            graphs.one_by_one = one_by_one

    def _states(self, graphs: Graphs, indices: Sequence[int]) -> dict[int, OwnStates]:
        """The states of all members that have predicted, and of these members."""
        with self._model.distribute_strategy.scope():
            for index in sorted(set(indices) - set(graphs.states)):
                graphs.states[index] = own_states(self._model, index)
        return graphs.states


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
