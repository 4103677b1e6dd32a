"""Runs that are interrupted and resumed: equal bit for bit to uninterrupted ones, or refused."""

import random
import re
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from models import SimulatedCrashError
from resume_cases import (
    ROWS,
    X,
    Y,
    arrays,
    assert_same_outcome,
    crash_in_epoch,
    dense,
    outcome,
    run,
)

from snapshot_ensemble import CosineAnnealing, SnapshotEnsemble

# A subclass without a config is resumed with the model at hand.
pytestmark = pytest.mark.filterwarnings("ignore:The saved copy of the model cannot be used")


class Subclass(keras.Model):
    """A model without a config, built at the first batch, with a training step of its own."""

    def __init__(self):
        super().__init__()
        self.dense, self.drop = layers.Dense(3, "softmax"), layers.Dropout(0.5)
        self.shift = self.add_weight(shape=(4,), name="shift")

    def call(self, inputs, training=False):
        return self.dense(self.drop(inputs + self.shift, training=training))

    def train_step(self, data):
        logs = super().train_step(data)
        # Without a seed, Keras draws from its global generator.
        self.shift.assign_add(keras.random.normal((4,)))
        return logs


def subclass():
    model = Subclass()
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    return model


def stateful():
    """A net that goes on in each batch where the one before it ended."""
    inputs = keras.Input(batch_shape=(8, 4))
    hidden = layers.GRU(3, stateful=True)(layers.Reshape((2, 2))(inputs))
    model = keras.Model(inputs, layers.Dense(3, "softmax")(hidden))
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    return model


def shuffled():
    data = tf.data.Dataset.from_tensor_slices((X, Y))
    return {"x": data.shuffle(ROWS, seed=3).batch(8), "shuffle": False}


def of_unknown_length():
    data = tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(ROWS, seed=3)
    return {"x": data.filter(lambda x, y: True).batch(8), "shuffle": False}


class Shuffling(keras.utils.PyDataset):
    """Data that depend on Python's and NumPy's global generators."""

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


class Stateful(keras.callbacks.Callback):
    """A user's callback with `get_state` and `set_state`, whose state affects training."""

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
        assert state["inner"]["pair"] == (1, 2.5)


def early_stopping():
    # Counts epochs in which the loss falls by less than 0.3.
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
    "recurrent states": {"make": stateful},
    "a graph of two steps": {"make": in_graph},
    "only the newest two snapshots": {"max_snapshots": 2},
    "growing cycles": {"schedule": CosineAnnealing(2, 2.0, lr_init=0.1, warmup=1)},
    "a callback with a state": {"callbacks": [Stateful]},
    "early stopping": {"callbacks": [early_stopping]},
    "state saved every two epochs": {"save_every": 2, "cycles": 2},
    "initial epoch above 0": {"initial_epoch": 2, "epochs": 8},
    "validation": {"validation_data": (X, Y), "validation_freq": 2},
    "restarts with shrink=0.5": {"shrink": 0.5},
    "restarts with shrink=auto": {"shrink": "auto", "validation_data": (X, Y)},
}

FAST = {"a subclass", "restarts with shrink=0.5"}


def arguments_of(case):
    """The arguments of `run` for a case, and its callbacks, newly created."""
    arguments = dict(CASES[case])
    callbacks = [make() for make in arguments.pop("callbacks", [])]
    return arguments, callbacks


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in FAST else pytest.mark.slow) for case in CASES],
)
def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path, case):
    case_arguments, callbacks = arguments_of(case)
    expected = outcome(*run(tmp_path / "uninterrupted", callbacks=callbacks, **case_arguments))
    first = case_arguments.get("initial_epoch", 0)
    for epoch in (1, 3):
        case_arguments, callbacks = arguments_of(case)
        with_crash = [*callbacks, crash_in_epoch(first + epoch)]
        with pytest.raises(SimulatedCrashError):
            run(tmp_path / "interrupted", callbacks=with_crash, resume=epoch > 1, **case_arguments)
    case_arguments, callbacks = arguments_of(case)
    resumed = run(tmp_path / "interrupted", callbacks=callbacks, resume=True, **case_arguments)
    assert_same_outcome(outcome(*resumed), expected)
    loaded = SnapshotEnsemble.load(tmp_path / "interrupted", model=resumed[0].model)
    assert loaded.snapshots == resumed[0].snapshots
    # Resuming a finished run does nothing and returns the same.
    case_arguments, callbacks = arguments_of(case)
    again = run(tmp_path / "interrupted", callbacks=callbacks, resume=True, **case_arguments)
    assert_same_outcome(outcome(*again), expected)


