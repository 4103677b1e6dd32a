"""Faults in training and on disk, and directories of other format versions."""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import keras
import numpy as np
import pytest
from models import three_classes

from snapshot_ensemble import SnapshotEnsemble, SnapshotError

layers = keras.layers
HERE = pathlib.Path(__file__).parent
X, Y = three_classes(24)


def dense(**arguments):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(5), layers.Dense(3, "softmax")])
    loss = arguments.pop("loss", "sparse_categorical_crossentropy")
    model.compile(keras.optimizers.Adam(0.01), loss, run_eagerly=True)
    return model


def at_epoch(number, action):
    """A callback that changes the model after the last batch of an epoch."""

    class AtEpoch(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

        def on_train_batch_end(self, batch, logs=None):
            if self.epoch == number and batch == 2:
                action(self.model)

    return AtEpoch()


def fit(ens, epochs=8, **arguments):
    return ens.fit(X, Y, epochs=epochs, batch_size=8, verbose=0, **arguments)


# Faults in training


def spoil(model):
    model.weights[0].assign(np.full(model.weights[0].shape, np.inf))


def test_a_cycle_that_ends_in_infinite_weights_is_no_member_and_ends_training():
    ens = SnapshotEnsemble(dense(), cycles=4, lr_init=0.1)
    message = r"Cycle 1 gives no member: its weights are not finite \(.*kernel\)\. Kept: 1 member\."
    with pytest.warns(UserWarning, match=message + r" Training stops\..*`keep_going=True`"):
        history = fit(ens, callbacks=[at_epoch(3, spoil)])
    assert [snapshot.cycle for snapshot in ens.snapshots] == [0]
    assert history.epoch == [0, 1, 2, 3]
    assert np.isfinite(ens.predict(X, verbose=0)).all()


def overflowing(y, prediction):
    return keras.ops.sum(prediction, axis=-1) * (np.inf if overflowing.on else 1.0)


def test_a_cycle_that_ends_in_a_loss_that_is_not_finite_is_no_member():
    overflowing.on = False
    ens = SnapshotEnsemble(dense(loss=overflowing), cycles=2, lr_init=1e-6, task="multiclass")

    def turn_on(model):
        overflowing.on = True

    with pytest.warns(
        UserWarning, match=r"Cycle 1 gives no member: its loss is (nan|inf)\. Kept: 1 mem"
    ):
        ens.fit(X, Y, epochs=4, batch_size=8, verbose=0, callbacks=[at_epoch(2, turn_on)])
    assert len(ens) == 1


def test_infinite_weights_within_a_cycle_are_ignored_if_they_recover():
    kept = []

    def spoil_and_mend(model):
        if kept:
            model.weights[0].assign(kept.pop())
        else:
            kept.append(model.weights[0].numpy())

    callbacks = [at_epoch(2, spoil_and_mend), at_epoch(3, spoil_and_mend)]
    ens = SnapshotEnsemble(dense(), cycles=2, lr_init=0.1)
    fit(ens, epochs=4, callbacks=callbacks)
    assert len(ens) == 2


@pytest.mark.parametrize("bad", [0, 1])
def test_keep_going_continues_from_the_last_good_cycle(bad):
    starts, own = [], []

    def note(epoch, logs):
        starts.append([v.numpy() for v in (*ens.model.weights, *ens.model.optimizer.variables)])

    ens = SnapshotEnsemble(dense(), cycles=3, lr_init=0.1)
    ens.model.optimizer.build(ens.model.trainable_variables)
    own.extend(v.numpy() for v in (*ens.model.weights, *ens.model.optimizer.variables))
    note = keras.callbacks.LambdaCallback(on_epoch_begin=note)
    with pytest.warns(
        UserWarning, match=rf"Cycle {bad} .*next cycle starts from the state before this one"
    ):
        fit(ens, 6, callbacks=[at_epoch(2 * bad + 1, spoil), note], keep_going=True)
    assert [snapshot.cycle for snapshot in ens.snapshots] == sorted({0, 1, 2} - {bad})
    begun, good = starts[2 * bad + 2], starts[2 * bad]
    # The learning rate (the second variable of the optimizer) is set in each step.
    rate_index = len(ens.model.weights) + 1
    for number, (one, other) in enumerate(zip(begun, good, strict=True)):
        assert number == rate_index or np.array_equal(one, other)
    assert np.isfinite(ens.predict_members(X, verbose=0)).all()


@pytest.mark.slow
def test_a_straggler_gives_a_warning():
    ens = SnapshotEnsemble(dense(), cycles=4, lr_init=1e-3)

    def worsen(model):
        model.weights[-1].assign(np.asarray([30.0, -30.0, 0.0]))

    message = (
        r"Far worse than the others on the validation data: member 2 \(val_loss .*Leave them out"
    )
    with pytest.warns(UserWarning, match=message):
        fit(
            ens,
            validation_data=(X, Y),
            callbacks=[
                at_epoch(5, worsen),
                at_epoch(6, lambda m: m.set_weights(ens[0].get_weights())),
            ],
        )
    losses = [snapshot.metrics["val_loss"] for snapshot in ens.snapshots]
    assert losses[2] > 2 * np.median(np.delete(losses, 2))


@pytest.mark.slow
def test_similar_members_give_no_warning():
    ens = SnapshotEnsemble(dense(), cycles=4, lr_init=1e-3)
    fit(ens, validation_data=(X, Y))  # A warning would be an error.
    assert len(ens) == 4


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_run_keeps_finished_cycles(tmp_path, error):
    def stop(model):
        raise error

    ens = SnapshotEnsemble(dense(), cycles=4, lr_init=0.1, directory=tmp_path / "run")
    with pytest.raises(error):
        fit(ens, callbacks=[at_epoch(5, stop)])
    assert [snapshot.cycle for snapshot in ens.snapshots] == [0, 1]
    actual = SnapshotEnsemble.load(tmp_path / "run").predict(X, verbose=0)
    np.testing.assert_array_equal(actual, ens.predict(X, verbose=0))


# Faults on disk


FULL = """
import json, os, resource, sys
import numpy as np
import keras
from snapshot_ensemble import SnapshotEnsemble
directory, fault = sys.argv[1:]
x = np.random.default_rng(0).normal(size=(24, 200)).astype("float32")
model = keras.Sequential([keras.Input((200,)), keras.layers.Dense(50), keras.layers.Dense(3)])
model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(True), run_eagerly=True)
def harm(epoch, logs):
    if epoch == 4:
        SnapshotEnsemble.load(directory)  # Waits for what is being written in the background.
    if epoch == 4 and fault == "permission":
        os.chmod(directory, 0o500)
        if os.geteuid() == 0:  # Root may write anywhere.
            os.seteuid(65534)
    elif epoch == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault), -1))
ens = SnapshotEnsemble(model, cycles=4, lr_init=0.1, directory=directory)
arguments = dict(x=x, y=np.arange(24) % 3, epochs=8, verbose=0)
try:
    callbacks = [keras.callbacks.LambdaCallback(on_epoch_begin=harm)]
    ens.fit(**arguments, callbacks=callbacks)
except OSError as error:
    message = str(error)
os.seteuid(os.getuid())
usable = bool(np.isfinite(ens.predict(x, verbose=0)).all())
members, loaded = len(ens), len(SnapshotEnsemble.load(directory))
left = [name for name in os.listdir(directory) if name.startswith("writing-")]
os.chmod(directory, 0o700)
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
ens.fit(**arguments, resume=True)
print(json.dumps([message, usable, members, loaded, left, len(ens)]))
"""


# A limit on file size simulates a full disk for all files, for weights, or for the state.
@pytest.mark.slow
@pytest.mark.parametrize("fault", ["0", "3000", "30000", "permission"])
def test_a_full_disk_is_reported_and_earlier_files_are_kept(fault):
    with tempfile.TemporaryDirectory() as scratch:
        pathlib.Path(scratch).chmod(0o777)
        command = [sys.executable, "-c", FULL, f"{scratch}/run", fault]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    message, usable, members, loaded, left, in_the_end = json.loads(done.stdout)
    assert "cannot be written to: " in message
    assert "What was written before is intact, including 2 snapshots." in message
    assert (usable, members, loaded, left, in_the_end) == (True, 2, 2, [], 4)


def test_a_deleted_directory_is_an_error_that_says_so():
    with tempfile.TemporaryDirectory() as scratch:
        directory = pathlib.Path(scratch, "run")
        ens = SnapshotEnsemble(dense(), cycles=4, lr_init=0.1, directory=directory)
        with pytest.raises(
            OSError, match=r"cannot be written to: .*The directory no longer exists\."
        ):
            fit(ens, callbacks=[at_epoch(4, lambda model: shutil.rmtree(directory))])
    assert len(ens) == 2


def test_an_invalid_directory_is_an_error_before_training(tmp_path):
    (tmp_path / "file").touch()
    ens = SnapshotEnsemble(dense(), cycles=4, lr_init=0.1, directory=tmp_path / "file" / "run")
    epochs = []
    look = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: epochs.append(epoch))
    with pytest.raises(OSError, match="run"):
        fit(ens, callbacks=[look])
    assert epochs == []


