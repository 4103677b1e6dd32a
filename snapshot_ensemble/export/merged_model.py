"""Merges all members into one Functional model; what they share is computed once."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.export.merged_check import check_merged
from snapshot_ensemble.export.served import open_batch, output_names
from snapshot_ensemble.inference.cloning import compile_like, copy_assets
from snapshot_ensemble.inference.members_model import identity
from snapshot_ensemble.keras_compat.layer_graph import (
    graph_of,
    run_graph,
    source_of,
    takes_training,
)
from snapshot_ensemble.keras_compat.random_seed import seeds_drawn_apart
from snapshot_ensemble.storage.snapshot import Weights
from snapshot_ensemble.storage.weight_files import set_weights


class Merger:
    """Merges the graphs of all members into one.

    A layer whose weights are equal in all members is created once, and called once for the same
    inputs, so that computations which depend on shared layers alone are not repeated. After the
    first layer that differs, each member has its own computation.

    Args:
        model: A Functional or Sequential model.
        members: The weights of each member, in the order of `model.weights`.
        reserved: Names that layers must not have.
    """

    def __init__(
        self, model: keras.Model, members: Sequence[Weights], reserved: Sequence[str]
    ) -> None:
        self._members = members
        self._index = {id(variable): i for i, variable in enumerate(model.weights)}
        first = members[0]
        self._equal = [
            all(member[i] is first[i] or np.array_equal(member[i], first[i]) for member in members)
            for i in range(len(first))
        ]
        self._names = set(reserved)
        self.made: dict[tuple[int, int | None], Any] = {}
        self._called: dict[Any, Any] = {}

    def outputs(self, graph: Any, inputs: Any, member: int, training: bool | None = None) -> Any:
        """The symbolic outputs of one member on symbolic inputs."""

        def call(operation: Any, *args: Any, **kwargs: Any) -> Any:
            inner = graph_of(operation)
            if inner is not None:
                return self.outputs(inner, args[0], member, kwargs.get("training", training))
            if training is not None and takes_training(operation):
                kwargs.setdefault("training", training)
            return self._call(operation, member, args, kwargs)

        return run_graph(graph, inputs, call)

    def made_of(self, operation: Any, member: int) -> Any:
        """What stands for a layer of the model in a member; None if it has not been made."""
        return self.made.get((id(operation), self._owner(operation, member)))

    def _indices(self, operation: Any) -> list[int]:
        return [self._index[id(v)] for v in getattr(operation, "weights", ())]

    def _owner(self, operation: Any, member: int) -> int | None:
        """None if all members can have the same layer."""
        return None if all(self._equal[i] for i in self._indices(operation)) else member

    def _call(self, operation: Any, member: int, args: Any, kwargs: Any) -> Any:
        indices, owner = self._indices(operation), self._owner(operation, member)
        key = (id(operation), owner, identity((args, kwargs)))
        if key in self._called:
            return self._called[key][0]
        made = self.made.get((id(operation), owner))
        if made is None:
            prefix = "" if owner is None else f"member_{member}_"
            name = self._free_name(prefix + operation.name)
            weights = [self._members[member][i] for i in indices]
            made, result = called_clone(operation, name, weights, args, kwargs)
            self.made[id(operation), owner] = made
        else:
            result = made(*args, **kwargs)
        # The arguments are kept alive, so that no new object can get the same id.
        self._called[key] = (result, args, kwargs)
        return result

    def _free_name(self, name: str) -> str:
        free, number = name, 0
        while free in self._names:
            number += 1
            free = f"{name}_{number}"
        self._names.add(free)
        return free


def merge(
    model: keras.Model,
    members: Sequence[Weights],
    combine: Callable[[list[Any]], Any],
    sample: Any = None,
) -> keras.Model:
    """One Functional model of Keras's own layers and operations that combines the members.

    Args:
        model: The model that the weights belong to; Functional or Sequential, and built.
        members: The weights of each member.
        combine: Takes the list of the members' symbolic outputs and returns the combined ones.
        sample: Inputs that `fit` saw, on which the result is compared with the members, or None.

    Returns:
        A `keras.Model` with the structure and names of the inputs and outputs of `model`,
        compiled with its loss and metrics.

    Raises:
        ValueError: If the model is not a graph of layers, or a layer cannot be made from its
            config, or computes something else then.
    """
    graph = graph_of(model)
    if graph is None:
        raise ValueError(
            "Only a Functional or Sequential model can be merged into one Keras model, because a "
            f"subclassed model runs its own code. Received: model={model.name!r} of class "
            f"{type(model).__name__}. `export(filepath)` to a SavedModel works for every model."
        )
    inputs = keras.tree.map_structure(lambda tensor: _input_like(model, tensor), graph.input)
    names = [tensor.name for tensor in keras.tree.flatten(inputs)]
    own = output_names(model) or []
    merger = Merger(model, members, [*names, *own])
    with seeds_drawn_apart():
        combined = combine([merger.outputs(graph, inputs, k) for k in range(len(members))])
    # An output is named after its last layer; one that is an input already has its name.
    named = [
        output if name in names else keras.layers.Identity(name=name, dtype=output.dtype)(output)
        for name, output in zip(own, keras.tree.flatten(combined), strict=True)
    ]
    outputs = keras.tree.pack_sequence_as(graph.output, named)
    merged = keras.Model(inputs, outputs, name=model.name)
    # With plain SGD, which has no slot variables to save.
    compile_like(merged, model)
    check_merged(merged, model, members, combine, lambda layer: merger.made_of(layer, 0), sample)
    return merged


def _input_like(model: keras.Model, tensor: Any) -> Any:
    config = source_of(tensor)[0].get_config()
    config["batch_shape"] = open_batch(model, config["batch_shape"])
    return keras.layers.InputLayer.from_config(config).output


def called_clone(
    operation: Any, name: str, weights: Weights, args: Any, kwargs: Any
) -> tuple[Any, Any]:
    """A layer or operation made from a config, with other weights, and what its call returns.

    Raises:
        ValueError: If it cannot be made from its config.
    """
    try:
        made = clone_operation(operation, name)
        result = made(*args, **kwargs)
        if weights:
            set_weights(made, weights)
        copy_assets(operation, made)
    except Exception as error:  # Anything may go wrong in a user's class.
        raise ValueError(
            f"Layer {operation.name!r} of class {type(operation).__name__} cannot be made from its "
            f"config, as one Keras model of all members needs: {error}\n`export` works without."
        ) from error
    return made, result


def clone_operation(operation: Any, name: str) -> Any:
    """A new layer or operation with the same configuration and another name.

    It has no penalties for its weights or outputs, which are terms of a member's loss, and not of
    the combination's.
    """
    config = without_penalties(operation.get_config()) | {"name": name}
    if isinstance(operation, keras.layers.ActivityRegularization):
        config |= {"l1": 0.0, "l2": 0.0}
    if isinstance(operation, keras.layers.Lambda):
        # Safe: the function is the user's own object and is not read from a file.
        return type(operation).from_config(config, safe_mode=False)
    return type(operation).from_config(config)


def without_penalties(config: Any) -> Any:
    """A layer's config with no regularizers in it, nor in those of layers inside it."""
    if isinstance(config, dict):
        return {
            key: None if str(key).endswith("regularizer") else without_penalties(value)
            for key, value in config.items()
        }
    if type(config) in (list, tuple):
        return type(config)(map(without_penalties, config))
    return config
