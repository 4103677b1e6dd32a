"""Whether a merged model computes what the members do.

Its layers are made from their configs, which loses whatever is neither configuration nor a weight,
such as a constant that a layer draws in its constructor.
"""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.inference.member_states import first_values, reset_recurrent_states
from snapshot_ensemble.inference.rebuilt import are_close, outputs_on
from snapshot_ensemble.inference.sample import made_up_batch
from snapshot_ensemble.keras_compat.layer_graph import (
    direct_layers,
    graph_of,
    run_graph,
    takes_training,
)
from snapshot_ensemble.keras_compat.layer_states import state_variables
from snapshot_ensemble.keras_compat.stateless_call import with_weights
from snapshot_ensemble.storage.snapshot import Weights

# The layer of the merged model that stands for a layer of the first member, or None.
MadeOf = Callable[[Any], Any]


def check_merged(
    merged: keras.Model,
    model: keras.Model,
    members: Sequence[Weights],
    combine: Callable[[list[Any]], Any],
    made_of: MadeOf,
    sample: Any = None,
) -> None:
    """Compares a merged model with the members' own outputs on a batch.

    Models that draw random numbers when they predict cannot be compared. Warns if there is no
    batch, or if layers add terms to the loss.

    Args:
        merged: The model that was made.
        model: The model that the weights belong to.
        members: The weights of each member.
        combine: Takes the list of the members' outputs and returns the combined ones.
        made_of: Returns what stands in `merged` for a layer of the first member.
        sample: Inputs that `fit` saw, as `predict_step` takes them, or None.

    Raises:
        ValueError: If the outputs differ.
    """
    states, others = (first_values(model, index) for index in (0, 1))
    for batch in (sample, made_up_batch(model)):
        expected = _combined(model, members, combine, batch, states)
        if expected is None:
            continue
        inputs = keras.tree.map_structure(keras.ops.convert_to_tensor, batch)
        actual = merged.predict_step((inputs,))
        reset_recurrent_states(merged, state_variables(merged))
        if not are_close(expected, actual):
            # With other seeds, and the same recurrent states.
            again = _combined(model, members, combine, batch, others)
            is_random = states and not are_close(expected, again)
            if not is_random:
                raise ValueError(_message(model, members[0], made_of, inputs))
        _warn_of_losses(merged)
        return
    warnings.warn(
        "The merged model was not compared with the members: they cannot predict random inputs, "
        "which were made up. Compare its `predict` with the ensemble's on data of your own.",
        stacklevel=4,
    )


def _combined(
    model: keras.Model,
    members: Sequence[Weights],
    combine: Callable[[list[Any]], Any],
    batch: Any,
    states: Sequence[np.ndarray],
) -> Any:
    outputs = [outputs_on(model, weights, batch, states) for weights in members]
    return None if any(output is None for output in outputs) else combine(outputs)


def _message(model: keras.Model, weights: Weights, made_of: MadeOf, batch: Any) -> str:
    layer = None
    with contextlib.suppress(Exception):  # It is only to name the layer.
        layer = _first_that_differs(model, weights, made_of, batch)
    cause = (
        "A layer"
        if layer is None
        else f"Layer {layer.name!r} of class {type(layer).__name__} gives other outputs when it is "
        "made from its config: it"
    )
    return (
        "The members cannot be merged into one Keras model, since what is made from the model's "
        f"config computes something else. Received: model={model.name!r}. {cause} may draw a "
        "constant in its constructor, or the model may have a `predict_step` of its own. "
        "`export` works without the config."
    )


def _first_that_differs(model: keras.Model, weights: Weights, made_of: MadeOf, batch: Any) -> Any:
    """The first layer with other outputs than what was made of it, for the same inputs."""
    differing: list[Any] = []

    def run(graph: Any, inputs: Any) -> Any:
        def call(operation: Any, *args: Any, **kwargs: Any) -> Any:
            inner = graph_of(operation)
            if inner is not None:
                return run(inner, args[0])
            if takes_training(operation):
                kwargs["training"] = False
            outputs = operation(*args, **kwargs)
            made = made_of(operation)
            if made is not None and not are_close(outputs, made(*args, **kwargs)):
                differing.append(operation)
            return outputs

        return run_graph(graph, inputs, call)

    with with_weights(model, weights):
        run(graph_of(model), batch)
    return differing[0] if differing else None


def _warn_of_losses(merged: keras.Model) -> None:
    """Warns if the loss of `evaluate` is not only the compiled loss of the combined outputs."""
    adding = [
        layer.name
        for layer in direct_layers(merged)
        if any(np.any(keras.ops.convert_to_numpy(loss)) for loss in layer.losses)
    ]
    if adding:
        warnings.warn(
            "Layers of the merged model add terms to the loss, so that its `evaluate` returns more "
            f"than the loss of the combined outputs. Received: layers={adding}.",
            stacklevel=5,
        )
