"""What is exported: one model that runs the user's own layers with each member's weights."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from snapshot_ensemble.inference.early_exit import Stages, outputs_of
from snapshot_ensemble.inference.graphs import Combiner
from snapshot_ensemble.inference.member_pool import MemberPool
from snapshot_ensemble.inference.member_states import own_states
from snapshot_ensemble.inference.members_model import MembersModel
from snapshot_ensemble.inference.task_words import Output
from snapshot_ensemble.keras_compat.layer_graph import all_layers, graph_of
from snapshot_ensemble.keras_compat.layer_states import state_variables
from snapshot_ensemble.keras_compat.saved_model import track_resources
from snapshot_ensemble.keras_compat.serving_signature import input_signature
from snapshot_ensemble.keras_compat.stateless_call import OwnStates
from snapshot_ensemble.storage.snapshot import Weights

Outputs = dict[str, Any]
# Formats that carry states on from call to call.
_WITH_VARIABLES = ("tf_saved_model", "litert")


class Beside(NamedTuple):
    """What is served beside the combined outputs.

    Attributes:
        extras: Takes the members' outputs and the combined ones; returns for each flat output what
            is served beside it, by what is added to its name. None if there is nothing.
        has_prediction: Whether the combined outputs are served themselves.
    """

    extras: Callable[[list[Any], Any], list[dict[str, Any]]] | None = None
    has_prediction: bool = True


@dataclasses.dataclass(frozen=True)
class Served:
    """What is exported, and what the exported file is compared with.

    Attributes:
        model: A model whose output is a dict with output names as keys.
        signature: A named `keras.layers.InputSpec` for each input, in the inputs' structure.
        expected: Returns the expected outputs by name for a batch in the inputs' structure.
        meanings: What each output means, by name; known once `expected` has been called.
    """

    model: keras.Model
    signature: Any
    expected: Callable[[Any], Outputs]
    meanings: dict[str, Output]


class ServedModel(keras.Model):
    """Combines members; the outputs are a dict by name.

    The user's own layers run, so that nothing has to be made from a config. They run as in
    `predict`, which also calls layers in inference mode that were recorded with `training=True`.

    Args:
        model: The model that the weights belong to. It is not changed.
        members: The weights of each member. What all of them share becomes one variable.
        combine: Takes the list of the members' outputs and returns the combined ones.
        states: Stands in for the states of the model's layers, for each member. Defaults to
            `None`: each call begins with the model's own states.
        stages: The stages of a cascade, or None.
        halved: Whether kernels are variables in float16, which are cast where they are used.
            Vectors, such as biases and the statistics of normalisation layers, are not.
    """

    def __init__(
        self,
        model: keras.Model,
        members: Sequence[Weights],
        combine: Callable[[list[Any]], Any],
        states: Sequence[OwnStates] | None = None,
        stages: Stages | None = None,
        halved: bool = False,
    ) -> None:
        super().__init__(name=model.name, autocast=False)
        self._halved = halved
        track_resources(self, model)
        columns = [
            self._column(variable, [member[i] for member in members])
            for i, variable in enumerate(model.weights)
        ]
        own = None if states is None else [of_member.values for of_member in states]
        # Without weights, there are no columns.
        weights = list(zip(*columns, strict=True)) or [()] * len(members)
        run = MembersModel(model, weights, combine, own, stages=stages).laid_out
        if halved:
            dtypes = [variable.dtype for variable in model.weights]

            def run(inputs: Any) -> Any:
                # Cast in the graph, and once for all members that share a variable.
                return MembersModel(
                    model, _cast(weights, dtypes), combine, own, stages=stages
                ).laid_out(inputs)

        names = output_names(model)
        self._states = tf.Module()  # Keras looks for variables in layers, but not in a module.
        self._states.of_members = states

        def named(inputs: Any) -> dict[str, Any]:
            return by_name(outputs_of(run(inputs), stages), names)

        self._run = named  # A closure, so that Keras tracks no other variables.
        self.built = True
        if stages is not None:
            self.jit_compile = False  # As in `predict`, with which the file is compared.

    def _column(self, original: keras.Variable, arrays: Sequence[np.ndarray]) -> list[Any]:
        """One weight of all members as variables, or the same variable for each."""
        first = arrays[0]
        is_shared = all(array is first or np.array_equal(array, first) for array in arrays)
        variables = []
        for array in arrays[:1] if is_shared else arrays:
            variables.append(
                self.add_weight(
                    original.shape,
                    "zeros",  # Drawing values would advance a random generator.
                    "float16" if self._halved and can_be_halved(array) else original.dtype,
                    trainable=original.trainable,
                    name=original.name,
                )
            )
            variables[-1].assign(array)
        return variables * len(arrays) if is_shared else variables

    def call(self, inputs: Any) -> Any:
        return self._run(inputs)


def can_be_halved(array: np.ndarray) -> bool:
    """Whether it is a kernel of more than 16 bits whose values are in the range of float16."""
    if array.ndim < 2 or array.dtype not in ("float32", "float64"):
        return False
    return bool(np.max(np.abs(array), initial=0.0) <= np.finfo("float16").max)


def _cast(members: Sequence[Sequence[Any]], dtypes: Sequence[str]) -> list[list[Any]]:
    """The weights of each member in the model's own dtypes."""
    done: dict[int, Any] = {}
    for member in members:
        for variable, dtype in zip(member, dtypes, strict=True):
            if id(variable) not in done:
                is_own = variable.dtype == dtype
                done[id(variable)] = variable if is_own else keras.ops.cast(variable, dtype)
    return [[done[id(variable)] for variable in member] for member in members]


