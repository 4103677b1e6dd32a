"""Runs a model with weights other than its own."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common import global_state
from tensorflow.python.framework import op_def_registry

from snapshot_ensemble.keras_compat.context_patch import ContextPatch
from snapshot_ensemble.keras_compat.layer_graph import all_layers
from snapshot_ensemble.keras_compat.layer_states import state_variables
from snapshot_ensemble.keras_compat.twins import twin_of, twins_called


def _call_retraced(_: Any, original: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    return original(function._clone(None), *args, **kwargs)


# Without retracing, a `tf.function` on a method of a user's layer would use the weights of the
# first member for all others.
_calling_functions = ContextPatch(type(tf.function(lambda: None)), "__call__", _call_retraced)

# The outermost call of a layer clears the losses that it and all layers inside it have collected.
# Another thread may be training with them. Inside a scope, Keras collects none.
_clearing_losses = ContextPatch(
    keras.layers.Layer, "_clear_losses", lambda _value, _original, _layer: None
)
_adding_losses = ContextPatch(
    keras.layers.Layer, "add_loss", lambda _value, _original, _layer, _loss: None
)
_finalizing = ContextPatch(
    keras.layers.Normalization, "finalize_state", lambda _value, _original, _layer: None
)


def _normalizing(model: keras.Model) -> dict[int, Any]:
    """Twins of `Normalization` layers, with the weights of the scope instead of their copies."""
    layers = [x for x in all_layers(model) if isinstance(x, keras.layers.Normalization)]
    twins = {id(layer): twin_of(layer) for layer in layers}
    for twin in twins.values():
        twin.finalize_state()
    return twins


class OwnStates(tf.Module):
    """Variables that stand in for the states of a model's layers.

    TensorFlow tracks them, so that they are part of a SavedModel. Keras does not: they are no
    weights.

    Args:
        originals: What `state_variables` returned for the model.
        values: What each starts with.
    """

    def __init__(self, originals: Sequence[keras.Variable], values: Sequence[np.ndarray]) -> None:
        super().__init__()
        self.values = [
            keras.Variable(
                value,
                dtype=original.dtype,
                trainable=False,
                autocast=False,  # What is read through the original is cast like the original.
                aggregation=original.aggregation,
                name=original.name,
            )
            for original, value in zip(originals, values, strict=True)
        ]


class _StatefulScope(keras.StatelessScope):
    """Makes a model run with other weights, which stay the same, and other states, which change.

    States are read and assigned at once, where Keras itself would do so, since that may be inside
    of a loop or a function of its own. Variables that are not the model's, such as the state of
    Keras's global random generator, are assigned as without a scope.

    Args:
        model: The model.
        weights: Arrays, tensors or variables, in the order of `model.weights`.
        states: Variables, in the order of `state_variables(model)`.
    """

    def __init__(
        self, model: keras.Model, weights: Sequence[Any], states: Sequence[keras.Variable]
    ) -> None:
        super().__init__(list(zip(model.weights, weights, strict=True)))
        originals = state_variables(model)
        self._states = {id(v): own for v, own in zip(originals, states, strict=True)}
        # Metrics of layers stay as they are, too.
        self._fixed = set(self.state_mapping) | {id(v) for v in model.metrics_variables}
        self.changes = 0

    def get_current_value(self, variable: Any) -> Any:
        own = self._states.get(id(variable))
        if own is None and variable._value is None:
            own = self._initialized(variable)
        if own is None:
            return super().get_current_value(variable)
        with self._outside():
            return own.value

    def _initialized(self, variable: Any) -> Any:
        """The variable, made inside the scope: Keras's global generator at its first use, say.

        Keras would initialize it only at the end, so that it would be a constant in this graph.
        """
        waiting = global_state.get_global_attribute("uninitialized_variables", [])
        waiting[:] = [other for other in waiting if other is not variable]
        with self._outside(), tf.init_scope():
            variable._deferred_initialize()
        return variable

    def add_update(self, update: tuple[Any, Any]) -> None:
        variable, value = update
        if id(variable) in self._fixed:
            super().add_update(update)
            return
        self.changes += 1
        with self._outside():
            self._states.get(id(variable), variable).assign(value)

    @contextlib.contextmanager
    def _outside(self) -> Iterator[None]:
        global_state.set_global_attribute("stateless_scope", self.original_scope)
        try:
            yield
        finally:
            global_state.set_global_attribute("stateless_scope", self)


@contextlib.contextmanager
def draws_noticed() -> Iterator[list[Any]]:
    """Adds something to the list if the code inside the context draws or changes a state.

    In a graph, TensorFlow's own random numbers count as well.
    """
    noticed: list[Any] = []
    changes, count = _state_changes(), len(_operations())
    yield noticed
    noticed.extend(filter(_may_draw, _operations()[count:]))
    if _state_changes() > changes:
        noticed.append("state")


def draws(graph: Any) -> bool:
    """Whether a graph, or a function that it calls, may draw random numbers or run Python."""
    functions = graph.as_graph_def().library.function
    types = {operation.type for operation in graph.get_operations()}
    types |= {node.op for function in functions for node in function.node_def}
    # What is not registered is one of the functions.
    known = filter(None, map(op_def_registry.get, types))
    return any(_draws(op_def) for op_def in known)


def _operations() -> list[Any]:
    if tf.executing_eagerly():
        return []
    return list(tf.compat.v1.get_default_graph().get_operations())


def _may_draw(operation: Any) -> bool:
    """Whether it is a random or Python operation, or runs functions that may have some."""
    op_def = operation.op_def
    return _draws(op_def) or (op_def.is_stateful and any("func" in a.type for a in op_def.attr))


def _draws(op_def: Any) -> bool:
    """Whether operations of this type draw random numbers or run Python."""
    if not op_def.is_stateful:
        return False
    if op_def.name.startswith(("Stateful", "Rng")):  # Those of `tf.random.Generator`.
        return op_def.name != "StatefulPartitionedCall"
    return any(a.name in ("seed2", "token") for a in op_def.attr)


def _state_changes() -> int:
    """How many times states were assigned so far inside the present `with_weights`."""
    return getattr(global_state.get_global_attribute("stateless_scope"), "changes", 0)


@contextlib.contextmanager
def weights_shown(model: keras.Model, weights: Sequence[Any]) -> Iterator[None]:
    """Makes the model read and save as if it had these weights; only in the caller's context.

    Args:
        model: A built model of any kind.
        weights: Arrays, tensors or variables, in the order of `model.weights`.
    """
    with keras.StatelessScope(state_mapping=list(zip(model.weights, weights, strict=True))):
        yield


@contextlib.contextmanager
def assignments_kept_apart() -> Iterator[None]:
    """Values that are assigned inside the context are seen only there, and forgotten afterwards.

    A model can thus read a file while another thread trains it.
    """
    with keras.StatelessScope(), _finalizing.active(True):
        yield


class _SendingScope(keras.StatelessScope):
    """Assigns other variables at once in place of some; the others are not changed.

    Args:
        pairs: Pairs of a variable and of the one that is assigned in its place.
    """

    def __init__(self, pairs: Iterable[tuple[keras.Variable, keras.Variable]]) -> None:
        super().__init__()
        self._targets = {id(variable): target for variable, target in pairs}
        self.assigned: set[int] = set()

    def get_current_value(self, variable: Any) -> Any:
        if id(variable) not in self.assigned:
            return super().get_current_value(variable)
        with scopes_left():
            return self._targets[id(variable)].value

    def add_update(self, update: tuple[Any, Any]) -> None:
        variable, value = update
        target = self._targets.get(id(variable))
        if target is None:
            super().add_update(update)  # Forgotten afterwards: a random seed, say.
            return
        with scopes_left():
            target.assign(value)
        self.assigned.add(id(variable))


@contextlib.contextmanager
def assignments_sent(model: keras.Model, targets: Sequence[keras.Variable]) -> Iterator[None]:
    """What is assigned to the model's weights inside the context is assigned to other variables.

    The model can thus read a file into them while another thread trains it.

    Args:
        model: A built model of any kind.
        targets: In the order of `model.weights`. At the end, those that nothing was assigned to
            get the model's own values.
    """
    pairs = list(zip(model.weights, targets, strict=True))
    with _SendingScope(pairs) as scope, _finalizing.active(True):
        yield
    for variable, target in pairs:
        if id(variable) not in scope.assigned:
            target.assign(variable.value)


@contextlib.contextmanager
def scopes_left() -> Iterator[None]:
    """Leaves all scopes of shown weights for a while: inside one, no variables can be made."""
    scope = global_state.get_global_attribute("stateless_scope")
    global_state.set_global_attribute("stateless_scope", None)
    try:
        yield
    finally:
        global_state.set_global_attribute("stateless_scope", scope)


@contextlib.contextmanager
def losses_left_alone() -> Iterator[None]:
    """Calls of layers inside the context neither add losses to the layers nor clear them.

    Another thread may be training with the losses.
    """
    with _clearing_losses.active(True), _adding_losses.active(True):
        yield


@contextlib.contextmanager
def with_weights(
    model: keras.Model,
    weights: Sequence[Any],
    states: Sequence[keras.Variable] | None = None,
) -> Iterator[None]:
    """Makes the model run with these weights, without changing its own.

    Args:
        model: A built model of any kind.
        weights: Arrays, tensors or variables, in the order of `model.weights`.
        states: Variables that stand in for `state_variables(model)`: they are read and changed
            instead. Defaults to `None`: whatever changes is forgotten afterwards.
    """
    if states is None:
        scope: Any = weights_shown(model, weights)
    else:
        scope = _StatefulScope(model, weights, states)
    with (
        scope,
        _calling_functions.active(True),
        _clearing_losses.active(True),
        twins_called(_normalizing(model)),
    ):
        yield
