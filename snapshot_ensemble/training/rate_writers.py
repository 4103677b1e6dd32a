"""Code of the user's that sets the learning rate while the plan does."""

import warnings
from typing import Any

import keras

from snapshot_ensemble.keras_compat.optimizer_rate import calling_callback
from snapshot_ensemble.keras_compat.train_step import is_traced


class RateWriters:
    """Notices callbacks and training steps that set the learning rate, and leaves that out.

    It costs nothing unless something sets the rate.

    Args:
        model: The model that is trained.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self._warned: set[type] = set()

    def allows(self) -> bool:
        """Whether the code that is about to set the rate may do so.

        Warns once of each class of callbacks that may not.

        Raises:
            ValueError: If a training step sets the rate. It would train with it.
        """
        callback = calling_callback()
        if is_traced() or (callback is None and self._model.run_eagerly):
            raise ValueError(
                "The learning rate is set by the ensemble's schedule, so the model's `train_step` "
                "must not set it. Received: a `train_step` that assigns to "
                "`optimizer.learning_rate`. Leave that out, or choose the rates with `schedule`, "
                "`lr_init` and `lr_min`."
            )
        kind = type(callback)
        if callback is None or kind.__module__.startswith("snapshot_ensemble."):
            return True  # Such as a state that is restored.
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(
                f"{kind.__name__} sets the learning rate, which has no effect: the rate follows "
                f"the ensemble's schedule. Received: callbacks with {kind.__name__}. Leave it out, "
                "or choose the rates with `schedule`, `lr_init` and `lr_min`.",
                stacklevel=4,
            )
        return False


def check_not_replaced(rate: Any) -> None:
    """Raises `ValueError` if the optimizer's rate during training is no longer a variable."""
    if not isinstance(rate, keras.Variable):
        raise ValueError(
            "The learning rate is set by the ensemble's schedule, so nothing may replace it during "
            f"training. Received: a callback that sets `optimizer.learning_rate` to "
            f"{type(rate).__name__}. Leave it out, or choose the rates with `schedule`, `lr_init` "
            "and `lr_min`."
        )
