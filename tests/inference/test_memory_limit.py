"""`ens(x)` for one batch, and members one after another if they exceed the memory limit."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from benchmarks.builders import random_ensemble
from models import COMBINATIONS, TASKS, dense, ensemble_of

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.inference.member_pool import MemberPool

X = np.random.default_rng(1).normal(size=(40, 4)).astype("float32")


def one_after_another(ens, monkeypatch):
    """The ensemble with a memory limit of 0; a graph of several members is an error."""
    ens.memory_limit = 0

    def refuse(*args):
        raise AssertionError("All members were built.")

    monkeypatch.setattr(MemberPool, "members_model", refuse)
    return ens


def ensemble(task):
    ens = ensemble_of(dense(*TASKS[task]), 4)
    ens.weights = [0.1, 0.2, 0.0, 0.7]
    return ens


@pytest.mark.sampled(8, 3)
@pytest.mark.parametrize(("task", "combine"), COMBINATIONS)
def test_predictions_are_the_same_one_after_another(task, combine, monkeypatch):
    ens = ensemble(task)
    if task != "regression":
        ens.temperature = 1.5
    expected = ens.predict(X, combine=combine, members=[0, 1, 3], verbose=0)
    before = ens.model.get_weights()
    ens = one_after_another(ens, monkeypatch)
    actual = ens.predict(X, combine=combine, members=[0, 1, 3], verbose=0)
    assert isinstance(actual, np.ndarray)
    assert actual.dtype == expected.dtype
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    for now, then in zip(ens.model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


@pytest.mark.sampled(6, 2)
@pytest.mark.parametrize("task", TASKS)
def test_member_outputs_and_uncertainty_are_the_same_one_after_another(task, monkeypatch):
    ens = ensemble(task)
    if task != "regression":
        ens.temperature = 1.5
    expected_members = ens.predict_members(X, verbose=0)
    expected_spread = ens.predict_uncertainty(X, verbose=0)
    ens = one_after_another(ens, monkeypatch)
    actual = ens.predict_members(X, verbose=0)
    np.testing.assert_allclose(actual, expected_members, rtol=1e-5, atol=1e-6)
    actual = ens.predict_uncertainty(X, verbose=0)
    assert set(actual) == set(expected_spread)
    for name, value in expected_spread.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-4, atol=1e-5)


class Subclass(keras.Model):
    def __init__(self):
        super().__init__()
        self.inner = keras.layers.Dense(3, "softmax")

    def call(self, x):
        return self.inner(x)


@pytest.mark.parametrize("kind", ["functional", "subclass"])
def test_predictions_from_a_directory_are_the_same(tmp_path, kind, monkeypatch):
    model = dense() if kind == "functional" else Subclass()
    model.compile("sgd", "sparse_categorical_crossentropy")
    model(X)
    ens = ensemble_of(model, 3)
    expected = ens.predict(X, verbose=0)
    is_lost = kind == "subclass"
    lost = pytest.warns(UserWarning, match="The saved copy of the model cannot be used")
    with lost if is_lost else contextlib.nullcontext():
        ens.save(tmp_path / "saved")
    model = model if is_lost else None
    loaded = SnapshotEnsemble.load(tmp_path / "saved", model=model)
    actual = one_after_another(loaded, monkeypatch).predict(X, verbose=0)
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)


def test_data_that_can_be_read_only_once_run_all_members_at_once():
    ens = ensemble("softmax")
    expected = ens.predict(X, verbose=0)
    ens.memory_limit = 0
    batches = ((X[i : i + 10],) for i in range(0, 40, 10))
    actual = ens.predict(batches, steps=4, verbose=0)
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    shuffled = tf.data.Dataset.from_tensor_slices(X).shuffle(40).batch(8)
    actual = ens.predict_members(shuffled, verbose=0)
    # All members saw the same order, which is recovered from the first member's outputs.
    whole = ens.predict_members(X, verbose=0)
    order = [np.abs(whole[0] - row).sum(axis=-1).argmin() for row in actual[0]]
    reordered = whole[:, order]
    np.testing.assert_allclose(actual, reordered, atol=1e-6)


@pytest.mark.parametrize("value", [-1, 1.5, "1 GB"])
def test_invalid_limits_are_refused(value):
    with pytest.raises((TypeError, ValueError), match="`memory_limit`.*Received: memory_limit="):
        SnapshotEnsemble(dense(), memory_limit=value)


# One batch


@pytest.mark.sampled(8, 3)
@pytest.mark.parametrize(("task", "combine"), COMBINATIONS)
def test_a_call_and_predict_agree(task, combine):
    ens = ensemble(task)
    expected = ens.predict(X, combine=combine, verbose=0)
    actual = ens(X, combine=combine)
    assert isinstance(actual, tf.Tensor)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ens(X[:1], combine=combine), expected[:1], rtol=1e-5, atol=1e-6)
    members = (
        ens.predict(X, combine=combine, members=2, verbose=0) if combine != "weighted" else None
    )
    if members is not None:
        np.testing.assert_allclose(ens(X, combine=combine, members=2), members, atol=1e-6)


def test_its_gradient_is_that_of_the_members_mean():
    ens = ensemble("softmax")

    def gradient(function):
        x = tf.constant(X)
        with tf.GradientTape() as tape:
            tape.watch(x)
            score = tf.reduce_sum(function(x)[:, 0])
        return tape.gradient(score, x).numpy()

    expected = np.mean([gradient(member) for member in ens], axis=0)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(gradient(ens), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_it_runs_inside_a_function():
    ens = ensemble("softmax")

    @tf.function
    def doubled(x):
        return 2 * ens(x)

    expected = 2 * ens.predict(X, verbose=0)
    np.testing.assert_allclose(doubled(tf.constant(X)), expected, rtol=1e-5, atol=1e-6)


def test_several_inputs_and_outputs():
    left, right = keras.Input((2,), name="left"), keras.Input((3,), name="right")
    both = keras.layers.concatenate([left, right])
    outputs = {
        "kind": keras.layers.Dense(3, "softmax", name="kind")(both),
        "size": keras.layers.Dense(1, name="size")(both),
    }
    model = keras.Model({"left": left, "right": right}, outputs)
    model.compile("sgd", {"kind": "sparse_categorical_crossentropy", "size": "mse"})
    ens = ensemble_of(model)
    x = {"left": X[:, :2], "right": X[:, 1:]}
    actual, expected = ens(x), ens.predict(x, verbose=0)
    assert set(actual) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-5, atol=1e-6)


def test_a_second_prediction_traces_nothing():
    traced = []

    class Counting(keras.layers.Layer):
        def call(self, x):
            traced.append(1)
            return x

    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(3, "softmax")(Counting()(inputs)))
    model.compile("sgd", "sparse_categorical_crossentropy")
    ens = ensemble_of(model)
    ens.predict(X, verbose=0)
    ens(X[:1])
    ens(X[:2])
    ens(X[:3])
    count = len(traced)
    for rows in (1, 5, 40):
        ens.predict(X[:32], verbose=0)
        ens(X[:rows])
    assert len(traced) == count


def test_calls_without_members_or_with_an_unknown_combination_are_refused():
    with pytest.raises(ValueError, match="no members yet"):
        SnapshotEnsemble(dense())(X)
    with pytest.raises(ValueError, match="`combine` must be"):
        ensemble("softmax")(X, combine="sum")


def test_the_limit_is_saved_and_can_be_given_when_it_is_loaded(tmp_path):
    ens = random_ensemble(dense(), 2)
    ens.memory_limit = 123
    ens.save(tmp_path / "saved")
    assert SnapshotEnsemble.load(tmp_path / "saved").memory_limit == 123
    assert SnapshotEnsemble.load(tmp_path / "saved", memory_limit=7).memory_limit == 7
    with pytest.raises(
        ValueError, match="`memory_limit` must be at least 0. Received: memory_limit=-1"
    ):
        SnapshotEnsemble.load(tmp_path / "saved", memory_limit=-1)
