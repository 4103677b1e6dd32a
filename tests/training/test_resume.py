"""Runs that break off and go on: the same to the bit, or refused."""

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from snapshot_ensemble import CosineAnnealing, SnapshotEnsemble, SnapshotError
from snapshot_ensemble.storage.directory import DirectoryStore

layers = keras.layers
ROWS = 24
X = np.random.default_rng(0).normal(size=(ROWS, 4)).astype("float32")
Y = np.argmax(X[:, :3], axis=1)


class BreakOffError(Exception):
    pass


def break_off_in(epoch):
    """A callback that raises in an epoch, when a part of it is done."""

    def maybe(batch, logs):
        if callback.now == epoch and batch == 1:
            raise BreakOffError

    def note(epoch, logs):
        callback.now = epoch

    callback = keras.callbacks.LambdaCallback(on_epoch_begin=note, on_train_batch_end=maybe)
    return callback


def dense(optimizer="adam", **arguments):
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(5, "tanh"),
            layers.BatchNormalization(),
            layers.Dropout(0.3),
            layers.Dense(3, "softmax"),
        ]
    )
    # Eager: a few steps of a small model are done before a graph would be traced.
    arguments = {"run_eagerly": True, **arguments}
    model.compile(optimizer, "sparse_categorical_crossentropy", **arguments)
    return model


class Subclass(keras.Model):
    """Not built before the first batch, and without a config; has an optimizer of its own."""

    def __init__(self):
        super().__init__()
        self.dense, self.drop = layers.Dense(3, "softmax"), layers.Dropout(0.5)
        self.other = keras.optimizers.Adam(0.01)
        self.shift = self.add_weight(shape=(4,), name="shift")

    def call(self, inputs, training=False):
        return self.dense(self.drop(inputs + self.shift, training=training))

    def train_step(self, data):
        logs = super().train_step(data)
        self.other.apply([self.shift.value * 0.1 + 1.0], [self.shift])
        # Without a seed, Keras draws from a generator of its own.
        self.shift.assign_add(keras.random.normal((4,)))
        return logs


def subclass():
    model = Subclass()
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    return model


def arrays():
    return {"x": X, "y": Y, "batch_size": 8}


def shuffled():
    data = tf.data.Dataset.from_tensor_slices((X, Y))
    return {"x": data.shuffle(ROWS, seed=3).batch(8), "shuffle": False}


def of_unknown_length():
    data = tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(ROWS, seed=3)
    return {"x": data.filter(lambda x, y: True).batch(8), "shuffle": False}


class Shuffling(keras.utils.PyDataset):
    """Shuffles by Python's and NumPy's generators."""

    def __init__(self):
        super().__init__()
        self.order = list(range(ROWS))

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index == 0:
            self.order = random.sample(range(ROWS), ROWS)
        rows = np.asarray(self.order[8 * index : 8 * index + 8])
        return X[rows] + np.random.normal(size=(8, 4)), Y[rows]  # noqa: NPY002


def python_data():
    return {"x": Shuffling(), "shuffle": False}


class Remembering(keras.callbacks.Callback):
    """A callback of a user's that can give its state, and lets training depend on it."""

    def __init__(self):
        super().__init__()
        self.seen, self.table = 0, np.zeros(2)

    def on_epoch_end(self, epoch, logs=None):
        self.seen += 1
        self.table = self.table + self.seen
        kernel = self.model.weights[0]
        kernel.assign(kernel + 0.001 * self.table[0])

    def get_state(self):
        return {"seen": self.seen, "inner": {"table": self.table, "pair": (1, 2.5)}}

    def set_state(self, state):
        self.seen, self.table = state["seen"], state["inner"]["table"]
        assert state["inner"]["pair"] == [1, 2.5]


def run(directory, make=dense, data=arrays, callbacks=(), epochs=6, **arguments):
    """What a script does from its first line on."""
    keras.utils.set_random_seed(3)
    model = make()
    options = {} if "schedule" in arguments else {"cycles": 3, "lr_init": 0.1}
    for name in ("cycles", "max_snapshots", "schedule", "shrink"):
        if name in arguments:
            options[name] = arguments.pop(name)
    ens = SnapshotEnsemble(model, directory=directory, **options)
    callbacks = [callback() if isinstance(callback, type) else callback for callback in callbacks]
    arguments = {**data(), "verbose": 0, **arguments}
    history = ens.fit(epochs=epochs, callbacks=callbacks, **arguments)
    return ens, history


def outcome(ens, history):
    """All that must be the same."""
    members = [ens._store.weights(ens.model, index) for index in range(len(ens))]
    optimizer = [variable.numpy() for variable in ens.model.optimizer.variables]
    facts = (ens.snapshots, ens.history, history.history, history.epoch)
    return [*members, ens.model.get_weights(), optimizer], facts


