"""How memory keeps snapshots: a list of weights, equal arrays held once."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import assert_same, classifier

from snapshot_ensemble import Snapshot
from snapshot_ensemble.storage.memory import MemoryStore


class Stub:
    """What a store asks of a model, with one weight to tell snapshots by."""

    def __init__(self, value=0.0):
        self.value = value

    @property
    def weights(self):
        return [keras.Variable(np.full(2, self.value))]


def kept(store):
    """The values that a store of `Stub` weights holds, oldest first."""
    return [store.view().weights(None, i)[0][0] for i in range(len(store.snapshots))]


def test_a_new_store_is_empty():
    assert MemoryStore().snapshots == []


def test_kept_weights_are_those_of_the_moment(model, data):
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    store = MemoryStore()
    before = [variable.numpy().copy() for variable in model.weights]
    store.add(model, Snapshot(0))
    model.fit(*data, verbose=0)
    assert_same(store.view().weights(model, 0), before)
    assert any(
        not np.array_equal(old, new.numpy()) for old, new in zip(before, model.weights, strict=True)
    )


def test_kept_weights_come_in_the_order_of_the_models(model):
    store = MemoryStore()
    store.add(model, Snapshot(0))
    shapes = [tuple(variable.shape) for variable in model.weights]
    assert [array.shape for array in store.view().weights(model, 0)] == shapes


def test_what_is_known_of_a_snapshot_is_kept_with_it():
    store = MemoryStore()
    snapshot = Snapshot(0, cycle=4, epoch=9, step=70, learning_rate=0.1, metrics={"loss": 2.0})
    store.add(Stub(), snapshot)
    assert store.snapshots == [snapshot]


def test_frozen_arrays_are_held_once(data):
    model = classifier("adam", [keras.layers.Dense(8, "relu")])
    model.layers[0].trainable = False
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    store = MemoryStore()
    for i in range(3):
        store.add(model, Snapshot(i))
        model.fit(*data, verbose=0)
    view = store.view()
    first, *others = [dict(zip("kbKB", view.weights(model, i), strict=True)) for i in range(3)]
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


def fail(store, *members):
    """A transaction that replaces the members, and then fails."""
    with store.transaction(overwrite=True):
        store.restart()
        for member in members:
            store.add(member, Snapshot(0))
        raise KeyError


def test_a_transaction_that_fails_takes_a_restart_back():
    store = MemoryStore()
    store.add(Stub(1), Snapshot(0))
    with pytest.raises(KeyError):
        fail(store)
    store.add(Stub(2), Snapshot(1))
    assert kept(store) == [1, 2]


def test_a_transaction_that_fails_late_keeps_what_was_added():
    store = MemoryStore()
    store.add(Stub(1), Snapshot(0))
    with pytest.raises(KeyError):
        fail(store, Stub(2))
    assert kept(store) == [2]


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(0, 2)),
            st.tuples(st.just("keep"), st.integers(1, 4)),
            st.tuples(st.just("restart"), st.none()),
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
            store.restart()
            restarting = True
        assert kept(store) == [value for value, _ in expected]
        assert [s.cycle for s in store.snapshots] == [cycle for _, cycle in expected]
        assert [s.index for s in store.snapshots] == list(range(len(expected)))
