"""The members of an ensemble, run in one graph or one after another."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import keras
import numpy as np
from keras import ops

from snapshot_ensemble.checks import whole_number
from snapshot_ensemble.inference.batch_size import are_arrays, batch_size_for, batches_at_once
from snapshot_ensemble.inference.blocks import in_blocks
from snapshot_ensemble.inference.cloning import (
    build_member,
    compile_like,
    separate_member,
    states_of,
)
from snapshot_ensemble.inference.combining import (
    check_combine,
    check_meanings,
    check_members,
    combine_outputs,
    weights_of,
)
from snapshot_ensemble.inference.early_exit import COUNTS, Stages
from snapshot_ensemble.inference.graphs import Combiner, GraphCache, Graphs, as_tensors, key_of
from snapshot_ensemble.inference.member_states import (
    copy_states,
    own_states,
    reset_recurrent_states,
)
from snapshot_ensemble.inference.members_model import MembersModel
from snapshot_ensemble.inference.model_checks import check_model
from snapshot_ensemble.inference.output_specs import (
    check_task,
    known_outputs,
    names_of,
    read_outputs,
)
from snapshot_ensemble.inference.passing import compared, kept_apart, refusal_in
from snapshot_ensemble.inference.rebuilt import computes_the_same
from snapshot_ensemble.inference.sample import first_rows
from snapshot_ensemble.inference.task_words import Output
from snapshot_ensemble.keras_compat.compile_arguments import compilation
from snapshot_ensemble.keras_compat.graphs import AssertionInGraphError, outside_graphs
from snapshot_ensemble.keras_compat.stateless_call import OwnStates
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
        # A few rows of inputs that `fit` has seen. They are never written to a file.
        self.sample: Any = None

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
        if "members" in changes and self.learned.early_exit is not None:
            changes["early_exit"] = None  # Its order is that of the members that predict.
        self.store.learn(self.view.version, **changes)

    def keep_sample(self, batch: Any) -> None:
        """Keeps the first rows of a batch that `fit` trains on."""
        # Data may yield anything; without a sample, a batch is made up.
        with contextlib.suppress(Exception):
            self.sample = first_rows(self.model, batch)

    def is_faithful(self, model: keras.Model, weights: Weights, rebuilt: keras.Model) -> bool:
        """Whether a model that was made anew gives the outputs of the model with these weights."""
        return computes_the_same(model, weights, rebuilt, self.sample)

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
        weights = self.view.weights(self.model, index)
        return build_member(self.model, weights, index, self.sample)

    # Combining their outputs

    def meanings(self, outputs: Any) -> list[Output]:
        """The meaning of each flat output."""
        return read_outputs(self.model, self.task, outputs)

    def combination(self, combine: str, members: Any) -> tuple[list[int], np.ndarray | None]:
        """Checks a combination; returns its members and, if it is weighted, their weights."""
        check_combine(combine)
        indices = self.indices(members) if combine == "weighted" else self.default_indices(members)
        outputs = known_outputs(self.model)
        if outputs is not None:
            # The outputs of a subclassed model are known only once it runs.
            check_meanings(combine, self.meanings(outputs))
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
            meanings, names = self.meanings(outputs[0]), names_of(self.model, outputs[0])
            return combine_outputs(outputs, combine, meanings, weights, temperature, names)

        return Combiner(indices, name, combined)

    def cascade(self) -> Combiner:
        """A combiner of the mean, in which members run in turn until a row is settled.

        Raises:
            ValueError: If `fit_early_exit` has not been called for these members.
        """
        self.indices()
        early_exit, temperature = self.learned.early_exit, self.learned.temperature
        if early_exit is None:
            raise ValueError(
                "`early_exit=True` needs thresholds. Received: early_exit=True, but none learned "
                "for these members. Call `fit_early_exit(x, y)` on held-out data first."
            )
        temperatures = [*early_exit.temperatures, temperature]

        def combined(stage: int, outputs: list[Any]) -> Any:
            meanings, names = self.meanings(outputs[0]), names_of(self.model, outputs[0])
            return combine_outputs(outputs, "mean", meanings, None, temperatures[stage], names)

        name = ("early exit", repr(early_exit), temperature)
        stages = Stages(early_exit, combined, self.meanings)
        return Combiner(early_exit.order, name, lambda outputs: outputs, stages=stages)

    def side_by_side(self, members: Any) -> Combiner:
        """A combiner that stacks the members' outputs on the second axis."""

        def stack(outputs: list[Any]) -> Any:
            return keras.tree.map_structure(lambda *o: ops.stack(o, axis=1), *outputs)

        return Combiner(self.indices(members), ("side by side",), stack)

    # Running them

    def predict_combined(self, x: Any, combiner: Combiner, arguments: PredictArguments) -> Any:
        """Like `predict`; raises `ValueError` if outputs that are passed through differ."""
        result = self.predict(x, self._apart(combiner), arguments)
        return compared(result, lambda: names_of(self.model, result["combined"]))

    def call(self, inputs: Any, combiner: Combiner) -> Any:
        """The combined outputs for one batch, as tensors; else like `predict_combined`."""
        return self.caller(combiner)(inputs)

    def caller(self, combiner: Combiner) -> Callable[[Any], Any]:
        """A function like `call`, which may also be called first inside a graph."""
        model = self.members_model(self._apart(combiner))

        def call(inputs: Any) -> Any:
            result = model.run(inputs)
            return compared(result, lambda: names_of(self.model, result["combined"]))

        return call

    def predict_early(self, x: Any, arguments: PredictArguments) -> tuple[Any, Any]:
        """The outputs of the cascade, and how many members ran for each row."""
        with self._refusals():
            result = self.predict(x, self.cascade(), arguments)
        return result["outputs"], result[COUNTS]

    def call_early(self, inputs: Any) -> tuple[Any, Any]:
        """Like `predict_early` for one batch, as tensors."""
        with self._refusals():
            result = self.members_model(self.cascade()).run(inputs)
        return result["outputs"], result[COUNTS]

    def _apart(self, combiner: Combiner) -> Combiner:
        def combine(outputs: list[Any]) -> Any:
            return kept_apart(combiner.combine, outputs, self.meanings(outputs[0]))

        return combiner._replace(name=("apart", *combiner.name), combine=combine)

    def predict(self, x: Any, combiner: Combiner, arguments: PredictArguments) -> Any:
        """Predicts with all members at once or, if they are too large, one after another."""
        options = arguments._asdict()
        options |= batch_size_for(self.model, x, **options)
        if not self.is_too_large(combiner.members) or not are_arrays(x):
            if (count := batches_at_once(self.model, x, **options)) > 1:
                combiner = combiner._replace(rows=options["batch_size"])
                options["batch_size"] *= count
            return self.members_model(combiner).predict(x, **options)
        predict = self._predicts_one(x, combiner.members, options)
        if combiner.stages is not None:
            result = combiner.stages.run(lambda k, rows: predict(combiner.members[k], rows), x)
            return keras.tree.map_structure(np.asarray, result)
        return in_blocks(combiner.combine, [predict(index, x) for index in combiner.members])

    def _predicts_one(
        self, x: Any, indices: Sequence[int], options: dict[str, Any]
    ) -> Callable[[int, Any], Any]:
        """A function of a member's index and inputs: one model gets the weights of each in turn."""
        view, sample = self.view, self.sample
        with self._cache.lock:
            states = self._states(self._graphs(view), indices)
            # Drops all weights in memory.
            self._cache.graphs = Graphs(self._cache.graphs.built_for, states=states)
        if sample is None:
            sample = first_rows(self.model, (x,))
        with self.model.distribute_strategy.scope():
            weights = view.weights(self.model, indices[0])
            member = separate_member(self.model, weights, sample=sample)
            del weights

        def predict(index: int, inputs: Any) -> Any:
            view.put(member, self.model, index)
            copy_states(states[index].values, states_of(member))
            outputs = member.predict(inputs, **options)
            copy_states(states_of(member), states[index].values)
            return outputs

        return predict

    def reset_state(self) -> None:
        """Implements `SnapshotEnsemble.reset_state`."""
        with self._cache.lock:
            for states in self._cache.graphs.states.values():
                reset_recurrent_states(self.model, states.values)

    def is_too_large(self, indices: Sequence[int]) -> bool:
        """Whether these members' weights exceed the memory limit; shared ones count once."""
        trained, frozen = bytes_of(self.model)
        return len(indices) * trained + frozen > self.memory_limit

    def members_model(self, combiner: Combiner, kind: type[MembersModel] = MembersModel) -> Any:
        """A model that runs the members; cached by the members and the combiner's name.

        Threads may share it to predict, but not to evaluate.
        """
        view, key = self.view, key_of(combiner)
        graphs = self._cache.graphs
        model = graphs.models.get(key) if graphs.built_for == self._built_for(view) else None
        if model is None:
            with self._cache.lock, outside_graphs():  # A user's `tf.function` may call this.
                graphs = self._graphs(view)
                if key not in graphs.models:
                    graphs.keep(key, self._build(graphs, view, combiner, kind))
                model = graphs.models[key]
        return model

    @contextlib.contextmanager
    def evaluator(
        self, combiner: Combiner, kind: type[MembersModel] = MembersModel
    ) -> Iterator[Any]:
        """Lends a model that runs the members to one thread, since metrics add up inside it."""
        combiner = combiner._replace(name=("evaluate", *combiner.name))
        view, key = self.view, key_of(combiner)
        with self._cache.lock:
            graphs = self._graphs(view)
            model = graphs.models.pop(key, None) or self._build(graphs, view, combiner, kind)
        with self._refusals():
            yield model
        with self._cache.lock:
            graphs.keep(key, model)

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """Raises `ValueError` if a graph finds that outputs that are passed through differ."""
        try:
            yield
        except AssertionInGraphError as error:
            if (refusal := refusal_in(error)) is None:
                raise
            raise ValueError(refusal) from None

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
            graphs.tensors[index] = as_tensors(view.weights(self.model, index), graphs.first)
        states = self._states(graphs, combiner.members)
        with self.model.distribute_strategy.scope():
            weights = [graphs.tensors[index] for index in combiner.members]
            own = [states[index].values for index in combiner.members]
            model = kind(self.model, weights, combiner.combine, own, combiner.rows, combiner.stages)
            compile_like(model, self.model)
            # XLA gives wrong results where a number of rows is known only as the graph runs.
            if combiner.stages is not None:
                model.jit_compile = False
        return model

    def _states(self, graphs: Graphs, indices: Sequence[int]) -> dict[int, OwnStates]:
        """The states of all members that have predicted, and of these members."""
        with self.model.distribute_strategy.scope():
            for index in sorted(set(indices) - set(graphs.states)):
                graphs.states[index] = own_states(self.model, index)
        return graphs.states
