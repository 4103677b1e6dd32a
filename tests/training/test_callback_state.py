"""The state of callbacks: what is kept of Keras's own, and what a user's may hold."""

import collections
import math
import re

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SimulatedCrashError
from resume_cases import crash_in_epoch, run

from snapshot_ensemble import SnapshotEnsembleCallback
from snapshot_ensemble.training.callback_state import (
    DEEPEST,
    check_states,
    pack,
    restore,
    restorers,
    states_of,
    unpack,
)

callbacks = keras.callbacks


class Holding(callbacks.Callback):
    """A callback with a state."""

    def __init__(self, state=None):
        super().__init__()
        self.state = state

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state


def dense():
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])


def restored(source, target, model=None):
    """Restores a callback to the state of another."""
    arrays = {}
    states = states_of([source], arrays)
    for callback, state in restorers(model, [target], states, arrays):
        restore(callback, state)
    return target


# Keras's own callbacks


def test_what_the_user_sets_is_not_restored():
    one = callbacks.EarlyStopping("val_loss", patience=2, min_delta=0.5, mode="min", verbose=1)
    one.wait, one.best, one.best_epoch, one.stopped_epoch = 2, 0.25, 7, 9
    other = callbacks.EarlyStopping("loss", patience=9, mode="max")
    restored(one, other)
    assert (other.wait, other.best, other.best_epoch, other.stopped_epoch) == (2, 0.25, 7, 9)
    assert (other.monitor, other.patience, other.min_delta, other.mode) == ("loss", 9, 0, "max")
    assert other.monitor_op is None


def test_the_best_weights_are_restored():
    model, source = dense(), callbacks.EarlyStopping(restore_best_weights=True)
    source.best_weights = [array + 1 for array in model.get_weights()]
    target = restored(source, callbacks.EarlyStopping(), model)
    np.testing.assert_equal(target.best_weights, source.best_weights)


def test_a_checkpoint_is_written_where_it_was_constructed_to(tmp_path):
    one = callbacks.ModelCheckpoint(tmp_path / "old.keras", save_freq=5)
    one.best, one._last_batch_seen, one._batches_seen_since_last_saving = 0.5, 3, 4
    other = restored(one, callbacks.ModelCheckpoint(tmp_path / "new.keras", save_freq=5))
    assert other.filepath == str(tmp_path / "new.keras")
    assert (other.best, other._last_batch_seen) == (0.5, 3)
    assert other._batches_seen_since_last_saving == 4


@pytest.mark.parametrize(
    ("make", "changed"),
    [
        (callbacks.ReduceLROnPlateau, {"best": 0.5, "wait": 2, "cooldown_counter": 3}),
        (callbacks.SwapEMAWeights, {"_ema_weights_in_model": True}),
        (
            lambda: callbacks.TensorBoard("logs"),
            {"_global_train_batch": 5, "_global_test_batch": 6},
        ),
        (lambda: callbacks.CSVLogger("log.csv"), {"keys": ["loss"]}),
        (callbacks.EarlyStopping, {"best": np.float32(0.5)}),
    ],
)
def test_what_training_changes_is_restored(make, changed):
    source = make()
    vars(source).update(changed)
    target = restored(source, make())
    assert {name: getattr(target, name) for name in changed} == changed


@pytest.mark.parametrize(
    "state",
    [
        {"wait": "x"},
        {"wait": -1},
        {"wait": 2**70},
        {"best": []},
        {"best_weights": [1]},
        {"best_weights": {"array": "missing"}},
        {"best_weights": [{"array": "missing"}]},
    ],
)
def test_a_state_of_the_wrong_type_is_refused(state):
    target = callbacks.EarlyStopping()
    before = dict(vars(target))
    with pytest.raises((ValueError, KeyError)):
        restorers(dense(), [target], [["EarlyStopping", {"dict": state}]], {})
    assert vars(target) == before


def test_best_weights_of_another_model_are_refused():
    arrays = {"a": np.zeros((3, 1), "float32"), "b": np.zeros(1, "float32")}
    state = {"dict": {"best_weights": [{"array": "a"}, {"array": "b"}]}}
    with pytest.raises(ValueError, match="`best_weights` are those of another model"):
        restorers(dense(), [callbacks.EarlyStopping()], [["EarlyStopping", state]], arrays)


def test_a_state_as_older_versions_wrote_it_is_read():
    state = {"monitor": "x", "patience": 1, "wait": 2, "best": "inf", "min_delta": -0.5}
    state["monitor_op"] = {"operation": "less"}
    target = callbacks.EarlyStopping("loss", patience=7)
    for callback, values in restorers(dense(), [target], [["EarlyStopping", {"dict": state}]], {}):
        restore(callback, values)
    assert (target.monitor, target.patience, target.min_delta) == ("loss", 7, 0)
    assert (target.wait, target.best, target.monitor_op) == (2, math.inf, None)


