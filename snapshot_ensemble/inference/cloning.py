"""Models like the user's: one member as a model of its own, and what it is compiled with."""

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
    """One member of an ensemble whose model cannot be cloned: the model with other weights."""

    def __init__(self, model: keras.Model) -> None:
        super().__init__(name=model.name, dtype=model.dtype_policy, autocast=False)
        own = [
            self.add_weight(shape=v.shape, dtype=v.dtype, trainable=v.trainable, name=v.name)
            for v in model.weights
        ]

        def run(inputs: Any) -> Any:
            return member_outputs(model, own, inputs)

        self._run = run
        # Keras lists trainable weights first; arrays come in the model's order.
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
    """A model of its own with the architecture of `model` and weights to be set, not compiled."""
    try:
        # Numbers for weights that are given anyway would take time, and memory for a while.
        with random_initializers_replaced(lambda _: keras.initializers.Zeros()):
            # Not through `clone_model`, which stumbles over losses and metrics without a config.
            member = type(model).from_config(model.get_config())
            if not member.built:
                member.build_from_config(model.get_build_config())
        if [v.shape for v in member.weights] != [v.shape for v in model.weights]:
            raise ValueError("Its config does not say what it is.")
        copy_assets(model, member)
    except Exception:
        member = Member(model)
    return member


def build_member(model: keras.Model, weights: Weights) -> keras.Model:
    """A model of its own with the architecture of `model` and these weights, compiled alike."""
    member = blank_member(model)
    set_weights(member, weights)
    compile_like(member, model, optimizer=_copy(compile_arguments(model)["optimizer"]))
    return member


def compile_like(target: keras.Model, model: keras.Model, optimizer: Any = "sgd") -> None:
    """Compiles `target` with the loss and metrics of `model`, and an optimizer of its own."""
    arguments = {**compile_arguments(model), "optimizer": optimizer}
    for name in ("metrics", "weighted_metrics"):
        arguments[name] = keras.tree.map_structure(_copy, arguments[name])
    keras.Model.compile(target, **arguments)


def _copy(thing: Any) -> Any:
    """A new optimizer or metric like the one given, with a state of its own where it can."""
    if not isinstance(thing, (keras.Optimizer, keras.Metric)):
        return thing
    try:
        # A lambda in it, such as a rate, is not read from a file but used as it is.
        with warnings_ignored():
            return type(thing).from_config(thing.get_config())
    except Exception:
        return thing


@contextlib.contextmanager
def metrics_lent(model: keras.Model) -> Iterator[None]:
    """Lends a model's metrics and gives them back as they were.

    For those that cannot be made anew from a config, which are shared with the user's model.
    """
    config = compile_arguments(model)
    leaves = keras.tree.flatten([config["metrics"], config["weighted_metrics"]])
    metrics = [leaf for leaf in leaves if isinstance(leaf, keras.Metric)]
    state = [(variable, variable.numpy()) for metric in metrics for variable in metric.variables]
    for metric in metrics:
        metric.reset_state()
    try:
        yield
    finally:
        for variable, value in state:
            variable.assign(value)


def copy_assets(layer: Any, clone: Any) -> None:
    """Carries over what is neither configuration nor weights, such as an adapted vocabulary."""
    if not isinstance(layer, keras.layers.Layer):
        return
    for own, other in zip(all_layers(layer), all_layers(clone), strict=True):
        if hasattr(own, "save_assets"):
            with tempfile.TemporaryDirectory() as directory:
                own.save_assets(directory)
                other.load_assets(directory)
