"""The members of an ensemble, run in one graph or one after another."""

import contextlib
import copy
import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import keras
import numpy as np
from keras import ops

from snapshot_ensemble.checks import whole_number
from snapshot_ensemble.inference.batch_size import are_arrays, batch_size_for
from snapshot_ensemble.inference.blocks import in_blocks
from snapshot_ensemble.inference.cloning import blank_member, build_member, compile_like
from snapshot_ensemble.inference.combining import (
    check_combine,
    check_meanings,
    check_members,
    combine_outputs,
    weights_of,
)
from snapshot_ensemble.inference.members_model import MembersModel
from snapshot_ensemble.inference.output_specs import Output, check_task, read_outputs
from snapshot_ensemble.keras_compat.compile_arguments import compilation
from snapshot_ensemble.keras_compat.layer_graph import graph_of
from snapshot_ensemble.storage.record import Learned
from snapshot_ensemble.storage.snapshot import Weights
from snapshot_ensemble.storage.store import SnapshotStore
from snapshot_ensemble.storage.view import View
from snapshot_ensemble.storage.weight_delta import bytes_of

# In bytes: how much memory the members' weights may take at once.
MEMORY_LIMIT = 2**28


class PredictArguments(NamedTuple):
    """The arguments of `model.predict` that all methods that run over data share."""

    batch_size: int | None = None
    verbose: Any = "auto"
    steps: int | None = None
    callbacks: Any = None


class Combiner(NamedTuple):
    """Which members run, and how their outputs are combined.

    Attributes:
        members: The indices of the members.
        name: The cache key of the graph, together with the members: equal names mean equal
            results. Its first item is the kind of result.
        combine: Takes the list of the members' outputs: arrays, tensors or symbolic tensors.
    """

    members: list[int]
    name: tuple[Any, ...]
    combine: Callable[[list[Any]], Any]


@dataclasses.dataclass(eq=False)
class Graphs:
    """The graphs built of some members, and what they were built of.

    Attributes:
        built_for: Identifies the members and metrics.
        tensors: Each member's weights, by its index.
        first: For each index in `model.weights`, the first array and the tensor made from it.
        models: By the members and the combiner's name.
    """

    built_for: Any = None
    tensors: dict[int, list[Any]] = dataclasses.field(default_factory=dict)
    first: dict[int, tuple[weakref.ref[np.ndarray], Any]] = dataclasses.field(default_factory=dict)
    models: dict[Any, MembersModel] = dataclasses.field(default_factory=dict)


