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


@pytest.mark.parametrize("kind", [tuple, list, lambda pair: {"one": pair[0], "more": [pair[1]]}])
def test_optimizers_in_containers_are_hidden(tmp_path, kind):
    def made():
        model = compiled("adam")
        model.parts = [keras.layers.Dense(2)]
        model.parts[0].build((None, 2))
        model.others = kind((keras.optimizers.Adam(), keras.optimizers.SGD()))
        return model

    one, other = made(), made()
    one.parts[0].set_weights([np.full((2, 2), 3.0), np.ones(2)])
    first = one.others["one"] if isinstance(one.others, dict) else one.others[0]
    first.build(one.trainable_variables)
    with optimizers.optimizers_hidden():
        one.save_weights(tmp_path / "one.weights.h5")
        other.load_weights(tmp_path / "one.weights.h5")
    # Keras's own file has their slots, which a reader without them may not expect.
    one.save_weights(tmp_path / "own.weights.h5")
    with optimizers.optimizers_hidden():
        other.load_weights(tmp_path / "own.weights.h5")
    np.testing.assert_array_equal(other.parts[0].kernel, np.full((2, 2), 3.0))


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


def test_optimizers_of_a_model_in_attributes_and_containers():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    one, two, three = (keras.optimizers.SGD() for _ in range(3))
    model.compile(keras.optimizers.LossScaleOptimizer(one), "mse")
    model.one, model.more, model.by_name = one, [two], {"three": (three, two)}
    found = optimizers.optimizers_of(model)
    assert len(found) == 4
    assert found[0] is one
    assert found[1] is model.optimizer
    assert {id(two), id(three)} == {id(o) for o in found[2:]}


def test_wraps_others():
    sgd = keras.optimizers.SGD()
    assert not optimizers.wraps_others(sgd)
    assert optimizers.wraps_others(keras.optimizers.LossScaleOptimizer(sgd))
    if hasattr(keras.optimizers, "MultiOptimizer"):  # Since Keras 3.13.
        assert optimizers.wraps_others(keras.optimizers.MultiOptimizer(lambda variable: sgd))


@pytest.mark.parametrize("value", [1.0, np.inf])
@pytest.mark.parametrize("accumulate", [None, 5])
@pytest.mark.parametrize("scaled", [False, True])
def test_calls_are_counted_also_where_iterations_stand_still(value, accumulate, scaled):
    optimizer = keras.optimizers.SGD(gradient_accumulation_steps=accumulate)
    optimizer = keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer
    variable = keras.Variable([1.0])
    optimizer.build([variable])
    counts = [optimizers.calls_counted(optimizer)]
    for _ in range(3):
        optimizer.apply([keras.ops.convert_to_tensor([value])], [variable])
        counts.append(optimizers.calls_counted(optimizer))
    assert len(set(counts)) == 4


def test_writes_filtered():
    optimizer, allowed = keras.optimizers.SGD(0.5), [False, True]
    variable = optimizer.learning_rate
    with optimizer_rate.writes_filtered(variable, lambda: allowed.pop(0)):
        optimizer.learning_rate = 0.25
        assert float(variable) == 0.5
        variable.assign_sub(0.25)
        assert float(variable) == 0.25
        optimizer_rate.assign_unfiltered(variable, 2.0)
        assert float(variable) == 2.0
    optimizer.learning_rate = 0.125
    assert float(variable) == 0.125


def test_put_rate_back():
    optimizer = keras.optimizers.Adam(0.5)
    variable, names = optimizer.learning_rate, [v.name for v in optimizer.variables]
    optimizer.learning_rate = schedules.ExponentialDecay(0.5, 10, 0.5)
    optimizer_rate.put_rate_back(optimizer, variable)
    optimizer_rate.put_rate_back(optimizer, variable)
    assert optimizer.learning_rate is variable
    assert [v.name for v in optimizer.variables] == names


def test_calling_callback():
    found = []
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    by_function = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: found.append(optimizer_rate.calling_callback())
    )
    x = np.zeros((2, 1))
    model.fit(x, x, verbose=0, callbacks=[by_function])
    assert found == [by_function]
    assert optimizer_rate.calling_callback() is None
