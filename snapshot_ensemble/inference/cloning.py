"""Clones of the user's model: one member as a separate model, compiled like the original."""

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

import keras

from snapshot_ensemble.inference.members_model import member_outputs
from snapshot_ensemble.keras_compat.compile_arguments import compile_arguments
from snapshot_ensemble.keras_compat.initializers import random_initializers_replaced
from snapshot_ensemble.keras_compat.layer_graph import all_layers
from snapshot_ensemble.keras_compat.quiet import warnings_ignored
from snapshot_ensemble.storage.snapshot import Weights
from snapshot_ensemble.storage.weight_files import set_weights


class Member(keras.Model):
    """One member of an ensemble whose model cannot be cloned: runs the model with other weights."""

    def __init__(self, model: keras.Model) -> None:
        super().__init__(name=model.name, dtype=model.dtype_policy, autocast=False)
        own = [
            self.add_weight(shape=v.shape, dtype=v.dtype, trainable=v.trainable, name=v.name)
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
        with random_initializers_replaced(lambda _: keras.initializers.Zeros()):
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
    compile_like(member, model, optimizer=_copy(compile_arguments(model)["optimizer"]))
    return member


def compile_like(target: keras.Model, model: keras.Model, optimizer: Any = "sgd") -> None:
    """Compiles `target` with the loss and metrics of `model`, and its own optimizer."""
    arguments = {**compile_arguments(model), "optimizer": optimizer}
    for name in ("metrics", "weighted_metrics"):
        arguments[name] = keras.tree.map_structure(_copy, arguments[name])
    keras.Model.compile(target, **arguments)


def _copy(original: Any) -> Any:
    """A copy of an optimizer or metric with its own state; if that fails, the original."""
    if not isinstance(original, (keras.Optimizer, keras.Metric)):
        return original
    try:
        # Keras warns of lambdas in a config, but this one is not read from a file.
        with warnings_ignored():
            return type(original).from_config(original.get_config())
    except Exception:
        return original


@contextlib.contextmanager
def metrics_lent(model: keras.Model) -> Iterator[None]:
    """Resets a model's metrics for the duration of a block and then restores their state.

    This matters for metrics that cannot be copied and are shared with the user's model.
    """
    config = compile_arguments(model)
    leaves = keras.tree.flatten([config["metrics"], config["weighted_metrics"]])
    metrics = [leaf for leaf in leaves if isinstance(leaf, keras.Metric)]
    saved = [(variable, variable.numpy()) for metric in metrics for variable in metric.variables]
    for metric in metrics:
        metric.reset_state()
    try:
        yield
    finally:
        for variable, value in saved:
            variable.assign(value)


def copy_assets(layer: Any, clone: Any) -> None:
    """Copies what is neither configuration nor weights, such as an adapted vocabulary."""
    if not isinstance(layer, keras.layers.Layer):
        return
    for own, other in zip(all_layers(layer), all_layers(clone), strict=True):
        if hasattr(own, "save_assets"):
            with tempfile.TemporaryDirectory() as directory:
                own.save_assets(directory)
                other.load_assets(directory)
