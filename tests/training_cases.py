"""A model whose only weight sums up its learning rates, to compare every step exactly."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from snapshot_ensemble import SnapshotEnsemble

PEAK, FLOOR, OWN = 0.1, 0.001, 0.05
X = np.zeros((32, 1), "float32")

# The warning of Keras at the end of each pass over data of unknown length.
ran_out_of_data = pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")


@keras.saving.register_keras_serializable("test_training")
class OneWeight(keras.layers.Layer):
    """Returns its only weight, which starts at 0, for every row."""

    def build(self, input_shape):
        self.w = self.add_weight(shape=(), initializer="zeros", name="w")

    def call(self, x):
        return ops.zeros_like(x) + self.w


def first_row(y, output):
    """A loss whose gradient is exactly 1, whatever the data and the batch size."""
    return output[0]


def one_weight(optimizer=None, model_type=keras.Sequential, **compile_arguments):
    model = model_type([keras.Input((1,)), OneWeight()])
    model.compile(optimizer or keras.optimizers.SGD(OWN), first_row, **compile_arguments)
    return model


def ensemble(model, cycles=2, **arguments):
    if "schedule" not in arguments:
        arguments = {"lr_init": PEAK, "lr_min": FLOOR, **arguments}
    return SnapshotEnsemble(model, cycles=cycles, task="regression", **arguments)


def arrays(batch_size=4):
    """8 batches per epoch by default."""
    return {"x": X, "y": X, "batch_size": batch_size}


def fitted(model=None, epochs=4, cycles=2, **fit_arguments):
    if "x" not in fit_arguments:
        fit_arguments |= arrays()
    ens = ensemble(one_weight() if model is None else model, cycles)
    ens.fit(epochs=epochs, verbose=0, **fit_arguments)
    return ens


def cosine(n, lr_max=PEAK, lr_min=FLOOR):
    """The rates of a cycle of `n` steps, in float64."""
    return lr_min + (lr_max - lr_min) / 2 * (1 + np.cos(np.pi * np.arange(n) / n))


def descend(*cycles, accumulate=1):
    """The only weight at the end of each cycle, computed step by step in float32."""
    w, ends, step = np.float32(0), [], 0
    for rates in cycles:
        for rate in rates.astype("float32"):
            step += 1
            if step % accumulate == 0:
                w -= rate
        ends.append(w)
    return ends


def weight(model):
    return model.get_weights()[0]


def members(ens):
    return [weight(member) for member in ens]


class Recorder(keras.callbacks.Callback):
    """Records the weight and the logs at the end of each epoch."""

    def __init__(self):
        super().__init__()
        self.weights, self.logs = [], []

    def on_epoch_end(self, epoch, logs=None):
        self.weights.append(weight(self.model))
        self.logs.append(dict(logs))


def raiser(error):
    def stop(*_):
        raise error

    return stop


class AtBatch(keras.callbacks.Callback):
    """Runs an action after a batch of an epoch, both counted from 0."""

    def __init__(self, epoch, batch, action):
        super().__init__()
        self.when, self.action, self.epoch = (epoch, batch), action, None

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.when:
            self.action(self.model)


def batches():
    return tf.data.Dataset.from_tensor_slices((X, X)).batch(2)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        return X[:2], X[:2]


def endless():
    while True:
        yield X[:2], X[:2]


# Arguments of `fit`, and the steps that Keras takes per epoch with 1 and 7 steps per execution.
DATA = {
    "arrays": (lambda: arrays(2), 16, 16),
    "arrays with all steps": (lambda: {**arrays(2), "steps_per_epoch": 16}, 16, 16),
    "tf.data": (lambda: {"x": batches()}, 16, 16),
    "endless tf.data": (lambda: {"x": batches().repeat(), "steps_per_epoch": 16}, 16, 21),
    "PyDataset": (lambda: {"x": Batches()}, 16, 16),
    "PyDataset with all steps": (lambda: {"x": Batches(), "steps_per_epoch": 16}, 16, 16),
    "generator": (lambda: {"x": endless(), "steps_per_epoch": 16}, 16, 21),
    "part of arrays": (
        lambda: {**arrays(2), "validation_split": 0.5, "steps_per_epoch": 8},
        8,
        8,
    ),
}


def filtered():
    return batches().filter(lambda x, y: True)


def classifier():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax")])
    model.compile(
        keras.optimizers.SGD(OWN), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    return model
