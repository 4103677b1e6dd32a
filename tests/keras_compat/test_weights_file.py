"""Contract tests for Keras's private writer of weight files."""

import h5py
import keras
import numpy as np
import pytest

from snapshot_ensemble.keras_compat.weights_file import weights_file


def model_with(optimizer=None):
    keras.utils.set_random_seed(0)
    backbone = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, name="a")], name="inner")
    model = keras.Sequential([keras.Input((3,)), backbone, keras.layers.Dense(2, name="b")])
    if optimizer:
        for one in (backbone, model):
            one.compile(optimizer(), "mse")
            one.fit(np.ones((4, 3)), np.ones((4, one.output_shape[-1])), verbose=0)
    return model


def arrays(file):
    found = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            found[name] = item[...]

    with h5py.File(file) as opened:
        opened.visititems(visit)
    return found


def test_it_is_the_file_of_the_same_model_without_optimizers(tmp_path):
    model = model_with(keras.optimizers.Adam)
    plain = model_with()
    plain.set_weights(model.get_weights())
    plain.save_weights(tmp_path / "plain.weights.h5")
    actual, expected = arrays(weights_file(model)), arrays(tmp_path / "plain.weights.h5")
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_keras_loads_it(tmp_path, dtype):
    def make():
        return keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, dtype=dtype)])

    model, other = make(), make()
    (tmp_path / "file.weights.h5").write_bytes(weights_file(model).getvalue())
    other.load_weights(tmp_path / "file.weights.h5")
    for one, two in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(np.asarray(one, "float32"), np.asarray(two, "float32"))


def test_the_model_keeps_its_optimizer():
    model = model_with(keras.optimizers.Adam)
    before = model.optimizer
    weights_file(model)
    assert model.optimizer is before
