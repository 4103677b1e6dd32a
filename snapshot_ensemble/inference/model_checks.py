"""What a model must be for an ensemble to be made of it."""

from typing import Any

import keras

from snapshot_ensemble.inference.output_specs import known_outputs
from snapshot_ensemble.storage.record import Learned


def check_model(model: Any) -> None:
    """Raises an error unless `model` is a compiled Keras model."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a `keras.Model`. Received: model={model!r}")
    if not model.compiled or model.optimizer is None:
        raise ValueError(
            "`model` must be compiled, so that it can be trained. "
            f"Received: model={model.name!r}, not compiled. Call `model.compile(...)` first."
        )


def check_built(model: keras.Model) -> None:
    """Raises an error unless the model has weights."""
    if model.built and not model.weights:
        raise ValueError(
            "`model` must have weights: without them, all members would be the same. "
            f"Received: model={model.name!r}, which has none."
        )
    if not model.built:
        raise ValueError(
            "`model` must be built, so that it has weights to load. "
            f"Received: model={model.name!r}, not built. Call it on a batch first."
        )


def check_learned(model: keras.Model, learned: Learned) -> None:
    """Raises an error if what was learned is for another number of outputs than the model's."""
    if (outputs := known_outputs(model)) is not None:
        learned.check_outputs(len(keras.tree.flatten(outputs)))
