"""What tests of `fit_chains` train: small models, made by functions that other processes get."""

import numpy as np
from models import three_classes

X, Y = three_classes(256, 64)
# In large matrices, the number of threads decides in which order TensorFlow adds numbers up.
WIDTH = 256
ARGUMENTS = {"chains": 3, "cycles": 2, "epochs": 4, "lr_init": 0.01, "batch_size": 128}


def maker():
    """A function that makes a model; it has all that it needs, so that it can be sent."""
    width = WIDTH

    def make_model():
        import keras

        layers = keras.layers
        hidden = [layers.Dense(width, "relu"), layers.BatchNormalization(), layers.Dropout(0.3)]
        hidden.append(layers.Dense(width, "relu"))
        model = keras.Sequential([keras.Input((64,)), *hidden, layers.Dense(3, "softmax")])
        model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        return model

    return make_model


def train_here(directory):
    """Trains the chains in this process, with as many threads as a worker with one CPU has."""
    import tensorflow as tf

    from snapshot_ensemble.ray import fit_chains

    tf.config.threading.set_intra_op_parallelism_threads(1)
    fit_chains(maker(), X, Y, engine="local", directory=directory, verbose=0, **ARGUMENTS)


def callback_that(act, epoch, marker):
    """A callback that acts once, when an epoch begins in the first chain that comes there.

    Args:
        act: `"die"`, `"fail"` or `"wait"`.
        epoch: The number of the epoch.
        marker: Path of a file that is made before.
    """
    import keras

    class Once(keras.callbacks.Callback):
        def on_epoch_begin(self, number, logs=None):
            import os
            import signal
            import time

            if number != epoch:
                return
            try:
                os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            if act == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if act == "fail":
                raise RuntimeError("no luck")
            time.sleep(30)

    return Once()


def outcome(ens):
    """Everything that must be equal."""
    weights = [array for member in ens for array in member.get_weights()]
    return weights, (ens.snapshots, ens.history)


def assert_same_outcome(actual, expected):
    (weights, facts), (others, other_facts) = outcome(actual), outcome(expected)
    assert len(weights) == len(others)
    for one, other in zip(weights, others, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
    np.testing.assert_equal(facts, other_facts)