# Formats


@pytest.mark.parametrize("version", [path.name for path in sorted((HERE / "formats").iterdir())])
def test_a_directory_of_each_format_is_read(tmp_path, version):
    made = HERE / "formats" / version
    directory = shutil.copytree(made / "ensemble", tmp_path / "ensemble")
    expected = np.load(made / "expected.npz")
    ens = SnapshotEnsemble.load(directory)
    actual = ens.predict_members(expected["x"], verbose=0)
    np.testing.assert_allclose(actual, expected["members"], rtol=1e-5)
    actual = ens.predict(expected["x"], combine="weighted", verbose=0)
    np.testing.assert_allclose(actual, expected["weighted"], rtol=1e-5)
    assert ens.temperature == float(expected["temperature"])
    assert [snapshot.cycle for snapshot in ens.snapshots] == [0, 1]
    assert len(ens.history["loss"]) == 2
    ens.fit(expected["x"], np.arange(len(expected["x"])) % 3, epochs=2, verbose=0)
    assert len(SnapshotEnsemble.load(directory)) == 4


def test_a_newer_format_is_refused_with_advice_to_update(tmp_path):
    directory = shutil.copytree(HERE / "formats" / "1" / "ensemble", tmp_path / "ensemble")
    path = directory / "ensemble.json"
    path.write_text(path.read_text("utf-8").replace('"version": 1', '"version": 3'))
    with pytest.raises(SnapshotError, match=r"ensemble\.json.*version 3.*Update"):
        SnapshotEnsemble.load(directory)
