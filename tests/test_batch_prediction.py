"""`BatchPredictor` on single batches: columns in and out, and what is refused."""

import pickle
import re

import keras
import numpy as np
import pytest
from keras import layers
from models import ensemble_of

from snapshot_ensemble import SnapshotError
from snapshot_ensemble.ray import BatchPredictor

ROWS = 7
X = np.random.default_rng(0).normal(size=(ROWS, 4)).astype("float32")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """An ensemble with one input and one output, and its directory."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,), name="pixels")
    model = keras.Model(inputs, layers.Dense(3, "softmax", name="digit")(inputs))
    model.compile("sgd", "sparse_categorical_crossentropy")
    ens = ensemble_of(model, 2)
    directory = tmp_path_factory.mktemp("digits") / "ens"
    ens.save(directory)
    return ens, directory


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """An ensemble with two inputs and two outputs."""
    keras.utils.set_random_seed(0)
    left, right = keras.Input((4,), name="left"), keras.Input((1,), name="right")
    both = layers.Concatenate()([left, right])
    kind = layers.Dense(3, "softmax", name="kind")(both)
    price = layers.Dense(1, name="price")(both)
    model = keras.Model({"left": left, "right": right}, {"price": price, "kind": kind})
    model.compile("sgd", {"kind": "sparse_categorical_crossentropy", "price": "mse"})
    ens = ensemble_of(model, 2)
    directory = tmp_path_factory.mktemp("several") / "ens"
    ens.save(directory)
    return ens, directory


FORMS = {
    "by the input's name": ({"pixels": X}, None),
    "the only column": ({"data": X}, None),
    "by another name": ({"data": X, "id": X}, "data"),
    "lists in rows": ({"pixels": np.array([*map(list, X), None], object)[:-1]}, None),
    "arrays in rows": ({"pixels": np.array([*X, None], object)[:-1]}, None),
    "columns of numbers": (dict(zip("abcd", X.T, strict=True)), ["a", "b", "c", "d"]),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("form", FORMS)
def test_columns_of_any_layout_are_predicted_and_kept(form, digits):
    ens, directory = digits
    columns, inputs = FORMS[form]
    predicted = BatchPredictor(directory, inputs=inputs)(columns)
    np.testing.assert_array_equal(predicted.pop("digit"), ens.predict(X, verbose=0))
    assert predicted.keys() == columns.keys()
    assert all(predicted[name] is column for name, column in columns.items())


def test_kinds_of_outputs(digits):
    ens, directory = digits
    batch = {"pixels": X}
    vote = BatchPredictor(directory, combine="vote", members=1, name="label")(batch)["label"]
    np.testing.assert_array_equal(vote, ens.predict(X, combine="vote", members=1, verbose=0))
    members = BatchPredictor(directory, output="members")(batch)["digit"]
    expected = np.moveaxis(ens.predict_members(X, verbose=0), 0, 1)
    np.testing.assert_array_equal(members, expected)
    unsure = BatchPredictor(directory, output="uncertainty", name="p")(batch)
    for name, array in ens.predict_uncertainty(X, verbose=0).items():
        np.testing.assert_array_equal(unsure[f"p_{name}"], array)
    assert unsure.keys() == {"pixels", "p_mean", "p_total", "p_aleatoric", "p_epistemic"}


def test_several_inputs_and_outputs(several):
    ens, directory = several
    right = X[:, :1] ** 2
    expected = ens.predict({"left": X, "right": right}, verbose=0)
    named = BatchPredictor(directory)({"left": X, "right": right})
    numbers = {**dict(zip("abcd", X.T, strict=True)), "size": right}
    inputs = {"left": ["a", "b", "c", "d"], "right": "size"}
    made = BatchPredictor(directory, inputs=inputs)(numbers)
    for name, array in expected.items():
        np.testing.assert_array_equal(named[name], array)
        np.testing.assert_array_equal(made[name], array)
    unsure = BatchPredictor(directory, output="uncertainty")({"left": X, "right": right})
    assert {"kind_total", "kind_epistemic", "price_mean", "price_std"} < unsure.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": "labels"}, "`output` must be one of .*'uncertainty'.*output='labels'"),
        ({"output": "members", "combine": "vote"}, "says how predictions are combined. Received"),
    ],
)
def test_impossible_arguments_are_refused_before_anything_is_loaded(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchPredictor("nowhere", **arguments)


@pytest.mark.parametrize(
    ("batch", "inputs", "message"),
    [
        ({"a": X, "b": X}, None, r"not clear which columns.*\['a', 'b'\], for .*\['pixels'\]"),
        ({"a": X}, "b", r"no columns of these names. Received: inputs='b', of which \['b'\]"),
        ({"a": X}, ["a", "c"], r"of which \['c'\] are not among \['a'\]"),
        ({"pixels": X, "digit": X}, None, r"must have other names.*Received: \['digit'\] in both"),
    ],
)
def test_columns_that_do_not_fit_are_refused(digits, batch, inputs, message):
    with pytest.raises(ValueError, match=message):
        BatchPredictor(digits[1], inputs=inputs)(batch)


def test_other_batches_and_copies_are_refused(digits, several, tmp_path):
    predictor = BatchPredictor(digits[1])
    with pytest.raises(TypeError, match="must be a dict.*type list. Pass `batch_format='numpy'`"):
        predictor([X])
    message = re.escape("Pass the class itself: `map_batches(BatchPredictor, ")
    with pytest.raises(TypeError, match=message):
        pickle.dumps(predictor)
    with pytest.raises(ValueError, match="`name` is for a model with one output.*name='p'"):
        BatchPredictor(several[1], name="p")({"left": X, "right": X[:, :1]})
    with pytest.raises(SnapshotError, match="is not a readable manifest"):
        BatchPredictor(tmp_path)
