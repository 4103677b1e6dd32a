"""The members' outputs against NumPy: statistics, dropout, masks and `tf.function`s."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from members_cases import (
    ROWS,
    adapted_normalization,
    compiled,
    ensemble_from_files,
    outputs_with,
    random_weights,
    sequential,
)
from models import assert_all_close

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.inference.members_model import MembersModel, member_outputs

# Statistics, dropout and masks, against NumPy


def test_batch_normalisation_uses_each_members_statistics(tmp_path):
    model = compiled(keras.Sequential([keras.Input((4,)), layers.BatchNormalization(epsilon=0.01)]))
    ens, weights = ensemble_from_files(model, tmp_path)
    actual = ens.predict_members(ROWS, verbose=0)
    for member, (gamma, beta, mean, variance) in zip(actual, weights, strict=True):
        expected = gamma * (ROWS - mean) / np.sqrt(variance + 0.01) + beta
        np.testing.assert_allclose(member, expected, rtol=1e-5, atol=1e-5)


def test_dropout_is_off(tmp_path):
    model = compiled(
        keras.Sequential([keras.Input((4,)), layers.Dropout(0.9), layers.Dense(3, use_bias=False)])
    )
    ens, weights = ensemble_from_files(model, tmp_path)
    expected = np.stack([ROWS @ kernel for (kernel,) in weights])
    np.testing.assert_allclose(ens.predict_members(ROWS, verbose=0), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ens[1].predict(ROWS, verbose=0), expected[1], rtol=1e-5, atol=1e-5)


def test_masked_steps_do_not_count(tmp_path):
    inputs = keras.Input((None,), dtype="int32")
    hidden = layers.Embedding(7, 4, mask_zero=True)(inputs)
    model = compiled(keras.Model(inputs, layers.GRU(3)(hidden)))
    ens, _ = ensemble_from_files(model, tmp_path)
    short = ens.predict_members(np.array([[1, 2, 3]]), verbose=0)
    padded = ens.predict_members(np.array([[1, 2, 3, 0, 0]]), verbose=0)
    np.testing.assert_allclose(padded, short, rtol=1e-5, atol=1e-6)


def test_each_member_may_have_its_own_normalization(tmp_path):
    # As if each was trained on another fold of the data.
    def folded(scale):
        normalization = layers.Normalization()
        normalization.adapt(ROWS * scale + scale)
        return compiled(keras.Sequential([keras.Input((4,)), normalization, layers.Dense(2)]))

    expected, paths = [], []
    for scale in (1, 5, 20):
        model = folded(scale)
        expected.append(model.predict(ROWS, verbose=0))
        paths.append(tmp_path / f"{scale}.weights.h5")
        model.save_weights(paths[-1])
    ens = SnapshotEnsemble.from_weights(folded(2), paths)
    assert_all_close(
        np.stack([member.predict(ROWS, verbose=0) for member in ens]), np.stack(expected)
    )
    assert_all_close(ens.predict_members(ROWS, verbose=0), np.stack(expected))


def test_reading_files_does_not_change_the_models_normalization(tmp_path):
    model, x = adapted_normalization()
    model.save_weights(tmp_path / "other.weights.h5")
    model.layers[0].adapt(ROWS * 20 - 7)
    before = np.array(model(x))
    SnapshotEnsemble.from_weights(model, [tmp_path / "other.weights.h5"])
    np.testing.assert_array_equal(np.array(model(x)), before)


# TensorFlow functions in models


# The layers are built first: inside a `tf.function`, Keras would create their weights as constants.
class DecoratedCall(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)
        self.dense.build((None, 4))

    @tf.function
    def call(self, inputs):
        return self.dense(inputs)


class DecoratedMethod(layers.Layer):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)
        self.dense.build((None, 4))

    @tf.function
    def transform(self, inputs):
        return self.dense(inputs)

    def call(self, inputs):
        return self.transform(inputs)


class DecoratedTwice(DecoratedMethod):
    @tf.function
    def call(self, inputs):
        return self.transform(inputs)


class FunctionAsAttribute(DecoratedMethod):
    def __init__(self):
        super().__init__()
        self.function = tf.function(self.dense)

    def call(self, inputs):
        return self.function(inputs)


class WithBranches(DecoratedCall):
    """AutoGraph converts its `if` on a tensor to a branch of the graph."""

    @tf.function
    def call(self, inputs):
        outputs = self.dense(inputs)
        if outputs[0, 1] <= 0:
            outputs = outputs * 2.0 - 10.0
        return outputs


def functional(layer):
    inputs = keras.Input((4,))
    return keras.Model(inputs, layer()(inputs))


def by_hand(weights, branches=False):
    outputs = np.stack([ROWS @ kernel + bias for kernel, bias in weights])
    if branches:
        low = outputs[:, :1, 1:2] <= 0
        assert 0 < low.sum() < len(low)
        outputs = np.where(low, outputs * 2 - 10, outputs)
    return outputs


FUNCTIONS = {
    "call": DecoratedCall,
    "method of a layer": lambda: functional(DecoratedMethod),
    "nested": lambda: functional(DecoratedTwice),
    "attribute": lambda: functional(FunctionAsAttribute),
}


@pytest.mark.sampled(3, 2)
@pytest.mark.parametrize("traced_before", [False, True])
@pytest.mark.parametrize("make", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_each_member_has_its_own_weights_in_tensorflow_functions(make, traced_before, tmp_path):
    model = compiled(make())
    model.build((None, 4))
    if traced_before:
        model.predict(ROWS, verbose=0)
    ens, weights = ensemble_from_files(model, tmp_path)
    assert_all_close(ens.predict_members(ROWS, verbose=0), by_hand(weights))
    assert_all_close(
        np.stack([member.predict(ROWS, verbose=0) for member in ens]), by_hand(weights)
    )
    assert_all_close(outputs_with(model, weights, ROWS), by_hand(weights))


@pytest.mark.parametrize("traced_before", [False, True])
def test_branches_of_tensorflow_functions(traced_before, tmp_path):
    model = compiled(WithBranches())
    model.build((None, 4))
    if traced_before:
        model.predict(ROWS, verbose=0)
    ens, weights = ensemble_from_files(model, tmp_path, 4)
    assert_all_close(ens.predict_members(ROWS, verbose=0), by_hand(weights, branches=True))
    assert_all_close(outputs_with(model, weights, ROWS), by_hand(weights, branches=True))


def test_members_in_tensorflow_functions_of_another_shape(tmp_path):
    model = compiled(functional(DecoratedMethod))
    ens, weights = ensemble_from_files(model, tmp_path)
    for rows in (10, 3, 7):
        assert_all_close(
            ens.predict_members(ROWS[:rows], batch_size=4, verbose=0), by_hand(weights)[:, :rows]
        )


@pytest.mark.parametrize("eagerly", [False, True])
def test_run_functions_eagerly_is_restored(eagerly, tmp_path):
    ens, _ = ensemble_from_files(compiled(functional(DecoratedMethod)), tmp_path)
    tf.config.run_functions_eagerly(eagerly)
    try:
        member_outputs(ens.model, ens.model.get_weights(), ROWS)
        assert tf.config.functions_run_eagerly() == eagerly
        with pytest.raises(Exception, match="incompatible"):
            member_outputs(ens.model, ens.model.get_weights(), ROWS[:, :2])
        assert tf.config.functions_run_eagerly() == eagerly
    finally:
        tf.config.run_functions_eagerly(False)


# Outputs for explicit weights


def test_member_outputs_of_arrays():
    model, x = sequential()
    weights = [random_weights(model, seed) for seed in (1, 2)]
    actual = np.stack([np.array(member_outputs(model, arrays, x)) for arrays in weights])
    assert_all_close(actual, outputs_with(model, weights, x))


def test_member_outputs_needs_every_weight():
    model, x = sequential()
    with pytest.raises(ValueError, match="zip"):
        member_outputs(model, model.get_weights()[:-1], x)


def test_a_members_model_does_not_track_the_model():
    inputs = keras.Input((4,))
    dense = layers.Dense(3, kernel_regularizer="l2", activity_regularizer="l2", name="answer")
    model = compiled(keras.Model(inputs, dense(inputs), name="mine"))
    weights = [random_weights(model, seed) for seed in (1, 2)]
    members = MembersModel(model, weights, lambda outputs: outputs[0] + outputs[1])
    first, second = (
        x @ kernel + bias for x, (kernel, bias) in zip([ROWS] * 2, weights, strict=True)
    )
    np.testing.assert_allclose(np.array(members(ROWS)), first + second, rtol=1e-5, atol=1e-5)
    assert members.weights == []
    assert members.losses == []
    assert members.layers == []
    assert members.name == "mine"
    assert members.output_names == ["answer"]
