"""What a kind of model is, and what Keras alone computes for it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

SEED, EPOCHS, CYCLES, BATCH = 7, 4, 2, 8
RATE = 0.05
ROWS = 24
RNG = np.random.default_rng(0)


def floats(*shape, rows=ROWS):
    return RNG.normal(size=(rows, *shape)).astype("float32")


def classes(count, *shape, rows=ROWS):
    # Every class is there, whatever is drawn.
    drawn = RNG.integers(0, count, (rows, *shape))
    return np.where(np.arange(drawn.size).reshape(drawn.shape) < count, 0, drawn) + (
        np.arange(drawn.size).reshape(drawn.shape) < count
    ) * (np.arange(drawn.size).reshape(drawn.shape) % count)


X4, Y3 = floats(4), classes(3)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of model, with tiny data.

    Attributes:
        name: What it is.
        build: Makes the compiled model, the same one each time the random generators are seeded.
        x: Inputs, as `model.predict` takes them.
        y: Targets, or None.
        fit_x: Inputs of `fit` and `evaluate` where they are not those of `predict`.
        meaning: Of each output: `"values"` and `"probabilities"` are averaged as they are,
            `"log-probabilities"` and `"log-odds"` as probabilities, `"same"` is equal in all
            members and passed through.
        called: The meaning of what `model(x)` returns, where that is not what `predict` does.
        loss: Of the targets and the combined output, if it is a mean over rows.
        is_random: Whether predictions are drawn at random.
        is_stateful: Whether layers carry states on from batch to batch and from call to call.
        has_own_rate: Whether something else than the compiled optimizer trains it, at a rate that
            is not annealed: `fit` must refuse it.
        is_averaged: Whether the mean of the weights has no statistics to estimate anew.
        arguments: Of `SnapshotEnsemble`.
        custom_objects: Of `load`.
        tolerance: How far outputs may differ, relative to the largest.
    """

    name: str
    build: Callable[[], keras.Model]
    x: Any = dataclasses.field(default_factory=lambda: X4)
    y: Any = dataclasses.field(default_factory=lambda: Y3)
    fit_x: Any = None
    meaning: Any = "probabilities"
    called: Any = None
    loss: Any = None
    is_random: bool = False
    is_stateful: bool = False
    has_own_rate: bool = False
    is_averaged: bool = True
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    custom_objects: dict[str, Any] = dataclasses.field(default_factory=dict)
    tolerance: float = 1e-5

    @property
    def trained_on(self):
        return self.x if self.fit_x is None else self.fit_x


def built(kind):
    """A new model of this kind, built, the same one each time."""
    keras.utils.set_random_seed(SEED)
    model = kind.build()
    if not model.built:
        model.predict(first_rows(kind.x), verbose=0, batch_size=2)
    return model


def first_rows(x, count=2):
    return keras.tree.map_structure(lambda array: array[:count], x)


def plain_copy(kind, weights):
    """A plain Keras model with the weights of a member."""
    model = built(kind)
    model.set_weights(weights)
    # Faster than to trace a graph for a few rows.
    model.run_eagerly, model.jit_compile = True, False
    return model


class Recorder(keras.callbacks.Callback):
    """Copies the weights where a cycle ends."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % (EPOCHS // CYCLES) == 0:
            self.weights.append([np.array(array) for array in self.model.get_weights()])


class RateLoop(keras.callbacks.Callback):
    """The rate of each step by the formula of the paper, set by hand."""

    def __init__(self, peak):
        super().__init__()
        self.peak, self.step = peak, 0

    def on_train_batch_begin(self, batch, logs=None):
        steps = self.params["steps"] * (EPOCHS // CYCLES)
        share = (self.step % steps) / steps
        self.model.optimizer.learning_rate = self.peak / 2 * (1 + np.cos(np.pi * share))
        self.step += 1


def combined(meaning, outputs):
    """The combination of the members' outputs, in float64, in NumPy."""
    flat = [keras.tree.flatten(each) for each in outputs]
    meanings = [meaning] * len(flat[0]) if isinstance(meaning, str) else keras.tree.flatten(meaning)
    means = [
        _COMBINED[each](np.stack([np.asarray(output[index]) for output in flat]))
        for index, each in enumerate(meanings)
    ]
    return keras.tree.pack_sequence_as(outputs[0], means)


def probabilities(meaning, stacked):
    """Outputs as probabilities."""
    stacked = np.asarray(stacked, "float64")
    if meaning == "log-probabilities":
        powers = np.exp(stacked - stacked.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)
    if meaning == "log-odds":
        return 1 / (1 + np.exp(-stacked))
    return stacked


def _log_mean(stacked):
    return np.log(probabilities("log-probabilities", stacked).mean(0))


def _log_odds_of_mean(stacked):
    mean = probabilities("log-odds", stacked).mean(0)
    return np.log(mean) - np.log1p(-mean)


def _same(stacked):
    assert all(np.array_equal(each, stacked[0]) for each in stacked), "the members differ"
    return stacked[0]


_COMBINED = {
    "values": lambda stacked: np.asarray(stacked, "float64").mean(0),
    "probabilities": lambda stacked: np.asarray(stacked, "float64").mean(0),
    "log-probabilities": _log_mean,
    "log-odds": _log_odds_of_mean,
    "same": _same,
}