def check_same(found, expected):
    for left, right in zip(found[0], expected[0], strict=True):
        for one, other in zip(left, right, strict=True):
            np.testing.assert_array_equal(one, other)
    np.testing.assert_equal(found[1], expected[1])


def patient():
    # It counts epochs in which the loss has not halved.
    return keras.callbacks.EarlyStopping(
        "loss", patience=2, min_delta=0.3, restore_best_weights=True
    )


def ema():
    return dense(keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True, ema_overwrite_frequency=5))


def decaying():
    return dense(keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.9)))


def accumulating():
    return dense(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))


def scaled():
    return dense(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(), 4.0))


def in_graph():
    return dense(run_eagerly=False, steps_per_execution=2)


CASES = {
    "arrays": {},
    "a dataset that shuffles": {"data": shuffled},
    "a dataset of unknown length": {"data": of_unknown_length},
    "a PyDataset that shuffles": {"data": python_data},
    "a subclass": {"make": subclass},
    "moving averages": {"make": ema},
    "a schedule in the optimizer": {"make": decaying},
    "gradient accumulation": {"make": accumulating},
    "loss scaling": {"make": scaled},
    "a graph of two steps": {"make": in_graph},
    "the newest two": {"max_snapshots": 2},
    "growing cycles": {"schedule": CosineAnnealing(2, 2.0, lr_init=0.1, warmup=1)},
    "a callback with a state": {"callbacks": [Remembering]},
    "early stopping": {"callbacks": [patient]},
    "seldom saved": {"save_every": 2, "cycles": 2},
    "not from epoch 0": {"initial_epoch": 2, "epochs": 8},
    "validation": {"validation_data": (X, Y), "validation_freq": 2},
    "half of the weights drawn anew": {"shrink": 0.5},
    "as many as are due": {"shrink": "auto", "validation_data": (X, Y)},
}


EVERY_DAY = {
    "a dataset of unknown length",
    "a subclass",
    "early stopping",
    "half of the weights drawn anew",
}


def unpacked(case):
    case = dict(CASES[case])
    made = [c() for c in case.pop("callbacks", [])]
    return case, made


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in EVERY_DAY else pytest.mark.slow) for case in CASES],
)
def test_a_run_that_broke_off_ends_like_one_that_did_not(tmp_path, case):
    case_arguments, callbacks = unpacked(case)
    expected = outcome(*run(tmp_path / "unbroken", callbacks=callbacks, **case_arguments))
    first = case_arguments.get("initial_epoch", 0)
    for epoch in (1, 3):
        case_arguments, callbacks = unpacked(case)
        broken = [*callbacks, break_off_in(first + epoch)]
        with pytest.raises(BreakOffError):
            run(tmp_path / "broken", callbacks=broken, resume=epoch > 1, **case_arguments)
    case_arguments, callbacks = unpacked(case)
    resumed = run(tmp_path / "broken", callbacks=callbacks, resume=True, **case_arguments)
    check_same(outcome(*resumed), expected)
    loaded = SnapshotEnsemble.load(tmp_path / "broken", model=resumed[0].model)
    assert loaded.snapshots == resumed[0].snapshots
    # And once more, when there is nothing left to do.
    case_arguments, callbacks = unpacked(case)
    again = run(tmp_path / "broken", callbacks=callbacks, resume=True, **case_arguments)
    check_same(outcome(*again), expected)


def test_early_stopping_in_the_cases_does_stop(tmp_path):
    _, history = run(tmp_path / "unbroken", callbacks=[patient()])
    assert 4 <= len(history.epoch) < 6


def test_the_order_of_a_dataset_is_not_the_same_in_each_epoch():
    data = shuffled()["x"]
    orders = [np.concatenate([y for _, y in data]) for _ in range(2)]
    assert not np.array_equal(*orders)


def test_it_goes_on_in_the_same_object_too(tmp_path):
    expected = outcome(*run(tmp_path / "unbroken"))
    keras.utils.set_random_seed(3)
    ens = SnapshotEnsemble(dense(), cycles=3, lr_init=0.1, directory=tmp_path / "broken")
    arguments = {**arrays(), "epochs": 6, "verbose": 0}
    with pytest.raises(BreakOffError):
        ens.fit(**arguments, callbacks=[break_off_in(3)])
    history = ens.fit(**arguments, resume=True)
    check_same(outcome(ens, history), expected)


