"""What a snapshot is, how weight files are read, and how memory keeps snapshots."""

import dataclasses
import pathlib

import h5py
import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshot_ensemble import Snapshot, SnapshotError
from snapshot_ensemble.storage.snapshot import MemoryStore, load_weights, weights_only


class BreakOffError(Exception):
    pass


class Stub:
    """What a store asks of a model, with one weight to tell snapshots by."""

    def __init__(self, value=0.0):
        self.value = value

    def get_weights(self):
        return [np.full(2, self.value)]


def kept(store):
    """The values that a store of `Stub` weights holds, oldest first."""
    return [store.weights(None, i)[0][0] for i in range(len(store.snapshots))]


def assert_equal_arrays(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        np.testing.assert_array_equal(one, other)


def dense_model(units=(8, 3), batch_normalization=False):
    model = keras.Sequential([keras.Input((4,))])
    for width in units[:-1]:
        model.add(keras.layers.Dense(width, "relu"))
        if batch_normalization:
            model.add(keras.layers.BatchNormalization())
    model.add(keras.layers.Dense(units[-1], "softmax"))
    # Eager: a few steps of a small model are done before a graph would be traced.
    model.compile("adam", "sparse_categorical_crossentropy", run_eagerly=True)
    return model


# Snapshot


def test_only_the_index_of_a_snapshot_must_be_known():
    assert dataclasses.asdict(Snapshot(3)) == {
        "index": 3,
        "cycle": None,
        "epoch": None,
        "step": None,
        "learning_rate": None,
        "metrics": {},
    }


def test_a_snapshot_is_frozen():
    for field in dataclasses.fields(Snapshot):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(Snapshot(0), field.name, 1)


def test_snapshots_share_no_default_metrics():
    first, second = Snapshot(0), Snapshot(1)
    first.metrics["loss"] = 1.0
    assert second.metrics == {}


# MemoryStore


def test_a_new_store_is_empty():
    assert MemoryStore().snapshots == []


def test_kept_weights_are_those_of_the_moment(model, data):
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    store = MemoryStore()
    before = [variable.numpy().copy() for variable in model.weights]
    store.add(model, Snapshot(0))
    model.fit(*data, verbose=0)
    assert_equal_arrays(store.weights(model, 0), before)
    assert any(
        not np.array_equal(old, new.numpy()) for old, new in zip(before, model.weights, strict=True)
    )


def test_kept_weights_come_in_the_order_of_the_models(model):
    store = MemoryStore()
    store.add(model, Snapshot(0))
    shapes = [tuple(variable.shape) for variable in model.weights]
    assert [array.shape for array in store.weights(model, 0)] == shapes


def test_what_is_known_of_a_snapshot_is_kept_with_it():
    store = MemoryStore()
    snapshot = Snapshot(0, cycle=4, epoch=9, step=70, learning_rate=0.1, metrics={"loss": 2.0})
    store.add(Stub(), snapshot)
    assert store.snapshots == [snapshot]


def test_frozen_arrays_are_held_once(data):
    model = dense_model()
    model.layers[0].trainable = False
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    store = MemoryStore()
    for i in range(3):
        store.add(model, Snapshot(i))
        model.fit(*data, verbose=0)
    first, *others = [dict(zip("kbKB", store.weights(model, i), strict=True)) for i in range(3)]
    for other in others:
        assert other["k"] is first["k"]
        assert other["b"] is first["b"]
        assert other["K"] is not first["K"]
        assert not np.array_equal(other["K"], first["K"])


def test_an_array_that_changed_and_came_back_is_right():
    store = MemoryStore()
    for value in (1, 2, 1):
        store.add(Stub(value), Snapshot(0))
    assert kept(store) == [1, 2, 1]


def test_arrays_with_nan_are_kept():
    store = MemoryStore()
    for value in (1, np.nan, np.nan):
        store.add(Stub(value), Snapshot(0))
    np.testing.assert_array_equal(kept(store), [1, np.nan, np.nan])


def test_keep_newest_renumbers():
    store = MemoryStore()
    for i in range(5):
        store.add(Stub(i), Snapshot(i, cycle=10 + i))
    store.keep_newest(2)
    assert [(s.index, s.cycle) for s in store.snapshots] == [(0, 13), (1, 14)]
    assert kept(store) == [3, 4]


def test_keep_newest_of_fewer_changes_nothing():
    store = MemoryStore()
    store.add(Stub(1), Snapshot(0))
    store.keep_newest(5)
    assert kept(store) == [1]


def test_a_restart_replaces_when_something_is_added():
    store = MemoryStore()
    for i in range(3):
        store.add(Stub(i), Snapshot(i))
    store.restart()
    assert kept(store) == [0, 1, 2]
    store.add(Stub(7), Snapshot(3))
    assert kept(store) == [7]
    assert store.snapshots == [Snapshot(0)]
    store.add(Stub(8), Snapshot(1))
    assert kept(store) == [7, 8]


def test_a_restart_may_be_taken_back():
    store = MemoryStore()
    store.add(Stub(1), Snapshot(0))
    store.restart()
    store.restart(False)
    store.add(Stub(2), Snapshot(1))
    assert kept(store) == [1, 2]


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(0, 2)),
            st.tuples(st.just("keep"), st.integers(1, 4)),
            st.tuples(st.just("restart"), st.booleans()),
        )
    )
)
def test_a_store_is_a_list(operations):
    store, expected, restarting = MemoryStore(), [], False
    for number, (operation, value) in enumerate(operations):
        if operation == "add":
            store.add(Stub(value), Snapshot(99, cycle=number))
            expected = ([] if restarting else expected) + [(value, number)]
            restarting = False
        elif operation == "keep":
            store.keep_newest(value)
            expected = expected[-value:]
        else:
            store.restart(value)
            restarting = value
        assert kept(store) == [value for value, _ in expected]
        assert [s.cycle for s in store.snapshots] == [cycle for _, cycle in expected]
        assert [s.index for s in store.snapshots] == list(range(len(expected)))


