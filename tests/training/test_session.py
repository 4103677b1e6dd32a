"""`fit` is a transaction: if it ends before anything new is on disk, nothing has changed."""

import _thread
import signal
import threading
import time

import keras
import numpy as np
import pytest

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.storage.atomic_file import Draft
from snapshot_ensemble.storage.background import Background

X = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
Y = np.argmax(X[:, :3], axis=1)


def compiled(units=5):
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(units, "relu"), keras.layers.Dense(3, "softmax")]
    )
    # Eager, since tracing takes longer than a few steps of a small model.
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    return model


def ensemble(directory=None, **arguments):
    return SnapshotEnsemble(compiled(), cycles=2, lr_init=0.1, directory=directory, **arguments)


def fit(ens, **arguments):
    return ens.fit(**{"x": X, "y": Y, "epochs": 4, "batch_size": 16, "verbose": 0, **arguments})


def state_of(ens):
    """The public state of an ensemble."""
    weights = None if ens.weights is None else ens.weights.tolist()
    return {
        "history": {name: list(column) for name, column in ens.history.items()},
        "snapshots": ens.snapshots,
        "learned": (weights, ens.temperature, ens.members),
        "weights": [[array.tolist() for array in member.get_weights()] for member in ens],
        "plan": repr(ens.plan(4)),
    }


def files_of(directory):
    """The bytes of every file; None if the directory does not exist."""
    if not directory.exists():
        return None
    return {path.name: path.read_bytes() for path in directory.iterdir()}


class Raises(keras.callbacks.Callback):
    def __init__(self, error, method):
        super().__init__()
        setattr(self, method, self._raise)
        self.error = error

    def _raise(self, *_, **__):
        raise self.error


ENDINGS = {
    "unknown argument": (TypeError, {"colour": 1}),
    "callback that sets the rate": (
        ValueError,
        {"callbacks": [keras.callbacks.ReduceLROnPlateau()]},
    ),
    "impossible budget": (ValueError, {"epochs": 1}),
    "impossible save_every": (ValueError, {"save_every": 0}),
    "data of another shape": (ValueError, {"x": X[:, :2]}),
    "targets of another length": (ValueError, {"y": Y[:5]}),
    "exception at the start": (KeyError, {"callbacks": [Raises(KeyError(), "on_train_begin")]}),
    "exception in a batch": (KeyError, {"callbacks": [Raises(KeyError(), "on_train_batch_end")]}),
    "Ctrl-C in a batch": (
        KeyboardInterrupt,
        {"callbacks": [Raises(KeyboardInterrupt(), "on_train_batch_end")]},
    ),
    "Ctrl-C at the end of an epoch": (
        KeyboardInterrupt,
        {"callbacks": [Raises(KeyboardInterrupt(), "on_epoch_end")]},
    ),
}


FAST_SETUPS = ("a new directory", "its own directory")
SETUPS = (*FAST_SETUPS, "in memory", "an empty one", "an old directory")


@pytest.fixture(
    params=[pytest.param(s, marks=() if s in FAST_SETUPS else pytest.mark.slow) for s in SETUPS]
)
def setup(request, tmp_path):
    """An ensemble, its directory, and the arguments with which it may train there."""
    directory = tmp_path / "run"
    if request.param == "in memory":
        return ensemble(), None, {}
    if request.param == "an empty one":
        directory.mkdir()
    if request.param in ("a new directory", "an empty one"):
        return ensemble(directory), directory, {}
    earlier = ensemble(directory)
    fit(earlier)
    earlier.weights, earlier.temperature = [0.25, 0.75], 2.0
    if request.param == "its own directory":
        return earlier, directory, {}
    return ensemble(directory), directory, {"overwrite": True}


@pytest.mark.sampled(12, 3)
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_fit_that_ends_early_changes_nothing(ending, setup):
    ens, directory, options = setup
    error, arguments = ENDINGS[ending]
    before = state_of(ens), directory and files_of(directory)
    with pytest.raises(error):
        fit(ens, **options, **arguments)
    assert (state_of(ens), directory and files_of(directory)) == before
    fit(ens, **options)
    assert len(ens) == 2 + len(before[0]["snapshots"])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("ending", ["exception in a batch", "Ctrl-C in a batch"])
