"""What is decided from losses does not depend on the unit of the values."""

import math
import warnings

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.losses import GaussianNLL
from snapshot_ensemble.storage.snapshot import Snapshot
from snapshot_ensemble.training.cutting_short import decide
from snapshot_ensemble.training.loss_ratios import density, plain, scale_of
from snapshot_ensemble.training.member_checks import warn_of_stragglers
from snapshot_ensemble.training.overfitting import has_overfitted

losses = st.lists(st.floats(-3, 3), min_size=6, max_size=6)


def stragglers(history):
    snapshots = [
        Snapshot(i, i, 2 * i, i, 0.1, {"val_loss": loss})
        for i, loss in enumerate(history["val_loss"][1::2])
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_stragglers(snapshots, history, density)
    return [str(warning.message).count("member ") for warning in caught]


@given(losses, losses, st.floats(-20, 20))
def test_a_constant_changes_nothing_for_densities(loss, val_loss, constant):
    history = {"cycle": [0, 0, 1, 1, 2, 2], "loss": loss, "val_loss": val_loss}
    other = history | {name: [v + constant for v in history[name]] for name in ("loss", "val_loss")}
    for rule in (
        lambda found: has_overfitted(found, density),
        lambda found: decide(found, 0, 6, density).is_cut,
        lambda found: decide({"loss": found["loss"]}, 0, 6, density).is_cut,
        stragglers,
    ):
        assert rule(history) == rule(other)


def test_it_is_the_variance_of_errors():
    # A normal distribution of standard deviation 3 whose errors have it, too.
    loss = math.log(2 * math.pi * 9) / 2 + 0.5
    assert density(loss + math.log(2)) == pytest.approx(4 * density(loss))
    assert density(1e6) < math.inf
    assert math.isnan(density(math.nan))
    assert density(math.inf) == math.inf


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (GaussianNLL(), density),
        ("mse", plain),
        ([GaussianNLL(), GaussianNLL()], density),
        ([GaussianNLL(), "mse"], plain),
    ],
)
def test_which_losses_are_densities(loss, expected):
    x = keras.Input((4,))
    outputs = [keras.layers.Dense(2)(x) for _ in (loss if isinstance(loss, list) else [loss])]
    model = keras.Model(x, outputs if len(outputs) > 1 else outputs[0])
    model.compile("sgd", loss)
    assert scale_of(model) is expected


# The first member is: the values are far away from those it has seen.
@pytest.mark.sampled(3, 2)
@pytest.mark.filterwarnings("ignore:Far worse than the others")
@pytest.mark.parametrize("unit", [1.0, 1000.0, 0.001])
def test_a_run_is_cut_short_in_any_unit(unit):
    x = keras.Input((4,))
    outputs = keras.layers.Dense(2)(x)
    scaled = keras.layers.Rescaling([unit, 1.0], [0.0, 2 * math.log(unit)])(outputs)
    model = keras.Model(x, scaled)
    model.compile(keras.optimizers.SGD(0.01), GaussianNLL(), run_eagerly=True)
    rng = np.random.default_rng(0)
    inputs, y = rng.normal(size=(16, 4)), rng.normal(size=(16, 1))
    ens = SnapshotEnsemble(model, cycles="auto")
    # Their loss is less than 20 % higher in some units, but the errors are much larger in all.
    validation = (inputs, unit * (y + 1.5))
    ens.fit(inputs, unit * y, epochs=10, validation_data=validation, batch_size=16, verbose=0)
    assert ens.decisions[0].is_cut
    found = ens.decisions[0]
    if unit == 1000:
        assert not decide({"loss": [found.loss] * 2, "val_loss": [found.val_loss] * 2}, 0, 2).is_cut