def output_names(model: keras.Model) -> list[str] | None:
    """A name for each output of a graph; None if the model is not a graph of layers.

    Keras names outputs after their last layer. Where one layer gives several of them, a number is
    added to all but the first.
    """
    graph = graph_of(model)
    if graph is None:
        return None
    names: list[str] = []
    for name in graph.output_names:
        more = (f"{name}_{i}" for i in itertools.count(1))
        taken = {*names, *(other for other in graph.output_names if other != name)}
        names.append(next(free for free in itertools.chain([name], more) if free not in taken))
    return names


def by_name(outputs: Any, names: Sequence[str] | None) -> dict[str, Any]:
    """Outputs as a dict, named by their keys, by `names`, or `output_0`, `output_1` and so on."""
    flat = keras.tree.flatten(outputs)
    if isinstance(outputs, dict) and len(outputs) == len(flat):
        return dict(zip(sorted(outputs), flat, strict=True))
    if names is None or len(names) != len(flat):  # A model's own `predict_step` may return others.
        names = [f"output_{i}" for i in range(len(flat))]
    return dict(zip(names, flat, strict=True))


def with_extras(combiner: Combiner, beside: Beside, names: Sequence[str] | None) -> Combiner:
    """A combiner of a flat dict by name: the combined outputs and what is served beside them.

    Args:
        combiner: Combines the members' outputs.
        beside: What is served beside these.
        names: A name for each output, or None.
    """
    extras: Any = beside.extras

    def combine(outputs: list[Any]) -> Outputs:
        combined = combiner.combine(outputs)
        own = by_name(combined, names)
        more = {
            f"{name}_{suffix}": part
            for name, parts in zip(own, extras(outputs, combined), strict=True)
            for suffix, part in parts.items()
        }
        if taken := sorted(own.keys() & more.keys()):
            raise ValueError(
                f"Two outputs would have the name {taken[0]!r}. Received: outputs {sorted(own)}. "
                "Rename the layer."
            )
        return (own if beside.has_prediction else {}) | more

    name = ("with extras", beside, *combiner.name)
    return combiner._replace(name=name, combine=combine)


def is_stateful(model: keras.Model) -> bool:
    """Whether a layer carries states of each row on to the next batch."""
    return any(getattr(layer, "stateful", False) for layer in all_layers(model))


def open_batch(model: keras.Model, shape: Sequence[int | None]) -> tuple[int | None, ...]:
    """The shape of an input of a graph, for any batch size.

    A Sequential model that was built by a call has the size of that batch, which means nothing. A
    size that a Functional model was given stays, and so does that of stateful layers.
    """
    if isinstance(model, keras.Sequential) and not is_stateful(model):
        return (None, *shape[1:])
    return tuple(shape)


def signature_of(model: keras.Model) -> Any:
    """A named input spec for each input, in the inputs' structure."""
    graph = graph_of(model)
    if graph is not None:
        return keras.tree.map_structure(
            lambda tensor: _named(tensor, tensor.name, open_batch(model, tensor.shape)), graph.input
        )
    signature = input_signature(model)
    if isinstance(signature, dict):
        return {key: _named(spec, key, spec.shape) for key, spec in signature.items()}
    if isinstance(signature, (list, tuple)):
        return [_named(spec, f"inputs_{i}", spec.shape) for i, spec in enumerate(signature)]
    return _named(signature, "inputs", signature.shape)