def test_a_callback_of_another_class_is_left_alone():
    target = callbacks.EarlyStopping()
    assert restorers(dense(), [target], [["ModelCheckpoint", {"dict": {"best": 1.0}}]], {}) == []


# Users' callbacks

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.builds(np.float32, st.floats(width=32))
    | st.builds(np.int64, st.integers(-(2**63), 2**63 - 1))
)
keys = st.integers() | st.text(max_size=3) | st.tuples(st.integers(), st.booleans())
values = st.recursive(
    scalars | st.builds(lambda size: np.arange(size, dtype="int16"), st.integers(0, 4)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
        | st.sets(keys, max_size=3)
        | st.frozensets(keys, max_size=3)
    ),
    max_leaves=8,
)


def same(one, other):
    """Whether two values and their types are equal, with NaN equal to itself."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return one == other or (one != one and other != other)  # noqa: PLR0124  NaN


@settings(deadline=None, database=None, max_examples=100)
@given(values)
def test_a_users_state_is_restored_with_its_types(value):
    assert same(restored(Holding(value), Holding()).state, value)


@pytest.mark.parametrize("value", [keras.ops.convert_to_numpy(keras.ops.ones(2, "bfloat16"))])
def test_an_array_of_bfloat16_is_restored(value):
    arrays = {}
    packed = pack(value, arrays)
    (name,) = arrays
    bits = {name: arrays[name].view("uint16")}  # As it is in the file.
    assert same(unpack(packed, bits), value)


def test_an_array_is_copied_when_the_state_is_taken():
    value, arrays = np.zeros(2), {}
    packed = pack({"a_b": value, "a": {"b": value + 1}}, arrays)
    value += 5
    assert same(unpack(packed, arrays), {"a_b": np.zeros(2), "a": {"b": np.ones(2)}})


class Point(collections.namedtuple("Point", "x y")):
    pass


def endless():
    value = []
    value.append(value)
    return value


def nested(levels):
    value = 0
    for _ in range(levels):
        value = (value,)
    return value


REFUSED = {
    "an array of objects": (np.asarray([None]), "an array of dtype object"),
    "a structured array": (np.zeros(1, [("a", "i4")]), "an array of dtype [('a', '<i4')]"),
    "an object": (object(), "a value of type builtins.object"),
    "a named tuple": (Point(1, 2), "Point"),
    "a default dict": (collections.defaultdict(int), "type collections.defaultdict"),
    "a tensor": (keras.ops.ones(2), "a value of type tensorflow."),
    "a complex number": (1j, "a value of type builtins.complex"),
    "a list that holds itself": (endless(), f"nested more than {DEEPEST} levels deep"),
    "deep tuples": (nested(DEEPEST + 1), f"tuple nested more than {DEEPEST} levels deep"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_restored_is_refused_by_class_and_type(case):
    value, message = REFUSED[case]
    with pytest.raises(TypeError, match=r"cannot be saved. Received: Holding\.get_state\(\) with"):
        check_states([Holding([value])])
    with pytest.raises(TypeError, match=re.escape(message)):
        check_states([Holding({"x": value})])


def test_the_deepest_state_is_accepted():
    check_states([Holding(nested(DEEPEST))])


def test_a_state_that_is_not_there_before_training_is_not_checked():
    class Late(Holding):
        def get_state(self):
            return {"x": self.set_in_training}

    check_states([Late()])


def test_a_run_is_refused_before_it_begins_and_leaves_nothing(tmp_path):
    epochs = []
    look = callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: epochs.append(epoch))
    with pytest.raises(TypeError, match=r"Holding\.get_state\(\) with a value of type .*object"):
        run(tmp_path / "run", callbacks=[look, Holding(object())])
    assert epochs == []
    assert not (tmp_path / "run").exists()


def test_without_a_saved_state_anything_goes(tmp_path):
    run(tmp_path / "run", callbacks=[Holding(object())], epochs=3, save_every=None)


@pytest.mark.slow
def test_a_changed_patience_counts_in_a_resumed_run(tmp_path):
    def stopping(patience):
        return callbacks.EarlyStopping("loss", patience=patience, min_delta=100.0)

    with pytest.raises(SimulatedCrashError):
        run(tmp_path / "run", callbacks=[stopping(5), crash_in_epoch(2)])
    stop = stopping(3)
    _, history = run(tmp_path / "run", callbacks=[stop], resume=True)
    assert (stop.patience, stop.stopped_epoch, len(history.epoch)) == (3, 3, 4)


def test_the_callback_of_version_1_is_refused_by_name():
    with pytest.raises(ValueError, match="Received: callbacks with SnapshotEnsembleCallback"):
        run(None, callbacks=[SnapshotEnsembleCallback()])
