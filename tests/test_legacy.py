"""The callbacks of version 1.0, in `model.fit`."""

import inspect
import pathlib

import keras
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from models import three_classes

from snapshot_ensemble import (
    CosineAnnealing,
    GenerateSnapshotCallbacks,
    SnapshotEnsemble,
    SnapshotEnsembleCallback,
    VisualizeLR,
)

X, Y = three_classes(24)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def dense(optimizer="sgd", **arguments):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax")])
    model.compile(
        optimizer, "sparse_categorical_crossentropy", **{"run_eagerly": True, **arguments}
    )
    return model


class Rates(keras.callbacks.Callback):
    """Records the rate of each step, and the weights at the end of each epoch."""

    def __init__(self):
        super().__init__()
        self.steps, self.weights = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.steps.append(float(self.model.optimizer.learning_rate))

    def on_epoch_end(self, epoch, logs=None):
        self.weights.append(self.model.get_weights())


def fit(model, *callbacks, epochs=6, **arguments):
    return model.fit(
        X, Y, batch_size=8, epochs=epochs, verbose=0, callbacks=list(callbacks), **arguments
    )


def names_in(directory):
    return sorted(path.name for path in pathlib.Path(directory).iterdir())


def options(**more):
    return {"cycle_length": 2, "cycle_length_multiplier": 1.0, **more}


def test_signatures_and_defaults_are_those_of_1_0():
    expected = {
        "cycle_length": 10,
        "cycle_length_multiplier": 1.5,
        "lr_init": 0.01,
        "lr_min": 1e-6,
        "lr_multiplier": 0.9,
    }
    for function in (SnapshotEnsembleCallback, GenerateSnapshotCallbacks):
        actual = {n: p.default for n, p in inspect.signature(function).parameters.items()}
        assert actual == {**expected, "ensemble": True, "ensemble_options": None}
    actual = {n: p.default for n, p in inspect.signature(VisualizeLR).parameters.items()}
    assert actual == {"epochs": 500, **expected}


def test_the_example_in_the_readme_of_1_0_works(tmp_path):
    snapshotCB = SnapshotEnsembleCallback()  # noqa: N806  As in that README.
    model = dense(run_eagerly=False)
    model.fit(X, Y, epochs=26, verbose=0, callbacks=[snapshotCB])
    names = names_in("Ensemble/")
    assert names == ["Model-1.weights.h5", "Model-2.weights.h5"]
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax")])
    other.load_weights("Ensemble/Model-2.weights.h5")
    np.testing.assert_array_equal(other.get_weights()[0], model.get_weights()[0])


@pytest.mark.parametrize("eager", [True, False])
def test_each_step_has_the_rate_of_the_formula(eager):
    rates = Rates()
    arguments = options(cycle_length_multiplier=2.0, lr_init=0.1, lr_min=0.01, lr_multiplier=0.5)
    fit(dense(run_eagerly=eager), SnapshotEnsembleCallback(**arguments), rates)
    expected = []
    for length, factor in ((2, 1.0), (4, 0.5)):
        t = np.arange(3 * length) / (3 * length)
        low, high = 0.01 * factor, 0.1 * factor
        expected.extend(low + (high - low) / 2 * (1 + np.cos(np.pi * t)))
    np.testing.assert_allclose(rates.steps, expected, rtol=1e-6)


def test_no_file_is_written_and_nothing_printed_before_training(capsys):
    given = {"num_snapshots": 3}
    SnapshotEnsembleCallback(ensemble_options=given)
    GenerateSnapshotCallbacks(ensemble_options=given)
    assert given == {"num_snapshots": 3}
    assert names_in(".") == []
    assert capsys.readouterr().out == ""


def test_files_rotate_and_load_into_an_ensemble():
    model, rates = dense(), Rates()
    given = {"num_snapshots": 2, "dirpath": "kept/here", "model_prefix": "Mine"}
    callback = SnapshotEnsembleCallback(**options(), ensemble_options=given)
    assert callback.paths == []
    fit(model, callback, rates)
    assert names_in("kept/here") == ["Mine-1.weights.h5", "Mine-2.weights.h5"]
    # The third replaced the first.
    assert [path.name for path in callback.paths] == ["Mine-2.weights.h5", "Mine-1.weights.h5"]
    ens = SnapshotEnsemble.from_weights(model, callback.paths)
    for member, epoch in zip(ens, (3, 5), strict=True):
        for actual, expected in zip(member.get_weights(), rates.weights[epoch], strict=True):
            np.testing.assert_array_equal(actual, expected)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("epochs", "ends"), [(1, [0]), (3, [2]), (5, [1, 4]), (7, [1, 3, 6])])
def test_the_cycle_that_ends_with_training_is_saved_too(epochs, ends):
    model, rates = dense(), Rates()
    callback = SnapshotEnsembleCallback(**options(cycle_length=2))
    if epochs == 3:
        callback = SnapshotEnsembleCallback(cycle_length=10)
    fit(model, callback, rates, epochs=epochs)
    ens = SnapshotEnsemble.from_weights(model, callback.paths)
    assert len(ens) == len(ends)
    for member, epoch in zip(ens, ends, strict=True):
        np.testing.assert_array_equal(member.get_weights()[0], rates.weights[epoch][0])


