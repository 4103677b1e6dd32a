"""Many members -> one Functional model, in which what members share is computed once."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.inference.cloning import compile_like, copy_assets
from snapshot_ensemble.inference.members_model import identity
from snapshot_ensemble.keras_compat.layer_graph import (
    graph_of,
    run_graph,
    source_of,
    takes_training,
)
from snapshot_ensemble.storage.snapshot import Weights
from snapshot_ensemble.storage.weight_files import set_weights


class Merger:
    """Lays the graphs of all members over each other.

    Every layer whose weights are equal in all members is made once, and called once for the same
    inputs: what depends on shared layers alone is one computation. From the first layer that
    differs on, each member has its own.

    Args:
        model: A Functional or Sequential model.
        members: The weights of each member, in the order of `model.weights`.
        reserved: Names that no layer may take.
    """

    def __init__(
        self, model: keras.Model, members: Sequence[Weights], reserved: Sequence[str]
    ) -> None:
        self._members = members
        self._place = {id(variable): i for i, variable in enumerate(model.weights)}
        first = members[0]
        self._equal = [
            all(member[i] is first[i] or np.array_equal(member[i], first[i]) for member in members)
            for i in range(len(first))
        ]
        self._names = set(reserved)
        self._made: dict[tuple[int, int | None], Any] = {}
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

    def _call(self, operation: Any, member: int, args: Any, kwargs: Any) -> Any:
        places = [self._place[id(v)] for v in getattr(operation, "weights", ())]
        owner = None if all(self._equal[i] for i in places) else member
        key = (id(operation), owner, identity((args, kwargs)))
        if key in self._called:
            return self._called[key][0]
        made = self._made.get((id(operation), owner))
        if made is None:
            prefix = "" if owner is None else f"member_{member}_"
            made = clone_operation(operation, self._free_name(prefix + operation.name))
            self._made[id(operation), owner] = made
            result = made(*args, **kwargs)
            if places:
                set_weights(made, [self._members[member][i] for i in places])
            copy_assets(operation, made)
        else:
            result = made(*args, **kwargs)
        # The arguments are kept, so that no other object takes their identity.
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
) -> keras.Model:
    """One Functional model, of stock layers and operations, that combines the members.

    Args:
        model: The model whose weights the members are; Functional or Sequential, and built.
        members: The weights of each member.
        combine: Takes the list of the members' symbolic outputs, returns the combined ones.

    Returns:
        A `keras.Model` with the inputs' structure and names and the outputs' structure and
        names of `model`, compiled as it is.

    Raises:
        ValueError: If the model is no graph of layers.
    """
    graph = graph_of(model)
    if graph is None:
        raise ValueError(
            "Only a Functional or Sequential model can be laid out as one Keras model, since a "
            f"subclass runs code of its own. Received: model={model.name!r} of class "
            f"{type(model).__name__}. `export(filepath)` to a SavedModel works for every model."
        )
    inputs = keras.tree.map_structure(
        lambda tensor: (
            keras.layers.InputLayer.from_config(source_of(tensor)[0].get_config()).output
        ),
        graph.input,
    )
    names = [tensor.name for tensor in keras.tree.flatten(inputs)]
    merger = Merger(model, members, [*names, *graph.output_names])
    combined = combine([merger.outputs(graph, inputs, k) for k in range(len(members))])
    # The last layer of an output gives it its name.
    named = [
        keras.layers.Identity(name=name, dtype=output.dtype)(output)
        for name, output in zip(graph.output_names, keras.tree.flatten(combined), strict=True)
    ]
    outputs = keras.tree.pack_sequence_as(graph.output, named)
    merged = keras.Model(inputs, outputs, name=model.name)
    # With plain SGD, which adds no slots to its file.
    compile_like(merged, model)
    return merged


def clone_operation(operation: Any, name: str) -> Any:
    """A layer or operation of its own with the same configuration, under another name."""
    config = operation.get_config()
    config["name"] = name
    if isinstance(operation, keras.layers.Lambda):
        # In this process its function is the user's own: nothing is read from a file.
        return type(operation).from_config(config, safe_mode=False)
    return type(operation).from_config(config)
