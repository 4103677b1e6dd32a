"""How members run: all in one graph, or one after another."""

import dataclasses
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from snapshot_ensemble.checks import real_number, whole_number
from snapshot_ensemble.inference.batch_size import are_arrays, batch_size_for
from snapshot_ensemble.inference.cloning import blank_member, build_member, compile_like
from snapshot_ensemble.inference.combining import (
    check_combine,
    check_meanings,
    check_members,
    check_weights,
    combine_outputs,
    weights_of,
)
from snapshot_ensemble.inference.members_model import MembersModel, graph_of
from snapshot_ensemble.inference.output_specs import Output, check_task, read_outputs
from snapshot_ensemble.storage.snapshot import Snapshot, SnapshotStore, Weights
from snapshot_ensemble.storage.weight_delta import bytes_of

# In bytes: how much memory the members' weights may take at once.
MEMORY_LIMIT = 2**28


@dataclasses.dataclass(frozen=True)
class Learned:
    """What was learned on held-out data about the members that there are."""

    weights: np.ndarray | None = None
    temperature: float = 1.0
    members: int | list[int] | None = None


class Runner:
    """Members of one model, kept in a store, that run together, and what was learned about them.

    Args:
        model: The compiled model whose weights the members are.
        task: As for `SnapshotEnsemble`.
        store: Where the members are.
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
        self.model = model
        self.task = task
        self._store = store
        self._learned = Learned()
        self._learned_of: Any = None  # The state of the store that it belongs to.
        self._tensors: dict[int, list[Any]] = {}
        self._first: dict[int, tuple[weakref.ref[np.ndarray], Any]] = {}  # By place in a model.
        self._models: dict[Any, MembersModel] = {}
        self._built_of: Any = None  # The state of the store that they were made of.

    # The members

    @property
    def snapshots(self) -> list[Snapshot]:
        """A `Snapshot` for each member, oldest first."""
        return list(self._store.snapshots)

    def __len__(self) -> int:
        return len(self._store.snapshots)

    def __getitem__(self, index: int) -> keras.Model:
        weights = self._store.weights(self.model, range(len(self))[operator.index(index)])
        return build_member(self.model, weights)

    def __iter__(self) -> Iterator[keras.Model]:
        return (self[i] for i in range(len(self)))

    def _members_now(self) -> Any:
        """Another value whenever the members are others."""
        return self._store, self._store.version

    # What was learned about them

    @property
    def weights(self) -> np.ndarray | None:
        """The weights of `combine="weighted"`.

        One a member, float64, at least 0 and summing to 1; `None` until they are set. They go
        when the members change.
        """
        weights = self._what_is_learned().weights
        return None if weights is None else weights.copy()

    @weights.setter
    def weights(self, weights: Any) -> None:
        self._learn(weights=None if weights is None else check_weights(weights, len(self)))

    @property
    def temperature(self) -> float:
        """What `calibrate` learned; 1.0 changes nothing. It goes when the members change."""
        return self._what_is_learned().temperature

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        self._learn(temperature=real_number("temperature", temperature, positive=True))

    @property
    def members(self) -> int | list[int] | None:
        """The members that predictions combine where nobody says.

        `None` for all, an int for the last that many, or a list of indices. `fit` chooses them if
        it has validation data, and so does `choose_members`. It goes when the members change.
        """
        return self._what_is_learned().members

    @members.setter
    def members(self, members: int | Sequence[int] | None) -> None:
        if members is not None:
            chosen = self._chosen(members)
            members = len(chosen) if np.ndim(members) == 0 else chosen
        self._learn(members=members)

    def _what_is_learned(self) -> Learned:
        return self._learned if self._learned_of == self._members_now() else Learned()

    def _learn(self, **what: Any) -> None:
        before = self._learned, self._learned_of
        self._learned = dataclasses.replace(self._what_is_learned(), **what)
        self._learned_of = self._members_now()
        try:
            self._keep_learned()
        except BaseException:
            self._learned, self._learned_of = before
            raise

    def _keep_learned(self) -> None:
        """Where it is to be kept beyond memory, that happens here."""

    # Running them

    def _combined(self, combine: str | None, members: Any) -> MembersModel:
        """The model that runs the members. None: not combined."""
        return self._model_of(*self._way(combine, members))

    def _way(
        self, combine: str | None, members: Any
    ) -> tuple[list[int], Any, Callable[[list[Any]], Any]]:
        """The members to run, a name for what is made of their outputs, and what makes it."""
        chosen, weights = self._choice(combine, members)
        how = (combine, None if weights is None else tuple(weights), self.temperature)
        return chosen, how, self._put_together(combine, weights)

    def _predict(
        self,
        x: Any,
        chosen: list[int],
        how: Any,
        put_together: Callable[[list[Any]], Any],
        **run: Any,
    ) -> Any:
        """Predicts with all members at once or, where they are too large, one after another."""
        run |= batch_size_for(self.model, x, **run)
        if not self._is_too_large(chosen) or not are_arrays(x):
            return self._model_of(chosen, how, put_together).predict(x, **run)
        self._tensors, self._models, self._first, self._built_of = {}, {}, {}, None
        outputs = []
        with self.model.distribute_strategy.scope():
            member = blank_member(self.model)
        for i in chosen:
            self._store.put(member, self.model, i)
            outputs.append(member.predict(x, **run))
        found = put_together(outputs)
        return keras.tree.map_structure(ops.convert_to_numpy, found)

    def _is_too_large(self, chosen: list[int]) -> bool:
        """Whether these members' weights take more memory than they may; shared ones count once."""
        trained, frozen = bytes_of(self.model)
        return len(chosen) * trained + frozen > self.memory_limit

    def _model_of(
        self,
        chosen: list[int],
        how: Any,
        put_together: Callable[[list[Any]], Any],
        kind: type[MembersModel] = MembersModel,
    ) -> Any:
        """A model that runs members; built once for each choice of them and name of a way."""
        # A new `compile` brings other metrics, and maybe another loss.
        state = (*self._members_now(), self.model._compile_config)
        if self._built_of != state:
            self._tensors, self._models, self._first, self._built_of = {}, {}, {}, state
        key = (how, tuple(chosen))
        if key not in self._models:
            for i in sorted(set(chosen) - set(self._tensors)):
                self._tensors[i] = self._as_tensors(self._store.weights(self.model, i))
            with self.model.distribute_strategy.scope():
                model = kind(self.model, [self._tensors[i] for i in chosen], put_together)
                compile_like(model, self.model)
            # A model for another temperature or other weights has had its day.
            for old in [k for k in self._models if k[1] == key[1] and k[0][0] == key[0][0]]:
                del self._models[old]
            self._models[key] = model
        return self._models[key]

    def _as_tensors(self, arrays: Weights) -> list[Any]:
        """Arrays as tensors; one that members share becomes one tensor, by which that is seen."""
        tensors = []
        for place, array in enumerate(arrays):
            known, tensor = self._first.get(place, (None, None))
            if known is None or known() is not array:
                tensor = ops.convert_to_tensor(array)
                if isinstance(array, np.ndarray):  # And no number.
                    self._first.setdefault(place, (weakref.ref(array), tensor))
            tensors.append(tensor)
        return tensors

    def _parts(
        self, combine: str, members: Any
    ) -> tuple[list[Weights], Callable[[list[Any]], Any]]:
        """What one model is made of: the members' weights, and what combines their outputs."""
        chosen, weights = self._choice(combine, members)
        arrays = [self._store.weights(self.model, i) for i in chosen]
        return arrays, self._put_together(combine, weights)

    def _choice(self, combine: str | None, members: Any) -> tuple[list[int], np.ndarray | None]:
        """The members to run and, for a weighted combination, their weights; all checked."""
        if combine is not None:
            check_combine(combine)
        if combine not in (None, "weighted"):  # Which has a weight for each.
            members = self._or_default(members)
        chosen, weights = self._chosen(members), None
        graph = graph_of(self.model)
        if combine is not None and graph is not None:
            # Of a subclass, the outputs are known only when it runs.
            check_meanings(combine, self._read(graph._outputs_struct))
        if combine == "weighted":
            weights = weights_of(self.weights, chosen)
            # Who has no say need not be run.
            chosen = [member for member, weight in zip(chosen, weights, strict=True) if weight]
            weights = weights[weights > 0]
        return chosen, weights

    def _put_together(
        self, combine: str | None, weights: np.ndarray | None
    ) -> Callable[[list[Any]], Any]:
        """What makes one output of the members' outputs; of arrays, tensors or symbols."""
        temperature = self.temperature

        def put_together(outputs: list[Any]) -> Any:
            if combine is None:
                return keras.tree.map_structure(lambda *o: ops.stack(o, axis=1), *outputs)
            meanings = self._read(outputs[0])
            return combine_outputs(outputs, combine, meanings, weights, temperature)

        return put_together

    def _or_default(self, members: Any) -> Any:
        return self.members if members is None else members

    def _chosen(self, members: Any) -> list[int]:
        if not len(self):
            raise ValueError(
                "The ensemble has no members yet. Call `fit`, or make it with `load` or "
                "`from_weights`."
            )
        return check_members(members, len(self))

    def _read(self, outputs: Any) -> list[Output]:
        return read_outputs(self.model, self.task, outputs)


def check_model(model: Any) -> None:
    """Raises an error unless it is a compiled Keras model."""
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