def test_it_goes_on_after_loading(tmp_path):
    expected = outcome(*run(tmp_path / "unbroken"))
    with pytest.raises(BreakOffError):
        run(tmp_path / "broken", callbacks=[break_off_in(3)])
    ens = SnapshotEnsemble.load(tmp_path / "broken")
    ens.model.run_eagerly = True
    history = ens.fit(**arrays(), epochs=6, verbose=0, resume=True)
    check_same(outcome(ens, history), expected)


def two_runs(directory, callbacks=(), resume=False):
    """A script that trains twice."""
    keras.utils.set_random_seed(3)
    ens = SnapshotEnsemble(dense(), cycles=2, lr_init=0.1, directory=directory)
    data = shuffled()
    for number in range(2):
        given = [c for c in callbacks if number == 1]
        history = ens.fit(**data, epochs=2, verbose=0, resume=resume, callbacks=given)
    return ens, history


def test_a_script_that_trains_twice_goes_on_in_its_second_run(tmp_path):
    expected = outcome(*two_runs(tmp_path / "unbroken"))
    for epoch in (0, 1):
        with pytest.raises(BreakOffError):
            two_runs(tmp_path / "broken", [break_off_in(epoch)], resume=True)
    check_same(outcome(*two_runs(tmp_path / "broken", resume=True)), expected)
    check_same(outcome(*two_runs(tmp_path / "broken", resume=True)), expected)


def test_a_run_that_ended_before_the_last_is_not_run_again(tmp_path):
    two_runs(tmp_path / "ended")
    keras.utils.set_random_seed(3)
    ens = SnapshotEnsemble(dense(), cycles=2, lr_init=0.1, directory=tmp_path / "ended")
    histories = [ens.fit(**shuffled(), epochs=2, verbose=0, resume=True) for _ in range(2)]
    assert [history.epoch for history in histories] == [[0, 1], [0, 1]]
    assert [h.history["cycle"] for h in histories] == [[0, 1], [2, 3]]
    assert histories[0].history["loss"] == ens.history["loss"][:2]
    assert len(ens) == 4


def test_a_fit_without_resume_after_a_break_adds_cycles(tmp_path):
    with pytest.raises(BreakOffError):
        run(tmp_path / "broken", callbacks=[break_off_in(3)])
    ens = SnapshotEnsemble.load(tmp_path / "broken")
    assert len(ens) == 1
    ens.fit(**arrays(), epochs=3, verbose=0)
    assert [snapshot.cycle for snapshot in ens.snapshots] == [0, 1, 2, 3]


def test_an_overwriting_run_that_broke_off_at_once_is_not_taken_for_the_old_one(tmp_path):
    run(tmp_path / "kept", cycles=2, epochs=2)
    expected = outcome(*run(tmp_path / "unbroken"))
    # As if it was killed: nothing puts the directory right.
    script = shutil.copytree(tmp_path / "kept", tmp_path / "copy")
    keras.utils.set_random_seed(3)
    ens = SnapshotEnsemble(dense(), cycles=3, lr_init=0.1, directory=script)

    def look(epoch, logs):
        shutil.copytree(script, tmp_path / "killed", dirs_exist_ok=True)
        raise BreakOffError

    look = keras.callbacks.LambdaCallback(on_epoch_begin=look)
    with pytest.raises(BreakOffError):
        ens.fit(**arrays(), epochs=6, verbose=0, overwrite=True, callbacks=[look])
    assert len(SnapshotEnsemble.load(tmp_path / "killed")) == 2
    check_same(outcome(*run(tmp_path / "killed", resume=True)), expected)


def test_snapshots_ahead_of_the_state_are_made_again(tmp_path, monkeypatch):
    expected = outcome(*run(tmp_path / "unbroken"))
    store = type(SnapshotEnsemble(dense(), directory=tmp_path / "any")._store)
    keep_state = store.keep_state

    def break_off(self, write):
        if len(self.snapshots) == 2:
            raise BreakOffError
        keep_state(self, write)

    monkeypatch.setattr(store, "keep_state", break_off)
    with pytest.raises(BreakOffError):
        run(tmp_path / "broken")
    monkeypatch.undo()
    assert len(SnapshotEnsemble.load(tmp_path / "broken")) == 2
    check_same(outcome(*run(tmp_path / "broken", resume=True)), expected)


def states(directory):
    with contextlib.suppress(SnapshotError):
        DirectoryStore.open(directory)  # Waits for what this process is writing there.
    return sorted(path.name for path in directory.glob("state-*"))


