"""What restarts do to the weights."""

import random

import keras
import numpy as np
import pytest
from keras import layers

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.storage.manifest import read_manifest
from snapshot_ensemble.storage.record import Progress
from snapshot_ensemble.training import shrink_perturb
from snapshot_ensemble.training.shrink_perturb import Restarter, parts_of, trained_before

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


class RestartRecorder(keras.callbacks.Callback):
    """Records the weights before and after each restart."""

    def __init__(self):
        super().__init__()
        self.at_end, self.at_begin = [], []

    def on_epoch_begin(self, epoch, logs=None):
        self.at_begin.append(self.model.get_weights())

    def on_epoch_end(self, epoch, logs=None):
        self.at_end.append(self.model.get_weights())


def watched(model, epochs=3, cycles=3, **arguments):
    """The weights before and after each restart, of a run with one epoch a cycle."""
    recorder = RestartRecorder()
    ens = SnapshotEnsemble(model, cycles=cycles, lr_init=0.1, **arguments)
    given = {"validation_data": (X, Y), "callbacks": [recorder]}
    ens.fit(X, Y, epochs=epochs, batch_size=8, verbose=0, **given)
    return ens, list(zip(recorder.at_end[:-1], recorder.at_begin[1:], strict=True))


def test_a_warm_restart_changes_nothing_and_draws_nothing():
    model = net()
    state = random.getstate()
    ens, restarts = watched(model, shrink=1.0)
    for before, after in restarts:
        for one, other in zip(before, after, strict=True):
            np.testing.assert_array_equal(one, other)
    assert random.getstate() == state
    assert "shrink" not in ens.history


@pytest.mark.sampled(2, 2)
@pytest.mark.parametrize("shrink", [0.0, 0.25, 0.5, np.float32(0.5)])
def test_each_weight_is_mixed_with_a_new_draw_of_its_own_initializer(shrink):
    _, restarts = watched(net(), shrink=shrink)
    limits = [
        np.sqrt(6 / (4 + 50)),
        0,
        np.sqrt(6 / (50 + 3)),
        0,
    ]  # Glorot's limits; biases start at zero.
    draws = []
    for before, after in restarts:
        actual = [
            (b.astype("float64") - shrink * a) / (1 - shrink)
            for a, b in zip(before, after, strict=True)
        ]
        draws.append(actual)
        for draw, limit in zip(actual, limits, strict=True):
            assert np.abs(draw).max() <= limit + 1e-6
        # The first kernel, with 200 values, is large enough to test for a uniform distribution.
        assert np.std(actual[0]) == pytest.approx(limits[0] / np.sqrt(3), rel=0.15)
    assert not np.allclose(draws[0][0], draws[1][0], atol=1e-3)  # Each draw is new.


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
    record = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: slots.append(ens.model.optimizer.variables[-1].numpy()),
        on_epoch_end=lambda epoch, logs: slots.append(ens.model.optimizer.variables[-1].numpy()),
    )
    ens = SnapshotEnsemble(net(), cycles=2, lr_init=0.1, shrink=0.5)
    ens.fit(X, Y, epochs=2, verbose=0, callbacks=[record])
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


@pytest.mark.slow
def test_layers_that_were_trained_before_are_carried_over():
    model = compiled(keras.Sequential([backbone(), layers.Dense(3, "softmax", name="head")]))
    parts = parts_of(model)
    assert [part.paths[0][-1] for part in parts] == ["plain", "norm", "dense", "head"]
    assert trained_before(parts) == [0, 1, 2]
    ens, restarts = watched(model, shrink=0.5)
    for before, after in restarts:
        same = [np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
        assert same == [True] * (len(same) - 2) + [False] * 2
    # In a second `fit` as well, although all layers have been trained by then.
    end, recorder = ens.model.get_weights(), RestartRecorder()
    ens.fit(X, Y, epochs=3, verbose=0, callbacks=[recorder])
    same = [np.array_equal(a, b) for a, b in zip(end, recorder.at_begin[0], strict=True)]
    assert same == [True] * (len(same) - 2) + [False] * 2


def test_a_second_fit_begins_with_a_restart():
    ens, _ = watched(net(), epochs=2, cycles=2, shrink=0.5)
    before, recorder = ens.model.get_weights(), RestartRecorder()
    assert [cycle.shrink for cycle in ens.plan(4)] == [0.5, 0.5]
    ens.fit(X, Y, epochs=2, verbose=0, callbacks=[recorder])
    assert not np.array_equal(before[0], recorder.at_begin[0][0])


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "shrink", [{"head": 0.5}, {"backbone": 0.5}, {"backbone": 0.5, "dense": 1.0}]
)
def test_shrink_by_layer_name(shrink):
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


