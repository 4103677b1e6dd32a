"""What each output of a model means: its task, and whether it is logits or probabilities."""

import dataclasses
from typing import Any

import keras

from snapshot_ensemble.inference.losses import family_of, per_output
from snapshot_ensemble.inference.task_words import (
    CLASSES,
    WORDS,
    Output,
    check_words,
    is_number_with_digits,
)
from snapshot_ensemble.keras_compat.layer_graph import graph_of, inputs_of_call, source_of
from snapshot_ensemble.keras_compat.own_methods import (
    has_own,
    has_own_or_assigned,
    traced_predict_step,
)

# Layers that rearrange values without changing them: the activation comes before them.
_PASS_ON = (
    keras.layers.Reshape,
    keras.layers.Flatten,
    keras.layers.Permute,
    keras.layers.Identity,
    keras.layers.Dropout,
)


@dataclasses.dataclass(frozen=True)
class Signs:
    """What can be known of an output from its model.

    Attributes:
        where: The output, for messages.
        losses: Its compiled losses.
        activation: The name of its last activation, or None.
        units: The size of its last axis, or None.
        own_step: The user's method that decides what the output means, or None if that can be
            read off the loss and the activation.
    """

    where: str
    losses: list[Any]
    activation: str | None
    units: int | None
    own_step: str | None

    @property
    def ends_in_probabilities(self) -> bool:
        return self.activation in ("softmax", "sigmoid")

    def of_losses(self) -> tuple[str | None, bool | None]:
        """The first family that a loss implies, and the first `from_logits` that one has."""
        read = [family_of(loss, self.units) for loss in self.losses]
        families = (family for family, _ in read if family is not None)
        logits = (from_logits for _, from_logits in read if from_logits is not None)
        return next(families, None), next(logits, None)

    def received(self) -> str:
        loss = self.losses[0] if len(self.losses) == 1 else self.losses or None
        own = "" if self.own_step is None else f" in a model with its own `{self.own_step}`"
        return f"loss={loss!r} with last activation {self.activation!r}{own}"


def _activation(tensor: Any) -> str | None:
    """The name of the last activation before an output tensor of a Functional model."""
    operation, node, index = source_of(tensor)
    if isinstance(operation, keras.Model):
        outputs = getattr(operation, "outputs", None)
        return _activation(outputs[index]) if outputs else None
    if isinstance(operation, _PASS_ON):
        return _activation(inputs_of_call(operation, node)[0])
    return _own_activation(operation)


def _own_activation(operation: Any) -> str | None:
    function = getattr(operation, "activation", None)
    if function is None:
        name = type(operation).__name__.lower()
        return name if name in ("softmax", "sigmoid") else None
    return getattr(function, "__name__", None)


def _own_step(model: keras.Model, activation: str | None) -> str | None:
    """The method of the user's that decides what an output means, or None."""
    if has_own(model, "predict_step"):
        traced = traced_predict_step(model)
        if traced is None or not traced.adds_nothing:
            return "predict_step"
    if activation in ("softmax", "sigmoid"):
        return None
    # The loss may be applied to something else than the output.
    return next((name for name in ("train_step", "compute_loss") if has_own(model, name)), None)


def _classify(word: str | None, signs: Signs) -> Output:
    task, logits = (None, None) if word is None else WORDS[word]
    if task is None:
        task = _inferred_task(signs)
    if task not in CLASSES:
        return Output(task)
    if logits is None:
        logits = _are_logits(task, signs)
    return Output(task, logits)


def _inferred_task(signs: Signs) -> str:
    family, _ = signs.of_losses()
    if signs.own_step is None:
        if signs.activation == "softmax" or family == "categorical":
            return "multiclass"
        if family == "binary" or (family is None and signs.activation == "sigmoid"):
            return "binary" if signs.units == 1 else "multilabel"
        if family in ("regression", "gaussian"):
            return family
    words = tuple(word for word, (_, logits) in WORDS.items() if logits is not None)
    raise ValueError(
        f"The task of {signs.where} cannot be inferred from the model. "
        f"Received: {signs.received()}. Pass `task=` with one of {words}."
    )


def _are_logits(task: str, signs: Signs) -> bool:
    if signs.own_step != "predict_step":
        if signs.ends_in_probabilities:
            return False
        _, from_logits = signs.of_losses()
        if from_logits is not None and signs.own_step is None:
            return from_logits
        if signs.activation is not None:
            return signs.activation in ("linear", "log_softmax")
    raise ValueError(
        f"It cannot be inferred from the model whether {signs.where} is probabilities or logits. "
        f"Received: task={task!r}, {signs.received()}. Pass task='{task}_probabilities' or "
        f"task='{task}_logits'."
    )


def check_methods(model: keras.Model) -> None:
    """Raises `ValueError` if the model has a `predict` of its own, which would not be called."""
    if has_own_or_assigned(model, "predict"):
        raise ValueError(
            "The model's own `predict` would not be called: the members are run by "
            f"`predict_step`. Received: model={model.name!r} of class {type(model).__name__} with "
            "its own `predict`. Move what it does into `call` or `predict_step`."
        )


