"""Methods of `keras.Model` that a user's model replaces."""

import dataclasses
import weakref
from typing import Any

import keras
from keras.src.backend import compute_output_spec

from snapshot_ensemble.keras_compat.context_patch import ContextPatch
from snapshot_ensemble.keras_compat.layer_graph import graph_of


def has_own(model: keras.Model, attribute: str) -> bool:
    """Whether the class of a model defines this attribute, such as a method, or defines it anew."""
    owner = next((kind for kind in type(model).__mro__ if attribute in vars(kind)), None)
    return owner is not None and not owner.__module__.startswith("keras.src.")


def has_own_or_assigned(model: keras.Model, attribute: str) -> bool:
    """Like `has_own`; also if the attribute was assigned to this model alone."""
    return attribute in vars(model) or has_own(model, attribute)


class _Calls:
    def __init__(self, model: keras.Model) -> None:
        self.model = model
        self.inputs: Any = None
        self.outputs: Any = None


def _call(calls: _Calls, original: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
    outputs = original(layer, *args, **kwargs)
    if layer is calls.model:
        calls.inputs, calls.outputs = args[:1], outputs
    return outputs


_calling = ContextPatch(keras.layers.Layer, "__call__", _call)


@dataclasses.dataclass(frozen=True)
class TracedStep:
    """What a model's `predict_step` returns.

    Attributes:
        outputs: Symbolic tensors in the structure that it returns.
        adds_nothing: Whether they are exactly what its call of the model returned.
        prepares_nothing: Whether it called the model on exactly its own inputs.
    """

    outputs: Any
    adds_nothing: bool
    prepares_nothing: bool


# Tracing takes a while, and a model's class does not change.
_traced: weakref.WeakKeyDictionary[keras.Model, TracedStep | None] = weakref.WeakKeyDictionary()


def traced_predict_step(model: keras.Model) -> TracedStep | None:
    """The `predict_step` of a graph of layers, traced with the inputs that the graph takes.

    None if that is not possible: for other models, and if the step takes other inputs.
    """
    graph = graph_of(model)
    if graph is None:
        return None
    if model not in _traced:
        _traced[model] = _trace(model, graph.input)
    return _traced[model]


def _trace(model: keras.Model, inputs: Any) -> TracedStep | None:
    same_outputs, same_inputs = [], []

    def step(inputs: Any) -> Any:
        calls = _Calls(model)
        with _calling.active(calls):
            returned = model.predict_step((inputs,))
        same_outputs.append(_are_same(returned, calls.outputs))
        same_inputs.append(_are_same((inputs,), calls.inputs))
        return returned

    try:
        # Nothing is run, and what is assigned is forgotten.
        outputs = compute_output_spec(step, inputs)
    except Exception:  # It is the user's code, and may need real data.
        return None
    return TracedStep(outputs, all(same_outputs), all(same_inputs))


def _are_same(one: Any, other: Any) -> bool:
    """Whether two structures hold the very same objects."""
    return [*map(id, keras.tree.flatten(one))] == [*map(id, keras.tree.flatten(other))]
