"""What each output of a model means: its task, and whether it is logits or probabilities."""

import dataclasses
import functools
from typing import Any

import keras

from snapshot_ensemble.keras_compat.layer_graph import graph_of, inputs_of_call, source_of

TASKS = ("multiclass", "binary", "multilabel", "regression")

_LOSSES = {
    "categorical": (
        "categorical_crossentropy",
        "sparse_categorical_crossentropy",
        "categorical_focal_crossentropy",
    ),
    "binary": ("binary_crossentropy", "binary_focal_crossentropy"),
    "regression": (
        "mean_squared_error",
        "mean_absolute_error",
        "mean_absolute_percentage_error",
        "mean_squared_logarithmic_error",
        "huber",
        "log_cosh",
        "poisson",
        "cosine_similarity",
    ),
}
_FAMILY = {
    getattr(keras.losses, name): family
    for family, names in _LOSSES.items()
    for function in names
    for name in (function, "".join(word.title() for word in function.split("_")))
}
# Layers that rearrange values without changing them: the activation comes before them.
_PASS_ON = (
    keras.layers.Reshape,
    keras.layers.Flatten,
    keras.layers.Permute,
    keras.layers.Identity,
    keras.layers.Dropout,
)


@dataclasses.dataclass(frozen=True)
class Output:
    """The meaning of one output.

    Attributes:
        task: `"multiclass"` (mutually exclusive classes on the last axis),
            `"binary"`, `"multilabel"` or `"regression"`.
        logits: Whether a classifier outputs logits (log-odds for binary and multilabel) rather
            than probabilities.
        ignored: The label that the compiled loss ignores (`ignore_class`), or None.
    """

    task: str
    logits: bool = False
    ignored: int | None = None

    @property
    def is_classes(self) -> bool:
        return self.task != "regression"


def _loss_family(loss: Any) -> tuple[str | None, bool | None]:
    """The family of a loss, and its `from_logits`, or None if it has none."""
    if isinstance(loss, functools.partial):
        family, logits = _loss_family(loss.func)
        return family, loss.keywords.get("from_logits", logits)
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    if isinstance(loss, keras.losses.Loss):
        kinds = (_FAMILY[kind] for kind in type(loss).__mro__ if kind in _FAMILY)
        family = next(kinds, None)
        logits = getattr(loss, "from_logits", False)
    else:
        family, logits = _FAMILY.get(loss), False
    return family, (bool(logits) if family in ("categorical", "binary") else None)


def is_mean_over_rows(loss: Any) -> bool:
    """Whether it is one of Keras's own losses that are the mean of each row's loss."""
    loss = keras.losses.get(loss)
    if not isinstance(loss, keras.losses.Loss):
        return loss in _FAMILY
    # A label that is ignored changes the number of rows that a mean is divided by.
    is_mean = loss.reduction == "sum_over_batch_size"
    return type(loss) in _FAMILY and is_mean and getattr(loss, "ignore_class", None) is None


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


def _classify(
    task: str | None, activation: str | None, loss: Any, units: int | None, where: str
) -> Output:
    family, from_logits = _loss_family(loss)
    if task is None:
        if activation == "softmax" or family == "categorical":
            task = "multiclass"
        elif family == "binary" or (family is None and activation == "sigmoid"):
            task = "binary" if units == 1 else "multilabel"
        elif family == "regression":
            task = "regression"
        else:
            raise ValueError(
                f"The task of {where} cannot be inferred from the model. Received: loss={loss!r} "
                f"with last activation {activation!r}. Pass `task=` with one of {TASKS}."
            )
    if task == "regression" or activation in ("softmax", "sigmoid"):
        return Output(task)
    if from_logits is None:
        if activation is None:
            raise ValueError(
                f"It cannot be inferred from the model whether {where} is probabilities or logits. "
                f"Received: task={task!r}, loss={loss!r}. End the model with a softmax or sigmoid "
                "layer, or compile it with a Keras loss that has `from_logits`."
            )
        from_logits = activation in ("linear", "log_softmax")
    return Output(task, from_logits)


def per_output(losses: Any, outputs: Any, names: list[str] | None, count: int) -> list[Any]:
    """One loss for each flat output, from any structure that `compile` accepts."""
    if not isinstance(losses, (list, tuple, dict)):
        return [losses] * count
    if isinstance(losses, dict) and not isinstance(outputs, dict) and names is not None:
        return [losses.get(name) for name in names]
    flat = keras.tree.flatten(losses)
    if len(flat) == count:
        return flat
    if isinstance(losses, dict) and isinstance(outputs, dict) and len(outputs) == count:
        return [losses.get(key) for key in sorted(outputs)]
    return [None] * count


def check_task(model: keras.Model, task: Any) -> None:
    """Raises `ValueError` if it is known before training that a task cannot be inferred."""
    for leaf in keras.tree.flatten(task):
        if leaf is not None and leaf not in TASKS:
            raise ValueError(f"`task` must be one of {TASKS}. Received: task={task!r}")
    symbolic = getattr(model, "outputs", None)
    if symbolic:
        graph = graph_of(model)
        read_outputs(model, task, model.output if graph is None else graph.output)
    elif len(losses := keras.tree.flatten(model.loss)) == 1:
        # Outputs are unknown before a model is built, and activations in a subclassed one.
        layers = model.layers if isinstance(model, keras.Sequential) else ()
        activation = _own_activation(layers[-1]) if layers else None
        for leaf in keras.tree.flatten(task):
            _classify(leaf, activation, losses[0], None, "the model's output")


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
    if len(tasks) == 1 and not by_name:
        tasks *= len(flat)
    if len(tasks) != len(flat) or by_name != (by_name and isinstance(outputs, dict)):
        raise ValueError(
            f"`task` must have one entry for each of the model's {len(flat)} outputs. "
            f"Received: task={task!r}"
        )
    names = getattr(model, "output_names", None)
    losses = per_output(model.loss, outputs, names, len(flat))
    symbolic = getattr(model, "outputs", None) or [None] * len(flat)
    specs = []
    for i, tensor in enumerate(flat):
        where = "the model's output" if len(flat) == 1 else f"output {i} of the model"
        activation = None if symbolic[i] is None else _activation(symbolic[i])
        axis = getattr(losses[i], "axis", -1)
        if axis not in (-1, len(tensor.shape) - 1):
            raise ValueError(
                f"The classes of {where} must lie on the last axis. Received: axis={axis} in "
                f"loss={losses[i]!r}. End the model with a `Permute` layer."
            )
        units = tensor.shape[-1] if len(tensor.shape) > 1 else 1
        output = _classify(tasks[i], activation, losses[i], units, where)
        ignored = getattr(losses[i], "ignore_class", None) if output.is_classes else None
        specs.append(dataclasses.replace(output, ignored=ignored))
    return specs
