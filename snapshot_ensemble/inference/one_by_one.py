"""Members one after another in one model, so that only one member's weights are in memory."""

from collections.abc import Callable
from typing import Any

import keras

from snapshot_ensemble.inference.cloning import compile_like
from snapshot_ensemble.inference.member_states import copy_states, own_states
from snapshot_ensemble.inference.members_model import MembersModel
from snapshot_ensemble.keras_compat.stateless_call import OwnStates
from snapshot_ensemble.storage.view import View


class OneByOne:
    """Variables that get the weights and states of each member in turn.

    They may be used by one thread at a time.

    Args:
        model: The model whose weights the members are. It is neither tracked nor changed.

    Attributes:
        in_model_order: The variables, in the order of `model.weights`.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        with model.distribute_strategy.scope():
            # Not trainable, so that a `GradientTape` of the user's does not watch them.
            self.in_model_order = [
                keras.Variable(
                    "zeros",  # Drawing values would advance a random generator.
                    shape=tuple(v.shape),
                    dtype=v.dtype,
                    trainable=False,
                    autocast=False,  # What is read through the original is cast like the original.
                    aggregation=v.aggregation,
                    name=v.name,
                )
                for v in model.weights
            ]
            self._states = own_states(model, 0).values
        self._models: dict[Any, MembersModel] = {}
        self._held: int | None = None

    def model(
        self, name: Any, combine: Callable[[list[Any]], Any], kind: type[MembersModel]
    ) -> MembersModel:
        """A model that runs whichever member the variables hold; built once for each name.

        Args:
            name: Equal names mean equal models.
            combine: Takes a list of one member's outputs, and returns the model's output.
            kind: The class of the model.
        """
        if name not in self._models:
            with self._model.distribute_strategy.scope():
                model = kind(self._model, [self.in_model_order], combine, [self._states])
                compile_like(model, self._model)
            self._models[name] = model
        return self._models[name]

    def run(self, view: View, index: int, states: OwnStates, action: Callable[[], Any]) -> Any:
        """What `action` returns while the variables hold one member.

        Args:
            view: Holds the members, always the same ones.
            index: The member's index.
            states: The member's states, which go on from there.
            action: Runs one of the models.
        """
        if index != self._held:
            self._held = None  # If reading fails, they are some of one member and some of another.
            view.put(self, self._model, index)
            self._held = index
        copy_states(states.values, self._states)
        result = action()
        copy_states(self._states, states.values)
        return result
