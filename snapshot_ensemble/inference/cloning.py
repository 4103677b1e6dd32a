"""Clones of the user's model: one member as a separate model, compiled like the original."""

import tempfile
from typing import Any

import keras

from snapshot_ensemble.inference.members_model import member_outputs
from snapshot_ensemble.keras_compat.compile_arguments import compile_arguments
from snapshot_ensemble.keras_compat.initializers import random_initializers_replaced
from snapshot_ensemble.keras_compat.layer_graph import all_layers
from snapshot_ensemble.keras_compat.metric_copies import copy_of_metric
from snapshot_ensemble.keras_compat.optimizer_rate import copy_of_optimizer
from snapshot_ensemble.keras_compat.random_seed import seeds_drawn_apart
from snapshot_ensemble.storage.snapshot import Weights
from snapshot_ensemble.storage.weight_files import set_weights


class Member(keras.Model):
    """One member of an ensemble whose model cannot be cloned: runs the model with other weights."""

    def __init__(self, model: keras.Model) -> None:
        super().__init__(name=model.name, dtype=model.dtype_policy, autocast=False)
        own = [
            # Zeros, since drawing values would advance a random generator.
            self.add_weight(v.shape, "zeros", v.dtype, trainable=v.trainable, name=v.name)
            for v in model.weights
        ]

        def run(inputs: Any) -> Any:
            return member_outputs(model, own, inputs)

        self._run = run
        # Keras lists trainable weights first; arrays are in the order of `model.weights`.
        self.in_model_order = own
        self.built = True

    def set_weights(self, weights: Weights) -> None:
        for variable, value in zip(self.in_model_order, weights, strict=True):
            variable.assign(value)

    def get_weights(self) -> Weights:
        return [variable.numpy() for variable in self.in_model_order]

    def call(self, inputs: Any) -> Any:
        return self._run(inputs)


def blank_member(model: keras.Model) -> keras.Model:
    """A new model with the architecture of `model`, not compiled, whose weights are to be set."""
    try:
        # Drawing initial weights that are overwritten anyway would cost time and memory.
        zeros = random_initializers_replaced(lambda _: keras.initializers.Zeros())
        with zeros, seeds_drawn_apart():
            # Not with `clone_model`, which fails if a loss or metric has no config.
            member = type(model).from_config(model.get_config())
            if not member.built:
                member.build_from_config(model.get_build_config())
        if [v.shape for v in member.weights] != [v.shape for v in model.weights]:
            raise ValueError("The config does not describe the model.")
        copy_assets(model, member)
    except Exception:
        member = Member(model)
    return member


def build_member(model: keras.Model, weights: Weights) -> keras.Model:
    """A new model with the architecture of `model` and these weights, compiled like it."""
    member = blank_member(model)
    set_weights(member, weights)
    compile_like(member, model, optimizer=_own(compile_arguments(model)["optimizer"]))
    return member


def compile_like(target: keras.Model, model: keras.Model, optimizer: Any = "sgd") -> None:
    """Compiles `target` with the loss and metrics of `model`, and its own optimizer."""
    arguments = {**compile_arguments(model), "optimizer": optimizer}
    for name in ("metrics", "weighted_metrics"):
        arguments[name] = keras.tree.map_structure(_own, arguments[name])
    keras.Model.compile(target, **arguments)


def _own(given: Any) -> Any:
    """A copy of an optimizer or metric, which have state; anything else as it is."""
    if isinstance(given, keras.Metric):
        return copy_of_metric(given)
    return copy_of_optimizer(given) if isinstance(given, keras.Optimizer) else given


def copy_assets(layer: Any, clone: Any) -> None:
    """Copies what is neither configuration nor weights, such as an adapted vocabulary."""
    if not isinstance(layer, keras.layers.Layer):
        return
    for own, other in zip(all_layers(layer), all_layers(clone), strict=True):
        if hasattr(own, "save_assets"):
            with tempfile.TemporaryDirectory() as directory:
                own.save_assets(directory)
                other.load_assets(directory)
