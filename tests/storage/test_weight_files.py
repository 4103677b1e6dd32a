"""Writing and reading weight files, and files that are refused."""

import pathlib

import h5py
import keras
import numpy as np
import pytest
from models import assert_same

from snapshot_ensemble import SnapshotError
from snapshot_ensemble.storage.weight_files import load_weights, save_weights


def dense_model(units=(8, 3), batch_normalization=False):
    model = keras.Sequential([keras.Input((4,))])
    for width in units[:-1]:
        model.add(keras.layers.Dense(width, "relu"))
        if batch_normalization:
            model.add(keras.layers.BatchNormalization())
    model.add(keras.layers.Dense(units[-1], "softmax"))
    # Eager, since tracing takes longer than a few steps of a small model.
    model.compile("adam", "sparse_categorical_crossentropy", run_eagerly=True)
    return model


# Writing weight files


def test_a_file_holds_only_weights(tmp_path):
    model = dense_model()
    model.fit(np.ones((4, 4)), np.zeros(4), verbose=0)
    save_weights(model, tmp_path / "alone.weights.h5")
    with h5py.File(tmp_path / "alone.weights.h5") as file:
        arrays = []
        file.visititems(lambda name, item: arrays.append(name) if hasattr(item, "shape") else None)
    assert len(arrays) == len(model.get_weights())
    assert not any("optimizer" in name for name in arrays)


# Reading weight files


def full_state(model):
    """Everything that reading a file could change."""
    return (
        [variable.numpy().copy() for variable in model.variables],
        [variable.numpy().copy() for variable in model.optimizer.variables],
    )


def assert_untouched(model, optimizer, state):
    assert model.optimizer is optimizer
    variables, slots = full_state(model)
    assert_same(variables, state[0])
    assert_same(slots, state[1])


@pytest.fixture
def trained(model, data):
    """A trained model with batch normalisation, dropout and Adam, which all have state."""
    model.compile(keras.optimizers.Adam(0.03), "sparse_categorical_crossentropy", run_eagerly=True)
    model.fit(*data, verbose=0)
    return model


@pytest.fixture(params=["with slots", "without slots"])
def weight_file(request, trained, tmp_path):
    """A file of earlier weights of the model."""
    path = tmp_path / "some.weights.h5"
    source = trained
    if request.param == "without slots":
        source = keras.Sequential.from_config(trained.get_config())  # Not compiled.
        source.set_weights(trained.get_weights())
    source.save_weights(path)
    with h5py.File(path) as file:
        assert ("optimizer" in file) == (source is trained)
    trained.set_weights([array + 1 for array in trained.get_weights()])
    return path


def test_a_file_gives_the_weights_that_were_saved(trained, weight_file):
    for one, other in zip(load_weights(trained, weight_file), trained.get_weights(), strict=True):
        np.testing.assert_allclose(one, other - 1, atol=1e-6)


def test_a_path_may_be_a_string(trained, weight_file):
    assert_same(
        load_weights(trained, str(weight_file)), load_weights(trained, pathlib.Path(weight_file))
    )


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
def test_a_file_gives_what_keras_reads(trained, weight_file):
    plain = keras.Sequential.from_config(trained.get_config())
    plain.load_weights(weight_file)
    assert_same(load_weights(trained, weight_file), plain.get_weights())


def test_a_file_gives_the_arrays_in_it(trained, weight_file):
    with h5py.File(weight_file) as file:
        kernel = file["layers/dense/vars/0"][:]
    np.testing.assert_array_equal(load_weights(trained, weight_file)[0], kernel)


def test_reading_leaves_the_model_as_it_was(trained, weight_file):
    optimizer, state = trained.optimizer, full_state(trained)
    load_weights(trained, weight_file)
    assert_untouched(trained, optimizer, state)
    assert float(trained.optimizer.learning_rate.numpy()) == np.float32(0.03)


def test_arrays_that_were_read_do_not_change_with_the_model(trained, weight_file, data):
    read = load_weights(trained, weight_file)
    copies = [array.copy() for array in read]
    trained.fit(*data, verbose=0)
    assert_same(read, copies)


def refused(model, path):
    """Asserts that a file is refused by name, and the model left as it was."""
    optimizer, state = model.optimizer, full_state(model)
    with pytest.raises(SnapshotError, match=path.name):
        load_weights(model, path)
    assert_untouched(model, optimizer, state)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"units": (9, 3)}, id="wider"),
        pytest.param({"units": (8, 4)}, id="more classes: fits up to the last layer"),
        pytest.param({"units": (8, 8, 3)}, id="deeper"),
        pytest.param({"units": (3,)}, id="shallower"),
        pytest.param({"units": (8, 3), "batch_normalization": True}, id="one more kind of layer"),
    ],
)
def test_a_file_of_another_architecture_is_refused(tmp_path, other):
    path = tmp_path / "other.weights.h5"
    dense_model(**other).save_weights(path)
    refused(dense_model(), path)


def test_a_file_with_fewer_layers_is_refused(tmp_path):
    path = tmp_path / "fewer.weights.h5"
    dense_model().save_weights(path)
    refused(dense_model(batch_normalization=True), path)


def test_a_missing_file_is_refused(model, tmp_path):
    refused(model, tmp_path / "missing.weights.h5")


def test_a_directory_is_refused(model, tmp_path):
    path = tmp_path / "folder.weights.h5"
    path.mkdir()
    refused(model, path)


@pytest.mark.parametrize("ending", [".weights.h5", ".h5", ".keras", ".weights.json", ".txt"])
def test_garbage_is_refused(model, tmp_path, ending):
    path = tmp_path / f"garbage{ending}"
    for content in (b"no weights at all" * 100, b"", b"\0" * 5000):
        path.write_bytes(content)
        refused(model, path)


def test_a_truncated_file_is_refused(model, tmp_path):
    path = tmp_path / "torn.weights.h5"
    model.save_weights(path)
    content = path.read_bytes()
    for length in np.linspace(0, len(content) - 1, 20, dtype=int):
        path.write_bytes(content[:length])
        refused(model, path)


@pytest.mark.parametrize("part", [b"TREE", b"HEAP", b"SNOD"])
def test_a_file_damaged_inside_is_refused(model, tmp_path, part):
    path = tmp_path / "damaged.weights.h5"
    model.save_weights(path)
    content = path.read_bytes()
    assert part in content
    path.write_bytes(content.replace(part, b"\0\0\0\0"))
    refused(model, path)


def test_an_hdf5_file_of_something_else_is_refused(model, tmp_path):
    path = tmp_path / "table.weights.h5"
    with h5py.File(path, "w") as file:
        file["temperatures"] = np.arange(3)
    refused(model, path)