def check_task(model: keras.Model, task: Any) -> None:
    """Raises `ValueError` if it is known before training that a task cannot be inferred."""
    check_words(task)
    check_methods(model)
    outputs = known_outputs(model)
    if outputs is not None:
        read_outputs(model, task, outputs)
        return
    losses = keras.tree.flatten(model.loss)
    if len(losses) != 1 and _own_step(model, None) is None:
        return
    # Outputs are unknown before a model is built, and activations in a subclassed one.
    layers = model.layers if isinstance(model, keras.Sequential) else ()
    activation = _own_activation(layers[-1]) if layers else None
    signs = Signs("the model's output", losses, activation, None, _own_step(model, activation))
    for leaf in keras.tree.flatten(task):
        _classify(leaf, signs)


def known_outputs(model: keras.Model) -> Any:
    """The symbolic outputs of predictions, if they are known before the model runs."""
    if has_own(model, "predict_step"):
        traced = traced_predict_step(model)
        return None if traced is None else traced.outputs
    if not getattr(model, "outputs", None):
        return None
    graph = graph_of(model)
    return model.output if graph is None else graph.output


def names_of(model: keras.Model, outputs: Any) -> list[str]:
    """A name for each flat output; for outputs in a dict, its key."""
    count = len(keras.tree.flatten(outputs))
    if isinstance(outputs, dict) and len(outputs) == count:
        return sorted(outputs)
    names = getattr(model, "output_names", None)
    if names and len(names) == count:
        return list(names)
    return [f"output_{i}" for i in range(count)]


def read_outputs(model: keras.Model, task: Any, outputs: Any) -> list[Output]:
    """The meaning of each of a model's flat outputs.

    Args:
        model: A compiled model.
        task: `None`, one task for all outputs, or a structure of tasks like the outputs'.
        outputs: The structure of outputs of a call of the model, symbolic or not.

    Returns:
        A list of `Output`, in the order of `keras.tree.flatten(outputs)`.

    Raises:
        ValueError: If the task of an output cannot be inferred, or `task` has another structure.
    """
    flat = keras.tree.flatten(outputs)
    tasks = keras.tree.flatten(task)
    by_name = isinstance(task, dict)
    is_one_for_all = len(tasks) == 1 and not by_name
    if is_one_for_all:
        tasks *= len(flat)
    if len(tasks) != len(flat) or by_name != (by_name and isinstance(outputs, dict)):
        raise ValueError(
            f"`task` must have one entry for each of the model's {len(flat)} outputs. "
            f"Received: task={task!r}"
        )
    losses = per_output(model.loss, outputs, getattr(model, "output_names", None))
    symbolic = getattr(model, "outputs", None) or [None] * len(flat)
    if len(symbolic) != len(flat):  # Those of the user's own `predict_step`.
        symbolic = [None] * len(flat)
    specs = []
    for i, tensor in enumerate(flat):
        if not is_number_with_digits(tensor):
            _check_passed(tasks[i], tensor, names_of(model, outputs)[i], is_one_for_all, len(flat))
            specs.append(Output("passthrough"))
            continue
        where = "the model's output" if len(flat) == 1 else f"output {i} of the model"
        activation = None if symbolic[i] is None else _activation(symbolic[i])
        units = tensor.shape[-1] if len(tensor.shape) > 1 else 1
        signs = Signs(where, losses[i], activation, units, _own_step(model, activation))
        output = _classify(tasks[i], signs)
        if output.is_gaussian and (units is None or units % 2):
            raise ValueError(
                f"The last axis of {where} must hold a mean and a log-variance for each value. "
                f"Received: task='gaussian' for an output of shape {tuple(tensor.shape)}"
            )
        specs.append(dataclasses.replace(output, ignored=_ignored(output, signs, tensor)))
    return specs


def _check_passed(
    word: str | None, tensor: Any, name: str, is_one_for_all: bool, count: int
) -> None:
    if word in (None, "passthrough") or (is_one_for_all and count > 1):
        return
    raise ValueError(
        f"Output '{name}' cannot be combined: integers, bools and strings are neither "
        f"probabilities nor values to average. Received: task={word!r} for an output of dtype "
        f"{getattr(tensor.dtype, 'name', tensor.dtype)}. Pass 'passthrough', or cast it to floats "
        "in the model."
    )


def _ignored(output: Output, signs: Signs, tensor: Any) -> int | None:
    """The label that a loss of classes ignores; raises an error if classes are on another axis."""
    if not output.is_classes:
        return None
    for loss in signs.losses:
        axis = getattr(loss, "axis", None)
        if isinstance(axis, int) and axis not in (-1, len(tensor.shape) - 1):
            raise ValueError(
                f"The classes of {signs.where} must lie on the last axis. Received: axis={axis} "
                f"in loss={loss!r}. End the model with a `Permute` layer."
            )
    ignored = (getattr(loss, "ignore_class", None) for loss in signs.losses)
    return next((label for label in ignored if label is not None), None)
