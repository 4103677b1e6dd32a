"""The range test: its curve, its suggestion, and that the model is left unchanged."""

import random

import keras
import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import layers

from snapshot_ensemble import SnapshotEnsemble, plots
from snapshot_ensemble.training.lr_range_test import smooth, suggest

mpl.use("Agg")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 4)).astype("float32")
Y = (X @ np.asarray([1.0, -2.0, 0.5, 3.0]) + 1).astype("float32")


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)


def linear(optimizer="sgd", **arguments):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
    model.compile(optimizer, "mse", **arguments)
    return model


def classifier(optimizer="sgd"):
    inside = [layers.Dense(16, "relu"), layers.BatchNormalization(), layers.Dropout(0.1)]
    model = keras.Sequential([keras.Input((4,)), *inside, layers.Dense(2, "softmax")])
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


@pytest.mark.slow
def test_losses_match_gradient_descent_in_numpy():
    model = linear()
    w, b = (array.astype("float64") for array in model.get_weights())
    actual = SnapshotEnsemble(model).find_lr(X, Y, batch_size=64, lr_min=1e-3, lr_max=0.3, steps=40)
    np.testing.assert_allclose(actual.rates, np.geomspace(1e-3, 0.3, 40))
    for rate, loss in zip(actual.rates, actual.losses, strict=True):
        residual = X @ w[:, 0] + b[0] - Y
        assert loss == pytest.approx(np.mean(residual**2), rel=1e-4)
        w = w - rate * (2 * X.T @ residual / 64)[:, None]
        b = b - rate * 2 * residual.mean()


def test_an_execution_of_several_steps_has_one_rate_and_its_mean_loss():
    actual = SnapshotEnsemble(linear(steps_per_execution=2)).find_lr(X, Y, batch_size=8, steps=12)
    assert len(actual.rates) == len(actual.losses) == 12


OPTIMIZERS = {
    "a rate": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(0.02),
    "a schedule": lambda: keras.optimizers.SGD(
        keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.9), momentum=0.9
    ),
    "loss scaling": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.02)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "trained"), [*((name, True) for name in OPTIMIZERS), ("Adam", False)]
)
def test_the_model_and_the_generators_are_restored(optimizer, trained):
    y = (Y > 0).astype(int)

    def run(with_test):
        keras.utils.set_random_seed(1)
        model = classifier(OPTIMIZERS[optimizer]())
        if trained:
            model.fit(X, y, verbose=0)
        if with_test:
            history = vars(model).get("history")
            generators = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
            SnapshotEnsemble(model).find_lr(X, y, batch_size=16, steps=30)
            now = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
            assert now == generators
            assert vars(model).get("history") is history
            assert not model.stop_training
        model.fit(X, y, epochs=2, verbose=0)
        return [*model.get_weights(), *(v.numpy() for v in model.optimizer.variables)]

    for one, other in zip(run(True), run(False), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_model_is_restored_after_an_exception():
    losses = []

    def failing_loss(y_true, y_pred):
        losses.append(keras.ops.mean((y_true - y_pred) ** 2))
        if len(losses) == 3:
            raise ZeroDivisionError
        return losses[-1]

    model = linear()
    model.compile("sgd", failing_loss, run_eagerly=True)
    before = model.get_weights()
    with pytest.raises(ZeroDivisionError):
        SnapshotEnsemble(model, task="regression").find_lr(X, Y, steps=30)
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.01)


@pytest.mark.slow
def test_the_test_ends_when_the_loss_diverges():
    actual = SnapshotEnsemble(linear()).find_lr(X, Y, batch_size=64, lr_max=1e4, steps=200)
    assert len(actual.rates) < 200
    assert np.isfinite(actual.losses).all()
    # Gradient descent diverges at rates above 2 / (largest eigenvalue of the Hessian).
    inputs = np.c_[X, np.ones(64)]
    highest = 2 / np.linalg.eigvalsh(2 * inputs.T @ inputs / 64).max()
    assert highest / 100 < actual.suggestion < highest


def test_a_model_that_is_not_built_is_built_first():
    model = keras.Sequential([layers.Dense(1)])
    model.compile("sgd", "mse")
    assert SnapshotEnsemble(model).find_lr(X, Y, steps=50, lr_max=1.0).suggestion < 1


@given(st.floats(-5, 5), st.floats(-5, 5), st.integers(30, 100))
def test_smoothing_does_not_change_lines_away_from_their_ends(level, slope, count):
    rates = np.geomspace(1e-6, 10, count)
    line = level + slope * np.log(rates)
    inner = slice(count // 4, -(count // 4))
    np.testing.assert_allclose(smooth(rates, line)[inner], line[inner], atol=1e-6)


def test_the_suggestion_is_where_nine_tenths_of_the_fall_are_reached():
    rates = np.geomspace(1e-3, 1e3, 7)
    assert suggest(rates, np.asarray([10, 9, 4, 1.1, 0.9, 0.0, 50])) == pytest.approx(10)
    assert suggest(rates, np.asarray([10, 9, 4, 0.9, 0.5, 0.0, 50])) == pytest.approx(1)


def test_result_prints_and_plots():
    actual = SnapshotEnsemble(linear()).find_lr(X, Y, steps=60)
    assert str(actual).startswith(f"suggested peak: {actual.suggestion:.2g} (loss ")
    ax = plots.plot_lr(actual)
    drawn = {line.get_label(): line.get_xydata() for line in ax.lines}
    np.testing.assert_array_equal(drawn["each batch"].T, [actual.rates, actual.losses])
    np.testing.assert_array_equal(drawn["smoothed"].T, [actual.rates, actual.smoothed])
    assert set(drawn[f"suggested peak: {actual.suggestion:.2g}"][:, 0]) == {actual.suggestion}
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_xscale()) == ("learning rate", "loss", "log")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr_min": 0}, ValueError, r"above 0\. Received: lr_min=0"),
        ({"lr_min": 1.0, "lr_max": 0.5}, ValueError, r"Received: lr_min=1\.0, lr_max=0\.5"),
        ({"steps": 5}, ValueError, r"at least 10\. Received: steps=5"),
        ({"epochs": 5, "callbacks": []}, ValueError, r"Received: callbacks, epochs\. Leave out"),
        ({"epoch": 5}, TypeError, r"no argument `epoch`\. Received: epoch=5"),
        ({"lr_min": 10.0, "lr_max": 1e3}, ValueError, r"never falls.*lr_max=1000\.0, steps=300"),
    ],
)
def test_invalid_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        SnapshotEnsemble(linear()).find_lr(X, Y, **arguments)