class GraphCache:
    """The latest graphs, for all threads.

    The lock is held while graphs are built, not while they run.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.graphs = Graphs()


class MemberPool:
    """The members of one model, whose weights are in a store.

    The members of a pool are those that the store has, and may change from one call to the next
    if another thread trains. Those of `now()` stay the same.

    Args:
        model: The compiled model whose weights the members are.
        task: As for `SnapshotEnsemble`.
        store: Holds the members' weights.
        memory_limit: As for `SnapshotEnsemble`.
    """

    def __init__(
        self,
        model: keras.Model,
        task: Any,
        store: SnapshotStore,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        check_model(model)
        check_task(model, task)
        self.memory_limit = whole_number("memory_limit", memory_limit, 0)
        self.model, self.task, self.store = model, task, store
        self._cache = GraphCache()
        self.fixed: View | None = None

    def now(self) -> Self:
        """The pool with the members that there are now."""
        pool = copy.copy(self)
        pool.fixed = self.store.view()
        return pool

    @property
    def view(self) -> View:
        """The members: always the same, or those that the store has at this moment."""
        return self.store.view() if self.fixed is None else self.fixed

    def __len__(self) -> int:
        return len(self.view.snapshots)

    @property
    def learned(self) -> Learned:
        """What was learned about the members."""
        return self.view.learned

    def learn(self, **changes: Any) -> None:
        """Changes what was learned about the members, and saves it with the snapshots.

        It is forgotten if the store has other members by now.
        """
        self.store.learn(self.view.version, **changes)

    # Selecting members

    def indices(self, members: Any = None) -> list[int]:
        """The indices that an argument `members` selects; `None` selects all.

        Raises:
            ValueError: If there are no members, or the argument is invalid.
        """
        if not len(self):
            raise ValueError(
                "The ensemble has no members yet. Call `fit`, or make it with `load` or "
                "`from_weights`."
            )
        return check_members(members, len(self))

    def default_indices(self, members: Any = None) -> list[int]:
        """Like `indices`, but `None` selects the members that predict by default."""
        return self.indices(self.learned.members if members is None else members)

    def weights(self, indices: Sequence[int]) -> list[Weights]:
        """The weights of members, each in the order of `model.weights`."""
        view = self.view
        return [view.weights(self.model, index) for index in indices]

    def member(self, index: int) -> keras.Model:
        """One member as a separate model."""
        return build_member(self.model, self.view.weights(self.model, index))

    # Combining their outputs

    def meanings(self, outputs: Any) -> list[Output]:
        """The meaning of each flat output."""
        return read_outputs(self.model, self.task, outputs)

    def combination(self, combine: str, members: Any) -> tuple[list[int], np.ndarray | None]:
        """Checks a combination; returns its members and, if it is weighted, their weights."""
        check_combine(combine)
        indices = self.indices(members) if combine == "weighted" else self.default_indices(members)
        graph = graph_of(self.model)
        if graph is not None:
            # The outputs of a subclassed model are known only once it runs.
            check_meanings(combine, self.meanings(graph.output))
        if combine != "weighted":
            return indices, None
        learned = self.learned.weights
        weights = weights_of(None if learned is None else np.asarray(learned), indices)
        # Members of weight 0 need not run.
        indices = [index for index, weight in zip(indices, weights, strict=True) if weight]
        return indices, weights[weights > 0]

    def combiner(self, combine: str, members: Any) -> Combiner:
        """A combiner for one of the named combinations."""
        indices, weights = self.combination(combine, members)
        temperature = self.learned.temperature
        name = (combine, None if weights is None else tuple(weights), temperature)

        def combined(outputs: list[Any]) -> Any:
            return combine_outputs(
                outputs, combine, self.meanings(outputs[0]), weights, temperature
            )

        return Combiner(indices, name, combined)

    def side_by_side(self, members: Any) -> Combiner:
        """A combiner that stacks the members' outputs on the second axis."""

        def stack(outputs: list[Any]) -> Any:
            return keras.tree.map_structure(lambda *o: ops.stack(o, axis=1), *outputs)

        return Combiner(self.indices(members), ("side by side",), stack)

    # Running them

    def predict(self, x: Any, combiner: Combiner, arguments: PredictArguments) -> Any:
        """Predicts with all members at once or, if they are too large, one after another."""
        options = arguments._asdict()
        options |= batch_size_for(self.model, x, **options)
        if not self.is_too_large(combiner.members) or not are_arrays(x):
            return self.members_model(combiner).predict(x, **options)
        self._cache.graphs = Graphs()  # Drops all weights in memory.
        with self.model.distribute_strategy.scope():
            member = blank_member(self.model)
        outputs, view = [], self.view
        for index in combiner.members:
            view.put(member, self.model, index)
            outputs.append(member.predict(x, **options))
        return in_blocks(combiner.combine, outputs)

    def is_too_large(self, indices: Sequence[int]) -> bool:
        """Whether these members' weights exceed the memory limit; shared ones count once."""
        trained, frozen = bytes_of(self.model)
        return len(indices) * trained + frozen > self.memory_limit

    def members_model(self, combiner: Combiner, kind: type[MembersModel] = MembersModel) -> Any:
        """A model that runs the members; cached by the members and the combiner's name.

        Threads may share it to predict, but not to evaluate.
        """
        view, key = self.view, _key(combiner)
        graphs = self._cache.graphs
        model = graphs.models.get(key) if graphs.built_for == self._built_for(view) else None
        if model is None:
            with self._cache.lock:
                graphs = self._graphs(view)
                if key not in graphs.models:
                    _keep(graphs, key, self._build(graphs, view, combiner, kind))
                model = graphs.models[key]
        return model

    @contextlib.contextmanager
    def evaluator(self, combiner: Combiner) -> Iterator[MembersModel]:
        """Lends a model that runs the members to one thread, since metrics add up inside it."""
        combiner = combiner._replace(name=("evaluate", *combiner.name))
        view, key = self.view, _key(combiner)
        with self._cache.lock:
            graphs = self._graphs(view)
            model = graphs.models.pop(key, None) or self._build(graphs, view, combiner)
        yield model
        with self._cache.lock:
            _keep(graphs, key, model)

    def _built_for(self, view: View) -> Any:
        # A new `compile` changes the metrics and perhaps the loss.
        return view.version, compilation(self.model)

    def _graphs(self, view: View) -> Graphs:
        """The graphs that were built for these members and the compiled metrics."""
        built_for = self._built_for(view)
        if self._cache.graphs.built_for != built_for:
            self._cache.graphs = Graphs(built_for)
        return self._cache.graphs

    def _build(
        self,
        graphs: Graphs,
        view: View,
        combiner: Combiner,
        kind: type[MembersModel] = MembersModel,
    ) -> MembersModel:
        for index in sorted(set(combiner.members) - set(graphs.tensors)):
            graphs.tensors[index] = _as_tensors(view.weights(self.model, index), graphs.first)
        with self.model.distribute_strategy.scope():
            weights = [graphs.tensors[index] for index in combiner.members]
            model = kind(self.model, weights, combiner.combine)
            compile_like(model, self.model)
        return model


def _key(combiner: Combiner) -> tuple[Any, ...]:
    return tuple(combiner.members), combiner.name


def _keep(graphs: Graphs, key: Any, model: MembersModel) -> None:
    """Adds a model, in place of one for other member weights or another temperature."""
    size = 2 if key[1][0] == "evaluate" else 1
    for other in list(graphs.models):
        if (other[0], other[1][:size]) == (key[0], key[1][:size]):
            del graphs.models[other]
    graphs.models[key] = model


def _as_tensors(
    arrays: Weights, first: dict[int, tuple[weakref.ref[np.ndarray], Any]]
) -> list[Any]:
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


def check_model(model: Any) -> None:
    """Raises an error unless `model` is a compiled Keras model."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a `keras.Model`. Received: model={model!r}")
    if not model.compiled or model.optimizer is None:
        raise ValueError(
            "`model` must be compiled, so that it can be trained. "
            f"Received: model={model.name!r}, not compiled. Call `model.compile(...)` first."
        )


def check_built(model: keras.Model) -> None:
    """Raises an error unless the model has weights."""
    if not model.built or not model.weights:
        raise ValueError(
            "`model` must be built, so that it has weights to load. "
            f"Received: model={model.name!r}, not built. Call it on a batch first."
        )
