"""Nothing that an ensemble does changes the user's model."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from members_cases import ROWS, ensemble_from_files, outputs_with
from models import assert_all_close


class Breakable(layers.Layer):
    broken = False

    def call(self, inputs):
        if self.broken:
            raise RuntimeError("the layer broke")
        return inputs


def breakable():
    inputs = keras.Input((4,))
    hidden = layers.BatchNormalization()(Breakable()(layers.Dense(4, name="frozen")(inputs)))
    model = keras.Model(inputs, layers.Dense(3)(layers.Dropout(0.5)(hidden)))
    model.get_layer("frozen").trainable = False
    return model


def state_of(model):
    """Everything that must not change: values, and the objects themselves."""
    values = [np.array(v) for v in (*model.variables, *model.optimizer.variables)]
    values += [np.array(v) for metric in model.metrics for v in metric.variables]
    objects = [model.optimizer, model.optimizer._learning_rate, model.loss, model.train_function]
    objects += [*model.variables, *model.optimizer.variables, *model.metrics, *model.layers]
    flags = [layer.trainable for layer in model._flatten_layers()]
    return values, objects, [*flags, model.compiled, model.name, tf.config.functions_run_eagerly()]


def predict(ens, y):
    ens.predict(ROWS, verbose=0)


def predict_weighted(ens, y):
    ens.weights = [0.25, 0.75]
    ens.predict(ROWS, combine="weighted", verbose=0)


def predict_members(ens, y):
    ens.predict_members(ROWS, verbose=0)


def evaluate(ens, y):
    ens.evaluate(ROWS, y, verbose=0)


def index(ens, y):
    ens[1].predict(ROWS, verbose=0)


def train_a_member(ens, y):
    ens[1].fit(ROWS, y, epochs=1, verbose=0)


def iterate(ens, y):
    assert len(list(ens)) == 2


def data_that_breaks(ens, y):
    def batches():
        yield ROWS
        raise RuntimeError("the data broke")

    with pytest.raises(Exception, match="the data broke"):
        ens.predict(batches(), verbose=0)


def layer_that_breaks(ens, y):
    Breakable.broken = True
    try:
        with pytest.raises(RuntimeError, match="the layer broke"):
            ens.predict(ROWS, members=[1, 0], verbose=0)  # Not traced yet.
    finally:
        Breakable.broken = False
    ens.predict(ROWS, members=[1, 0], verbose=0)


def callback_that_breaks(ens, y):
    def end(batch, logs):
        raise KeyboardInterrupt

    callback = keras.callbacks.LambdaCallback()
    callback.on_test_batch_end = end
    with pytest.raises(KeyboardInterrupt):
        ens.evaluate(ROWS, y, callbacks=[callback], verbose=0)


def inputs_of_a_wrong_shape(ens, y):
    with pytest.raises(Exception, match="incompatible"):
        ens.predict(ROWS[:, :2], verbose=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained model, its ensemble, and what the members predict."""
    keras.utils.set_random_seed(0)
    model = breakable()
    rate = keras.optimizers.schedules.CosineDecay(0.1, 10)
    model.compile(keras.optimizers.Adam(rate), "mse", metrics=["mae"])
    model.fit(ROWS, np.ones((10, 3)), epochs=1, verbose=0)
    ens, weights = ensemble_from_files(model, tmp_path_factory.mktemp("trained"))
    return model, ens, outputs_with(model, weights, ROWS)


@pytest.mark.sampled(6, 2)
@pytest.mark.parametrize(
    "action",
    [
        predict,
        predict_weighted,
        predict_members,
        evaluate,
        index,
        iterate,
        train_a_member,
        data_that_breaks,
        layer_that_breaks,
        callback_that_breaks,
        inputs_of_a_wrong_shape,
    ],
)
def test_the_model_is_unchanged(action, trained):
    model, ens, expected = trained
    values, objects, flags = state_of(model)
    action(ens, np.ones((10, 3)))
    values_after, objects_after, flags_after = state_of(model)
    for before, after in zip(values, values_after, strict=True):
        np.testing.assert_array_equal(before, after)
    assert all(before is after for before, after in zip(objects, objects_after, strict=True))
    assert flags == flags_after
    # The ensemble still works after a failure, too.
    assert_all_close(ens.predict_members(ROWS, verbose=0), expected)


@pytest.mark.slow
def test_the_model_continues_training_after_its_ensemble_predicted(tmp_path):
    y, losses = np.ones((10, 3)), []
    for interrupted in (False, True):
        keras.utils.set_random_seed(3)
        model = breakable()
        model.compile("sgd", "mse")
        model.fit(ROWS, y, epochs=1, shuffle=False, verbose=0)
        if interrupted:
            ens, _ = ensemble_from_files(model, tmp_path)
            ens.predict(ROWS, verbose=0)
            ens.evaluate(ROWS, y, verbose=0)
        history = model.fit(ROWS, y, epochs=2, shuffle=False, verbose=0)
        losses.append(history.history["loss"])
    assert losses[0] == losses[1]
