"""Layers that save something else than their variables: members are kept bit for bit anyway."""

import keras
import numpy as np
import pytest
from models import SimulatedCrashError, assert_same, member_weights
from storage_cases import X, Y, weight_files

from snapshot_ensemble import SnapshotEnsemble

layers = keras.layers


@keras.saving.register_keras_serializable("test_own_saving")
class Scaled(layers.Dense):
    """Saves its variables divided by three, which rounds them, and multiplies what it loads."""

    def save_own_variables(self, store):
        for index, variable in enumerate(self.weights):
            store[str(index)] = variable.numpy() / np.float32(3)

    def load_own_variables(self, store):
        for index, variable in enumerate(self.weights):
            variable.assign(np.asarray(store[str(index)]) * np.float32(3))


def lora(*inner, shape=(4,), dtype="float32"):
    """A classifier all of whose inner layers are adapted by LoRA."""
    model = keras.Sequential(
        [keras.Input(shape, dtype=dtype), *inner, layers.Flatten(), layers.Dense(3, "softmax")]
    )
    for layer in inner:
        layer.enable_lora(2)
    return model


def quantized():
    model = lora(layers.Dense(16, "tanh"))
    model.layers[0].quantize("int8")
    return model


def scaled():
    return keras.Sequential([keras.Input((4,)), Scaled(8, "tanh"), layers.Dense(3, "softmax")])


MODELS = {
    "Dense": lambda: lora(layers.Dense(16, "tanh"), layers.Dense(16, "tanh")),
    "frozen share": lambda: lora(layers.Dense(64, "tanh"), layers.Dense(64, "tanh")),
    "EinsumDense": lambda: lora(layers.EinsumDense("bi,ij->bj", 8, "tanh")),
    "Embedding": lambda: lora(layers.Embedding(5, 4), dtype="int32"),
    "Conv1D": lambda: lora(layers.Conv1D(3, 2), shape=(4, 1)),
    "int8": quantized,
    "scaled": scaled,
}


def ensemble(name, directory):
    keras.utils.set_random_seed(3)
    model = MODELS[name]()
    model.compile(keras.optimizers.Adam(0.05), "sparse_categorical_crossentropy", run_eagerly=True)
    return SnapshotEnsemble(model, cycles=3, directory=directory)


def fit(ens, **arguments):
    keras.utils.set_random_seed(5)
    x = np.abs(X.astype("int32")) if "int" in str(ens.model.inputs[0].dtype) else X
    x = x[:, :, None] if len(ens.model.inputs[0].shape) == 3 else x
    ens.fit(x, Y, epochs=3, batch_size=16, verbose=0, **arguments)
    return x


def crash_in_the_last_epoch(epoch, logs):
    if epoch == 2:
        raise SimulatedCrashError


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_is_what_is_loaded(name, tmp_path):
    expected = ensemble(name, None)
    x = fit(expected)
    kept = member_weights(expected)
    outputs = expected.predict_members(x, verbose=0)

    # Written as training goes, through a crash.
    crash = keras.callbacks.LambdaCallback(on_epoch_begin=crash_in_the_last_epoch)
    with pytest.raises(SimulatedCrashError):
        fit(ensemble(name, tmp_path / "run"), callbacks=[crash])
    resumed = ensemble(name, tmp_path / "run")
    fit(resumed, resume=True)
    assert_same(member_weights(resumed), kept)
    assert_same(resumed.model.get_weights(), expected.model.get_weights())

    expected.save(tmp_path / "saved")
    for directory in (tmp_path / "run", tmp_path / "saved"):
        given = ensemble(name, None).model
        assert_same(member_weights(SnapshotEnsemble.load(directory, model=given)), kept)
        loaded = SnapshotEnsemble.load(directory)
        assert_same(member_weights(loaded), kept)
        np.testing.assert_array_equal(loaded.predict_members(x, verbose=0), outputs)


def test_plain_layers_are_kept_in_files_of_keras(tmp_path):
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    ens = SnapshotEnsemble(model, cycles=2, lr_init=0.1)
    fit(ens)
    ens.save(tmp_path / "saved")
    assert all(path.name.endswith(".weights.h5") for path in weight_files(tmp_path / "saved"))
