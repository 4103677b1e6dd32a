"""Explicit tasks, and errors if a task cannot be inferred."""

import keras
import pytest
from keras.layers import (
    Dense,
)
from output_cases import IN_DICTS, IN_LISTS, custom_loss, ending_in, meaning, meanings, two_outputs

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.inference.task_words import WORDS, Output

TASKS = ("multiclass", "binary", "multilabel", "regression", "passthrough")
EXPLICIT = (
    "('regression', 'gaussian', 'passthrough', 'multiclass_logits', 'binary_logits', "
    "'multilabel_logits', 'multiclass_probabilities', 'binary_probabilities', "
    "'multilabel_probabilities')"
)

# Explicit tasks


@pytest.mark.parametrize("task", TASKS)
def test_an_explicit_task_overrides_loss_and_activation(task):
    assert meaning(Dense(3, "softmax"), "mse", task) == Output(task)


def test_a_task_for_a_sigmoid_trained_on_squared_errors():
    assert meaning(Dense(1, "sigmoid"), "mse", "binary") == Output("binary")


def test_one_task_for_all_outputs():
    model = two_outputs(custom_loss, activations=("sigmoid", "sigmoid"))
    assert meanings(model, "multilabel") == [Output("multilabel"), Output("multilabel")]


@pytest.mark.parametrize("structure", [list, tuple])
def test_tasks_in_the_structure_of_the_outputs(structure):
    model = two_outputs(custom_loss, structure)
    assert meanings(model, structure(["multiclass", "regression"])) == IN_LISTS


@pytest.mark.parametrize(
    "task",
    [
        {"kind": "multiclass", "amount": "regression"},
        {"amount": "regression", "kind": "multiclass"},
    ],
)
def test_tasks_in_a_dict_like_the_outputs(task):
    assert meanings(two_outputs(custom_loss, dict), task) == IN_DICTS


def test_a_task_of_none_among_others_is_inferred():
    model = two_outputs(["sparse_categorical_crossentropy", custom_loss])
    assert meanings(model, [None, "regression"]) == IN_LISTS


def test_tasks_by_name_are_not_assigned_by_position():
    # In the order of their sorted names they would be swapped.
    model = two_outputs(custom_loss, activations=(None, None))
    with pytest.raises(ValueError, match="Received: task="):
        SnapshotEnsemble(model, task={"kind": "multiclass", "amount": "regression"})


# Tasks that cannot be inferred


@pytest.mark.parametrize("last", [Dense(3), Dense(3, "tanh"), lambda x: Dense(3)(x) * 2])
def test_a_task_that_cannot_be_inferred(last):
    activation = {"linear": "'linear'", "tanh": "'tanh'"}.get(
        getattr(getattr(last, "activation", None), "__name__", None), "None"
    )
    with pytest.raises(ValueError) as caught:
        SnapshotEnsemble(ending_in(last, custom_loss))
    assert str(caught.value) == (
        "The task of the model's output cannot be inferred from the model. "
        f"Received: loss={custom_loss!r} with last activation {activation}. "
        f"Pass `task=` with one of {EXPLICIT}."
    )


@pytest.mark.parametrize("loss", ["hinge", "kl_divergence", lambda y, p: 0.0])
def test_losses_that_imply_no_task(loss):
    with pytest.raises(ValueError, match="Pass `task=` with one of"):
        SnapshotEnsemble(ending_in(Dense(3), loss))


def test_a_model_without_a_loss_needs_a_task():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, Dense(1)(inputs))
    model.compile("sgd")
    with pytest.raises(ValueError, match="Received: loss=None with last activation 'linear'"):
        SnapshotEnsemble(model)
    SnapshotEnsemble(model, task="regression")


def test_the_output_whose_task_cannot_be_inferred_is_named():
    with pytest.raises(ValueError, match="The task of output 1 of the model cannot be inferred"):
        SnapshotEnsemble(two_outputs(custom_loss))


def test_probabilities_or_logits_that_cannot_be_inferred():
    with pytest.raises(ValueError) as caught:
        SnapshotEnsemble(ending_in(lambda x: Dense(3)(x) / 2, custom_loss), task="multiclass")
    assert str(caught.value) == (
        "It cannot be inferred from the model whether the model's output is probabilities or "
        f"logits. Received: task='multiclass', loss={custom_loss!r} with last activation None. "
        "Pass task='multiclass_probabilities' or task='multiclass_logits'."
    )


@pytest.mark.parametrize(
    "task", ["classification", "Multiclass", "", 3, ["multiclass"] * 3 + ["classes"], {"a": "b"}]
)
def test_unknown_tasks_are_refused(task):
    with pytest.raises(ValueError) as caught:
        SnapshotEnsemble(ending_in(Dense(3, "softmax"), "mse"), task=task)
    assert str(caught.value) == (f"`task` must be one of {tuple(WORDS)}. Received: task={task!r}")


@pytest.mark.parametrize("task", [["multiclass"] * 3, ["multiclass", "regression", None]])
def test_a_wrong_number_of_tasks_is_refused(task):
    losses = ["sparse_categorical_crossentropy", "mse"]
    with pytest.raises(ValueError) as caught:
        SnapshotEnsemble(two_outputs(losses), task=task)
    assert str(caught.value) == (
        f"`task` must have one entry for each of the model's 2 outputs. Received: task={task!r}"
    )


def test_several_tasks_for_one_output_are_refused():
    with pytest.raises(ValueError, match="one entry for each of the model's 1 outputs"):
        SnapshotEnsemble(ending_in(Dense(3), "mse"), task=["regression", "regression"])


@pytest.mark.parametrize("task", TASKS)
def test_is_classes(task):
    assert Output(task).is_classes == (task in ("multiclass", "binary", "multilabel"))
    assert Output(task).is_passed == (task == "passthrough")
