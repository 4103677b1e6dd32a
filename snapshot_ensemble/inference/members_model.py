"""All members as one Keras model, which calls the user's model with each member's weights."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from snapshot_ensemble.inference.early_exit import Stages
from snapshot_ensemble.keras_compat.graphs import in_batches
from snapshot_ensemble.keras_compat.layer_graph import (
    all_layers,
    calls_of,
    graph_of,
    operations_replaced,
)
from snapshot_ensemble.keras_compat.logits import attach, attached_to
from snapshot_ensemble.keras_compat.own_methods import has_own_or_assigned
from snapshot_ensemble.keras_compat.stateless_call import draws, draws_noticed, with_weights
from snapshot_ensemble.keras_compat.stock_layers import has_own_predict_step
from snapshot_ensemble.keras_compat.train_step import only_with

_MOST_OPERATIONS = 2000
# Types whose `repr` is exact.
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def identity(structure: Any) -> Any:
    """A hashable key, equal only if the structures, with their names, hold the same.

    Arrays are compared by their contents, tensors and other objects by their `id`.
    """
    # Paths tell neither lists from tuples nor that there is an empty one.
    containers = repr(keras.tree.map_structure(lambda _: 0, structure))
    leaves = keras.tree.flatten_with_path(structure)
    return containers, tuple((path, _identity_of_leaf(leaf)) for path, leaf in leaves)


def _identity_of_leaf(leaf: Any) -> Any:
    if isinstance(leaf, (np.ndarray, np.generic)):
        # Not by `repr`, which leaves out the middle of a long array.
        return type(leaf), leaf.dtype, leaf.shape, leaf.tobytes()
    if type(leaf) in _PLAIN:
        return type(leaf), repr(leaf)  # As numbers, -0.0 and 0.0 would be equal.
    return id(leaf)


class SharedCalls:
    """The layer calls that all members have in common, so that each is made only once.

    A call is shared if the layer's weights are the same objects in all members, its inputs come
    from shared calls and it neither draws random numbers nor changes a state: a frozen backbone,
    for example, or preprocessing.

    Args:
        model: A model of any kind; only graphs of layers have shared calls.
        members: The weights of each member, in the order of `model.weights`.
    """

    def __init__(self, model: keras.Model, members: Sequence[Sequence[Any]]) -> None:
        first, *rest = members
        equal = [all(m[i] is first[i] for m in rest) for i in range(len(first))]
        works = _multiplications(model)
        alike = sum(work for work, e in zip(works, equal, strict=True) if e)
        self._share = alike / max(sum(works), 1)
        self._differs = {id(v) for v, e in zip(model.weights, equal, strict=True) if not e}
        self._top = graph_of(model)
        # A custom `predict_step` may do anything with its inputs.
        is_plain_graph = self._top is not None and not has_own_predict_step(model)
        inside = all_layers(model) if rest and is_plain_graph else ()
        if not any(layer.weights and not self._differs_in(layer) for layer in inside):
            inside = ()
        graphs = [graph_of(layer) for layer in inside if isinstance(layer, keras.Model)]
        self._graphs = [graph for graph in graphs if graph is not None]

    def __bool__(self) -> bool:
        return bool(self._graphs)

    @property
    def is_most(self) -> bool:
        """Whether what members share takes longer than what a member has of its own."""
        return bool(self) and self._share > 0.5

    def _differs_in(self, operation: Any) -> bool:
        """Whether members have different weights in a layer or operation."""
        weights = getattr(operation, "weights", ())
        return any(id(variable) in self._differs for variable in weights)

    @contextlib.contextmanager
    def made_once(self) -> Iterator[None]:
        """Within the block, shared layers return the same outputs for the same inputs."""
        results: dict[Any, Any] = {}

        def with_cache(graph: Any, inputs: Any, call_of: Callable[[Any], Any]) -> tuple[Any, Any]:
            if not any(graph is known for known in self._graphs):
                return inputs, call_of
            if graph is self._top:  # Each member receives its own cast of the same inputs.
                inputs = results.setdefault("inputs", inputs)
            return inputs, lambda operation: self._once(operation, call_of(operation), results)

        with operations_replaced(with_cache) if self._graphs else contextlib.nullcontext():
            yield

    def _once(
        self, operation: Any, call: Callable[..., Any], results: dict[Any, Any]
    ) -> Callable[..., Any]:
        if self._differs_in(operation):
            return call

        def cached(*args: Any, **kwargs: Any) -> Any:
            key = (id(operation), identity((args, kwargs)))
            if key in results:
                return results[key][0]
            with draws_noticed() as draws:
                outputs = call(*args, **kwargs)
            if not draws:
                # The arguments are kept alive, so that no new object can get the same id.
                results[key] = (outputs, args, kwargs)
            return outputs

        return cached


def _multiplications(model: keras.Model) -> list[int]:
    """About how often each of a model's weights is multiplied with something for a row."""
    positions: dict[int, int] = {}
    for layer in all_layers(model):  # Outer layers first: what an inner one says is more exact.
        # To look up an embedding takes no multiplication.
        known = [0] if isinstance(layer, keras.layers.Embedding) else []
        tensors = [tensor for _, outputs in calls_of(layer) for tensor in outputs]
        known += [math.prod(size or 1 for size in tensor.shape[1:-1]) for tensor in tensors]
        if known:
            positions.update((id(variable), known[0]) for variable in layer.weights)
    return [math.prod(v.shape) * positions.get(id(v), 1) for v in model.weights]


