"""The members of an ensemble, run in one graph or one after another."""

import contextlib
import copy
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, Self

import keras
import numpy as np
from keras import ops

from snapshot_ensemble.checks import whole_number
from snapshot_ensemble.inference.batch_size import are_arrays, batch_size_for, batches_at_once
from snapshot_ensemble.inference.blocks import in_blocks
from snapshot_ensemble.inference.cloning import build_member
from snapshot_ensemble.inference.combining import (
    check_combine,
    check_meanings,
    check_members,
    combine_outputs,
    weights_of,
)
from snapshot_ensemble.inference.early_exit import COUNTS, Stages
from snapshot_ensemble.inference.graphs import Combiner, GraphCache, Graphs, key_of
from snapshot_ensemble.inference.member_states import reset_recurrent_states
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
from snapshot_ensemble.keras_compat.graphs import AssertionInGraphError, outside_graphs
from snapshot_ensemble.keras_compat.train_step import is_traced
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
        self._cache = GraphCache(model)
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
        learned = self.learned
        if "members" in changes and learned.early_exit is not None:
            changes["early_exit"] = None  # Its order is that of the members that predict.
        if learned.conformal is not None and any(
            changes.get(name, getattr(learned, name)) != getattr(learned, name)
            for name in ("weights", "temperature", "spreads")
        ):
            changes.setdefault("conformal", None)  # It holds for these predictions alone.
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
        if is_traced() or not self.is_too_large(combiner.members):
            return self.caller(combiner)(inputs)
        result = self._call_one_by_one(inputs, self._apart(combiner))
        return compared(result, lambda: names_of(self.model, result["combined"]))

    def caller(self, combiner: Combiner) -> Callable[[Any], Any]:
        """A function like `call`, which may also be called first inside a graph."""
        model = self.members_model(self._apart(combiner))

        def call(inputs: Any) -> Any:
            result = model.run(inputs)
            return compared(result, lambda: names_of(self.model, result["combined"]))

        return call

    def predict_early(self, x: Any, arguments: PredictArguments) -> tuple[Any, Any]:
        """The outputs of the cascade, and how many members ran for each row."""
        with self.refusals():
            result = self.predict(x, self.cascade(), arguments)
        return result["outputs"], result[COUNTS]

    def call_early(self, inputs: Any) -> tuple[Any, Any]:
        """Like `predict_early` for one batch, as tensors."""
        with self.refusals():
            combiner = self.cascade()
            if is_traced() or not self.is_too_large(combiner.members):
                result = self.members_model(combiner).run(inputs)
            else:
                result = self._call_one_by_one(inputs, combiner)
        return result["outputs"], result[COUNTS]

    def _apart(self, combiner: Combiner) -> Combiner:
        def combine(outputs: list[Any]) -> Any:
            return kept_apart(combiner.combine, outputs, self.meanings(outputs[0]))

        return combiner._replace(name=("apart", *combiner.name), combine=combine)

    def predict(self, x: Any, combiner: Combiner, arguments: PredictArguments) -> Any:
        """Predicts with all members at once or, if they are too large, one after another."""
        options = arguments._asdict()
        options |= batch_size_for(self.model, x, **options)
        if not self.runs_one_by_one(combiner.members, x):
            if (count := batches_at_once(self.model, x, **options)) > 1:
                combiner = combiner._replace(rows=options["batch_size"])
                options["batch_size"] *= count
            return self.members_model(combiner).predict(x, **options)
        with self.one_by_one(_each_of(combiner.members)) as run:

            def predict(number: int, rows: Any) -> Any:
                index = combiner.members[number]
                return run(index, lambda model: model.predict(rows, **options))

            if combiner.stages is not None:
                result = combiner.stages.run(predict, x)
                return keras.tree.map_structure(np.asarray, result)
            outputs = [predict(number, x) for number in range(len(combiner.members))]
        return in_blocks(combiner.combine, outputs)

    def _call_one_by_one(self, inputs: Any, combiner: Combiner) -> Any:
        inputs = keras.tree.map_structure(ops.convert_to_tensor, inputs)
        with self.one_by_one(_each_of(combiner.members)) as run:

            def call(number: int, rows: Any) -> Any:
                return run(combiner.members[number], lambda model: model.run(rows))

            if combiner.stages is not None:
                return combiner.stages.run(call, inputs)
            outputs = [call(number, inputs) for number in range(len(combiner.members))]
        return combiner.combine(outputs)

    def reset_state(self) -> None:
        """Implements `SnapshotEnsemble.reset_state`."""
        with self._cache.lock:
            for states in self._cache.graphs.states.values():
                reset_recurrent_states(self.model, states.values)

    def is_too_large(self, indices: Collection[int]) -> bool:
        """Whether these members' weights exceed the memory limit; shared ones count once."""
        trained, frozen = bytes_of(self.model)
        return len(indices) * trained + frozen > self.memory_limit

    def runs_one_by_one(self, indices: Collection[int], x: Any) -> bool:
        """Whether these members run on these data one after another: arrays can be read again."""
        return self.is_too_large(indices) and are_arrays(x)

    def one_by_one(
        self, combiner: Combiner, kind: type[MembersModel] = MembersModel
    ) -> contextlib.AbstractContextManager[Callable[[int, Callable[[Any], Any]], Any]]:
        """Lends a model that is one member after another to one thread.

        Args:
            combiner: The members that will run. It gets a list of one member's outputs.
            kind: The class of the model.

        Returns:
            A context manager, whose value is a function of a member's index and of a function of
            the model, which it calls while the model is this member.
        """
        return self._cache.one_by_one(self.view, combiner, kind)

    def members_model(self, combiner: Combiner, kind: type[MembersModel] = MembersModel) -> Any:
        """A model that runs the members; cached by the members and the combiner's name.

        Threads may share it to predict, but not to evaluate.
        """
        view, key, cache = self.view, key_of(combiner), self._cache
        graphs = cache.graphs
        model = graphs.models.get(key) if graphs.built_for == cache.built_for(view) else None
        if model is None:
            with cache.lock, outside_graphs():  # A user's `tf.function` may call this.
                graphs = self._graphs_with_room(view, combiner.members)
                if key not in graphs.models:
                    graphs.keep(key, cache.build(graphs, view, combiner, kind))
                model = graphs.models[key]
        return model

    @contextlib.contextmanager
    def evaluator(
        self, combiner: Combiner, kind: type[MembersModel] = MembersModel
    ) -> Iterator[Any]:
        """Lends a model that runs the members to one thread, since metrics add up inside it."""
        combiner = combiner._replace(name=("evaluate", *combiner.name))
        view, key, cache = self.view, key_of(combiner), self._cache
        with cache.lock:
            graphs = self._graphs_with_room(view, combiner.members)
            model = graphs.models.pop(key, None) or cache.build(graphs, view, combiner, kind)
        with self.refusals():
            yield model
        with cache.lock:
            graphs.keep(key, model)

    def _graphs_with_room(self, view: View, indices: Sequence[int]) -> Graphs:
        """The graphs of these members; what is in them is dropped if it would be too much."""
        graphs = self._cache.graphs_of(view)
        held = {*graphs.tensors, *indices}
        count = len(held) + (graphs.one_by_one is not None)
        if len(held) > len(graphs.tensors) and self.is_too_large(range(count)):
            graphs = self._cache.emptied(view)
        return graphs

    @contextlib.contextmanager
    def refusals(self) -> Iterator[None]:
        """Raises `ValueError` if a graph finds that outputs that are passed through differ."""
        try:
            yield
        except AssertionInGraphError as error:
            if (refusal := refusal_in(error)) is None:
                raise
            raise ValueError(refusal) from None


def _each_of(members: list[int]) -> Combiner:
    """A combiner of one member's outputs, which stay as they are."""
    return Combiner(members, ("each",), operator.itemgetter(0))
