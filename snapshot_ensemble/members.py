"""Many members, one Keras model: a model is a function, and a member its weights."""

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from snapshot_ensemble.snapshots import Weights, set_weights


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


class Member(keras.Model):
    """One member of an ensemble whose model cannot be cloned: the model with other weights."""

    def __init__(self, model: keras.Model) -> None:
        super().__init__(name=model.name, dtype=model.dtype_policy, autocast=False)
        own = [
            self.add_weight(shape=v.shape, dtype=v.dtype, trainable=v.trainable, name=v.name)
            for v in model.weights
        ]

        def run(inputs: Any) -> Any:
            return member_outputs(model, own, inputs)

        self._run = run
        # Keras lists trainable weights first; arrays come in the model's order.
        self.in_model_order = own
        self.built = True

    def set_weights(self, weights: Weights) -> None:
        for variable, value in zip(self.in_model_order, weights, strict=True):
            variable.assign(value)

    def get_weights(self) -> Weights:
        return [variable.numpy() for variable in self.in_model_order]

    def call(self, inputs: Any) -> Any:
        return self._run(inputs)


def blank_member(model: keras.Model) -> keras.Model:
    """A model of its own with the architecture of `model` and weights to be set, not compiled."""
    try:
        # Not through `clone_model`, which stumbles over losses and metrics without a config.
        member = type(model).from_config(model.get_config())
        if not member.built:
            member.build_from_config(model.get_build_config())
        if [v.shape for v in member.weights] != [v.shape for v in model.weights]:
            raise ValueError("Its config does not say what it is.")
        copy_assets(model, member)
    except Exception:
        member = Member(model)
    return member


def build_member(model: keras.Model, weights: Weights) -> keras.Model:
    """A model of its own with the architecture of `model` and these weights, compiled alike."""
    member = blank_member(model)
    set_weights(member, weights)
    compile_like(member, model, optimizer=_copy(model._compile_config.config["optimizer"]))
    return member


def compile_like(target: keras.Model, model: keras.Model, optimizer: Any = "sgd") -> None:
    """Compiles `target` with the loss and metrics of `model`, and an optimizer of its own."""
    arguments = {**model._compile_config.config, "optimizer": optimizer}
    for name in ("metrics", "weighted_metrics"):
        arguments[name] = keras.tree.map_structure(_copy, arguments[name])
    keras.Model.compile(target, **arguments)


def _copy(thing: Any) -> Any:
    """A new optimizer or metric like the one given, with a state of its own where it can."""
    if not isinstance(thing, (keras.Optimizer, keras.Metric)):
        return thing
    try:
        with warnings.catch_warnings():
            # A lambda in it, such as a rate, is not read from a file but used as it is.
            warnings.simplefilter("ignore")
            return type(thing).from_config(thing.get_config())
    except Exception:
        return thing


@contextlib.contextmanager
def metrics_lent(model: keras.Model) -> Iterator[None]:
    """Lends a model's metrics and gives them back as they were.

    For those that cannot be made anew from a config, which are shared with the user's model.
    """
    config = model._compile_config.config
    leaves = keras.tree.flatten([config["metrics"], config["weighted_metrics"]])
    metrics = [leaf for leaf in leaves if isinstance(leaf, keras.Metric)]
    state = [(variable, variable.numpy()) for metric in metrics for variable in metric.variables]
    for metric in metrics:
        metric.reset_state()
    try:
        yield
    finally:
        for variable, value in state:
            variable.assign(value)


def copy_assets(layer: Any, clone: Any) -> None:
    """Carries over what is neither configuration nor weights, such as an adapted vocabulary."""
    if not isinstance(layer, keras.layers.Layer):
        return
    for own, other in zip(layer._flatten_layers(), clone._flatten_layers(), strict=True):
        if hasattr(own, "save_assets"):
            with tempfile.TemporaryDirectory() as directory:
                own.save_assets(directory)
                other.load_assets(directory)
