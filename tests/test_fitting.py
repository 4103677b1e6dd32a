"""Epochs, cycles and rates in `plan` and `fit`, and arguments that `fit` refuses."""

import re

import keras
import numpy as np
import pytest
from ensemble_cases import WEIGHTS, X, Y, fit, shown
from models import assert_same, classifier, ensemble_with, member_weights

from snapshot_ensemble import (
    CosineAnnealing,
    Cycle,
    Snapshot,
    SnapshotEnsemble,
)

RATE = 0.03125  # Exact in float32.


# The plan


@pytest.mark.parametrize("epochs", [3, 8])
def test_training_follows_the_plan(epochs):
    ens = SnapshotEnsemble(classifier(), cycles=3, lr_init=0.5, lr_min=0.25)
    plan = ens.plan(epochs)
    history = fit(ens, epochs=epochs).history
    # An epoch is one step here, so its rate is the one in the plan.
    rates = np.concatenate([cycle.rates(1) for cycle in plan])
    np.testing.assert_allclose(history["learning_rate"], rates, rtol=1e-6)
    assert history["cycle"] == [
        cycle.index for cycle in plan for _ in range(cycle.first_epoch, cycle.last_epoch + 1)
    ]
    assert [snapshot.epoch for snapshot in ens.snapshots] == [cycle.last_epoch for cycle in plan]
    assert plan[-1].last_epoch == epochs - 1


def test_a_schedule_replaces_equal_cycles():
    ens = SnapshotEnsemble(classifier(), schedule=CosineAnnealing(1, 2.0, 0.5, 0.25, 0.5))
    assert ens.plan(8) == [
        Cycle(0, 0, 0, 0.5, 0.25),
        Cycle(1, 1, 2, 0.25, 0.125),
        Cycle(2, 3, 7, 0.125, 0.0625),
    ]


@pytest.mark.parametrize("epochs", [0, -1, 1.5, True, "a", None])
def test_impossible_epochs_are_refused_by_plan(epochs):
    with pytest.raises((TypeError, ValueError), match=f"`epochs` must be.*epochs={epochs!r}"):
        SnapshotEnsemble(classifier()).plan(epochs)


# The peak rate


DECAY = keras.optimizers.schedules.ExponentialDecay(RATE, decay_steps=1, decay_rate=0.5)
OPTIMIZERS = {
    "float": lambda: keras.optimizers.SGD(RATE),
    "schedule": lambda: keras.optimizers.SGD(DECAY),
    "callable": lambda: keras.optimizers.SGD(lambda: RATE),
    "loss scaling": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(RATE)),
    "loss scaling of a schedule": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(DECAY)
    ),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_peak_is_the_compiled_rate(optimizer):
    model = classifier(OPTIMIZERS[optimizer]())
    model.fit(X, Y, verbose=0)  # Advances a Keras schedule.
    ens = SnapshotEnsemble(model, cycles=2)
    assert [cycle.lr_max for cycle in ens.plan(4)] == [RATE, RATE]
    assert fit(ens, epochs=2).history["learning_rate"] == [RATE, RATE]


def test_the_peak_of_a_schedule_without_one_is_the_compiled_rate():
    ens = SnapshotEnsemble(
        classifier(keras.optimizers.SGD(RATE)), schedule=CosineAnnealing(2, lr_multiplier=0.5)
    )
    assert [cycle.lr_max for cycle in ens.plan(4)] == [RATE, RATE / 2]


def test_the_peak_of_an_optimizer_by_name_is_its_default():
    [cycle] = SnapshotEnsemble(classifier("adam"), cycles=1).plan(1)
    assert cycle.lr_max == pytest.approx(keras.optimizers.Adam().get_config()["learning_rate"])


def test_the_peak_follows_the_rate_of_the_model():
    ens = SnapshotEnsemble(classifier(), cycles=1)
    ens.model.optimizer.learning_rate = 0.25
    assert ens.plan(1) == [Cycle(0, 0, 0, 0.25, 0.0)]


