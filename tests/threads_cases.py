"""One ensemble, used by other threads and callbacks while it trains: models, actions, numbers."""

import contextlib
import random
import threading

import keras
import numpy as np
from keras import layers, ops

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.storage.directory import DirectoryStore

X = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
Y = np.argmax(X[:, :3], axis=1)


class Shift(layers.Layer):
    """Adds a constant, after dropping some features."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.drop = layers.Dropout(0.2)

    def call(self, inputs):
        return self.drop(inputs) + 0.25


class Without(keras.Model):
    """A subclass without `get_config`, with a training step of its own."""

    def __init__(self, size):
        super().__init__()
        self.hidden = layers.Dense(size, "relu", activity_regularizer="l2")
        self.drop, self.norm = layers.Dropout(0.2), layers.BatchNormalization()
        self.head = layers.Dense(3, "softmax")

    def call(self, x, training=False):
        return self.head(self.norm(self.drop(self.hidden(x), training=training), training=training))

    def train_step(self, data):
        return {**super().train_step(data), "twice": ops.convert_to_tensor(2.0)}


class Share(keras.metrics.Mean):
    """A metric that cannot be made from a config."""

    def __init__(self, threshold):
        super().__init__(name="share")
        self.threshold = threshold

    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(ops.cast(y_pred > self.threshold, "float32"))


def functional():
    normalize = layers.Normalization()
    normalize.adapt(X)
    inputs = keras.Input((4,))
    x = layers.Dense(6, "relu", activity_regularizer="l2")(normalize(inputs))
    x = layers.Dropout(0.2)(layers.BatchNormalization()(Shift()(x)))
    return keras.Model(inputs, layers.Dense(3, "softmax")(x))


def subclass():
    model = Without(6)
    model(X[:1])
    return model


MODELS = {"functional": functional, "subclass": subclass}
OPTIMIZERS = {
    "Adam": lambda: keras.optimizers.Adam(0.05),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "schedule": lambda: keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.05, 99)),
}


def ensemble(kind="functional", optimizer="Adam", directory=None, *, eager=False, cycles=3, **more):
    """An ensemble of a new model, always with the same initial weights."""
    keras.utils.set_random_seed(1)
    model = MODELS[kind]()
    model.compile(
        OPTIMIZERS[optimizer](),
        "sparse_categorical_crossentropy",
        metrics=["accuracy", Share(0.5)],
        run_eagerly=eager,
    )
    # The own `train_step` of one of the models hides what its loss says.
    more["task"] = "multiclass_probabilities"
    return SnapshotEnsemble(model, cycles=cycles, directory=directory, **more)


def fit(ens, epochs=3, **arguments):
    """Trains on shuffled data and returns everything that a reader must not change."""
    history = ens.fit(X, Y, epochs=epochs, batch_size=8, verbose=0, **arguments).history
    return {
        "history": history,
        "weights": ens.model.get_weights(),
        "variables": [np.asarray(v) for v in ens.model.variables],
        "slots": [np.asarray(v) for v in ens.model.optimizer.variables],
        "members": member_weights(ens),
        "random": random.getstate(),
    }


def same(one, other):
    """Whether two results of `fit` are equal bit for bit."""
    flat, others = keras.tree.flatten(one), keras.tree.flatten(other)
    return len(flat) == len(others) and all(map(np.array_equal, flat, others))


def probabilities(kind, weights, x=X):
    """What a member predicts, written out in NumPy."""
    weights = [np.asarray(array, "float64") for array in weights]
    if kind == "functional":
        mean, variance, _, kernel, bias, *rest = weights
        x = (x - mean) / np.maximum(np.sqrt(variance), 1e-7)
        gamma, beta, moving_mean, moving_variance, head, shift = rest
        hidden = np.maximum(x @ kernel + bias, 0) + 0.25
    else:
        kernel, bias, gamma, beta, moving_mean, moving_variance, head, shift = weights
        hidden = np.maximum(x @ kernel + bias, 0)
    hidden = (hidden - moving_mean) / np.sqrt(moving_variance + 1e-3) * gamma + beta
    powers = np.exp(hidden @ head + shift)
    return powers / powers.sum(-1, keepdims=True)


# What `evaluate` returns depends on the temperature that another reader may be learning.
ONE_TEMPERATURE = threading.Lock()


class Seen:
    """Checks what readers see of an ensemble while it trains; counts, and keeps what was wrong."""

    def __init__(self, ens, kind, scratch):
        self.ens, self.kind, self.scratch = ens, kind, scratch
        self.looks, self.wrong, self.numbers = 0, [], []
        self.actions = [self.predict, self.index, self.evaluate, self.learn, self.save]
        self.actions += [self.report, self.average, self.merge]

    def look(self, number):
        """Does one of the actions; errors are kept, not raised."""
        if not len(self.ens):
            return
        action = self.actions[number % len(self.actions)]
        try:
            action()
        except Exception as error:
            self.wrong.append(f"{action.__name__}: {type(error).__name__}: {error}")
        self.looks += 1

    def predict(self):
        self.numbers.append(self.ens.predict_members(X, verbose=0))

    def index(self):
        member = self.ens[0]
        self.numbers.append(member.predict(X, verbose=0)[None])
        rate = float(ops.convert_to_numpy(member.optimizer.learning_rate))
        if not np.isclose(rate, self.ens._rate.compiled):
            self.wrong.append(f"a member has the learning rate {rate}")

    def evaluate(self):
        with ONE_TEMPERATURE:
            scores = self.ens.evaluate(X, Y, members=[0], verbose=0, return_dict=True)
        p = probabilities(self.kind, member_weights(self.ens)[0])
        expected = [np.mean(p.argmax(-1) == Y), np.mean(p > 0.5)]
        if not np.allclose([scores["accuracy"], scores["share"]], expected, atol=1e-5):
            self.wrong.append(f"scores {scores} instead of {expected}")

    def learn(self):
        with ONE_TEMPERATURE:
            self.ens.calibrate(X, Y, verbose=0)
            self.ens.temperature = 1.0  # For the numbers of `evaluate`.
        self.ens.fit_weights(X, Y, verbose=0)
        with contextlib.suppress(ValueError):  # A cycle may have ended since `len` was read.
            self.ens.weights = np.ones(len(self.ens)) / len(self.ens)
        self.ens.members = None

    def save(self):
        self.ens.save(self.scratch, overwrite=True)
        # Read without building a model, which would draw seeds.
        weights = weights_in(DirectoryStore.open(self.scratch), self.ens.model)
        self.numbers.append(np.stack([probabilities(self.kind, member) for member in weights]))

    def report(self):
        self.ens.report(X, Y, verbose=0)

    def average(self):
        self.ens.average_weights(x=X)

    def merge(self):
        if self.kind == "functional":
            self.ens.to_keras()

    def check(self, members):
        """Adds numbers to `wrong` that are not those of the first members."""
        expected = np.stack([probabilities(self.kind, member) for member in members])
        for actual in self.numbers:
            if not np.allclose(actual, expected[: len(actual)], atol=1e-4):
                self.wrong.append("predictions of other members")


def weights_in(store, model):
    """The weights of all snapshots in a store."""
    view = store.view()
    return [view.weights(model, index) for index in range(len(view.snapshots))]


def member_weights(ens):
    return weights_in(ens._store, ens.model)


@contextlib.contextmanager
def looking(seen, first=0):
    """Looks again and again from another thread, as long as the block runs."""
    ended = threading.Event()

    def run():
        number = first
        while not ended.is_set():
            seen.look(number)
            number += bool(len(seen.ens))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Paced(keras.callbacks.Callback):
    """Lets training wait at the end of an epoch until a reader has looked a few more times."""

    def __init__(self, seen, looks):
        super().__init__()
        self.seen, self.looks = seen, looks

    def on_epoch_end(self, epoch, logs=None):
        begun, ended = self.seen.looks, threading.Event()
        while len(self.seen.ens) and self.seen.looks < begun + self.looks:
            ended.wait(0.01)


class Looking(keras.callbacks.Callback):
    """Looks three times after each epoch, from inside `fit`."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def on_epoch_end(self, epoch, logs=None):
        for number in range(3 * epoch, 3 * epoch + 3):
            self.seen.look(number)
