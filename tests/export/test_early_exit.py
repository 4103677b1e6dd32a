"""Exports in which members run only for the rows that reach them, run by TensorFlow alone."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from benchmarks.builders import random_ensemble
from keras import layers
from models import pool_of

from snapshot_ensemble.storage.record import EarlyExit

X = np.random.default_rng(1).normal(size=(203, 6)).astype("float32")


def ensemble(thresholds):
    inputs = keras.Input((6,), name="x")
    hidden = layers.Dense(8, "relu")(inputs)
    outputs = [
        layers.Dense(3, "softmax", name="kind")(hidden),
        layers.Dense(1, name="size")(hidden),
    ]
    model = keras.Model(inputs, outputs)
    model.compile("sgd", ["sparse_categorical_crossentropy", "mse"])
    ens = random_ensemble(model, 3, scale=0.6)
    pool_of(ens).learn(early_exit=EarlyExit([2, 0, 1], [0.8, 1.2], thresholds, [1.0, 0.0]))
    return ens


@pytest.mark.slow
@pytest.mark.parametrize("thresholds", [[0.4, 0.5], [-1.0, -1.0], [9.0, 9.0]])
def test_a_saved_model_predicts_the_same(thresholds, tmp_path):
    ens = ensemble(thresholds)
    ens.export(tmp_path / "served", early_exit=True, x=X)
    served = tf.saved_model.load(str(tmp_path / "served")).signatures["serving_default"]
    (kind, size), counts = ens.predict(X, early_exit=True, return_counts=True, verbose=0)
    assert len(set(counts)) == (3 if thresholds[0] == 0.4 else 1)
    for rows in (slice(None), slice(0, 1), slice(0, 20)):
        actual = served(tf.constant(X[rows]))
        np.testing.assert_allclose(actual["kind"], kind[rows], rtol=1e-5)
        np.testing.assert_allclose(actual["size"], size[rows], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_row_that_is_settled_runs_no_further_member(tmp_path):
    """Members that would fail for a row must not see it."""
    ens = ensemble([0.4, 0.5])
    counts = ens.predict(X, early_exit=True, return_counts=True, verbose=0)[1]
    ens.export(tmp_path / "served", early_exit=True, x=X)
    served = tf.saved_model.load(str(tmp_path / "served"))
    function = served.signatures["serving_default"]
    heads = [variable for variable in served.variables if variable.shape == (8, 3)]
    before = function(tf.constant(X))["kind"].numpy()
    first = pool_of(ens).weights([2])[0][2]
    for head in heads:
        if not np.array_equal(head, first):
            head.assign(tf.fill([8, 3], np.nan))
    after = function(tf.constant(X))["kind"].numpy()
    np.testing.assert_array_equal(after[counts == 1], before[counts == 1])
    assert np.isnan(after[counts > 1]).all()


@pytest.mark.parametrize("format", ["onnx", "litert", "openvino"])
def test_formats_without_branches_are_refused(format, tmp_path):
    names = {"onnx": "a.onnx", "litert": "a.tflite", "openvino": "a.xml"}
    with pytest.raises(ValueError, match=f"all members run for all rows.*format='{format}'"):
        ensemble([0.4, 0.5]).export(tmp_path / names[format], format, early_exit=True)
