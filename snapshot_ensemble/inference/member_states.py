"""The states of a member: what its random generators and recurrent layers carry on.

They go from batch to batch and from call to call, as in `model.predict`, and each member has its
own. They are not saved: a member that is loaded starts anew.
"""

from collections.abc import Sequence

import keras
import numpy as np

from snapshot_ensemble.keras_compat.layer_states import recurrent_states, state_variables
from snapshot_ensemble.keras_compat.random_seed import seed_states
from snapshot_ensemble.keras_compat.stateless_call import OwnStates

# How far apart the seeds of two members are: layers of one model often have consecutive ones.
_BETWEEN_MEMBERS = 1_000_003


def first_values(model: keras.Model, index: int) -> list[np.ndarray]:
    """What the states of a member start with, in the order of `state_variables(model)`.

    Recurrent states start at zero. Members draw different random numbers, which only depend on the
    seeds of the model's layers and on the member's index.
    """
    seeds = [
        np.array([state.numpy()[0] + index * _BETWEEN_MEMBERS, 0]) for state in seed_states(model)
    ]
    return [*seeds, *(np.zeros(state.shape) for state in recurrent_states(model))]


def own_states(model: keras.Model, index: int) -> OwnStates:
    """Variables for the states of a member, with their first values."""
    return OwnStates(state_variables(model), first_values(model, index))


def copy_states(source: Sequence[keras.Variable], target: Sequence[keras.Variable]) -> None:
    """Assigns the states of one model to those of another one of the same architecture."""
    for variable, value in zip(target, source, strict=True):
        variable.assign(value.value)


def reset_recurrent_states(model: keras.Model, states: Sequence[keras.Variable]) -> None:
    """Sets the recurrent ones among states, in the order of `state_variables(model)`, to zero."""
    count = len(recurrent_states(model))
    for state in states[len(states) - count :]:
        state.assign(keras.ops.zeros_like(state.value))
