"""Metrics and logs with the names of the columns that `fit` adds to the history."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from training_cases import FLOOR, OWN, PEAK, OneWeight, X, arrays, ensemble, one_weight

NAMES = ["cycle", "learning_rate", "shrink"]


def function(name):
    def metric(y, output):
        return y - output

    metric.__name__ = name
    return metric


class Tracking(keras.Sequential):
    def __init__(self, given):
        super().__init__(given)
        self.tracker = keras.metrics.Mean(name=self.tracked)


WAYS = {
    "metric": lambda name: one_weight(metrics=[keras.metrics.MeanSquaredError(name=name)]),
    "weighted": lambda name: one_weight(weighted_metrics=[keras.metrics.Mean(name=name)]),
    "function": lambda name: one_weight(metrics=[function(name)]),
    "tracked": lambda name: one_weight(model_type=type("Named", (Tracking,), {"tracked": name})),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_a_metric_with_such_a_name_is_refused_before_training(way, name):
    model = WAYS[way](name)
    ens = ensemble(model)
    message = rf"no metric may have them\. Received: {name}\. Rename .*`name='my_{name}'`"
    with pytest.raises(ValueError, match=message):
        ens.fit(**arrays(), epochs=2, verbose=0)
    assert int(model.optimizer.iterations) == 0


@pytest.mark.slow
def test_names_with_the_name_of_an_output_are_accepted():
    inputs = keras.Input((1,))
    outputs = {"a": OneWeight(name="a")(inputs), "b": OneWeight(name="b")(inputs)}
    model = keras.Model(inputs, outputs)
    metrics = {"a": [keras.metrics.MeanSquaredError(name="cycle")]}
    model.compile("sgd", {"a": "mse", "b": "mse"}, metrics=metrics)
    ens = ensemble(model)
    ens.fit(X, {"a": X, "b": X}, epochs=2, verbose=0)
    assert ens.history["cycle"] == [0, 1]
    assert "a_cycle" in ens.history


class OwnLogs(keras.Sequential):
    extra = "cycle"

    def train_step(self, data):
        return {**super().train_step(data), self.extra: tf.constant(7.0)}


@pytest.mark.parametrize("name", NAMES)
def test_logs_of_a_training_step_are_refused_when_they_are_known(name, tmp_path):
    model = one_weight(model_type=type("Named", (OwnLogs,), {"extra": name}))
    ens = ensemble(model, directory=tmp_path / "run")
    with pytest.raises(ValueError, match=rf"no metric may have them\. Received: {name}\."):
        ens.fit(**arrays(), epochs=4, verbose=0)
    assert int(model.optimizer.iterations) == 8  # One epoch.
    assert len(ens) == 0
    assert ens.history == {}
    assert not (tmp_path / "run").exists()


class Adds(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        logs.update(dict.fromkeys(NAMES, 7.0))


@pytest.mark.parametrize("is_given", [False, True])
def test_a_callback_that_adds_to_the_logs_changes_no_column(is_given):
    ens = ensemble(one_weight(), shrink=1.0)
    own = [keras.callbacks.History()] if is_given else []
    for _ in range(2):
        history = ens.fit(**arrays(), epochs=2, verbose=0, callbacks=[Adds(), *own]).history
    rates = ens.history["learning_rate"]
    assert ens.history["cycle"] == [0, 1, 2, 3]
    assert max(rates) < PEAK
    assert rates[0] > FLOOR > 0
    assert history["cycle"] == ([0, 1, 2, 3] if is_given else [2, 3])
    assert history["learning_rate"] == (rates if is_given else rates[2:])
    assert np.float32(OWN) == float(ens.model.optimizer.learning_rate)
