"""What a restart leaves of the weights."""

import random

import keras
import numpy as np
import pytest
from keras import layers

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.training.shrink_perturb import (
    Restarter,
    has_overfitted,
    parts_of,
    trained_before,
)

RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 4)).astype("float32")
Y = np.arange(24) % 3


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)


def compiled(model, learning_rate=0.1):
    model.compile(
        keras.optimizers.SGD(learning_rate, momentum=0.9),
        "sparse_categorical_crossentropy",
        run_eagerly=True,
    )
    return model


def net(*inside, **arguments):
    hidden = layers.Dense(50, "relu", name="hidden", **arguments)
    head = layers.Dense(3, "softmax", name="head")
    return compiled(keras.Sequential([keras.Input((4,)), hidden, *inside, head]))


class Watching(keras.callbacks.Callback):
    """Keeps the weights before and after each restart."""

    def __init__(self):
        super().__init__()
        self.at_end, self.at_begin = [], []

    def on_epoch_begin(self, epoch, logs=None):
        self.at_begin.append(self.model.get_weights())

    def on_epoch_end(self, epoch, logs=None):
        self.at_end.append(self.model.get_weights())


def watched(model, epochs=3, cycles=3, **arguments):
    """The weights before and after each restart, of a run with one epoch a cycle."""
    watching = Watching()
    ens = SnapshotEnsemble(model, cycles=cycles, lr_init=0.1, **arguments)
    given = {"validation_data": (X, Y), "callbacks": [watching]}
    ens.fit(X, Y, epochs=epochs, batch_size=8, verbose=0, **given)
    return ens, list(zip(watching.at_end[:-1], watching.at_begin[1:], strict=True))


def test_a_warm_restart_changes_nothing_and_draws_nothing():
    model = net()
    state = random.getstate()
    ens, restarts = watched(model, shrink=1.0)
    for before, after in restarts:
        for one, other in zip(before, after, strict=True):
            np.testing.assert_array_equal(one, other)
    assert random.getstate() == state
    assert "shrink" not in ens.history


@pytest.mark.parametrize("shrink", [0.0, 0.25, 0.5, np.float32(0.5)])
def test_each_weight_goes_towards_a_fresh_draw_of_its_own_initializer(shrink):
    _, restarts = watched(net(), shrink=shrink)
    limits = [np.sqrt(6 / (4 + 50)), 0, np.sqrt(6 / (50 + 3)), 0]  # Of Glorot's, and zeros.
    draws = []
    for before, after in restarts:
        actual = [
            (b.astype("float64") - shrink * a) / (1 - shrink)
            for a, b in zip(before, after, strict=True)
        ]
        draws.append(actual)
        for draw, limit in zip(actual, limits, strict=True):
            assert np.abs(draw).max() <= limit + 1e-6
        # Spread as a uniform distribution is: the kernel of 200 numbers tells.
        assert np.std(actual[0]) == pytest.approx(limits[0] / np.sqrt(3), rel=0.15)
    assert not np.allclose(draws[0][0], draws[1][0], atol=1e-3)  # Another one each time.


def test_an_initializer_with_a_seed_draws_other_numbers_at_each_restart():
    seeded = keras.initializers.RandomNormal(stddev=1.0, seed=7)
    model = net(kernel_initializer=seeded)
    first = model.get_weights()[0]
    _, restarts = watched(model, shrink=0.0)
    one, other = (after[0] for _, after in restarts)
    assert not np.allclose(one, other)
    assert not np.allclose(one, first)
    assert np.std(one) == pytest.approx(1, rel=0.2)


def test_frozen_weights_and_statistics_are_carried_over():
    model = net(layers.BatchNormalization(), layers.Dense(5, name="frozen"))
    model.get_layer("frozen").trainable = False
    compiled(model)
    _, restarts = watched(model, shrink=0.5)
    names = [variable.path for variable in model.weights]
    for before, after in restarts:
        for name, one, other in zip(names, before, after, strict=True):
            kept = "frozen" in name or "moving" in name
            assert np.array_equal(one, other) == kept, name


