"""Many members, one Keras model: a model is a function, and a member its weights."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from snapshot_ensemble.keras_compat.layer_graph import (
    all_layers,
    graph_of,
    operations_replaced,
)
from snapshot_ensemble.keras_compat.stateless_call import with_weights
from snapshot_ensemble.keras_compat.stock_layers import has_own_predict_step


def identity(structure: Any) -> Any:
    """A key that is equal for the same tensors and equal plain values."""
    return tuple(
        id(leaf) if isinstance(leaf, keras.KerasTensor) or keras.ops.is_tensor(leaf) else repr(leaf)
        for leaf in keras.tree.flatten(structure)
    )


class SharedCalls:
    """The calls that members have in common, so that each is made once for all of them.

    These are the calls of layers whose weights are the very same objects in all members, on inputs
    that such layers gave: a frozen backbone, preprocessing.

    Args:
        model: A model of any kind; in one that is no graph there is nothing to find.
        members: The weights of each member, in the order of `model.weights`.
    """

    def __init__(self, model: keras.Model, members: Sequence[Sequence[Any]]) -> None:
        first, *rest = members
        equal = [all(m[i] is first[i] for m in rest) for i in range(len(first))]
        self._differs = {id(v) for v, e in zip(model.weights, equal, strict=True) if not e}
        self._top = graph_of(model)
        # A prediction step of the user's own may do anything with its inputs.
        is_plain_graph = self._top is not None and not has_own_predict_step(model)
        can_share = rest and any(equal) and is_plain_graph
        inside = all_layers(model) if can_share else ()
        graphs = [graph_of(layer) for layer in inside if isinstance(layer, keras.Model)]
        self._graphs = [graph for graph in graphs if graph is not None]

    @contextlib.contextmanager
    def made_once(self) -> Iterator[None]:
        """Lets the layers of the graphs remember meanwhile what they returned for which tensors."""
        results: dict[Any, Any] = {}

        def remembering(graph: Any, inputs: Any, call_of: Callable[[Any], Any]) -> tuple[Any, Any]:
            if not any(graph is known for known in self._graphs):
                return inputs, call_of
            if graph is self._top:  # What each member receives are casts of the same inputs.
                inputs = results.setdefault("inputs", inputs)
            return inputs, lambda operation: self._once(operation, call_of(operation), results)

        with operations_replaced(remembering) if self._graphs else contextlib.nullcontext():
            yield

    def _once(
        self, operation: Any, call: Callable[..., Any], results: dict[Any, Any]
    ) -> Callable[..., Any]:
        weights = getattr(operation, "weights", ())
        if any(id(variable) in self._differs for variable in weights):
            return call

        def remembered(*args: Any, **kwargs: Any) -> Any:
            key = (id(operation), identity((args, kwargs)))
            if key not in results:
                # With its arguments, so that no other object takes their identity.
                results[key] = (call(*args, **kwargs), args, kwargs)
            return results[key][0]

        return remembered


def member_outputs(model: keras.Model, weights: Sequence[Any], inputs: Any) -> Any:
    """What the model predicts for a batch if it has these weights.

    Args:
        model: A built model of any kind. Its `predict_step` does the work.
        weights: Arrays, tensors or variables, in the order of `model.weights`.
        inputs: One batch.

    Returns:
        The outputs, in the model's own structure.
    """
    with with_weights(model, weights):
        return model.predict_step((inputs,))


class MembersModel(keras.Model):
    """A `keras.Model` that runs every member on each batch and puts their outputs together.

    Being one, it takes from Keras all kinds of data, callbacks, the progress bar and distribution
    over devices, and goes through the data once.

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
        # Inputs reach the members as they are: each casts them by its own policy.
        super().__init__(name=model.name, dtype=model.dtype_policy, autocast=False)

        shared = SharedCalls(model, weights)

        # In a closure, so that Keras takes no variables (nor weight penalties) from the model.
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
