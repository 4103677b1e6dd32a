"""Members as separate models: cloned with their weights, and compiled like the model."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from members_cases import (
    ensemble_from_files,
    outputs_with,
    random_weights,
    sequential,
    subclassed_with_config,
    subclassed_without_config,
    with_lambda,
    with_operations,
)
from models import assert_all_close

from snapshot_ensemble.inference.cloning import build_member, clone_of

# Members as separate models


@pytest.mark.parametrize("kind", [sequential, subclassed_with_config, with_operations])
def test_a_member_has_the_models_class_if_possible(kind):
    model, _ = kind()
    member = build_member(model, random_weights(model, 1))
    assert type(member) is type(model)
    assert member.name == model.name
    assert [v.name for v in member.weights] == [v.name for v in model.weights]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", [sequential, subclassed_without_config, with_lambda])
def test_a_member_has_its_own_weights(kind, tmp_path):
    model, x = kind()
    ens, _ = ensemble_from_files(model, tmp_path)
    before = ens.predict_members(x, verbose=0)
    own = model.predict(x, verbose=0)
    member = ens[0]
    member.set_weights([np.zeros_like(array) for array in member.get_weights()])
    np.testing.assert_array_equal(ens.predict_members(x, verbose=0), before)
    np.testing.assert_array_equal(model.predict(x, verbose=0), own)
    np.testing.assert_allclose(ens[0].predict(x, verbose=0), before[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [sequential, subclassed_without_config])
def test_weights_of_a_member_are_set_in_the_models_order(kind):
    model, x = kind()
    first, second = random_weights(model, 1), random_weights(model, 2)
    member = build_member(model, first)
    member.set_weights(second)
    assert_all_close(member.predict(x, verbose=0), outputs_with(model, [second], x)[0])


@pytest.mark.parametrize("kind", [sequential, subclassed_without_config])
def test_a_member_has_the_models_trainable_flags(kind):
    model, _ = kind()
    model.layers[0].trainable = False
    member = build_member(model, random_weights(model, 1))
    names = [v.name for v in model.trainable_variables]
    assert [v.name for v in member.trainable_variables] == names
    assert len(member.non_trainable_variables) == len(model.non_trainable_variables)


def test_a_member_is_saved_and_loaded_by_keras(tmp_path):
    model, x = sequential()
    ens, _ = ensemble_from_files(model, tmp_path)
    ens[1].save(tmp_path / "member.keras")
    loaded = keras.models.load_model(tmp_path / "member.keras")
    assert_all_close(loaded.predict(x, verbose=0), ens.predict_members(x, verbose=0)[1])


# Compiled like the model


def scaled_mean(factor):
    def mean_output(y_true, y_pred):
        return factor * ops.mean(y_pred)

    return mean_output


def with_custom_loss(model):
    model.compile(
        keras.optimizers.Adam(0.01),
        lambda y_true, y_pred: ops.mean(ops.abs(y_true - y_pred), axis=-1),
        metrics=[scaled_mean(10.0)],
    )
    return model


@pytest.mark.parametrize("kind", [sequential, subclassed_without_config])
def test_a_lambda_as_loss_and_a_closure_as_metric(kind, tmp_path):
    model, x = kind()
    with_custom_loss(model)
    ens, _ = ensemble_from_files(model, tmp_path, task="regression")
    outputs = ens.predict_members(x, verbose=0)
    y = np.ones_like(outputs[0])
    for combined, actual in [
        (outputs.mean(axis=0), ens.evaluate(x, y, verbose=0)),
        (outputs[1], ens[1].evaluate(x, y, verbose=0)),
    ]:
        expected = [np.abs(y - combined).mean(), 10 * combined.mean()]
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_member_has_its_own_optimizer():
    model, _ = sequential()
    model.compile(keras.optimizers.Adam(0.02, beta_1=0.5), "mse")
    member = build_member(model, random_weights(model, 1))
    assert member.optimizer is not model.optimizer
    assert isinstance(member.optimizer, keras.optimizers.Adam)
    assert float(member.optimizer.learning_rate) == pytest.approx(0.02)
    assert member.optimizer.beta_1 == 0.5


def test_members_have_their_own_metrics(tmp_path):
    model, x = sequential()
    metric = keras.metrics.MeanAbsoluteError()
    model.compile("sgd", "mse", metrics=[metric])
    ens, _ = ensemble_from_files(model, tmp_path)
    y = np.ones((len(x), 3))
    model.evaluate(x, y, verbose=0)
    before = float(metric.result())
    ens.evaluate(x, y, verbose=0)
    ens[0].evaluate(x, y, verbose=0)
    assert float(metric.result()) == before


class Demanding(keras.metrics.Mean):
    """Cannot be created from its config, which lacks `function`."""

    def __init__(self, function, name="demanding"):
        super().__init__(name=name)
        self.function = function

    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(self.function(y_pred))


def test_a_metric_without_a_config_is_copied_and_not_changed(tmp_path):
    model, x = sequential()
    metric = Demanding(ops.max)
    model.compile("sgd", "mse", metrics=[metric])
    ens, _ = ensemble_from_files(model, tmp_path)
    y = np.ones((len(x), 3))
    model.evaluate(x, y, verbose=0)
    before = float(metric.result())
    actual = ens.evaluate(x, y, verbose=0, return_dict=True)["demanding"]
    assert actual == pytest.approx(ens.predict(x, verbose=0).max(), rel=1e-5)
    assert float(metric.result()) == before


# Blank members


@keras.saving.register_keras_serializable("tests")
class WithTable(layers.Layer):
    """Has randomly initialised weights, and constants that are not random."""

    def build(self, shape):
        self.drawn = self.add_weight(shape=(shape[-1], 2))
        self.normal = self.add_weight(shape=(2,), initializer="random_normal")
        table = keras.initializers.Constant(np.arange(2.0))
        self.table = self.add_weight(shape=(2,), initializer=table, trainable=False)
        self.ones = self.add_weight(shape=(2,), initializer="ones")

    def call(self, inputs):
        return (inputs @ self.drawn) * self.normal * self.ones + self.table


def test_a_blank_member_draws_no_random_weights():
    model = keras.Sequential([keras.Input((3,)), WithTable(), layers.LayerNormalization()])
    model.compile("sgd", "mse")
    member = clone_of(model)
    drawn, normal, ones, table, *normed = member.get_weights()
    assert not drawn.any()
    assert not normal.any()
    np.testing.assert_array_equal(table, [0, 1])
    for actual, expected in zip([ones, *normed], [1, 1, 0], strict=True):
        np.testing.assert_array_equal(actual, np.full(2, expected))
    # Layers that are built afterwards are initialised randomly again.
    fresh = layers.Dense(4)
    fresh.build((None, 3))
    assert fresh.kernel.numpy().any()
