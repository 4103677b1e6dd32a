"""Checks that the learning rate that is annealed is the one that trains."""

from typing import Any

import keras

from snapshot_ensemble.keras_compat.layer_graph import all_layers
from snapshot_ensemble.keras_compat.optimizer_rate import rate_holder
from snapshot_ensemble.keras_compat.optimizers import calls_counted, optimizers_of, wraps_others
from snapshot_ensemble.keras_compat.stock_layers import has_own_train_step

_ADVICE = (
    "Compile the model with one optimizer that has the learning rate itself, and apply all "
    "gradients with it (in a `train_step`: with `self.optimizer`)."
)


def check_one_optimizer(model: keras.Model) -> None:
    """Raises `ValueError` if the model trains with several optimizers."""
    annealed = rate_holder(model.optimizer)
    if wraps_others(annealed):
        raise ValueError(
            "The learning rate of one optimizer is annealed, but this one has others inside, each "
            f"with a rate of its own. Received: optimizer={type(annealed).__name__}. {_ADVICE}"
        )
    others = [o for o in optimizers_of(model) if rate_holder(o) is not annealed]
    # A stock training step applies the compiled optimizer only, whatever else the model holds.
    if others and has_own_train_step(model):
        raise ValueError(
            "The learning rate of one optimizer is annealed, but the model has a training step of "
            f"its own and several optimizers. Received: model={model.name!r}, compiled with "
            f"{type(annealed).__name__}, and {_names(others)} in its attributes. {_ADVICE}"
        )


class OptimizerSteps:
    """Notices which optimizers take steps.

    Args:
        model: The model; its optimizers, and those of models inside, are watched from now on.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self._before = [(optimizer, calls_counted(optimizer)) for optimizer in _every(model)]

    def check(self, steps: int) -> None:
        """Raises `RuntimeError` unless it was the model's compiled optimizer, and no other.

        Args:
            steps: How many steps the annealed rate has counted.
        """
        model = self._model
        if not model.trainable_variables:  # Keras warns that nothing is trained.
            return
        own = (model.optimizer, rate_holder(model.optimizer))
        moved = [o for o, before in self._before if calls_counted(o) != before]
        others = [o for o in moved if not any(o is mine for mine in own)]
        has_moved = len(moved) > len(others) or not any(o is own[0] for o, _ in self._before)
        if steps and has_moved and not others:
            return
        found = f"{_names(others)} did" if others else "no optimizer of the model did"
        if steps and has_moved:
            found = f"{_names(others)} took steps, too"
        raise RuntimeError(
            "The learning rate that is annealed is not the one that trains. Received: "
            f"model={model.name!r}, whose {type(own[1]).__name__} took "
            f"{'steps' if steps and has_moved else 'no step'} in the first epoch; {found}. "
            f"{_ADVICE}"
        )


def _every(model: keras.Model) -> list[Any]:
    models = [layer for layer in all_layers(model) if isinstance(layer, keras.Model)]
    found = [optimizer for one in models for optimizer in optimizers_of(one)]
    return list({id(optimizer): optimizer for optimizer in found}.values())


def _names(optimizers: list[Any]) -> str:
    return ", ".join(type(optimizer).__name__ for optimizer in optimizers)