def test_early_stopping_stops_before_the_last_epoch(tmp_path):
    _, history = run(tmp_path / "uninterrupted", callbacks=[early_stopping()])
    assert 4 <= len(history.epoch) < 6


def test_the_dataset_shuffles_differently_in_each_epoch():
    data = shuffled()["x"]
    orders = [np.concatenate([y for _, y in data]) for _ in range(2)]
    assert not np.array_equal(*orders)


@pytest.mark.slow
def test_a_run_can_be_resumed_by_the_same_object(tmp_path):
    expected = outcome(*run(tmp_path / "uninterrupted"))
    keras.utils.set_random_seed(3)
    ens = SnapshotEnsemble(dense(), cycles=3, lr_init=0.1, directory=tmp_path / "interrupted")
    arguments = {**arrays(), "epochs": 6, "verbose": 0}
    with pytest.raises(SimulatedCrashError):
        ens.fit(**arguments, callbacks=[crash_in_epoch(3)])
    history = ens.fit(**arguments, resume=True)
    assert_same_outcome(outcome(ens, history), expected)


@pytest.mark.slow
def test_a_run_can_be_resumed_after_loading(tmp_path):
    expected = outcome(*run(tmp_path / "uninterrupted"))
    with pytest.raises(SimulatedCrashError):
        run(tmp_path / "interrupted", callbacks=[crash_in_epoch(3)])
    ens = SnapshotEnsemble.load(tmp_path / "interrupted")
    ens.model.run_eagerly = True
    history = ens.fit(**arrays(), epochs=6, verbose=0, resume=True)
    assert_same_outcome(outcome(ens, history), expected)


def two_runs(directory, callbacks=(), resume=False):
    """A script that calls `fit` twice."""
    keras.utils.set_random_seed(3)
    ens = SnapshotEnsemble(dense(), cycles=2, lr_init=0.1, directory=directory)
    data = shuffled()
    for number in range(2):
        given = [c for c in callbacks if number == 1]
        history = ens.fit(**data, epochs=2, verbose=0, resume=resume, callbacks=given)
    return ens, history


@pytest.mark.slow
def test_a_script_with_two_fits_resumes_the_second(tmp_path):
    expected = outcome(*two_runs(tmp_path / "uninterrupted"))
    for epoch in (0, 1):
        with pytest.raises(SimulatedCrashError):
            two_runs(tmp_path / "interrupted", [crash_in_epoch(epoch)], resume=True)
    assert_same_outcome(outcome(*two_runs(tmp_path / "interrupted", resume=True)), expected)
    assert_same_outcome(outcome(*two_runs(tmp_path / "interrupted", resume=True)), expected)


def test_finished_runs_are_not_run_again(tmp_path):
    two_runs(tmp_path / "ended")
    keras.utils.set_random_seed(3)
    ens = SnapshotEnsemble(dense(), cycles=2, lr_init=0.1, directory=tmp_path / "ended")
    histories = [ens.fit(**shuffled(), epochs=2, verbose=0, resume=True) for _ in range(2)]
    assert [history.epoch for history in histories] == [[0, 1], [0, 1]]
    assert [h.history["cycle"] for h in histories] == [[0, 1], [2, 3]]
    assert histories[0].history["loss"] == ens.history["loss"][:2]
    assert len(ens) == 4