def member_outputs(
    model: keras.Model,
    weights: Sequence[Any],
    inputs: Any,
    states: Sequence[keras.Variable] | None = None,
) -> Any:
    """What the model predicts for a batch with the given weights.

    Args:
        model: A built model of any kind; its `predict_step` is called.
        weights: Arrays, tensors or variables, in the order of `model.weights`.
        inputs: One batch.
        states: As for `with_weights`.

    Returns:
        The outputs, in the model's own structure.
    """
    with with_weights(model, weights, states):
        return model.predict_step((inputs,))


def outputs_traced_once(
    model: keras.Model,
    members: Sequence[Sequence[Any]],
    inputs: Any,
    states: Sequence[keras.Variable],
) -> list[Any] | None:
    """Each member's outputs, by a function that is traced once and called for each member.

    To trace a large model again for each of many members can take a minute.

    Args:
        model: A built model of any kind.
        members: The weights of each member, as tensors.
        inputs: One batch, in a graph.
        states: The states of the first member.

    Returns:
        The outputs; None outside of a graph, with a distribution strategy, and if members may not
        do the same, since they use their states or draw random numbers.
    """
    if not tf.inside_function() or tf.distribute.has_strategy():
        return None
    structure: list[Any] = []

    def of_one(weights: list[Any]) -> list[Any]:
        outputs = member_outputs(model, weights, inputs, states)
        # What Keras attaches to tensors does not leave a function.
        flat = keras.tree.flatten(outputs)
        structure.append(outputs)
        return [flat, [attached_to(tensor) for tensor in flat]]

    traced = tf.function(of_one, autograph=False).get_concrete_function(
        [tf.TensorSpec(weight.shape, weight.dtype) for weight in members[0]]
    )
    own = {id(state.value) for state in states}
    if draws(traced.graph) or any(id(variable) in own for variable in traced.graph.variables):
        return None
    call = traced if _is_small(traced.graph, len(members)) else _kept_whole(traced)
    results = []
    for weights in members:
        flat, attached = call(*weights)
        flat = [attach(*pair) for pair in zip(flat, attached, strict=True)]
        results.append(keras.tree.pack_sequence_as(structure[-1], flat))
    return results


def _is_small(graph: Any, times: int) -> bool:
    """Whether a graph may be laid out this many times inside another one.

    A call of a function takes as long as a few small layers, but what is laid out is optimized
    again each time, with all functions that it calls, such as the steps of recurrent layers.
    """
    is_plain = not graph.as_graph_def().library.function
    return is_plain and times * len(graph.get_operations()) <= _MOST_OPERATIONS


def _kept_whole(traced: Any) -> Any:
    """A function that is not laid out where it is called."""

    def call(*weights: Any) -> Any:
        return traced(*weights)

    attributes = {"_noinline": True}
    return tf.function(call, autograph=False, experimental_attributes=attributes)


class MembersModel(keras.Model):
    """A `keras.Model` that runs every member on each batch and combines their outputs.

    As a Keras model, it supports all kinds of data, callbacks, the progress bar and distribution
    strategies, and reads the data once for all members.

    Args:
        model: The model whose weights the members are. It is neither tracked nor changed.
        weights: The weights of each member.
        combine: Takes the list of the members' outputs and returns the model's output.
        states: The variables that stand in for the states of the model's layers, for each member.
            Defaults to `None`: each batch begins with the model's own states.
        rows: The most rows of a batch that members run on at once. Defaults to `None`: all.
        stages: The stages of a cascade, in which not all members run for each row. Defaults to
            `None`: all members run for all rows.
    """

    def __init__(
        self,
        model: keras.Model,
        weights: Sequence[Sequence[Any]],
        combine: Callable[[list[Any]], Any],
        states: Sequence[Sequence[keras.Variable]] | None = None,
        rows: int | None = None,
        stages: Stages | None = None,
    ) -> None:
        # No autocast here: each member casts the inputs by its own dtype policy.
        super().__init__(name=model.name, dtype=model.dtype_policy, autocast=False)
        shared = SharedCalls(model, weights)
        own: Sequence[Any] = [None] * len(weights) if states is None else states

        # Closures, so that Keras tracks neither the model's variables nor its weight penalties.
        def of_one(number: int, inputs: Any) -> Any:
            return member_outputs(model, weights[number], inputs, own[number])

        def each(inputs: Any) -> list[Any]:
            with shared.made_once():
                return [of_one(number, inputs) for number in range(len(weights))]

        def laid_out(inputs: Any) -> Any:
            if stages is None:
                return combine(each(inputs))
            return stages.choose(each(inputs)) if shared.is_most else stages.run(of_one, inputs)

        def run(inputs: Any) -> Any:
            is_plain = states is not None and stages is None and not shared and len(weights) > 1
            outputs = outputs_traced_once(model, weights, inputs, own[0]) if is_plain else None
            return laid_out(inputs) if outputs is None else combine(outputs)

        self._is_users = functools.partial(has_own_or_assigned, model)
        self._of_users = functools.partial(getattr, model)
        self._run = run if rows is None else lambda inputs: in_batches(run, inputs, rows)
        self._in_graph = tf.function(run, autograph=False, reduce_retracing=True)
        self.laid_out = laid_out  # For what is exported: not all converters know functions.
        self.built = True
        if getattr(model, "output_names", None):
            self.output_names = model.output_names

    def __getattr__(self, name: str) -> Any:
        # What is not found here may be an attribute of the user's model, which callbacks use.
        if name.startswith("_") or not self._is_users(name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self._of_users(name)

    def call(self, inputs: Any) -> Any:
        return self._run(inputs)

    def test_step(self, data: Any) -> Any:
        with only_with(data):
            return super().test_step(data)

    def run(self, inputs: Any) -> Any:
        """The output for one batch, computed in one compiled graph."""
        return self._in_graph(keras.tree.map_structure(keras.ops.convert_to_tensor, inputs))