def test_a_floor_above_the_compiled_rate_is_refused_before_training():
    ens = SnapshotEnsemble(classifier(keras.optimizers.SGD(RATE)), cycles=2, lr_min=2 * RATE)
    weights = ens.model.get_weights()
    for attempt in (lambda: ens.plan(2), lambda: fit(ens, epochs=2)):
        with pytest.raises(ValueError, match=r"`lr_min`, the floor, must not be above"):
            attempt()
    assert_same([ens.model.get_weights()], [weights])


# The budget


def test_the_default_budget_is_ten_epochs_a_cycle():
    ens = SnapshotEnsemble(classifier(), cycles=2)
    assert fit(ens).history["cycle"] == [0] * 10 + [1] * 10
    assert len(ens) == 2


def test_the_default_budget_of_a_schedule_is_five_cycles():
    ens = SnapshotEnsemble(classifier(), schedule=CosineAnnealing(1, 1.5))
    lengths = [1, 2, 2, 3, 5]  # Of 1, 1.5, 2.25, 3.375 and 5.0625, halves to the even side.
    expected = [cycle for cycle, length in enumerate(lengths) for _ in range(length)]
    assert fit(ens).history["cycle"] == expected
    assert len(ens) == 5


def test_the_default_budget_comes_after_the_initial_epoch():
    history = fit(SnapshotEnsemble(classifier(), cycles=1), initial_epoch=3)
    assert history.epoch == list(range(3, 13))


# What `fit` refuses


class Foreign(keras.utils.PyDataset):
    """Data of another model."""

    def __init__(self):
        super().__init__()

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return np.zeros((2, 7)), np.zeros(2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"epochs": 1},
            ValueError,
            "at least one epoch for each cycle. Received: epochs=1, cycles=2. Train for 2 epochs",
        ),
        ({"epochs": 0}, ValueError, "`epochs` must be at least 1. Received: epochs=0"),
        ({"epochs": -2}, ValueError, "`epochs` must be at least 1. Received: epochs=-2"),
        ({"epochs": 2.5}, TypeError, "`epochs` must be a whole number. Received: epochs=2.5"),
        ({"epochs": True}, TypeError, "`epochs` must be a whole number. Received: epochs=True"),
        ({"epochs": "a"}, TypeError, "`epochs` must be a whole number. Received: epochs='a'"),
        ({"epoch": 4}, TypeError, "`fit` has no argument `epoch`. Received: epoch=4"),
        ({"validation": (X, Y)}, TypeError, "validation_data, validation_freq"),
        ({"lr_init": 0.1}, TypeError, "`fit` has no argument `lr_init`"),
        (
            {"epochs": 4, "initial_epoch": 4},
            ValueError,
            "must be above `initial_epoch`. Received: epochs=4, initial_epoch=4",
        ),
        (
            {"epochs": 4, "initial_epoch": 3},
            ValueError,
            "at least one epoch for each cycle",
        ),
        ({"epochs": 4, "initial_epoch": -1}, ValueError, "`initial_epoch` must be at least 0"),
        ({"epochs": 4, "initial_epoch": 0.5}, TypeError, "`initial_epoch` must be a whole number"),
        (
            {"epochs": 4, "callbacks": [keras.callbacks.ReduceLROnPlateau()]},
            ValueError,
            "no callback may set it. Received: callbacks with ReduceLROnPlateau",
        ),
        ({"epochs": 4, "x": Foreign(), "y": None}, ValueError, "shape"),
    ],
    ids=shown,
)
def test_refused_arguments_change_nothing(arguments, error, message):
    model = classifier(keras.optimizers.SGD(RATE))
    ens = ensemble_with(model, *WEIGHTS, cycles=2)
    ens.weights = [0.5, 0.25, 0.25]
    own = model.get_weights()
    for overwrite in (False, True):
        with pytest.raises(error, match=re.escape(message)):
            fit(ens, overwrite=overwrite, **arguments)
    assert_same(member_weights(ens), WEIGHTS)
    assert ens.snapshots == [Snapshot(0), Snapshot(1), Snapshot(2)]
    assert ens.history == {}
    np.testing.assert_array_equal(ens.weights, [0.5, 0.25, 0.25])
    assert_same([model.get_weights()], [own])
    assert float(model.optimizer.learning_rate.numpy()) == RATE
