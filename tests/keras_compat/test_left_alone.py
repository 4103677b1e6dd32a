"""What readers do to a model is not seen by the code that trains it at the same time."""

import random
import threading

import keras
import numpy as np
import pytest
from keras import layers, ops

from snapshot_ensemble.keras_compat import metric_copies, random_seed, stateless_call, twins

X = np.random.default_rng(0).normal(size=(6, 3)).astype("float32")


def in_another_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_a_twin_shares_variables_but_not_attributes():
    layer = layers.Dense(2)
    layer.build((None, 3))
    twin = twins.twin_of(layer, activation=ops.exp)
    assert twin.kernel is layer.kernel
    np.testing.assert_allclose(twin(X), np.exp(layer(X)), rtol=1e-5)
    twin.trainable_before = True
    assert not hasattr(layer, "trainable_before")


def test_twins_are_called_in_their_context_alone():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    layer, before = model.layers[0], np.asarray(model(X))
    call = keras.layers.Layer.__call__
    with twins.twins_called({id(layer): twins.twin_of(layer, activation=ops.exp)}):
        np.testing.assert_allclose(model(X), np.exp(before), rtol=1e-5)
        np.testing.assert_array_equal(in_another_thread(lambda: np.asarray(model(X))), before)
    np.testing.assert_array_equal(model(X), before)
    with twins.twins_called({}):
        assert keras.layers.Layer.__call__ is call
    assert keras.layers.Layer.__call__ is call


def test_values_assigned_apart_are_forgotten(tmp_path):
    normalize = layers.Normalization()
    normalize.adapt(X)
    model = keras.Sequential([keras.Input((3,)), normalize, layers.Dropout(0.5), layers.Dense(1)])
    path = tmp_path / "some.weights.h5"
    saved = model.get_weights()
    model.save_weights(path)
    normalize.adapt(X * 2 + 1)
    model.set_weights([*model.get_weights()[:3], *(array + 1 for array in saved[3:])])
    model.layers[1].seed_generator.state.assign([3, 4])
    before, mean = [np.asarray(v) for v in model.variables], normalize.mean
    with stateless_call.assignments_kept_apart():
        model.load_weights(path)
        for actual, expected in zip(model.get_weights(), saved, strict=True):
            np.testing.assert_array_equal(actual, expected)
    assert normalize.mean is mean
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)


def test_a_model_is_saved_with_other_weights(tmp_path):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
    own, other = model.get_weights(), [array + 1 for array in model.get_weights()]
    with stateless_call.weights_shown(model, other):
        model.save(tmp_path / "model.keras")
        assert np.array_equal(in_another_thread(model.get_weights)[0], own[0])
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.get_weights()[0], other[0])
    np.testing.assert_array_equal(model.get_weights()[0], own[0])


@pytest.mark.parametrize("context", ["with weights", "left alone"])
def test_losses_of_layers_stay(context):
    layer = layers.Dense(2, activity_regularizer="l2")
    model = keras.Sequential([keras.Input((3,)), layer])
    model(X)
    (loss,) = model.losses
    apart = stateless_call.losses_left_alone()
    if context == "with weights":
        apart = stateless_call.with_weights(model, model.get_weights())
    with apart:
        model(X * 2)
    (after,) = model.losses
    assert after is loss


class Listing(keras.metrics.Metric):
    """Has a metric, variables in a list, and counts in Python, but no config."""

    def __init__(self, scale):
        super().__init__(name="listing")
        self.scale, self.mean, self.calls = scale, keras.metrics.Mean(), np.zeros(1)
        self.sums = [self.add_variable((), "zeros", name=f"sum_{i}") for i in range(2)]
        self.named = {"last": self.sums[1]}

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.calls += 1
        self.mean.update_state(y_pred)
        self.sums[0].assign_add(self.scale)
        self.named["last"].assign(ops.sum(y_pred))

    def result(self):
        return self.mean.result() + self.sums[0] + self.sums[1]


def test_a_copy_of_a_metric_has_a_state_of_its_own():
    metric = Listing(2.0)
    metric.update_state(None, np.ones(4, "float32"))
    copied = metric_copies.copy_of_metric(metric)
    assert len(copied.variables) == len(metric.variables)
    assert not {id(v) for v in copied.variables} & {id(v) for v in metric.variables}
    assert float(copied.result()) == 0
    copied.update_state(None, np.full(4, 3, "float32"))
    assert float(copied.result()) == 3 + 2 + 12
    assert (float(metric.result()), metric.calls[0]) == (1 + 2 + 4, 1)
    copied.extra = copied.add_variable((), "zeros", name="extra")
    assert len(copied.variables) == len(metric.variables) + 1


def test_seeds_are_drawn_apart():
    random.seed(3)
    expected = layers.Dropout(0.5).seed_generator.state.numpy()
    random.seed(3)
    state = random.getstate()
    with random_seed.seeds_drawn_apart():
        drawn = layers.Dropout(0.5).seed_generator.state.numpy()
        first, second = keras.initializers.GlorotUniform(), keras.initializers.GlorotUniform()
        assert first.seed != second.seed
    assert random.getstate() == state
    np.testing.assert_array_equal(drawn, expected)


def test_scopes_are_left_and_entered_again():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    kernel = model.weights[0]
    with stateless_call.weights_shown(model, [np.full((1, 1), 5.0), np.zeros(1)]):
        with stateless_call.scopes_left():
            own = float(kernel.numpy()[0, 0])
            keras.layers.Dense(1).build((None, 1))  # Inside a scope, no variables can be made.
        assert kernel.numpy() == [[5.0]]
    assert own == kernel.numpy() != 5


def test_generators_are_restored():
    def draw():
        return random.random(), np.random.uniform(), float(keras.random.uniform(()))  # noqa: NPY002

    def start():
        random_seed.set_global_seed([0, 0])  # Before Keras 3.13 the seed did not reset it.
        keras.utils.set_random_seed(0)

    start()
    expected = draw()
    start()
    with random_seed.generators_restored():
        assert draw() == expected
    assert draw() == expected