def test_how_often_the_state_is_saved(tmp_path):
    seen = []
    look = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: seen.append(states(tmp_path / "run"))
    )
    run(tmp_path / "run", callbacks=[look], cycles=2, epochs=10, save_every=3)
    # After epochs 3, 5 (the cycle's end), 6 and 9; one file at any time.
    assert [seen[i] != seen[i - 1] for i in range(1, 10)] == [
        e in (3, 5, 6, 9) for e in range(1, 10)
    ]
    assert all(len(names) <= 1 for names in seen)


def test_without_states_there_is_nothing_to_go_on_from(tmp_path):
    with pytest.raises(BreakOffError):
        run(tmp_path / "broken", callbacks=[break_off_in(3)], save_every=None)
    assert states(tmp_path / "broken") == []
    with pytest.raises(ValueError, match=r"no state of training to go on from\. Received: resume"):
        run(tmp_path / "broken", resume=True)
    assert len(SnapshotEnsemble.load(tmp_path / "broken")) == 1


def test_an_ensemble_that_was_saved_holds_no_run(tmp_path):
    keras.utils.set_random_seed(3)
    ens = SnapshotEnsemble(dense(), cycles=2, lr_init=0.1)
    ens.fit(**arrays(), epochs=2, verbose=0)
    ens.save(tmp_path / "saved")
    again = SnapshotEnsemble(dense(), cycles=2, lr_init=0.1, directory=tmp_path / "saved")
    assert again.fit(**arrays(), epochs=2, verbose=0, resume=True).epoch == []
    assert len(again) == 2


def test_the_members_of_a_broken_run_that_were_saved_elsewhere_stay(broken, tmp_path):
    SnapshotEnsemble.load(broken).save(tmp_path / "saved")
    with pytest.raises(ValueError, match="no state of training to go on from"):
        run(tmp_path / "saved", resume=True)
    assert len(SnapshotEnsemble.load(tmp_path / "saved")) == 1


@pytest.fixture(scope="module")
def broken_once(tmp_path_factory):
    directory = tmp_path_factory.mktemp("broken") / "ensemble"
    with pytest.raises(BreakOffError):
        run(directory, callbacks=[break_off_in(3)])
    return directory


@pytest.fixture
def broken(broken_once, tmp_path):
    return shutil.copytree(broken_once, tmp_path / "broken")


def wider():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(6), layers.Dense(3, "softmax")])
    model.compile("adam", "sparse_categorical_crossentropy", run_eagerly=True)
    return model


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"epochs": 9}, r"plan: \[\[0, 1, 0.1, 0.0, 0\].*now \[\[0, 2,"),
        ({"cycles": 2}, "plan: "),
        ({"make": wider}, "layers: "),
        ({"make": lambda: dense("sgd")}, "optimizer: Adam, now SGD"),
        ({"batch_size": 4}, "batch_size: 8, now 4"),
        ({"x": X[:-1], "y": Y[:-1]}, "rows or batches of data: 24, now 23"),
        ({"data": shuffled}, "rows or batches of data: 24, now 3"),
        ({"initial_epoch": 1, "epochs": 7}, "first epoch: 0, now 1"),
    ],
)
def test_another_run_does_not_go_on(broken, other, told):
    before = {path.name: path.read_bytes() for path in broken.iterdir()}
    match = rf"cannot go on as another one\. Received: .*{told}.*`overwrite=True`"
    with pytest.raises(ValueError, match=match):
        run(broken, resume=True, **other)
    assert {path.name: path.read_bytes() for path in broken.iterdir()} == before


