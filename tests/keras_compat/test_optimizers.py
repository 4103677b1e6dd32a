"""Contract tests for private names of optimizers."""

import keras
import numpy as np
import pytest

from snapshot_ensemble.keras_compat import optimizer_rate, optimizers

schedules = keras.optimizers.schedules


def compiled(optimizer):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(optimizer, "mse")
    return model


def test_rate_holder_is_the_innermost_optimizer():
    inner = keras.optimizers.Adam(0.5)
    outer = keras.optimizers.LossScaleOptimizer(inner)
    assert optimizer_rate.rate_holder(outer) is inner
    assert optimizer_rate.rate_holder(inner) is inner


def test_held_rate():
    schedule = schedules.ExponentialDecay(0.5, 10, 0.5)
    assert optimizer_rate.held_rate(keras.optimizers.SGD(schedule)) is schedule
    assert isinstance(optimizer_rate.held_rate(keras.optimizers.SGD(0.25)), keras.Variable)
    assert float(optimizer_rate.held_rate(keras.optimizers.SGD(0.25))) == 0.25


@pytest.mark.parametrize("rate", [schedules.ExponentialDecay(0.5, 10, 0.5), lambda: 0.5])
def test_rate_replaced(rate):
    weights = [keras.Variable(np.zeros(2))]
    optimizer = keras.optimizers.Adam(rate)
    optimizer.build(weights)
    before = [id(variable) for variable in optimizer.variables]
    variable = keras.Variable(0.0, trainable=False, name="learning_rate")
    # The setter of `learning_rate` would refuse it.
    with optimizer_rate.rate_replaced(optimizer, variable):
        variable.assign(0.125)
        assert float(optimizer.learning_rate) == 0.125
        ordinary = keras.optimizers.Adam(0.1)
        ordinary.build(weights)
        assert [v.name for v in optimizer.variables] == [v.name for v in ordinary.variables]
    assert optimizer_rate.held_rate(optimizer) is rate
    assert [id(variable) for variable in optimizer.variables] == before


def test_rate_shown():
    optimizer, schedule = keras.optimizers.SGD(0.5), schedules.ExponentialDecay(0.25, 10, 0.5)
    with optimizer_rate.rate_shown(optimizer, schedule):
        assert optimizer.get_config()["learning_rate"]["class_name"] == "ExponentialDecay"
        assert float(optimizer.learning_rate) == 0.5
    with optimizer_rate.rate_shown(keras.optimizers.LossScaleOptimizer(optimizer), 0.125):
        assert optimizer.get_config()["learning_rate"] == 0.125
        assert keras.optimizers.SGD(0.25).get_config()["learning_rate"] == 0.25
    assert optimizer.get_config()["learning_rate"] == 0.5
    assert "get_config" not in vars(keras.Optimizer)


@pytest.mark.parametrize("rate", [0.5, schedules.ExponentialDecay(0.5, 10, 0.5), lambda: 0.5])
def test_a_copy_of_an_optimizer(rate):
    optimizer = keras.optimizers.SGD(rate, momentum=0.75)
    copied = optimizer_rate.copy_of_optimizer(optimizer)
    assert copied is not optimizer
    assert (copied.momentum, float(copied.learning_rate)) == (0.75, 0.5)
    with optimizer_rate.rate_shown(optimizer, 0.25):
        shown = optimizer_rate.copy_of_optimizer(optimizer)
    assert (shown.momentum, float(shown.learning_rate)) == (0.75, 0.25)


def test_optimizers_of_a_model():
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam())
    model = compiled(scaled)
    assert optimizers.optimizers_of(model) == [scaled.inner_optimizer, scaled]
    model = compiled("sgd")
    model.second = keras.optimizers.Adam()
    assert optimizers.optimizers_of(model) == [model.optimizer, model.second]


def test_built_for_returns_the_variables():
    model = compiled("adam")
    assert optimizers.built_for(model.optimizer) == []
    model.optimizer.build(model.trainable_variables)
    kernel, bias = optimizers.built_for(model.optimizer)
    assert kernel is model.weights[0]
    assert bias is model.weights[1]


def test_initial_values():
    plain, inner = (keras.optimizers.Adagrad(initial_accumulator_value=0.25) for _ in range(2))
    for optimizer in (plain, keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)):
        model = compiled(optimizer)
        model.optimizer.build(model.trainable_variables)
        expected = [variable.numpy() for variable in optimizer.variables]
        model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)
        actual = optimizers.initial_values(optimizer)
        for one, other in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_optimizers_hidden(tmp_path):
    inner = compiled("adam")
    inner.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)
    model = keras.Sequential([keras.Input((3,)), inner, keras.layers.Dense(1)])
    model.compile("adam", "mse")
    model.fit(np.ones((4, 3)), np.ones((4, 1)), verbose=0)
    own = model.optimizer, inner.optimizer
    with optimizers.optimizers_hidden():
        assert (model.optimizer, inner.optimizer) == own
        model.save_weights(tmp_path / "alone.weights.h5")
    model.save_weights(tmp_path / "with.weights.h5")
    sizes = [(tmp_path / name).stat().st_size for name in ("alone.weights.h5", "with.weights.h5")]
    assert sizes[0] < sizes[1]


def test_a_built_twin_has_the_variables_that_building_will_give():
    optimizer = keras.optimizers.Adam(0.5)
    weights = [keras.Variable(np.zeros((2, 3))), keras.Variable(np.zeros(4))]
    twin = optimizers.built_twin(optimizer, weights)
    assert not optimizer.built
    optimizer.build(weights)
    assert [v.shape for v in twin.variables] == [v.shape for v in optimizer.variables]
    assert [v.dtype for v in twin.variables] == [v.dtype for v in optimizer.variables]


def test_an_optimizer_that_cannot_be_copied_has_no_twin():
    class Own(keras.optimizers.SGD):
        def get_config(self):
            raise NotImplementedError

    assert optimizers.built_twin(Own(), [keras.Variable(np.zeros(2))]) is None
