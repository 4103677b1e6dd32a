"""The members of an ensemble, run in one graph or one after another."""

import dataclasses
import errno
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
from snapshot_ensemble.storage.interrupts import interrupts_deferred
from snapshot_ensemble.storage.record import Learned
from snapshot_ensemble.storage.snapshot import Weights
from snapshot_ensemble.storage.store import SnapshotStore
from snapshot_ensemble.storage.weight_delta import bytes_of

# In bytes: how much memory the members' weights may take at once.
MEMORY_LIMIT = 2**28

# The errors of a directory that may only be read.
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


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


class MemberPool:
    """The members of one model, whose weights are in a store.

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
        self._forget()

    def _forget(self, built_for: Any = None) -> None:
        """Drops all graphs; `built_for` identifies the members and metrics of the next ones."""
        self._tensors: dict[int, list[Any]] = {}
        # For each index in `model.weights`, the first array and the tensor made from it.
        self._first: dict[int, tuple[weakref.ref[np.ndarray], Any]] = {}
        self._models: dict[Any, MembersModel] = {}
        self._built_for: Any = built_for

    def __len__(self) -> int:
        return len(self.store.snapshots)

    @property
    def learned(self) -> Learned:
        """What was learned about the present members."""
        return self.store.record.learned

    def learn(self, **changes: Any) -> None:
        """Changes what was learned and saves it with the snapshots."""
        record, before = self.store.record, self.learned
        with interrupts_deferred():
            record.learned = dataclasses.replace(before, **changes)
            try:
                self.store.commit()
            except OSError as error:
                if error.errno not in NOT_WRITABLE:
                    record.learned = before
                    raise
                warnings.warn(
                    f"{', '.join(changes)} will not be saved: {error} Save the ensemble elsewhere "
                    "with `save`.",
                    stacklevel=3,
                )
            except BaseException:
                record.learned = before
                raise

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
        return [self.store.weights(self.model, index) for index in indices]

    def member(self, index: int) -> keras.Model:
        """One member as a separate model."""
        return build_member(self.model, self.store.weights(self.model, index))

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
        self._forget()
        with self.model.distribute_strategy.scope():
            member = blank_member(self.model)
        outputs = []
        for index in combiner.members:
            self.store.put(member, self.model, index)
            outputs.append(member.predict(x, **options))
        return in_blocks(combiner.combine, outputs)

    def is_too_large(self, indices: Sequence[int]) -> bool:
        """Whether these members' weights exceed the memory limit; shared ones count once."""
        trained, frozen = bytes_of(self.model)
        return len(indices) * trained + frozen > self.memory_limit

    def members_model(self, combiner: Combiner, kind: type[MembersModel] = MembersModel) -> Any:
        """A model that runs the members; cached by the members and the combiner's name."""
        # A new `compile` changes the metrics and perhaps the loss.
        built_for = (self.store.version, compilation(self.model))
        if self._built_for != built_for:
            self._forget(built_for)
        key = (tuple(combiner.members), combiner.name)
        if key not in self._models:
            for index in sorted(set(combiner.members) - set(self._tensors)):
                self._tensors[index] = self._as_tensors(self.store.weights(self.model, index))
            with self.model.distribute_strategy.scope():
                weights = [self._tensors[index] for index in combiner.members]
                model = kind(self.model, weights, combiner.combine)
                compile_like(model, self.model)
            # Evict graphs built for older weights or another temperature.
            for other in list(self._models):
                if (other[0], other[1][0]) == (key[0], key[1][0]):
                    del self._models[other]
            self._models[key] = model
        return self._models[key]

    def _as_tensors(self, arrays: Weights) -> list[Any]:
        """Arrays as tensors; an array that members share becomes one and the same tensor."""
        tensors = []
        for i, array in enumerate(arrays):
            known, tensor = self._first.get(i, (None, None))
            if known is None or known() is not array:
                tensor = ops.convert_to_tensor(array)
                if isinstance(array, np.ndarray):  # NumPy scalars have no weak references.
                    self._first.setdefault(i, (weakref.ref(array), tensor))
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
