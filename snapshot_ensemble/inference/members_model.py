"""All members as one Keras model, which calls the user's model with each member's weights."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from snapshot_ensemble.keras_compat.layer_graph import (
    all_layers,
    graph_of,
    operations_replaced,
)
from snapshot_ensemble.keras_compat.stateless_call import with_weights
from snapshot_ensemble.keras_compat.stock_layers import has_own_predict_step

# Types whose `repr` is exact.
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def identity(structure: Any) -> Any:
    """A hashable key, equal only if the structures, with their names, hold the same.

    Arrays are compared by their contents, tensors and other objects by their `id`.
    """
    return tuple(
        (path, _identity_of_leaf(leaf)) for path, leaf in keras.tree.flatten_with_path(structure)
    )


def _identity_of_leaf(leaf: Any) -> Any:
    if isinstance(leaf, (np.ndarray, np.generic)):
        # Not by `repr`, which leaves out the middle of a long array.
        return leaf.dtype, leaf.shape, leaf.tobytes()
    if type(leaf) in _PLAIN:
        return type(leaf), repr(leaf)  # As numbers, -0.0 and 0.0 would be equal.
    return id(leaf)


class SharedCalls:
    """The layer calls that all members have in common, so that each is made only once.

    A call is shared if the layer's weights are the same objects in all members and its inputs come
    from shared calls: a frozen backbone, for example, or preprocessing.

    Args:
        model: A model of any kind; only graphs of layers have shared calls.
        members: The weights of each member, in the order of `model.weights`.
    """

    def __init__(self, model: keras.Model, members: Sequence[Sequence[Any]]) -> None:
        first, *rest = members
        equal = [all(m[i] is first[i] for m in rest) for i in range(len(first))]
        self._differs = {id(v) for v, e in zip(model.weights, equal, strict=True) if not e}
        self._top = graph_of(model)
        # A custom `predict_step` may do anything with its inputs.
        is_plain_graph = self._top is not None and not has_own_predict_step(model)
        can_share = rest and any(equal) and is_plain_graph
        inside = all_layers(model) if can_share else ()
        graphs = [graph_of(layer) for layer in inside if isinstance(layer, keras.Model)]
        self._graphs = [graph for graph in graphs if graph is not None]

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
        weights = getattr(operation, "weights", ())
        if any(id(variable) in self._differs for variable in weights):
            return call

        def cached(*args: Any, **kwargs: Any) -> Any:
            key = (id(operation), identity((args, kwargs)))
            if key not in results:
                # The arguments are kept alive, so that no new object can get the same id.
                results[key] = (call(*args, **kwargs), args, kwargs)
            return results[key][0]

        return cached


def member_outputs(model: keras.Model, weights: Sequence[Any], inputs: Any) -> Any:
    """What the model predicts for a batch with the given weights.

    Args:
        model: A built model of any kind; its `predict_step` is called.
        weights: Arrays, tensors or variables, in the order of `model.weights`.
        inputs: One batch.

    Returns:
        The outputs, in the model's own structure.
    """
    with with_weights(model, weights):
        return model.predict_step((inputs,))


class MembersModel(keras.Model):
    """A `keras.Model` that runs every member on each batch and combines their outputs.

    As a Keras model, it supports all kinds of data, callbacks, the progress bar and distribution
    strategies, and reads the data once for all members.

    Args:
        model: The model whose weights the members are. It is neither tracked nor changed.
        weights: The weights of each member.
        combine: Takes the list of the members' outputs and returns the model's output.
    """

    def __init__(
        self,
        model: keras.Model,
        weights: Sequence[Sequence[Any]],
        combine: Callable[[list[Any]], Any],
    ) -> None:
        # No autocast here: each member casts the inputs by its own dtype policy.
        super().__init__(name=model.name, dtype=model.dtype_policy, autocast=False)

        shared = SharedCalls(model, weights)

        # A closure, so that Keras tracks neither the model's variables nor its weight penalties.
        def run(inputs: Any) -> Any:
            with shared.made_once():
                outputs = [member_outputs(model, member, inputs) for member in weights]
            return combine(outputs)

        self._run = run
        self._in_graph = tf.function(run, autograph=False, reduce_retracing=True)
        self.built = True
        if getattr(model, "output_names", None):
            self.output_names = model.output_names

    def call(self, inputs: Any) -> Any:
        return self._run(inputs)

    def run(self, inputs: Any) -> Any:
        """The output for one batch, computed in one compiled graph."""
        return self._in_graph(keras.tree.map_structure(keras.ops.convert_to_tensor, inputs))