# Hiding the optimizer


@pytest.mark.parametrize("broken", [False, True])
def test_the_optimizer_is_hidden_for_a_moment_only(model, broken):
    optimizer = model.optimizer
    try:
        with weights_only(model):
            assert model.optimizer is None
            if broken:
                raise BreakOffError
    except BreakOffError:
        pass
    assert model.optimizer is optimizer


# Reading weight files


def full_state(model):
    """All that reading a file could change."""
    return (
        [variable.numpy().copy() for variable in model.variables],
        [variable.numpy().copy() for variable in model.optimizer.variables],
    )


def assert_untouched(model, optimizer, state):
    assert model.optimizer is optimizer
    variables, slots = full_state(model)
    assert_equal_arrays(variables, state[0])
    assert_equal_arrays(slots, state[1])


@pytest.fixture
def trained(model, data):
    """A model with batch normalisation, dropout and Adam, all with a state of their own."""
    model.compile(keras.optimizers.Adam(0.03), "sparse_categorical_crossentropy", run_eagerly=True)
    model.fit(*data, verbose=0)
    return model


@pytest.fixture(params=["with slots", "without slots"])
def weight_file(request, trained, tmp_path):
    """A file of weights that are not the model's any more."""
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
    assert_equal_arrays(
        load_weights(trained, str(weight_file)), load_weights(trained, pathlib.Path(weight_file))
    )


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
def test_a_file_gives_what_keras_reads(trained, weight_file):
    plain = keras.Sequential.from_config(trained.get_config())
    plain.load_weights(weight_file)
    assert_equal_arrays(load_weights(trained, weight_file), plain.get_weights())


def test_a_file_gives_what_lies_in_it(trained, weight_file):
    with h5py.File(weight_file) as file:
        kernel = file["layers/dense/vars/0"][:]
    np.testing.assert_array_equal(load_weights(trained, weight_file)[0], kernel)


def test_reading_leaves_the_model_as_it_was(trained, weight_file):
    optimizer, state = trained.optimizer, full_state(trained)
    load_weights(trained, weight_file)
    assert_untouched(trained, optimizer, state)
    assert float(trained.optimizer.learning_rate.numpy()) == np.float32(0.03)


def test_what_was_read_does_not_change_with_the_model(trained, weight_file, data):
    read = load_weights(trained, weight_file)
    copies = [array.copy() for array in read]
    trained.fit(*data, verbose=0)
    assert_equal_arrays(read, copies)


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
