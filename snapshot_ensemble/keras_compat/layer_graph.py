"""The graph of layers behind a Functional or Sequential model."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras.src.ops.function import Function

from snapshot_ensemble.keras_compat.context_patch import ContextPatch


def graph_of(model: Any) -> Any:
    """The graph of layers that a model runs; None if it runs its own code instead."""
    if isinstance(model, keras.Sequential):
        return model._functional
    # A subclass that overrides `call` does not run its graph.
    is_graph = getattr(type(model).call, "__qualname__", "") == "Functional.call"
    return model if is_graph else None


def all_layers(layer: Any) -> list[Any]:
    """The layer itself and all layers inside it, at any depth, each once."""
    return list(layer._flatten_layers())


def direct_layers(layer: Any) -> list[Any]:
    """The layers directly inside a layer, without those inside them."""
    return list(layer._flatten_layers(include_self=False, recursive=False))


def own_trainable_variables(layer: Any) -> list[Any]:
    """The trainable variables that a layer created itself, without those of layers inside it."""
    return [variable for variable in layer._trainable_variables if variable.trainable]


def source_of(tensor: Any) -> tuple[Any, int, int]:
    """The operation that returned a symbolic tensor, and the numbers of its call and output."""
    operation, node, index = tensor._keras_history
    return operation, node, index


def inputs_of_call(operation: Any, node: int) -> list[Any]:
    """The symbolic tensors that an operation was called on."""
    return list(operation._inbound_nodes[node].input_tensors)


def input_ranks(operation: Any) -> list[list[int]]:
    """For each call of an operation, the ranks of the symbolic tensors that it was called on."""
    return [[len(t.shape) for t in node.input_tensors] for node in operation._inbound_nodes]


def calls_of(operation: Any) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """The keyword arguments and the symbolic outputs of each call of an operation."""
    for node in operation._inbound_nodes:
        yield node.arguments.kwargs, keras.tree.flatten(node.output_tensors)


def takes_training(operation: Any) -> bool:
    """Whether a layer's `call` has an argument `training`."""
    return bool(getattr(operation, "_call_has_training_arg", False))


def run_graph(graph: Any, inputs: Any, call: Callable[..., Any]) -> Any:
    """Runs a graph, calling each operation as `call(operation, *args, **kwargs)`."""
    return graph._run_through_graph(inputs, lambda operation: operation, call)


def _run_replaced(
    wrap: Any, run: Any, graph: Any, inputs: Any, operation_fn: Any = None, call_fn: Any = None
) -> Any:
    inputs, operation_fn = wrap(graph, inputs, operation_fn or (lambda operation: operation))
    return run(graph, inputs, operation_fn, call_fn)


_running_graphs = ContextPatch(Function, "_run_through_graph", _run_replaced)


@contextlib.contextmanager
def operations_replaced(wrap: Callable[..., tuple[Any, Any]]) -> Iterator[None]:
    """Lets the caller replace the operations of all graphs that run inside the context.

    Args:
        wrap: Takes a graph, its inputs and the function that returns the callable for an
            operation; returns the inputs and the function to use instead.
    """
    with _running_graphs.active(wrap):
        yield
