"""What Keras assigns to a model's weights, when it reads a file, goes to other variables."""

import keras
import numpy as np
from keras import layers

from snapshot_ensemble.keras_compat.stateless_call import assignments_sent

X = np.random.default_rng(0).normal(size=(6, 3)).astype("float32")


def model_with_all_kinds_of_variables():
    normalize = layers.Normalization()
    normalize.adapt(X)
    inside = [normalize, layers.Dropout(0.5), layers.BatchNormalization(), layers.LSTM(2)]
    return keras.Sequential([keras.Input((4, 3)), *inside, layers.Dense(1, dtype="mixed_float16")])


def zeros_like(variables):
    return [
        keras.Variable("zeros", shape=tuple(v.shape), dtype=v.dtype, trainable=False)
        for v in variables
    ]


def test_a_file_is_read_into_other_variables(tmp_path):
    model, path = model_with_all_kinds_of_variables(), tmp_path / "some.weights.h5"
    saved = model.get_weights()
    model.save_weights(path)
    model.layers[0].adapt(X * 2 + 1)
    model.set_weights([*model.get_weights()[:3], *(array + 1 for array in saved[3:])])
    model.layers[1].seed_generator.state.assign([3, 4])
    before, mean = [np.asarray(v) for v in model.variables], model.layers[0].mean
    targets = zeros_like(model.weights)
    with assignments_sent(model, targets):
        model.load_weights(path)
        # Inside, the model reads what was assigned.
        for actual, expected in zip(model.get_weights(), saved, strict=True):
            np.testing.assert_array_equal(actual, expected)
    for actual, expected in zip(targets, saved, strict=True):
        np.testing.assert_array_equal(actual.numpy(), expected)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    assert model.layers[0].mean is mean


def test_each_is_assigned_at_once():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    targets = zeros_like(model.weights)
    with assignments_sent(model, targets):
        model.weights[0].assign(np.full((3, 2), 5.0))
        variable = targets[0]
        np.testing.assert_array_equal(np.asarray(variable._value), np.full((3, 2), 5.0))
        model.weights[0].assign_add(np.ones((3, 2)))
    np.testing.assert_array_equal(targets[0].numpy(), np.full((3, 2), 6.0))


def test_what_nothing_was_assigned_to_has_the_models_own_value():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, bias_initializer="ones")])
    targets = zeros_like(model.weights)
    with assignments_sent(model, targets):
        model.weights[0].assign(np.zeros((3, 2)))
    np.testing.assert_array_equal(targets[1].numpy(), np.ones(2))