@pytest.mark.slow
def test_a_fit_without_resume_after_an_interruption_adds_cycles(tmp_path):
    with pytest.raises(SimulatedCrashError):
        run(tmp_path / "interrupted", callbacks=[crash_in_epoch(3)])
    ens = SnapshotEnsemble.load(tmp_path / "interrupted")
    assert len(ens) == 1
    ens.fit(**arrays(), epochs=3, verbose=0)
    assert [snapshot.cycle for snapshot in ens.snapshots] == [0, 1, 2, 3]


@pytest.mark.slow
def test_resuming_an_overwrite_killed_at_its_start_does_not_resume_the_old_run(tmp_path):
    run(tmp_path / "kept", cycles=2, epochs=2)
    expected = outcome(*run(tmp_path / "uninterrupted"))
    # A copy made during the run is what a killed process would leave.
    script = shutil.copytree(tmp_path / "kept", tmp_path / "copy")
    keras.utils.set_random_seed(3)
    ens = SnapshotEnsemble(dense(), cycles=3, lr_init=0.1, directory=script)

    def copy_and_crash(epoch, logs):
        shutil.copytree(script, tmp_path / "killed", dirs_exist_ok=True)
        raise SimulatedCrashError

    callback = keras.callbacks.LambdaCallback(on_epoch_begin=copy_and_crash)
    with pytest.raises(SimulatedCrashError):
        ens.fit(**arrays(), epochs=6, verbose=0, overwrite=True, callbacks=[callback])
    assert len(SnapshotEnsemble.load(tmp_path / "killed")) == 2
    assert_same_outcome(outcome(*run(tmp_path / "killed", resume=True)), expected)


def wider():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(6), layers.Dense(3, "softmax")])
    model.compile("adam", "sparse_categorical_crossentropy", run_eagerly=True)
    return model


@pytest.mark.parametrize(
    ("other", "message"),
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
def test_a_different_run_is_refused(interrupted_run, other, message):
    before = {path.name: path.read_bytes() for path in interrupted_run.iterdir()}
    match = rf"same model, data and plan\. Received: .*{message}.*`overwrite=True`"
    with pytest.raises(ValueError, match=match):
        run(interrupted_run, resume=True, **other)
    assert {path.name: path.read_bytes() for path in interrupted_run.iterdir()} == before


@pytest.mark.parametrize(
    ("directory", "arguments", "message"),
    [
        (None, {"resume": True}, "that needs a `directory`. Received: resume=True, overwrite=F"),
        ("some", {"resume": True, "overwrite": True}, "but `overwrite=True` starts over. Received"),
        ("some", {"save_every": 0}, "`save_every` must be at least 1. Received: save_every=0"),
    ],
)
def test_invalid_arguments_are_refused(tmp_path, directory, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(directory and tmp_path / directory, **arguments)
    assert not (tmp_path / "some").exists()


def test_backup_and_restore_is_refused(tmp_path):
    callback = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(ValueError, match=r"`BackupAndRestore` .*Received: .*`fit\(\.\.\., resume="):
        run(tmp_path / "some", callbacks=[callback])


def test_resuming_with_an_iterator_needs_a_built_model(tmp_path):
    def endless():
        while True:
            yield X[:8], Y[:8]

    def data():
        return {"x": endless(), "steps_per_epoch": 3, "shuffle": False}

    with pytest.raises(SimulatedCrashError):
        run(tmp_path / "interrupted", subclass, data, callbacks=[crash_in_epoch(3)])
    with pytest.raises(ValueError, match=r"the model must be built\. Received: model='subcl"):
        run(tmp_path / "interrupted", subclass, data, resume=True)

    def built():
        model = subclass()
        model(X[:1])
        return model

    # The data start from the beginning; everything else is resumed.
    ens, history = run(tmp_path / "interrupted", built, data, resume=True)
    assert len(ens) == 3
    assert history.epoch == list(range(6))