def test_optimizer_slots_are_carried_over():
    slots = []
    look = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: slots.append(ens.model.optimizer.variables[-1].numpy()),
        on_epoch_end=lambda epoch, logs: slots.append(ens.model.optimizer.variables[-1].numpy()),
    )
    ens = SnapshotEnsemble(net(), cycles=2, lr_init=0.1, shrink=0.5)
    ens.fit(X, Y, epochs=2, verbose=0, callbacks=[look])
    np.testing.assert_array_equal(slots[1], slots[2])
    assert slots[1].any()


def backbone():
    inside = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6, use_bias=False, name="plain"),
            layers.BatchNormalization(name="norm"),
            layers.Dense(6, "relu", name="dense"),
        ],
        name="backbone",
    )
    compiled(keras.Sequential([inside, layers.Dense(3, "softmax")])).fit(X, Y, verbose=0)
    return inside


def test_layers_that_were_trained_before_are_carried_over():
    model = compiled(keras.Sequential([backbone(), layers.Dense(3, "softmax", name="head")]))
    parts = parts_of(model)
    assert [part.path[-1] for part in parts] == ["plain", "norm", "dense", "head"]
    assert trained_before(parts) == [0, 1, 2]
    ens, restarts = watched(model, shrink=0.5)
    for before, after in restarts:
        same = [np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
        assert same == [True] * (len(same) - 2) + [False] * 2
    # Also by a second `fit`, before which all of it was trained.
    watching = Watching()
    ens.fit(X, Y, epochs=3, verbose=0, callbacks=[watching])
    for a, b in zip(restarts[-1][1][:-2], watching.at_begin[0][:-2], strict=True):
        assert a.shape == b.shape
    assert ens._restarter.spared == [0, 1, 2]


def test_a_second_fit_begins_with_a_restart():
    ens, _ = watched(net(), epochs=2, cycles=2, shrink=0.5)
    before, watching = ens.model.get_weights(), Watching()
    assert [cycle.shrink for cycle in ens.plan(4)] == [0.5, 0.5]
    ens.fit(X, Y, epochs=2, verbose=0, callbacks=[watching])
    assert not np.array_equal(before[0], watching.at_begin[0][0])


@pytest.mark.parametrize(
    "shrink", [{"head": 0.5}, {"backbone": 0.5}, {"backbone": 0.5, "dense": 1.0}]
)
def test_layers_by_name(shrink):
    model = compiled(keras.Sequential([backbone(), layers.Dense(3, "softmax", name="head")]))
    ens, restarts = watched(model, shrink=shrink)
    names = [variable.path for variable in model.weights]
    for before, after in restarts:
        for name, a, b in zip(names, before, after, strict=True):
            layer = name.split("/")[-2]
            share = shrink.get(layer, shrink.get("backbone", 1) if layer != "head" else 1)
            expected = share != 1 and "moving" not in name
            assert np.array_equal(a, b) != expected, name
    assert str(shrink) in str(ens.plan(3))


def test_the_plan_the_history_and_the_manifest_say_it(tmp_path):
    ens, _ = watched(net(), shrink=0.25, directory=tmp_path / "run")
    assert [cycle.shrink for cycle in SnapshotEnsemble(net(), shrink=0.25).plan(5)] == [1] + [
        0.25
    ] * 4
    assert "shrink" in str(ens.plan(3))
    assert "shrink" not in str(SnapshotEnsemble(net(), shrink=1).plan(5))
    assert ens.history["shrink"] == [1, 0.25, 0.25]
    again = SnapshotEnsemble.load(tmp_path / "run")
    assert again.shrink == 0.25
    assert again.history["shrink"] == [1, 0.25, 0.25]
    assert again._restarter.spared == []


def test_a_restart_is_printed(capfd):
    keras.config.enable_interactive_logging()
    SnapshotEnsemble(net(), cycles=2, lr_init=0.1, shrink=0.5).fit(X, Y, epochs=2, verbose=2)
    assert "Restart with 0.5 of the weights, the rest drawn anew" in capfd.readouterr().out


class Own(keras.Model):
    """A subclass without a config."""

    def __init__(self, with_weight=False, trainable=True):
        super().__init__()
        self.hidden = layers.Dense(6, "relu")
        self.head = layers.Dense(3, "softmax")
        self.scale = 1.0
        if with_weight:
            self.scale = self.add_weight(shape=(1,), initializer="ones", trainable=trainable)

    def call(self, inputs):
        return self.head(self.hidden(inputs) * self.scale)


@pytest.mark.parametrize("built", [True, False])
def test_subclassed_models(built):
    model = compiled(Own())
    if built:
        model(X)
    _, restarts = watched(model, shrink=0.0)
    for before, after in restarts:
        assert not np.array_equal(before[0], after[0])
        assert not after[1].any()  # A bias begins at zero.


def test_weights_of_which_nothing_is_known_are_named_before_training():
    model = compiled(Own(with_weight=True))
    model(X)
    with pytest.raises(ValueError, match=r"nothing is known of how these began: own.*get_config"):
        SnapshotEnsemble(model, shrink=0.5).fit(X, Y, epochs=5)
    ens, restarts = watched(model, shrink="auto")  # Which is never in the way.
    assert len(ens) == 3
    assert all(np.array_equal(a, b) for pair in restarts for a, b in zip(*pair, strict=True))


def test_weights_that_are_not_trained_need_not_be_known():
    model = compiled(Own(with_weight=True, trainable=False))
    model(X)
    _, restarts = watched(model, shrink=0.0)
    changed = [not np.array_equal(a, b) for a, b in zip(*restarts[0], strict=True)]
    assert sum(changed) == 4
    assert len(changed) == 5


def test_a_model_that_was_trained_before_is_not_torn_down_unasked():
    model = net()
    model.fit(X, Y, verbose=0)
    with pytest.raises(ValueError, match=r"all that there are\. Received: shrink=0\.5\. N"):
        SnapshotEnsemble(model, shrink=0.5).fit(X, Y, epochs=5)
    _, restarts = watched(model, shrink={"head": 0.5})
    assert all(np.array_equal(before[0], after[0]) for before, after in restarts)
    assert not any(np.array_equal(before[2], after[2]) for before, after in restarts)


@pytest.mark.parametrize(
    ("shrink", "error", "message"),
    [
        (1.5, ValueError, r"between 0 and 1\. Received: shrink=1\.5"),
        (-0.1, ValueError, r"at least 0\. Received: shrink=-0\.1"),
        (None, TypeError, r"a number\. Received: shrink=None"),
        ({"head": 2}, ValueError, r"between 0 and 1\. Received: shrink=2"),
        ("half", ValueError, r"or 'auto'\. Received: shrink='half'"),
    ],
)
def test_what_it_may_be(shrink, error, message):
    with pytest.raises(error, match=message):
        SnapshotEnsemble(net(), shrink=shrink)


def test_unknown_names_are_an_error_before_training():
    message = r"Received: foot\. There are: head, hidden, "
    with pytest.raises(ValueError, match=message):
        SnapshotEnsemble(net(), shrink={"foot": 0.5}).fit(X, Y, epochs=5)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([3.0, 1.0], False),  # One cycle.
        ([1.0, 1.04], False),
        ([1.0, 1.06], True),
        ([-1.0, -0.96], False),
        ([-1.0, -0.94], True),
        ([3.0, 1.0, 2.0, 0.89], False),  # Only ends of cycles count.
        ([3.0, 1.0, 2.0, 0.91], True),
        ([3.0, -1.0, 2.0, -1.11], False),
        ([3.0, -1.0, 2.0, -1.09], True),
        ([3.0, 1.0, 0.8, 0.83], False),  # And the least, wherever it was.
        ([3.0, 1.0, 0.8, 0.85], True),
        ([0.98, 1.0, 2.0, 0.89], True),
        ([3.0, 1.0, 2.0, 0.87, 2.0, 0.78], False),
        ([3.0, 1.0, 2.0, 0.87, 2.0, 0.79], True),
        ([3.0, 1.0, 0.76, 1.0], False),  # What the first cycle missed, others would as well.
        ([3.0, 1.0, 0.78, 1.0], True),
        ([1.0, 1.04, 0.76, 1.0], False),
        ([0.99, 1.03, 0.77, 1.0], True),
        ([3.0, -1.0, -1.5, -1.0], False),
        ([3.0, -1.0, -1.4, -1.0], True),
        ([3.0, 1.0, 2.0, 1.1, 2.0, 0.5], True),  # Once and for all.
        ([3.0, 1.0, 1.2, None], True),  # With `validation_freq` the last that is known.
        ([None, None, None, None], False),
        ([], False),
    ],
)
def test_when_a_run_has_overfitted(losses, expected):
    history = {"cycle": [i // 2 for i in range(len(losses))], "val_loss": losses}
    learned = {**history, "loss": [-9.0 if (loss or 1) < 0 else 0.1 for loss in losses]}
    assert has_overfitted(learned) is expected
    assert not has_overfitted({name: learned[name] for name in ("cycle", "loss")})
    # What is as bad on the training data has not been learned by heart.
    assert not has_overfitted({**history, "loss": losses})


@pytest.mark.parametrize(
    ("loss", "val_loss", "expected"),
    [(0.49, 1.0, True), (0.51, 1.0, False), (-1.51, -1.0, True), (-1.49, -1.0, False)],
)
def test_how_far_below_the_training_loss_must_be(loss, val_loss, expected):
    history = {"cycle": [0, 0], "loss": [3.0, loss], "val_loss": [val_loss - 0.1, val_loss]}
    assert has_overfitted(history) is expected


def test_auto_tears_down_once_the_run_has_overfitted(monkeypatch):
    asked = []

    def at_the_third(history):
        asked.append(len(history["cycle"]))
        return len(asked) > 1

    monkeypatch.setattr("snapshot_ensemble.training.shrink_perturb.has_overfitted", at_the_third)
    ens, restarts = watched(net(), shrink="auto")
    assert asked == [1, 2]
    same = [np.array_equal(before[0], after[0]) for before, after in restarts]
    assert same == [True, False]
    assert ens.history["shrink"] == [1, 1, 0.5]
    assert [cycle.shrink for cycle in SnapshotEnsemble(net(), shrink="auto").plan(5)][1] == "auto"


@pytest.mark.parametrize(("labels", "expected"), [(RNG.permutation(Y), [1, 0.5]), (Y, [1, 1])])
def test_auto_notices_what_cannot_be_learned(labels, expected):
    # Of labels at random the net knows its own rows by heart, and nothing of any others.
    model = net()
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    model.compile(optimizer, "sparse_categorical_crossentropy", steps_per_execution=3)
    ens = SnapshotEnsemble(model, cycles=2, lr_init=0.1)
    given = {"validation_data": (X, labels), "batch_size": 8, "verbose": 0}
    ens.fit(X, Y, epochs=60, **given)
    assert ens.history["loss"][29] < 0.3
    assert ens.history.get("shrink", [1] * 60)[::30] == expected


def test_a_restarter_by_itself_is_warm():
    assert Restarter().is_warm
    assert Restarter().restart(net(), {}) == 1


def test_auto_takes_layers_apart_only_where_there_are_validation_data(monkeypatch):
    def never(model):
        raise AssertionError("taken apart")

    monkeypatch.setattr("snapshot_ensemble.training.shrink_perturb.parts_of", never)
    SnapshotEnsemble(net(), cycles=2).fit(X, Y, epochs=2, verbose=0)
    for given in ({"validation_data": (X, Y)}, {"validation_split": 0.5}):
        with pytest.raises(AssertionError, match="taken apart"):
            SnapshotEnsemble(net(), cycles=2).fit(X, Y, epochs=2, verbose=0, **given)