@pytest.mark.parametrize(
    ("directory", "arguments", "told"),
    [
        (None, {"resume": True}, "which needs a `directory`. Received: resume=True, overwrite=F"),
        ("some", {"resume": True, "overwrite": True}, "and `overwrite=True` starts anew. Received"),
        ("some", {"save_every": 0}, "`save_every` must be at least 1. Received: save_every=0"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path, directory, arguments, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        run(directory and tmp_path / directory, **arguments)
    assert not (tmp_path / "some").exists()


def test_backup_and_restore_is_refused(tmp_path):
    callback = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(ValueError, match=r"`BackupAndRestore` .*Received: .*`fit\(\.\.\., resume="):
        run(tmp_path / "some", callbacks=[callback])


def test_a_model_that_is_not_built_does_not_go_on_with_an_iterator(tmp_path):
    def endless():
        while True:
            yield X[:8], Y[:8]

    def data():
        return {"x": endless(), "steps_per_epoch": 3, "shuffle": False}

    with pytest.raises(BreakOffError):
        run(tmp_path / "broken", subclass, data, callbacks=[break_off_in(3)])
    with pytest.raises(ValueError, match=r"Only a model that is built .* Received: model='subcl"):
        run(tmp_path / "broken", subclass, data, resume=True)

    def built():
        model = subclass()
        model(X[:1])
        return model

    # The data begin anew, the rest goes on.
    ens, history = run(tmp_path / "broken", built, data, resume=True)
    assert len(ens) == 3
    assert history.epoch == list(range(6))


def forge_state(directory, **arrays):
    """Puts another state in, with a manifest that fits."""
    import hashlib

    path = directory / states(directory)[0]
    np.savez(path, **arrays)
    manifest = json.loads((directory / "ensemble.json").read_text("utf-8"))
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    content["state"] = {"name": path.name, "size": path.stat().st_size, "sha256": digest}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (directory / "ensemble.json").write_text(json.dumps(content))
    return path


def arrays_of(directory):
    with np.load(directory / states(directory)[0]) as file:
        return {name: file[name] for name in file.files}


class Harmful:
    """Does something when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("harm",))


def test_a_pickle_in_a_state_is_refused_and_not_run(broken, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    harmful = np.empty(1, object)
    harmful[0] = Harmful()
    path = forge_state(broken, **{**arrays_of(broken), "variable_0": harmful})
    with pytest.raises(SnapshotError, match=re.escape(str(path))):
        run(broken, resume=True)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("facts", [b"", b"[]", b"{}", b'{"run": "x"}', b"\xff", b"torn"], ids=repr)
def test_a_state_without_its_facts_is_refused_by_name(broken, facts):
    found = {**arrays_of(broken), "facts": np.frombuffer(facts, "uint8")}
    path = forge_state(broken, **found)
    with pytest.raises(SnapshotError, match=re.escape(str(path))):
        run(broken, resume=True)


def test_a_state_of_other_variables_is_refused(broken):
    found = arrays_of(broken)
    del found["variable_3"]
    forge_state(broken, **found)
    with pytest.raises(SnapshotError, match="not this model's and its optimizer's. Received: "):
        run(broken, resume=True)


# One writer


HOLDER = """
import sys
from snapshot_ensemble.storage.lock import DirectoryLock
import pathlib
with DirectoryLock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(broken):
    """A directory that another process writes to, and that process."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(broken)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield broken, process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_second_writer_is_refused_at_once_and_a_dead_one_is_not_in_the_way(held):
    directory, process = held
    ens = SnapshotEnsemble.load(directory)  # A reader may.
    told = "Another run writes to the directory. Received: directory="
    with pytest.raises(BlockingIOError, match=told):
        run(directory, resume=True)
    with pytest.raises(BlockingIOError, match=told):
        run(directory, overwrite=True)
    with pytest.raises(BlockingIOError, match=told):
        ens.weights = [1.0]
    assert ens.weights is None
    ens.save(directory.parent / "other")
    with pytest.raises(BlockingIOError, match=told):
        ens.save(directory)
    process.kill()
    process.wait()
    ens, _ = run(directory, resume=True)
    assert len(ens) == 3


def test_a_second_writer_in_the_same_process_is_refused(broken):
    other = SnapshotEnsemble.load(broken)

    def write(epoch, logs):
        with pytest.raises(BlockingIOError, match="Another run writes"):
            other.weights = [1.0]
        seen.append(epoch)

    seen = []
    run(broken, resume=True, callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=write)])
    assert seen == [3, 4, 5]
    # Now it is behind what is there.
    with pytest.raises(SnapshotError, match=r"ensemble\.json' was changed by another process"):
        other.weights = [1.0]


def test_what_a_killed_writer_left_is_cleared_away(broken):
    left = ["writing-1-snapshot-0009.weights.h5", "snapshot-9999.weights.h5", "state-9999.npz"]
    for name in [*left, "mine.weights.h5"]:
        (broken / name).write_bytes(b"left")
    run(broken, resume=True)
    names = {path.name for path in broken.iterdir()}
    assert not names & set(left)
    assert "mine.weights.h5" in names


def test_a_directory_with_only_what_a_killed_writer_left_is_free(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ensemble.lock").touch()
    (tmp_path / "run" / "writing-1-state-0001.npz").write_bytes(b"left")
    ens, _ = run(tmp_path / "run")
    assert len(ens) == 3


def test_a_reader_that_a_writer_overtakes_reads_again(broken, monkeypatch):
    opened, open_store = [], DirectoryStore.open

    def overtaken(directory):
        store = open_store(directory)
        if not opened:
            opened.append(store)
            run(broken, resume=True, max_snapshots=1)  # Removes the file that it would read.
        return store

    monkeypatch.setattr(DirectoryStore, "open", overtaken)
    loaded = SnapshotEnsemble.load(broken)
    assert [snapshot.cycle for snapshot in loaded.snapshots] == [2]
