"""Models like the user's: one member as a model of its own, and what it is compiled with."""

import contextlib
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras.src.initializers.random_initializers import RandomInitializer

from snapshot_ensemble.inference.members_model import member_outputs
from snapshot_ensemble.storage.snapshot import Weights, set_weights


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


@contextlib.contextmanager
def initialized_by(replace: Callable[[Any], Any]) -> Iterator[None]:
    """Puts other initializers in the place of those that draw, for weights made here meanwhile.

    Args:
        replace: Takes an initializer of Keras's that gives random numbers. Any other might be a
            table that no file holds, and is left as it is.
    """
    add_weight, here = keras.layers.Layer.add_weight, threading.get_ident()

    def add(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = keras.initializers.get(kwargs.get("initializer"))
        dtype = keras.backend.standardize_dtype(kwargs.get("dtype") or self.variable_dtype)
        if found is None and "float" in dtype:
            found = keras.initializers.GlorotUniform()  # Keras's default.
        if not args and threading.get_ident() == here and isinstance(found, RandomInitializer):
            kwargs["initializer"] = replace(found)
        return add_weight(self, *args, **kwargs)

    keras.layers.Layer.add_weight = add
    try:
        yield
    finally:
        keras.layers.Layer.add_weight = add_weight


def blank_member(model: keras.Model) -> keras.Model:
    """A model of its own with the architecture of `model` and weights to be set, not compiled."""
    try:
        # Numbers for weights that are given anyway would take time, and memory for a while.
        with initialized_by(lambda drawing: keras.initializers.Zeros()):
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
    compile_like(member, model, optimizer=_copy(model._compile_config.config["optimizer"]))
    return member


def compile_like(target: keras.Model, model: keras.Model, optimizer: Any = "sgd") -> None:
    """Compiles `target` with the loss and metrics of `model`, and an optimizer of its own."""
    arguments = {**model._compile_config.config, "optimizer": optimizer}
    for name in ("metrics", "weighted_metrics"):
        arguments[name] = keras.tree.map_structure(_copy, arguments[name])
    keras.Model.compile(target, **arguments)


def _copy(thing: Any) -> Any:
    """A new optimizer or metric like the one given, with a state of its own where it can."""
    if not isinstance(thing, (keras.Optimizer, keras.Metric)):
        return thing
    try:
        with warnings.catch_warnings():
            # A lambda in it, such as a rate, is not read from a file but used as it is.
            warnings.simplefilter("ignore")
            return type(thing).from_config(thing.get_config())
    except Exception:
        return thing


@contextlib.contextmanager
def metrics_lent(model: keras.Model) -> Iterator[None]:
    """Lends a model's metrics and gives them back as they were.

    For those that cannot be made anew from a config, which are shared with the user's model.
    """
    config = model._compile_config.config
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
    for own, other in zip(layer._flatten_layers(), clone._flatten_layers(), strict=True):
        if hasattr(own, "save_assets"):
            with tempfile.TemporaryDirectory() as directory:
                own.save_assets(directory)
                other.load_assets(directory)