def test_shrink_is_in_the_plan_the_history_and_the_manifest(tmp_path):
    ens, _ = watched(net(), shrink=0.25, directory=tmp_path / "run")
    assert [cycle.shrink for cycle in SnapshotEnsemble(net(), cycles=5, shrink=0.25).plan(5)] == [
        1
    ] + [0.25] * 4
    assert "shrink" in str(ens.plan(3))
    assert "shrink" not in str(SnapshotEnsemble(net(), cycles=5, shrink=1).plan(5))
    assert ens.history["shrink"] == [1, 0.25, 0.25]
    again = SnapshotEnsemble.load(tmp_path / "run")
    assert again.shrink == 0.25
    assert again.history["shrink"] == [1, 0.25, 0.25]
    manifest = tmp_path / "run" / "ensemble.json"
    assert read_manifest(manifest, manifest.read_bytes()).ensemble["spared"] == []


def test_a_restart_is_printed(capfd):
    keras.config.enable_interactive_logging()
    SnapshotEnsemble(net(), cycles=2, lr_init=0.1, shrink=0.5).fit(X, Y, epochs=2, verbose=2)
    assert "Restart with shrink=0.5: weights are mixed with a new draw" in capfd.readouterr().out


class Subclass(keras.Model):
    """A subclassed model without a config."""

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
def test_subclassed_models_can_shrink(built):
    model = compiled(Subclass())
    if built:
        model(X)
    _, restarts = watched(model, shrink=0.0)
    for before, after in restarts:
        assert not np.array_equal(before[0], after[0])
        assert not after[1].any()  # Biases start at zero.


def test_weights_with_an_unknown_initializer_are_an_error_before_training():
    model = compiled(Subclass(with_weight=True))
    model(X)
    with pytest.raises(
        ValueError, match=r"not known how these are initialised\. Received: subclass.*get_config"
    ):
        SnapshotEnsemble(model, shrink=0.5).fit(X, Y, epochs=5)
    ens, restarts = watched(model, shrink="auto")  # With `auto`, restarts are warm instead.
    assert len(ens) == 3
    assert all(np.array_equal(a, b) for pair in restarts for a, b in zip(*pair, strict=True))


def test_frozen_weights_may_have_an_unknown_initializer():
    model = compiled(Subclass(with_weight=True, trainable=False))
    model(X)
    _, restarts = watched(model, shrink=0.0)
    changed = [not np.array_equal(a, b) for a, b in zip(*restarts[0], strict=True)]
    assert sum(changed) == 4
    assert len(changed) == 5


def test_a_pretrained_model_shrinks_only_by_layer_name():
    model = net()
    model.fit(X, Y, verbose=0)
    with pytest.raises(
        ValueError, match=r"all layers of this model were\. Received: shrink=0\.5\. N"
    ):
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
def test_invalid_values_are_refused(shrink, error, message):
    with pytest.raises(error, match=message):
        SnapshotEnsemble(net(), shrink=shrink)


def test_unknown_layer_names_are_an_error_before_training():
    message = r"Received: foot\. The layers with weights are: head, hidden, "
    with pytest.raises(ValueError, match=message):
        SnapshotEnsemble(net(), shrink={"foot": 0.5}).fit(X, Y, epochs=5)


def test_auto_shrinks_once_the_run_has_overfitted(monkeypatch):
    checked = []

    def overfitted_after_two_cycles(history, scale, unfinished):
        checked.append(len(history["cycle"]))
        return len(checked) > 1

    monkeypatch.setattr(shrink_perturb, "has_overfitted", overfitted_after_two_cycles)
    ens, restarts = watched(net(), shrink="auto")
    assert checked == [1, 2]
    same = [np.array_equal(before[0], after[0]) for before, after in restarts]
    assert same == [True, False]
    assert ens.history["shrink"] == [1, 1, 0.5]
    assert [cycle.shrink for cycle in SnapshotEnsemble(net(), cycles=5, shrink="auto").plan(5)][
        1
    ] == "auto"


@pytest.mark.slow
@pytest.mark.parametrize(("labels", "expected"), [(RNG.permutation(Y), [1, 0.5]), (Y, [1, 1])])
def test_auto_shrinks_when_the_validation_labels_are_random(labels, expected):
    # With random validation labels, the model fits its training data and does not generalise.
    model = net()
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    model.compile(optimizer, "sparse_categorical_crossentropy", steps_per_execution=3)
    ens = SnapshotEnsemble(model, cycles=2, lr_init=0.1)
    given = {"validation_data": (X, labels), "batch_size": 8, "verbose": 0}
    ens.fit(X, Y, epochs=60, **given)
    assert ens.history["loss"][29] < 0.3
    assert ens.history.get("shrink", [1] * 60)[::30] == expected


def test_restarts_are_warm_by_default():
    assert Restarter().is_warm
    assert Restarter().restart(net(), Progress()) == 1


def test_auto_looks_for_parts_only_if_there_are_validation_data(monkeypatch):
    def never(model):
        raise AssertionError("looked for parts")

    monkeypatch.setattr(shrink_perturb, "parts_of", never)
    SnapshotEnsemble(net(), cycles=2).fit(X, Y, epochs=2, verbose=0)
    for given in ({"validation_data": (X, Y)}, {"validation_split": 0.5}):
        with pytest.raises(AssertionError, match="looked for parts"):
            SnapshotEnsemble(net(), cycles=2).fit(X, Y, epochs=2, verbose=0, **given)