def test_with_ensemble_false_only_the_rate_is_set():
    rates = Rates()
    history = fit(dense(), SnapshotEnsembleCallback(**options(), ensemble=False), rates)
    assert names_in(".") == []
    assert len(set(rates.steps)) > 3
    assert history.history["learning_rate"] == rates.steps[2::3]


def test_a_second_fit_continues_with_the_next_file():
    callback = SnapshotEnsembleCallback(**options(), ensemble_options={"num_snapshots": 3})
    model = dense()
    for _ in range(2):
        fit(model, callback, epochs=4)
    assert [path.name[:7] for path in callback.paths] == ["Model-2", "Model-3", "Model-1"]


def test_initial_epoch_shifts_the_plan():
    rates = Rates()
    fit(dense(), SnapshotEnsembleCallback(**options()), rates, epochs=6, initial_epoch=2)
    assert len(rates.steps) == 12
    assert [rates.steps[0], rates.steps[6]] == pytest.approx([0.01, 0.009])
    assert len(names_in("Ensemble")) == 2


def with_rate(rate):
    return dense(keras.optimizers.SGD(rate))


SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.9)


@pytest.mark.parametrize("rate", [0.25, SCHEDULE], ids=["number", "schedule"])
def test_the_optimizers_own_rate_is_restored(rate):
    model = with_rate(rate)
    fit(model, SnapshotEnsembleCallback(**options()))
    assert not {"train_step", "make_train_function"} & set(vars(model))
    own = model.optimizer._learning_rate
    assert own is SCHEDULE or float(own) == 0.25


@pytest.mark.sampled(3)
@pytest.mark.parametrize("again", ["fit", "train_on_batch", "the same callback"])
@pytest.mark.parametrize("rate", [0.25, SCHEDULE], ids=["number", "schedule"])
def test_after_an_exception_the_rate_is_restored_at_the_next_training(rate, again):
    def fail(epoch, logs):
        raise ZeroDivisionError

    model, callback = with_rate(rate), SnapshotEnsembleCallback(**options())
    with pytest.raises(ZeroDivisionError):
        fit(model, callback, keras.callbacks.LambdaCallback(on_epoch_end=fail))
    if again == "fit":
        fit(model, epochs=1)
    elif again == "train_on_batch":
        model.train_on_batch(X, Y)
    else:
        rates = Rates()
        fit(model, callback, rates, epochs=2)
        assert rates.steps[0] == pytest.approx(0.01)
    assert not {"train_step", "make_train_function"} & set(vars(model))
    own = model.optimizer._learning_rate
    assert own is SCHEDULE or float(own) == 0.25


def test_the_checkpoint_has_the_weights_with_the_lowest_validation_loss():
    callbacks = GenerateSnapshotCallbacks(**options(lr_init=0.5))
    model, rates = dense(), Rates()
    history = fit(model, *callbacks, rates, validation_data=(X, Y))
    best = int(np.argmin(history.history["val_loss"]))
    other = dense()
    other.load_weights("Ensemble/Model-Best.weights.h5")
    np.testing.assert_array_equal(other.get_weights()[0], rates.weights[best][0])
    assert len(callbacks[0].paths) == 3


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_validation_loss_that_is_not_finite_is_not_the_lowest(value):
    def spoil(epoch, logs):
        if epoch == 0:
            logs["val_loss"] = value

    spoiling, rates = keras.callbacks.LambdaCallback(on_epoch_end=spoil), Rates()
    callbacks = [spoiling, *GenerateSnapshotCallbacks(**options()), rates]
    fit(dense(), *callbacks, epochs=2, validation_data=(X, Y))
    other = dense()
    other.load_weights("Ensemble/Model-Best.weights.h5")
    np.testing.assert_array_equal(other.get_weights()[0], rates.weights[1][0])


def test_visualize_lr_plots_the_rates():
    before = plt.get_fignums()
    figure = VisualizeLR(epochs=6, cycle_length=2, cycle_length_multiplier=2.0, lr_init=0.1)
    assert isinstance(figure, Figure)
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    drawn = np.concatenate([line.get_ydata() for line in lines])
    schedule = CosineAnnealing(2, 2.0, lr_init=0.1, lr_min=1e-6, lr_multiplier=0.9)
    np.testing.assert_allclose(drawn, schedule.rates(6, 100))
    assert plt.get_fignums() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"ensemble_options": {"snapshots": 3}},
            "may have the keys 'num_snapshots', ",
        ),
        ({"ensemble_options": {"num_snapshots": 0}}, "`num_snapshots` must be at least 1. Receiv"),
        ({"lr_init": 0}, "`lr_init` must be finite and above 0. Received: lr_init=0"),
        ({"cycle_length": 0}, "`cycle_length` must be at least 1. Received: cycle_length=0"),
    ],
)
def test_invalid_values_are_refused(arguments, message):
    for function in (SnapshotEnsembleCallback, GenerateSnapshotCallbacks):
        with pytest.raises(ValueError, match=message):
            function(**arguments)
