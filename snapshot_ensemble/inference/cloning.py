"""Clones of the user's model: one member as a separate model, compiled like the original."""

import functools
import tempfile
from collections.abc import Sequence
from typing import Any

import keras

from snapshot_ensemble.inference.member_states import (
    first_values,
    own_states,
    reset_recurrent_states,
)
from snapshot_ensemble.inference.members_model import member_outputs
from snapshot_ensemble.inference.rebuilt import computes_the_same
from snapshot_ensemble.keras_compat.added_losses import added_losses_noticed
from snapshot_ensemble.keras_compat.compile_arguments import compile_arguments
from snapshot_ensemble.keras_compat.initializers import random_initializers_replaced
from snapshot_ensemble.keras_compat.layer_graph import all_layers
from snapshot_ensemble.keras_compat.layer_states import state_variables
from snapshot_ensemble.keras_compat.metric_copies import copy_of_metric
from snapshot_ensemble.keras_compat.optimizer_rate import copy_of_optimizer
from snapshot_ensemble.keras_compat.own_methods import has_own_or_assigned
from snapshot_ensemble.keras_compat.random_seed import seeds_drawn_apart
from snapshot_ensemble.storage.snapshot import Weights
from snapshot_ensemble.storage.weight_files import get_weights, set_weights


class Member(keras.Model):
    """One member of an ensemble whose model cannot be cloned: runs the model with other weights.

    Args:
        model: The model whose layers run. It does not change.
        index: The member's index, which its random numbers depend on.
    """

    def __init__(self, model: keras.Model, index: int = 0) -> None:
        super().__init__(name=model.name, dtype=model.dtype_policy, autocast=False)
        own = [
            # Zeros, since drawing values would advance a random generator.
            self.add_weight(
                v.shape,
                "zeros",
                v.dtype,
                trainable=v.trainable,
                regularizer=v.regularizer,
                name=v.name,
            )
            for v in model.weights
        ]

        states = own_states(model, index)

        def run(inputs: Any) -> Any:
            losses: list[Any] = []
            with added_losses_noticed(losses.append):
                outputs = member_outputs(model, own, inputs, states.values)
            self.add_loss(losses)
            return outputs

        def reset() -> None:
            reset_recurrent_states(model, states.values)

        self._run, self._reset = run, reset
        # Not the model itself, which Keras would track.
        self._check = functools.partial(_check_runs_no_own, model)
        self.own_states = states
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

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        self._check("fit", ("train_step", "compute_loss", "compute_metrics"))
        return super().fit(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        self._check("evaluate", ("test_step", "compute_loss", "compute_metrics"))
        return super().evaluate(*args, **kwargs)

    def reset_state(self) -> None:
        """Resets the recurrent states, as the layers' own `reset_state`."""
        self._reset()


def _check_runs_no_own(model: keras.Model, method: str, steps: Sequence[str]) -> None:
    own = [name for name in (method, *steps) if has_own_or_assigned(model, name)]
    if own:
        raise ValueError(
            f"`{method}` of this member would not run the model's own `{own[0]}`, since the model "
            f"cannot be made from its config. Received: model={model.name!r} of class "
            f"{type(model).__name__}. Use the model itself, with the member's weights: "
            "`model.set_weights(ens[k].get_weights())`."
        )


def states_of(member: keras.Model) -> list[keras.Variable]:
    """The states of a member, in the order of `state_variables` of the ensemble's model."""
    if isinstance(member, Member):
        return list(member.own_states.values)
    return state_variables(member)


def clone_of(model: keras.Model) -> keras.Model:
    """A new model made from the config of `model`, or an error.

    What its config does not hold may be missing, and initial weights are not drawn.
    """
    # Drawing initial weights that are overwritten anyway would cost time and memory.
    zeros = random_initializers_replaced(lambda _: keras.initializers.Zeros())
    with zeros, seeds_drawn_apart():
        # Not with `clone_model`, which fails if a loss or metric has no config.
        clone = type(model).from_config(model.get_config())
        if not clone.built:
            clone.build_from_config(model.get_build_config())
    for variables in (lambda m: m.weights, state_variables):
        if [v.shape for v in variables(clone)] != [v.shape for v in variables(model)]:
            raise ValueError("The config does not describe the model.")
    copy_assets(model, clone)
    return clone


def build_member(
    model: keras.Model, weights: Weights, index: int = 0, sample: Any = None
) -> keras.Model:
    """A new model that computes what `model` does with other weights, compiled like it.

    It is a clone if that gives the same outputs, and otherwise runs the layers of `model`.

    Args:
        model: A built model of any kind.
        weights: In the order of `model.weights`.
        index: The member's index, which its random numbers depend on.
        sample: As for `computes_the_same`.
    """
    try:
        member = clone_of(model)
        set_weights(member, weights)
        is_same = computes_the_same(model, weights, member, sample)
    except Exception:  # Anything may go wrong in the code of a user's classes.
        is_same = False
    if not is_same:
        member = Member(model, index)
        set_weights(member, weights)
    for state, value in zip(states_of(member), first_values(model, index), strict=True):
        state.assign(value)
    compile_like(member, model, optimizer=_own(compile_arguments(model)["optimizer"]))
    return member


def copy_of_model(model: keras.Model) -> keras.Model:
    """A new compiled model with the weights of `model`, to be trained in its place.

    Args:
        model: A compiled model. One that is not built yet gets new weights.

    Raises:
        ValueError: If it cannot be made again from its config.
    """
    if not model.built:
        copied = type(model).from_config(model.get_config())
        arguments = compile_arguments(model)
        compile_like(copied, model, optimizer=_own(arguments["optimizer"]))
        return copied
    copied = build_member(model, get_weights(model))
    if isinstance(copied, Member):
        raise ValueError(
            "The model cannot be copied: what is made from its config does not give its outputs. "
            f"Received: model={model.name!r} of class {type(model).__name__}. Pass a function that "
            "returns a new model."
        )
    return copied


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
