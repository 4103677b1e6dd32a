"""Members are right where a config loses something, as in Keras's neural decision trees."""

import keras
import numpy as np
import pytest
from keras import layers
from models import compiled, ensemble_of

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.inference.cloning import Member

X = np.random.default_rng(0).normal(size=(12, 6)).astype("float32")


@keras.saving.register_keras_serializable("test_rebuilt_members")
class RandomMask(layers.Layer):
    """Draws a constant in its constructor, as the example draws the features of a tree."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.mask = 3 * np.random.default_rng().random(6).astype("float32")

    def call(self, inputs):
        return inputs * self.mask


@keras.saving.register_keras_serializable("test_rebuilt_members")
class Tuned(layers.Layer):
    """Has an attribute that is changed after construction."""

    gain = 1.0

    def call(self, inputs):
        return inputs * self.gain


def tuned():
    layer = Tuned()
    layer.gain = 4.0
    return layer


LAYERS = {"a random mask": RandomMask, "a changed attribute": tuned}


@pytest.fixture(params=LAYERS)
def case(request):
    """An ensemble, and each member's outputs as the model gives them with its weights."""
    inside = LAYERS[request.param]()
    model = compiled(keras.Sequential([keras.Input((6,)), inside, layers.Dense(3)]), "mse")
    ens = ensemble_of(model, 3)
    own, expected = model.get_weights(), []
    for member in ens:
        model.set_weights(member.get_weights())
        expected.append(model.predict(X, verbose=0))
    model.set_weights(own)
    return ens, np.stack(expected)


def test_members_give_the_models_outputs(case):
    ens, expected = case
    for member, outputs in zip(ens, expected, strict=True):
        np.testing.assert_allclose(member.predict(X, verbose=0), outputs, atol=1e-5)


def test_so_do_members_one_after_another_and_the_mean_of_weights(case):
    ens, expected = case
    ens.memory_limit = 0
    np.testing.assert_allclose(ens.predict(X, verbose=0), expected.mean(axis=0), atol=1e-5)
    # Up to the last layer nothing is trained, so the mean of weights is the mean of outputs.
    averaged = ens.average_weights()
    np.testing.assert_allclose(averaged.predict(X, verbose=0), expected.mean(axis=0), atol=1e-5)


def test_and_members_that_were_loaded(case, tmp_path):
    ens, expected = case
    with pytest.warns(UserWarning, match="The saved copy of the model cannot be used"):
        ens.save(tmp_path / "saved")
    loaded = SnapshotEnsemble.load(tmp_path / "saved", model=ens.model)
    np.testing.assert_allclose(loaded[1].predict(X, verbose=0), expected[1], atol=1e-5)


def test_a_clone_that_is_right_is_used():
    model = compiled(keras.Sequential([keras.Input((6,)), layers.Dense(3)]), "mse")
    assert not any(isinstance(member, Member) for member in ensemble_of(model, 2))


@keras.saving.register_keras_serializable("test_rebuilt_members")
class Endpoint(RandomMask):
    """Adds a loss, as endpoint layers do that get the targets."""

    def call(self, inputs):
        self.add_loss(keras.ops.mean(keras.ops.square(inputs)))
        return super().call(inputs)


def test_members_add_the_losses_of_layers_and_the_penalties_of_weights():
    last = layers.Dense(3, kernel_regularizer="l2", activity_regularizer="l1")
    model = compiled(keras.Sequential([keras.Input((6,)), Endpoint(), last]), "mse")
    y = np.ones((12, 3), "float32")
    for member in ensemble_of(model, 2):
        assert isinstance(member, Member)
        model.set_weights(member.get_weights())
        scores = member.evaluate(X, y, verbose=0)
        np.testing.assert_allclose(scores, model.evaluate(X, y, verbose=0), rtol=1e-5)
        outputs, kernel = member.predict(X, verbose=0), last.get_weights()[0]
        penalties = 0.01 * (np.square(kernel).sum() + np.abs(outputs).sum() / len(X))
        loss = np.square(outputs - y).mean() + np.square(X).mean() + penalties
        np.testing.assert_allclose(np.ravel(scores)[0], loss, rtol=1e-5)


def test_a_members_own_steps_are_not_passed_over():
    class OwnStep(keras.Sequential):
        def test_step(self, data):
            return {"own": 1.0}

    y = np.ones((12, 3), "float32")
    layers_of = [keras.Input((6,)), RandomMask(), layers.Dense(3)]
    model = compiled(OwnStep(layers_of), "mse")
    member = ensemble_of(model, 2)[0]
    assert isinstance(member, Member)
    with pytest.raises(ValueError, match=r"own `test_step`.*`model.set_weights\(ens\[k\]"):
        member.evaluate(X, y, verbose=0)
    member.fit(X, y, verbose=0)
