"""Runs that are interrupted and resumed, and what must be equal afterwards."""

import keras
import numpy as np
from keras import layers
from models import SimulatedCrashError, assert_same, member_weights, three_classes

from snapshot_ensemble import SnapshotEnsemble

ROWS = 24
X, Y = three_classes(ROWS)


def crash_in_epoch(epoch):
    """A callback that raises in the middle of an epoch."""

    def crash(batch, logs):
        if callback.epoch == epoch and batch == 1:
            raise SimulatedCrashError

    def record_epoch(current, logs):
        callback.epoch = current

    callback = keras.callbacks.LambdaCallback(on_epoch_begin=record_epoch, on_train_batch_end=crash)
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
    # Eager, since tracing takes longer than a few steps of a small model.
    arguments = {"run_eagerly": True, **arguments}
    model.compile(optimizer, "sparse_categorical_crossentropy", **arguments)
    return model


def arrays():
    return {"x": X, "y": Y, "batch_size": 8}


def run(directory, make=dense, data=arrays, callbacks=(), epochs=6, **arguments):
    """Creates and fits an ensemble, as a script would."""
    keras.utils.set_random_seed(3)
    model = make()
    # The own `train_step` of some models hides what their loss says.
    options = {"task": "multiclass_probabilities"}
    options |= {} if "schedule" in arguments else {"cycles": 3, "lr_init": 0.1}
    for name in ("cycles", "max_snapshots", "schedule", "shrink"):
        if name in arguments:
            options[name] = arguments.pop(name)
    ens = SnapshotEnsemble(model, directory=directory, **options)
    callbacks = [callback() if isinstance(callback, type) else callback for callback in callbacks]
    arguments = {**data(), "verbose": 0, **arguments}
    history = ens.fit(epochs=epochs, callbacks=callbacks, **arguments)
    return ens, history


def outcome(ens, history):
    """Everything that must be equal."""
    members = member_weights(ens)
    optimizer = [variable.numpy() for variable in ens.model.optimizer.variables]
    facts = (ens.snapshots, ens.history, history.history, history.epoch)
    return [*members, ens.model.get_weights(), optimizer], facts


def assert_same_outcome(actual, expected):
    assert_same(actual[0], expected[0])
    np.testing.assert_equal(actual[1], expected[1])
