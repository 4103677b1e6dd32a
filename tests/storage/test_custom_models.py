"""Models that Keras alone cannot save or load: subclasses, lambdas, custom layers."""

import pathlib

import keras
import numpy as np
import pytest
from models import assert_same, classifier, member_weights
from storage_cases import MANIFEST, X, file_entries, fitted, load_and_use, manifest_of

from snapshot_ensemble import SnapshotEnsemble, SnapshotError


class NoConfig(keras.Model):
    """A subclassed model that Keras cannot recreate from a file."""

    def __init__(self, something):
        super().__init__()
        self.dense = keras.layers.Dense(3, "softmax")
        self.something = something

    def call(self, inputs):
        return self.dense(inputs)


def no_config(optimizer="sgd"):
    model = NoConfig(open)
    model.compile(optimizer, "sparse_categorical_crossentropy", run_eagerly=True)
    model(X[:1])
    return model


@pytest.fixture
def without_model(tmp_path):
    """An ensemble whose directory has snapshots but no model."""
    with pytest.warns(UserWarning, match=r"cannot be saved, only its snapshots.*(?s:.)*`model=`"):
        return fitted(tmp_path / "ensemble", model=no_config())


def test_a_model_that_cannot_be_saved_is_needed_for_loading(without_model):
    with pytest.raises(SnapshotError, match=rf"{MANIFEST}.*could not be saved.*`model=`"):
        SnapshotEnsemble.load(without_model.directory)


def test_a_model_that_cannot_be_saved_may_be_given(without_model):
    model = no_config()
    optimizer, own = model.optimizer, model.get_weights()
    loaded = SnapshotEnsemble.load(without_model.directory, model=model)
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), without_model.predict(X, verbose=0))
    assert loaded.model is model
    assert model.optimizer is optimizer
    assert_same(model.get_weights(), own)


def test_save_warns_of_a_model_that_cannot_be_saved(tmp_path):
    ens = fitted(model=no_config())
    with pytest.warns(UserWarning, match="cannot be saved, only its snapshots"):
        ens.save(tmp_path / "ensemble")
    loaded = SnapshotEnsemble.load(tmp_path / "ensemble", model=no_config())
    assert_same(member_weights(loaded), member_weights(ens))


def test_a_given_model_must_be_compiled(made):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax")])
    with pytest.raises(ValueError, match="must be compiled"):
        SnapshotEnsemble.load(made.directory, model=model)


def test_a_given_model_must_be_built(without_model):
    model = NoConfig(open)
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    with pytest.raises((ValueError, SnapshotError), match="built"):
        load_and_use(without_model.directory, model=model)


def test_a_lambda_as_loss_needs_the_model_for_loading(tmp_path):
    def with_lambda():
        return classifier(loss=lambda y, p: keras.ops.sum((keras.ops.one_hot(y, 3) - p) ** 2, -1))

    with pytest.warns(UserWarning, match="lambda"):
        ens = fitted(tmp_path / "ensemble", model=with_lambda())
    with pytest.raises(SnapshotError, match=r"(?s)\.keras'.*cannot be loaded.*`model=`"):
        SnapshotEnsemble.load(ens.directory)
    loaded = SnapshotEnsemble.load(ens.directory, model=with_lambda())
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), ens.predict(X, verbose=0))


class Scale(keras.layers.Layer):
    def build(self, shape):
        self.factor = self.add_weight(shape=shape[1:], initializer="ones")

    def call(self, inputs):
        return self.factor * inputs


def test_a_custom_layer_is_looked_up_in_custom_objects(tmp_path):
    ens = fitted(tmp_path / "ensemble", model=classifier(inside=[Scale()]))
    with pytest.raises(
        SnapshotError,
        match=r"^Class 'Scale' is not known\. Pass `custom_objects=.*`model=`.*\.keras'",
    ):
        SnapshotEnsemble.load(ens.directory)
    loaded = SnapshotEnsemble.load(ens.directory, custom_objects={"Scale": Scale})
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), ens.predict(X, verbose=0))


def test_code_in_a_file_is_refused_and_not_run(tmp_path):
    marker = str(tmp_path / "was-run")

    def doubled(t):
        __import__("pathlib").Path(marker).touch()
        return 2 * t

    doubled.__name__ = "<lambda>"  # Keras recognises lambdas by this name, and saves their code.
    layer = keras.layers.Lambda(doubled, output_shape=(4,))
    with pytest.warns(UserWarning, match="could not be loaded again.*lambda.*`model=`"):
        ens = fitted(tmp_path / "ensemble", model=classifier(inside=[layer]))
    (entry,) = file_entries(manifest_of(ens.directory)["model"])
    pathlib.Path(marker).unlink()
    with pytest.raises(SnapshotError, match=r"pass it as `model=`: .*lambda.*\.keras'"):
        SnapshotEnsemble.load(ens.directory)
    assert not pathlib.Path(marker).exists()
    # The file does contain code: Keras runs it without safe mode.
    path = ens.directory / entry["name"]
    keras.models.load_model(path, safe_mode=False, compile=False)(X)
    assert pathlib.Path(marker).exists()