def _named(spec: Any, name: str, shape: Sequence[int | None]) -> Any:
    return keras.layers.InputSpec(spec.dtype, tuple(shape), name=name)


def given_signature(model: keras.Model, given: Any) -> Any:
    """A user's `input_signature`, with the model's own names where it has none.

    Args:
        model: The model to be exported.
        given: As for `keras.Model.export`: a list with one item, which is the inputs' structure.

    Raises:
        TypeError: If it has something else than specs.
    """
    (signature,) = given if isinstance(given, (list, tuple)) and len(given) == 1 else (given,)
    specs = keras.tree.flatten(signature)
    if not all(hasattr(spec, "shape") and hasattr(spec, "dtype") for spec in specs):
        raise TypeError(
            "`input_signature` must be a list with one item: a `keras.InputSpec`, `tf.TensorSpec` "
            "or `keras.KerasTensor` for each input, in the structure of the model's inputs. "
            f"Received: input_signature={given!r}"
        )
    try:
        names = [spec.name for spec in keras.tree.flatten(signature_of(model))]
    except Exception:  # Not known for a model that has not been called, but then it is not needed.
        names = []
    if len(names) != len(specs):
        names = [f"inputs_{i}" for i in range(len(specs))]
    return keras.tree.pack_sequence_as(
        signature,
        [
            _named(spec, getattr(spec, "name", None) or name, spec.shape)
            for spec, name in zip(specs, names, strict=True)
        ],
    )


def _check_supported(model: keras.Model, stages: Stages | None, format: str) -> None:
    if is_stateful(model) and format not in _WITH_VARIABLES:
        raise ValueError(
            "A stateful layer carries its state on from call to call, which a file of this format "
            f"cannot. Received: format={format!r}. Export a SavedModel, or make the layer with "
            "`stateful=False`."
        )
    if stages is not None and format != "tf_saved_model":
        raise ValueError(
            "In files of this format all members run for all rows. Received: early_exit=True, "
            f"format={format!r}. Export a SavedModel, or leave `early_exit` out."
        )


def served(
    pool: MemberPool,
    combiner: Combiner,
    format: str,
    signature: Any = None,
    halved: bool = False,
    beside: Beside = Beside(),  # noqa: B008  It is constant.
) -> Served:
    """The combined members for export, and the reference for the exported file.

    Args:
        pool: The members.
        combiner: Which of them, and how they are combined.
        format: A Keras export format.
        signature: An `input_signature` of the user. Defaults to `None`: the model's own.
        halved: As for `ServedModel`; the reference has the weights as they are.
        beside: What is served beside the combined outputs.

    Raises:
        ValueError: If two outputs would have one name, the model carries states on and the format
            has none, or it has no branches for a cascade.
    """
    model = pool.model
    stages = combiner.stages
    _check_supported(model, stages, format)
    signature = signature_of(model) if signature is None else given_signature(model, signature)
    members, names = pool.weights(combiner.members), output_names(model)
    if beside.extras is not None:
        combiner = with_extras(combiner, beside, names)
    has_states = bool(state_variables(model)) and format in _WITH_VARIABLES

    def states() -> list[OwnStates] | None:
        return [own_states(model, k) for k in combiner.members] if has_states else None

    def expected(x: Any) -> Outputs:
        # The ensemble's own states must stay as they are, and the file's are new.
        reference = (
            ServedModel(model, members, combiner.combine, states(), stages)
            if has_states
            else pool.members_model(combiner)
        )
        predicted = reference.predict(x, verbose=0)
        outputs = predicted if has_states else outputs_of(predicted, stages)
        if beside.extras is not None:
            meanings.update(dict.fromkeys(outputs, Output("passthrough")))
            return outputs
        read = keras.tree.pack_sequence_as(outputs, pool.meanings(outputs))
        meanings.update(by_name(read, names))
        return by_name(outputs, names)

    meanings: dict[str, Output] = {}
    exported = ServedModel(model, members, combiner.combine, states(), stages, halved)
    return Served(exported, signature, expected, meanings)
