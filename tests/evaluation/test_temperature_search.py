"""The search for the temperature against SciPy, and how often it goes through the data."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats

from snapshot_ensemble.evaluation import calibration
from snapshot_ensemble.evaluation.calibration import MANY, PRIOR, learn_temperature, tempered_loss
from snapshot_ensemble.evaluation.targets import Truth
from snapshot_ensemble.inference import blocks


def by_scipy(items, truths, shares):
    """The loss at a temperature, written out, and the temperature that is best with the prior."""

    def loss(temperature):
        total = 0.0
        for logs, truth, share in zip(items, truths, shares, strict=True):
            tempered = special.log_softmax(logs / temperature, axis=-1)
            total -= share * truth.weights @ np.sum(truth.targets * tempered, axis=-1)
        return total

    weights = np.concatenate([s * t.weights for t, s in zip(truths, shares, strict=True)])
    count = weights.sum() ** 2 / np.sum(weights**2)

    def penalised(temperature):
        # Up to a constant, the logarithm of the density of a gamma distribution.
        log_prior = stats.gamma(1 + PRIOR, scale=1 / PRIOR).logpdf(1 / temperature)
        return loss(temperature) - weights.sum() / count * log_prior

    options = {"xatol": 1e-10}
    found = optimize.minimize_scalar(
        lambda log: penalised(np.exp(log)),
        bounds=np.log((0.05, 20)),
        method="bounded",
        options=options,
    )
    return loss, penalised, min([0.05, float(np.exp(found.x)), 20.0], key=penalised)


def some(rng, rows, classes, scale, soft=False):
    """Log-probabilities, and targets that were drawn at a temperature of `scale`."""
    logs = special.log_softmax(scale * rng.normal(size=(rows, classes)), axis=-1)
    drawn = special.softmax(logs / scale, axis=-1)
    labels = (np.log(drawn) + rng.gumbel(size=logs.shape)).argmax(axis=-1)
    weights = rng.exponential(size=rows) * (rng.random(rows) < 0.8)
    weights[0] = 1
    targets = drawn if soft else np.eye(classes)[labels]
    return logs, Truth(targets, weights / weights.sum())


def check(items, truths, shares):
    actual = learn_temperature(items, truths, shares)
    _, penalised, expected = by_scipy(items, truths, shares)
    assert 0.05 <= actual <= 20
    assert penalised(actual) <= penalised(expected) + 1e-10
    assert penalised(actual) <= penalised(1.0) + 1e-12
    return actual, expected


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40),
    st.integers(2, 6),
    st.sampled_from([0.1, 0.5, 1, 3, 10, 40]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_no_temperature_has_a_lower_loss(rows, classes, scale, soft, seed):
    check(*map(list, zip((*some(np.random.default_rng(seed), rows, classes, scale, soft), 1.0))))


def test_several_outputs_share_the_temperature():
    rng = np.random.default_rng(0)
    items, truths = zip(some(rng, 300, 4, 3.0), some(rng, 900, 2, 0.7), strict=True)
    actual, expected = check(items, truths, [2.0, 0.5])
    assert actual == pytest.approx(expected, rel=1e-6)
    alone = [learn_temperature([i], [t], [1.0]) for i, t in zip(items, truths, strict=True)]
    assert min(alone) < actual < max(alone)


def counted(monkeypatch):
    """The number of items in each pass."""
    passes, moments = [], calibration._moments

    def counting(logs, *arguments):
        passes.append(len(logs))
        return moments(logs, *arguments)

    monkeypatch.setattr(calibration, "_moments", counting)
    return passes


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_few_passes_over_many_items(scale, monkeypatch):
    logs, truth = some(np.random.default_rng(1), 2 * MANY, 5, scale)
    passes = counted(monkeypatch)
    actual = learn_temperature([logs], [truth], [1.0])
    assert passes.count(len(logs)) <= 4
    assert set(passes) == {len(logs), len(logs) // 64}
    assert actual == pytest.approx(by_scipy([logs], [truth], [1.0])[-1], rel=1e-6)


def test_few_passes_where_the_slope_only_fades_away(monkeypatch):
    # All but one of the items are right, so the best temperature is low but above its bound.
    count = 5_000
    logs = np.log(np.repeat([[0.6, 0.4], [0.55, 0.45]], [count, 1], axis=0))
    truth = Truth(np.eye(2)[[0] * count + [1]], np.full(count + 1, 1 / (count + 1)))
    passes = counted(monkeypatch)
    actual, expected = check([logs], [truth], [1.0])
    assert actual == pytest.approx(expected, rel=1e-5)
    assert 0.05 < actual < 0.1
    assert len(passes) <= 25
    passes.clear()
    logs = np.log(np.repeat([[0.55, 0.45]], count + 1, axis=0))
    right = Truth(np.eye(2)[[0] * (count + 1)], truth.weights)
    assert learn_temperature([logs], [right], [1.0]) == 0.05
    assert len(passes) <= 25
    wrong = Truth(np.eye(2)[[1] * (count + 1)], truth.weights)
    assert learn_temperature([logs], [wrong], [1.0]) == 20


@pytest.mark.parametrize("rows", [1, 10, 100])
def test_a_few_rows_that_are_all_right_do_not_make_predictions_sure_of_everything(rows):
    logs = np.log(np.full((rows, 2), [0.9, 0.1]))
    right = Truth(np.eye(2)[[0] * rows], np.full(rows, 1 / rows))
    temperature, _ = check([logs], [right], [1.0])
    # The more rows there are, the surer.
    assert temperature == pytest.approx({1: 0.95, 10: 0.74, 100: 0.47}[rows], abs=0.01)


@pytest.mark.parametrize("numbers", [1, 50, 10**6])
def test_the_loss_at_a_temperature(numbers, monkeypatch):
    monkeypatch.setattr(blocks, "NUMBERS", numbers)
    logs, truth = some(np.random.default_rng(2), 90, 4, 2.0, soft=True)
    loss, *_ = by_scipy([logs], [truth], [1.0])
    for temperature in (0.05, 0.7, 1.0, 20.0):
        assert tempered_loss(logs, truth, temperature) == pytest.approx(loss(temperature))
