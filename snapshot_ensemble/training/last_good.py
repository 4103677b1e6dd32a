"""The state that training goes back to after a cycle that gives no member."""

from typing import Any, Self

import keras
import numpy as np

from snapshot_ensemble.keras_compat.optimizers import initial_values, optimizers_of
from snapshot_ensemble.storage.weight_delta import from_bits, same
from snapshot_ensemble.training.member_checks import not_finite
from snapshot_ensemble.training.state import variables_of


class LastGood:
    """What all variables were at the end of the last good cycle, or before the first one.

    Args:
        values: The value of each variable that training changes, by the variable's `id`. An
            optimizer creates its slots at its first step: before it, they have none.
    """

    def __init__(self, values: dict[int, np.ndarray]) -> None:
        self._values = values

    @classmethod
    def of(cls, model: keras.Model) -> Self:
        """The present state."""
        return cls({id(variable): _value(variable) for variable in variables_of(model)})

    def restore(self, model: keras.Model) -> str:
        """Goes back to this state; returns why that is impossible, empty if it is not."""
        if created := [v.path for v in model.weights if id(v) not in self._values]:
            return (
                "The state before it is not known, since the model was not built: "
                f"{created[0]} was created later. Call the model on a batch before `fit`."
            )
        self._assign(model.variables)
        for optimizer in optimizers_of(model):
            if any(id(variable) not in self._values for variable in optimizer.variables):
                try:
                    with model.distribute_strategy.scope():
                        # Slots may begin as copies of the weights, which are already restored.
                        as_new = initial_values(optimizer)
                except Exception as error:
                    return (
                        "The optimizer cannot begin anew, since it cannot be made from its config. "
                        f"Received: {type(optimizer).__name__}: {error}"
                    )
                for variable, value in zip(optimizer.variables, as_new, strict=True):
                    variable.assign(value)
            self._assign(optimizer.variables)
        if cause := not_finite(model, {}):
            return f"The state before it is not finite either: {cause}."
        return ""

    def _assign(self, variables: list[Any]) -> None:
        for variable in variables:
            if id(variable) in self._values:
                variable.assign(self._values[id(variable)])

    def packed(self, model: keras.Model) -> list[Any] | None:
        """The values in the order of the variables, to be saved; None if this is the present."""
        pairs = [(v, self._values.get(id(v))) for v in variables_of(model)]
        if all(value is not None and same(value, _value(variable)) for variable, value in pairs):
            return None
        return [value for _, value in pairs]

    @classmethod
    def unpacked(cls, model: keras.Model, values: list[Any]) -> Self:
        """What `packed` returned, read from a file."""
        pairs = zip(variables_of(model), values, strict=True)
        return cls(
            {
                id(variable): _with_dtype(value, _value(variable).dtype)
                for variable, value in pairs
                if value is not None
            }
        )


def _value(variable: Any) -> np.ndarray:
    return keras.ops.convert_to_numpy(variable.value)


def _with_dtype(value: Any, dtype: np.dtype) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return from_bits(value, dtype)
    return np.asarray(value, dtype)  # A number, as JSON has it.