def test_overwriting_in_memory_is_undone_as_well(ending):
    ens = ensemble()
    fit(ens)
    ens.weights = [0.25, 0.75]
    before = state_of(ens)
    error, arguments = ENDINGS[ending]
    with pytest.raises(error):
        fit(ens, overwrite=True, **arguments)
    assert state_of(ens) == before
    fit(ens)
    assert len(ens) == 4  # The next run adds cycles, as if the failed one had not happened.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"epochs": 6}, "plan"), ({"x": X[:16], "y": Y[:16]}, "rows")],
    ids=["another plan", "other data"],
)
def test_a_refused_resume_does_not_claim_the_directory(tmp_path, arguments, message):
    directory = tmp_path / "run"
    fit(ensemble(directory))
    before = files_of(directory)
    other = ensemble(directory)
    with pytest.raises(ValueError, match=message):
        fit(other, resume=True, **arguments)
    assert files_of(directory) == before
    assert (len(other), other.history) == (0, {})
    with pytest.raises(ValueError, match="is not empty"):
        fit(other)
    assert files_of(directory) == before


def test_a_refused_resume_with_another_model(tmp_path):
    directory = tmp_path / "run"
    fit(ensemble(directory))
    before = files_of(directory)
    other = SnapshotEnsemble(compiled(7), cycles=2, lr_init=0.1, directory=directory)
    with pytest.raises(ValueError, match="layers"):
        fit(other, resume=True)
    with pytest.raises(ValueError, match="is not empty"):
        fit(other)
    assert files_of(directory) == before


def test_a_resume_that_fails_early_leaves_the_interrupted_run_unchanged(tmp_path):
    """Snapshots newer than the state are dropped only when new ones replace them."""
    directory = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        fit(ensemble(directory), callbacks=[StopsAtEpoch(3)])
    before = files_of(directory)
    ens = ensemble(directory)
    with pytest.raises(KeyError):
        fit(ens, resume=True, callbacks=[Raises(KeyError(), "on_train_batch_begin")])
    assert files_of(directory) == before
    assert len(ens) == 0
    fit(ens, resume=True)
    assert len(ens) == 2


class StopsAtEpoch(keras.callbacks.Callback):
    def __init__(self, epoch, error=KeyboardInterrupt):
        super().__init__()
        self.epoch, self.error = epoch, error

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise self.error


@pytest.mark.sampled(4)
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("in_memory", [True, False])
def test_finished_cycles_are_kept(tmp_path, error, in_memory):
    ens = ensemble(None if in_memory else tmp_path / "run")
    with pytest.raises(error):
        fit(ens, callbacks=[StopsAtEpoch(2, error)])
    assert [snapshot.cycle for snapshot in ens.snapshots] == [0]
    if not in_memory:
        again = SnapshotEnsemble.load(tmp_path / "run")
        assert again.snapshots == ens.snapshots
        assert again.history == ens.history


def test_ctrl_c_in_the_final_wait_keeps_finished_cycles(tmp_path, monkeypatch):
    """The user presses Ctrl-C after training, while the last files are being written."""
    has_ended, is_waiting, interrupted = threading.Event(), threading.Event(), []
    put, wait = Draft.put, Background.wait

    def put_slowly(draft):
        if has_ended.is_set() and not interrupted:
            assert is_waiting.wait(10)
            interrupted.append(draft.name)
            time.sleep(0.2)  # Gives the main thread time to start waiting.
            _thread.interrupt_main()
            time.sleep(0.2)
        return put(draft)

    def wait_seen(thread):
        if has_ended.is_set():
            is_waiting.set()
        return wait(thread)

    class Ends(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            has_ended.set()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # Workers ignore it.
    monkeypatch.setattr(Draft, "put", put_slowly)
    monkeypatch.setattr(Background, "wait", wait_seen)
    ens = ensemble(tmp_path / "run")
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(ens, callbacks=[Ends()])
    finally:
        signal.signal(signal.SIGINT, before)
    assert interrupted
    assert [snapshot.cycle for snapshot in ens.snapshots] == [0, 1]
    again = SnapshotEnsemble.load(tmp_path / "run")
    assert again.snapshots == ens.snapshots
    assert state_of(again) == state_of(ens)
    assert not [path.name for path in (tmp_path / "run").iterdir() if "writing" in path.name]
    fit(again)  # The lock has been released.
    assert len(again) == 4
