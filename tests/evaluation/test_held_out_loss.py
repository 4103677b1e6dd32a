"""The loss on held-out data equals the loss that Keras computes."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from held_out_cases import AMOUNTS, BY_NAME, LABELS, PIXELS, RNG, ROWS, YES, gathered, two_headed
from keras import layers
from models import TASKS, dense, eager, ensemble_of, one_batch
from scipy import special

from snapshot_ensemble.inference.combining import combine_outputs


def mean_of(held):
    return combine_outputs(held.members(), "mean", held.meanings)


TARGETS = {
    "softmax": LABELS,
    "logits": LABELS,
    "sigmoid": YES[:, :1],
    "log-odds": YES[:, 0],
    "multilabel": YES,
    "regression": AMOUNTS,
}


@pytest.mark.parametrize("task", TASKS)
def test_loss_equals_that_of_keras(task):
    loss, units, activation = TASKS[task]
    metric = "accuracy" if TARGETS[task] is LABELS else "mae"
    ens = ensemble_of(eager(dense(loss, units, activation), loss, metrics=[metric]), 3)
    data = one_batch(ROWS, TARGETS[task])
    held = gathered(ens, data)
    expected = ens.evaluate(data, verbose=0, return_dict=True)
    assert held.loss(mean_of(held)) == pytest.approx(expected["loss"], rel=1e-5)
    assert held.scorer()(mean_of(held)) == pytest.approx(expected, rel=1e-5)
    one = ens.evaluate(data, members=[1], verbose=0, return_dict=True)
    assert held.loss(held.members()[1]) == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.parametrize("structure", [list, dict])
def test_loss_of_several_outputs_with_loss_weights(structure):
    by_name = {"kind": 0.5, "amount": 3.0}
    loss_weights = by_name if structure is dict else [0.5, 3.0]
    ens = ensemble_of(two_headed(structure, loss_weights=loss_weights), 3)
    # Keras divides by the number of rows, not by the sum of their weights.
    weights = RNG.uniform(0.2, 1.8, 11)
    weights *= 11 / weights.sum()
    y = BY_NAME if structure is dict else (LABELS, AMOUNTS)
    data = one_batch(ROWS, y, weights)
    held = gathered(ens, data)
    assert dict(zip(held.names, held.loss_weights, strict=True)) == by_name
    expected = ens.evaluate(data, verbose=0, return_dict=True)
    assert held.loss(mean_of(held)) == pytest.approx(expected["loss"], rel=1e-5)
    assert held.scorer()(mean_of(held)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ignored", [-1, 0])
def test_ignored_classes_are_not_in_the_loss(ignored):
    model = keras.Sequential([keras.Input((4, 5, 2)), layers.Conv2D(3, 1)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=ignored)
    ens = ensemble_of(eager(model, loss), 2)
    labels = np.where(RNG.random(PIXELS.shape) < 0.4, ignored, PIXELS)
    x = RNG.normal(size=(2, 4, 5, 2)).astype("float32")
    held = gathered(ens, one_batch(x, labels))
    logs = special.log_softmax(held.outputs[0][1].astype("float64"), axis=-1)
    real = labels != ignored
    expected = -np.take_along_axis(logs, labels.clip(0)[..., None], -1)[..., 0][real].mean()
    assert held.loss(held.members()[1]) == pytest.approx(expected, rel=1e-5)
    by_keras = ens.evaluate(one_batch(x, labels), members=[1], verbose=0)
    assert by_keras == pytest.approx(expected, rel=1e-5)


def test_masked_steps_are_not_in_the_loss():
    tokens = np.array([[1, 2, 3, 0, 0], [4, 5, 0, 0, 0], [1, 1, 1, 1, 0]])
    tags = RNG.integers(0, 2, tokens.shape)
    inputs = keras.Input((5,), dtype="int32")
    hidden = layers.Embedding(7, 4, mask_zero=True)(inputs)
    model = keras.Model(inputs, layers.Dense(2, "softmax")(hidden))
    ens = ensemble_of(eager(model, "sparse_categorical_crossentropy", metrics=["accuracy"]), 2)
    # In several batches, since masks are computed for each batch.
    data = tf.data.Dataset.from_tensor_slices((tokens, tags)).batch(2)
    held = gathered(ens, data)
    np.testing.assert_array_equal(held.masks["0"], tokens != 0)
    own = held.outputs[0][1].astype("float64")
    picked = np.take_along_axis(own, tags[..., None], axis=-1)[..., 0]
    expected = -np.log(picked[tokens != 0]).mean()
    assert held.loss(held.members()[1]) == pytest.approx(expected, rel=1e-5)
    actual = held.scorer()(held.members()[1])
    by_keras = ens.evaluate(one_batch(tokens, tags), members=[1], verbose=0, return_dict=True)
    assert actual == pytest.approx(by_keras, rel=1e-5)
    assert actual["loss"] == pytest.approx(expected, rel=1e-5)


class Unnamed(keras.Model):
    def __init__(self):
        super().__init__()
        self.first, self.second = layers.Dense(1, "sigmoid"), layers.Dense(1)

    def call(self, inputs):
        return [self.first(inputs)[:, 0], self.second(inputs)]


def test_outputs_of_a_subclass_are_named_by_number():
    model = eager(Unnamed(), ["binary_crossentropy", "mse"])
    model(ROWS)
    ens = ensemble_of(model, 2)
    yes, values = YES[:, 0], AMOUNTS[:, 0]
    held = gathered(ens, one_batch(ROWS, (yes, values)))
    assert held.names == ["output_0", "output_1"]
    first, second = (output.astype("float64") for output in held.outputs)
    assert first.shape == (2, 11)
    expected = -np.log(np.where(yes, first[0], 1 - first[0])).mean()
    expected += np.mean((second[0, :, 0] - values) ** 2)
    assert held.loss(held.members()[0]) == pytest.approx(expected, rel=1e-5)
