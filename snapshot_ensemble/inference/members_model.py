"""Many members, one Keras model: a model is a function, and a member its weights."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf


def graph_of(model: Any) -> Any:
    """The graph of layers that a model runs; None for what is no model, or runs code of its own."""
    if isinstance(model, keras.Sequential):
        return model._functional
    # A subclass that overrides `call` does something else than its graph says.
    is_graph = getattr(type(model).call, "__qualname__", "") == "Functional.call"
    return model if is_graph else None


def identity(structure: Any) -> Any:
    """A key that is equal for the same tensors and equal plain values."""
    return tuple(
        id(leaf) if isinstance(leaf, keras.KerasTensor) or keras.ops.is_tensor(leaf) else repr(leaf)
        for leaf in keras.tree.flatten(structure)
    )


class Common:
    """What members have in common, so that it runs once for all of them.

    That is every layer of a graph whose weights are the very same objects in all members, and
    whose inputs are what such layers gave: a frozen backbone, preprocessing.

    Args:
        model: A model of any kind; in one that is no graph there is nothing to find.
        members: The weights of each member, in the order of `model.weights`.
    """

    def __init__(self, model: keras.Model, members: Sequence[Sequence[Any]]) -> None:
        first, *rest = members
        equal = [all(m[i] is first[i] for m in rest) for i in range(len(first))]
        self._differs = {id(v) for v, e in zip(model.weights, equal, strict=True) if not e}
        # A prediction step of one's own may do anything with what it is given.
        own_step = type(model).predict_step is not keras.Model.predict_step
        is_found = rest and any(equal) and graph_of(model) is not None and not own_step
        inside = model._flatten_layers() if is_found else ()
        graphs = [graph_of(layer) for layer in inside if isinstance(layer, keras.Model)]
        self._graphs = {id(graph): graph for graph in graphs if graph is not None}
        self._top = graph_of(model)

    @contextlib.contextmanager
    def once(self) -> Iterator[None]:
        """Lets the layers of the graphs remember meanwhile what they gave for which tensors."""
        given: dict[Any, Any] = {}
        try:
            for graph in self._graphs.values():
                object.__setattr__(graph, "_run_through_graph", self._remembering(graph, given))
            yield
        finally:
            for graph in self._graphs.values():
                vars(graph).pop("_run_through_graph", None)

    def _remembering(self, graph: Any, given: dict[Any, Any]) -> Callable[..., Any]:
        run = type(graph)._run_through_graph

        def run_through_graph(inputs: Any, operation_fn: Callable[[Any], Any]) -> Any:
            def remember(operation: Any) -> Callable[..., Any]:
                call = operation_fn(operation)
                weights = getattr(operation, "weights", ())
                if any(id(variable) in self._differs for variable in weights):
                    return call

                def called(*args: Any, **kwargs: Any) -> Any:
                    key = (id(operation), identity((args, kwargs)))
                    if key not in given:
                        # With its arguments, so that no other object takes their identity.
                        given[key] = (call(*args, **kwargs), args, kwargs)
                    return given[key][0]

                return called

            if graph is self._top:  # What each member is given are casts of the same.
                inputs = given.setdefault("inputs", inputs)
            return run(graph, inputs, remember)

        return run_through_graph


@contextlib.contextmanager
def _traced_afresh() -> Iterator[None]:
    """Traces every `tf.function` anew that is called meanwhile.

    Left alone, one on a method of a user's layer would keep the weights of the first member that
    it was traced with, for all the others.
    """
    function = type(tf.function(lambda: None))
    call = function.__call__

    def call_afresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(self._clone(None), *args, **kwargs)

    function.__call__ = call_afresh
    try:
        yield
    finally:
        function.__call__ = call


@contextlib.contextmanager
def _normalizing(model: keras.Model) -> Iterator[None]:
    """Lets `Normalization` layers work with the weights of the scope, which they hold twice."""
    found = [x for x in model._flatten_layers() if isinstance(x, keras.layers.Normalization)]
    own = [(layer.mean, layer.variance) for layer in found]
    try:
        for layer in found:
            layer.finalize_state()
        yield
    finally:
        for layer, (mean, variance) in zip(found, own, strict=True):
            layer.mean, layer.variance = mean, variance


@contextlib.contextmanager
def with_weights(model: keras.Model, weights: Sequence[Any]) -> Iterator[keras.StatelessScope]:
    """Lets the model run with these weights; its own are not touched.

    Args:
        model: A built model of any kind.
        weights: Arrays, tensors or variables, in the order of `model.weights`.
    """
    mapping = list(zip(model.weights, weights, strict=True))
    with keras.StatelessScope(state_mapping=mapping) as scope:
        with _traced_afresh(), _normalizing(model):
            yield scope


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

        common = Common(model, weights)

        # In a closure, so that Keras takes no variables (nor weight penalties) from the model.
        def run(inputs: Any) -> Any:
            with common.once():
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
