"""The meanings of several outputs, and of the outputs of subclassed models."""

import keras
import numpy as np
import pytest
from keras.layers import (
    Dense,
)
from models import MULTICLASS, MULTICLASS_LOGITS
from output_cases import IN_DICTS, IN_LISTS, custom_loss, ending_in, meaning, meanings, two_outputs

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.inference.output_specs import check_task, read_outputs
from snapshot_ensemble.inference.task_words import Output

# Several outputs


@pytest.mark.parametrize(
    "losses",
    [
        ["sparse_categorical_crossentropy", "mse"],
        ("sparse_categorical_crossentropy", "mse"),
        {"kind": "sparse_categorical_crossentropy", "amount": "mse"},
        {"amount": "mse", "kind": "sparse_categorical_crossentropy"},
    ],
    ids=["list", "tuple", "dict", "dict backwards"],
)
@pytest.mark.parametrize("structure", [list, tuple])
def test_losses_of_a_list_of_outputs(structure, losses):
    assert meanings(two_outputs(losses, structure)) == IN_LISTS


@pytest.mark.parametrize(
    "losses",
    [
        {"kind": "sparse_categorical_crossentropy", "amount": "mse"},
        {"amount": "mse", "kind": "sparse_categorical_crossentropy"},
        ["mse", "sparse_categorical_crossentropy"],
    ],
    ids=["dict", "dict backwards", "list by sorted keys"],
)
def test_losses_of_a_dict_of_outputs(losses):
    assert meanings(two_outputs(losses, dict)) == IN_DICTS


def test_keys_of_a_dict_of_outputs_override_names_of_layers():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, {"b": Dense(3, name="a")(inputs), "a": Dense(1, name="b")(inputs)})
    model.compile("sgd", {"a": "mse", "b": "sparse_categorical_crossentropy"})
    assert meanings(model) == [Output("regression"), MULTICLASS]


def test_nested_outputs():
    inputs = keras.Input((4,))
    model = keras.Model(
        inputs,
        {"a": [Dense(3)(inputs), Dense(1)(inputs)], "b": Dense(1)(inputs)},
    )
    categorical = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", {"a": [categorical, "mse"], "b": "binary_crossentropy"})
    assert meanings(model) == [MULTICLASS_LOGITS, Output("regression"), Output("binary")]


def test_one_loss_for_all_outputs():
    actual = meanings(two_outputs("mse", activations=("relu", None)))
    assert actual == [Output("regression"), Output("regression")]


def test_each_output_has_its_own_activation():
    actual = meanings(two_outputs(custom_loss, activations=("softmax", "sigmoid")))
    assert actual == [MULTICLASS, Output("binary")]


def test_each_output_has_its_own_from_logits():
    losses = [
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        keras.losses.BinaryCrossentropy(),
    ]
    actual = meanings(two_outputs(losses, activations=(None, None)))
    assert actual == [MULTICLASS_LOGITS, Output("binary")]


def test_a_loss_in_a_list_of_one():
    assert meaning(Dense(3), ["sparse_categorical_crossentropy"]) == MULTICLASS


def test_a_loss_in_a_dict_of_one():
    model = ending_in(Dense(3, name="kind"), {"kind": "sparse_categorical_crossentropy"})
    assert meanings(model) == [MULTICLASS]


def test_an_output_without_a_loss_needs_a_task():
    model = two_outputs(["sparse_categorical_crossentropy", None])
    with pytest.raises(ValueError, match="The task of output 1 of the model cannot be inferred"):
        SnapshotEnsemble(model)
    assert meanings(model, ["multiclass", "regression"]) == IN_LISTS
    SnapshotEnsemble(model, task=[None, "regression"])


# Subclassed models


class Subclassed(keras.Model):
    def __init__(self, *activations):
        super().__init__()
        self.heads = [Dense(units, a) for units, a in zip((3, 1), activations, strict=False)]

    def call(self, inputs):
        outputs = [head(inputs) for head in self.heads]
        return outputs if len(outputs) > 1 else outputs[0]


def read_subclassed(loss, *activations, task=None):
    model = Subclassed(*activations)
    model.compile("sgd", loss)
    check_task(model, task)
    return read_outputs(model, task, model(np.zeros((2, 4), "float32")))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("sparse_categorical_crossentropy", MULTICLASS),
        (keras.losses.CategoricalCrossentropy(from_logits=True), MULTICLASS_LOGITS),
        ("binary_crossentropy", Output("multilabel")),
        (keras.losses.BinaryCrossentropy(from_logits=True), Output("multilabel", logits=True)),
        ("mae", Output("regression")),
    ],
)
def test_the_task_of_a_subclassed_model_is_inferred_from_its_loss(loss, expected):
    assert read_subclassed(loss, None) == [expected]


@pytest.mark.parametrize(
    "losses",
    [["sparse_categorical_crossentropy", "mse"], ("sparse_categorical_crossentropy", "mse")],
)
def test_a_subclassed_model_with_several_outputs(losses):
    assert read_subclassed(losses, "softmax", None) == IN_LISTS


def test_a_subclassed_model_with_a_dict_of_outputs():
    class Named(keras.Model):
        def __init__(self):
            super().__init__()
            self.kind, self.amount = Dense(3), Dense(1)

        def call(self, inputs):
            return {"kind": self.kind(inputs), "amount": self.amount(inputs)}

    model = Named()
    model.compile("sgd", {"kind": "sparse_categorical_crossentropy", "amount": "mse"})
    check_task(model, None)
    assert read_outputs(model, None, model(np.zeros((2, 4), "float32"))) == IN_DICTS


def test_a_subclassed_model_with_an_explicit_task():
    assert read_subclassed(custom_loss, None, task="regression") == [Output("regression")]
    [actual] = read_subclassed("binary_crossentropy", None, task="multiclass")
    assert actual == MULTICLASS


def test_a_subclassed_model_has_no_known_activation():
    with pytest.raises(ValueError, match="last activation None"):
        read_subclassed(custom_loss, "softmax")


def test_a_sequential_model_that_is_not_built():
    model = keras.Sequential([Dense(3, "softmax")])
    model.compile("sgd", custom_loss)
    check_task(model, None)
    assert read_outputs(model, None, model(np.zeros((2, 4), "float32"))) == [MULTICLASS]
