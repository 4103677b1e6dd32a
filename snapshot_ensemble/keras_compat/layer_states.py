"""The variables of layers that are no weights: random generators and recurrent states."""

from typing import Any

import keras

from snapshot_ensemble.keras_compat.layer_graph import all_layers
from snapshot_ensemble.keras_compat.random_seed import seed_states


def recurrent_states(layer: Any) -> list[keras.Variable]:
    """The states of the stateful recurrent layers of a layer, at any depth, each once."""
    states = keras.tree.flatten([vars(inner).get("states") for inner in all_layers(layer)])
    weights = {id(variable) for variable in layer.weights}
    own = {id(v): v for v in states if isinstance(v, keras.Variable) and id(v) not in weights}
    return list(own.values())


def state_variables(layer: Any) -> list[keras.Variable]:
    """All of them: first the random generators' states, then the recurrent ones."""
    return [*seed_states(layer), *recurrent_states(layer)]
