"""What Keras keeps behind probabilities, and which of its methods a model replaces."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from snapshot_ensemble.keras_compat import graphs
from snapshot_ensemble.keras_compat.added_losses import (
    added_losses_noticed,
    has_weight_penalties,
    sum_of_added_losses,
)
from snapshot_ensemble.keras_compat.logits import logits_behind, with_logits
from snapshot_ensemble.keras_compat.own_methods import (
    has_own,
    has_own_or_assigned,
    traced_predict_step,
)

FIRST = np.asarray([0])
LOGITS = np.asarray([[-300.0, 0.0, 300.0]], "float32")


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_keras_keeps_the_logits_of_probabilities(activation):
    layer = layers.Activation(activation)
    np.testing.assert_array_equal(logits_behind(layer(LOGITS)), LOGITS)
    assert logits_behind(ops.convert_to_tensor(LOGITS)) is None
    assert logits_behind(ops.cast(layer(LOGITS), "float16")) is None
    assert logits_behind(layer(keras.Input((3,)))) is None


def test_keras_reads_attached_logits():
    probabilities = ops.convert_to_tensor([[0.2, 0.3, 0.5]])
    assert with_logits(probabilities, LOGITS) is probabilities
    loss = keras.losses.sparse_categorical_crossentropy(FIRST, probabilities)
    np.testing.assert_allclose(loss, [600.0])
    without = with_logits(ops.softmax(LOGITS), None)
    clipped = keras.losses.sparse_categorical_crossentropy(FIRST, without)
    np.testing.assert_allclose(clipped, -np.log([1e-7]), rtol=1e-4)


def test_keras_reads_the_logits_of_an_operation_in_a_graph():
    @tf.function
    def found(logits):
        tensor = tf.nn.softmax(logits)
        loss = keras.losses.sparse_categorical_crossentropy(FIRST, tensor)
        return logits_behind(tensor), loss

    logits, loss = found(LOGITS)
    np.testing.assert_array_equal(logits, LOGITS)
    np.testing.assert_allclose(loss, [600.0])


def test_methods_of_the_users_are_told_from_those_of_keras():
    class Own(keras.Model):
        def test_step(self, data):
            return {}

    class Derived(Own):
        pass

    inputs = keras.Input((3,))
    outputs = layers.Dense(1)(inputs)
    for model in (Own(inputs, outputs), Derived(inputs, outputs)):
        assert has_own(model, "test_step")
        assert not has_own(model, "train_step")
    for model in (keras.Model(inputs, outputs), keras.Sequential([inputs, layers.Dense(1)])):
        for name in ("test_step", "train_step", "predict_step", "predict", "evaluate", "missing"):
            assert not has_own_or_assigned(model, name)
    model.predict = print
    model.counter = 0
    assert has_own_or_assigned(model, "predict")
    assert has_own_or_assigned(model, "counter")


def test_a_predict_step_is_traced_without_changing_the_model():
    class Own(keras.Model):
        def predict_step(self, data):
            outputs = super().predict_step(data)
            return {"label": ops.argmax(outputs, axis=-1), "outputs": outputs}

    inputs = keras.Input((3,))
    model = Own(inputs, layers.BatchNormalization()(inputs))
    before = model.get_weights()
    traced = traced_predict_step(model)
    assert traced.outputs["label"].dtype in ("int32", "int64")
    assert not traced.adds_nothing
    assert traced.prepares_nothing
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert traced_predict_step(keras.Model()) is None


def test_losses_of_layers_are_noticed():
    noticed = []
    layer = layers.Dense(2, activity_regularizer="l2")
    with added_losses_noticed(noticed.append):
        layer(np.ones((1, 2), "float32"))
        layers.Dense(2)(np.ones((1, 2), "float32"))
    [loss] = noticed
    np.testing.assert_array_equal(loss, layer.losses[0])
    inputs = keras.Input((2,))
    assert not has_weight_penalties(keras.Model(inputs, layers.Dense(1)(inputs)))
    regularized = layers.Dense(1, kernel_regularizer="l2")
    model = keras.Model(inputs, regularized(inputs))
    assert has_weight_penalties(model)
    regularized.trainable = False
    assert has_weight_penalties(model) == bool(model.losses)


def test_a_graph_compares_tensors_and_calls_numpy_when_it_runs():
    seen = []

    @tf.function
    def run(one, other):
        assert graphs.is_in_graph(one)
        zeros = graphs.zeros_after(seen.append, [one])
        return graphs.first_if_equal([one, other], "They differ."), zeros

    ones = tf.ones(3)
    same, zeros = run(ones, ones)
    np.testing.assert_array_equal(same, np.ones(3))
    np.testing.assert_array_equal(zeros, np.zeros(3))
    assert len(seen) == 1
    assert not graphs.is_in_graph(ones)
    with pytest.raises(graphs.AssertionInGraphError, match="They differ"):
        run(ones, ones * 2)
    not_a_number = tf.constant([np.nan])
    run(not_a_number, not_a_number)


def test_the_sum_of_added_losses_is_what_keras_adds_to_the_compiled_loss():
    inputs = keras.Input((3,))
    penalties = {"kernel_regularizer": keras.regularizers.L2(0.5)}
    model = keras.Model(inputs, keras.layers.Dense(2, **penalties)(inputs))
    model.compile("sgd", "mse")
    x, y = np.ones((4, 3), "float32"), np.zeros((4, 2), "float32")
    outputs = model(x)
    added = float(model.compute_loss(x, y, outputs)) - float(np.mean(np.square(outputs)))
    np.testing.assert_allclose(float(sum_of_added_losses(model)), added, rtol=1e-5)
    assert float(sum_of_added_losses(keras.Model(inputs, keras.layers.Dense(2)(inputs)))) == 0
