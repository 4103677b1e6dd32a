"""Sets and intervals: MAPIE's, ties, several items a row, and the coverage that they promise."""

import math

import keras
import numpy as np
import pytest
from conformal_cases import mapie_intervals, mapie_sets, shares_of
from keras import layers
from models import dense, eager, ensemble_of, one_batch, scaled_digits
from scipy import special, stats
from sklearn.datasets import load_diabetes

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.evaluation.conformal import Scored, _learned_rule
from snapshot_ensemble.evaluation.conformal_coverage import binomial_interval
from snapshot_ensemble.evaluation.conformal_scores import (
    RankedClasses,
    class_set,
    least_rows,
    quantile,
)
from snapshot_ensemble.storage.record import ConformalRule

RNG = np.random.default_rng(5)
LEVELS = [0.8, 0.9, 0.95]


def drawn(rows, classes=5):
    """Probabilities, and classes that are drawn from them."""
    p = special.softmax(2 * RNG.normal(size=(rows, classes)), axis=-1)
    return p, np.array([RNG.choice(classes, p=row) for row in p])


def scored(p, y):
    return Scored("kind", p, y, np.ones((len(y), 1, 1), bool), lambda _: None, False)


@pytest.mark.parametrize("method", ["lac", "aps", "raps"])
def test_sets_are_those_of_mapie(method):
    p, y = drawn(400 if method == "raps" else 300)
    new, _ = drawn(500)
    rule = _learned_rule(scored(p, y), method, LEVELS)
    sets = [np.asarray(class_set(new, rule, level, False)) for level in range(3)]
    np.testing.assert_array_equal(np.stack(sets, axis=-1), mapie_sets(method, p, y, new, LEVELS))
    assert 1 < sets[1].sum(axis=-1).mean() < 5


def test_a_rank_that_is_a_whole_number_is_taken_as_it_is():
    p, y = drawn(99)
    rule = _learned_rule(scored(p, y), "lac", [0.9])
    scores = np.sort(1 - p[np.arange(99), y])
    assert rule.quantiles == [[scores[89]]]
    edge = np.array([[1 - s, 0, 0, 0, s] for s in (scores[89], scores[90])])
    actual = np.asarray(class_set(edge, rule, 0, False))
    assert actual[:, 0].tolist() == [True, False]
    np.testing.assert_array_equal(actual, mapie_sets("lac", p, y, edge, [0.9])[..., 0])


@pytest.mark.parametrize("rows", [99, 100, 150])
def test_intervals_are_those_of_mapie(rows):
    y, mean, std = RNG.normal(size=rows), RNG.normal(size=rows), RNG.uniform(0.1, 2, rows)
    new, new_std = RNG.normal(size=20), RNG.uniform(0.1, 2, 20)
    kept = np.ones((rows, 1, 1), bool)
    of = Scored("amount", mean, y, kept, lambda _: std, False)
    for method, scales in (("absolute", (None, None)), ("epistemic", (std, new_std))):
        rule = _learned_rule(of, method, LEVELS)
        reach = np.array(rule.quantiles)[:, 0] * (1 if scales[1] is None else new_std[:, None])
        actual = np.stack([new[:, None] - reach, new[:, None] + reach], axis=1)
        expected = mapie_intervals(mean, y, new, LEVELS, *scales)
        np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_the_quantile_has_the_rank_of_the_paper():
    for rows in (9, 10, 19, 20, 101):
        scores = RNG.permutation(rows).astype("float64")[:, None]
        for level in (0.5, 0.7, 0.9):
            rank = math.ceil(round(level * (rows + 1), 6))
            expected = rank - 1 if rank <= rows else math.inf
            assert quantile(scores, np.ones_like(scores, bool), level) == expected
    for level, least in ((0.5, 1), (0.8, 4), (0.9, 9), (0.95, 19), (0.99, 99)):
        assert least_rows(level) == least


def test_each_unit_needs_enough_rows():
    kept = np.ones((20, 1, 2), bool)
    kept[5:, 0, 1] = False
    of = Scored("amounts", np.zeros(40), np.arange(40.0), kept, lambda _: None, False)
    with pytest.raises(ValueError, match=r"needs at least 9 rows\. Received: 5 rows for output"):
        _learned_rule(of, "absolute", [0.9])
    assert _learned_rule(of, "absolute", [0.8]).quantiles == [[32.0, 9.0]]


def test_several_items_count_as_one_row():
    """By definition: the least score that enough of the rows' shares lie at or below."""
    scores = RNG.integers(0, 9, (12, 4)).astype("float64")  # With ties.
    kept = RNG.random((12, 4)) < 0.7
    kept[3] = False
    shares = [
        np.mean([(row[k] <= q).mean() for row, k in zip(scores, kept, strict=True) if k.any()])
        for q in range(9)
    ]
    for level in (0.3, 0.5, 0.8):
        expected = next(q for q in range(9) if shares[q] * 11 >= level * 12 - 1e-9)
        assert quantile(scores, kept, level) == expected


@pytest.mark.parametrize("method", ["lac", "aps", "raps"])
def test_ties_are_covered(method):
    """Overconfident models give many rows the probabilities 1 and 0, also where they are wrong."""
    y = np.arange(40) % 3
    p = np.eye(3)[np.where(np.arange(40) < 30, y, (y + 1) % 3)]
    rule = _learned_rule(scored(p, y), method, [0.9])
    sets = np.asarray(class_set(p, rule, 0, False))
    assert sets[np.arange(40), y].mean() >= 0.9


def test_equally_probable_classes_are_in_a_set_together():
    rule = ConformalRule("aps", [[0.5]])
    p = np.array([[0.3, 0.3, 0.3, 0.1], [0.6, 0.2, 0.2, 0]])
    expected = [[True, True, True, False], [True, False, False, False]]
    assert np.asarray(class_set(p, rule, 0, False)).tolist() == expected


def test_a_penalty_makes_large_sets_rarer():
    p, y = drawn(2000, 20)
    sizes = {}
    for method in ("aps", "raps"):
        rule = _learned_rule(scored(p, y), method, [0.9])
        sizes[method] = np.asarray(class_set(p, rule, 0, False)).sum(axis=-1)
    assert sizes["raps"].std() < sizes["aps"].std()


def test_scores_of_true_classes():
    p = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    ranked = RankedClasses(p, np.array([1, 0]))
    shares = shares_of(2)
    np.testing.assert_allclose(ranked.aps, [0.8 - 0.3 * shares[0], 1 - 0.1 * shares[1]])
    assert ranked.ranks.tolist() == [2, 3]
    np.testing.assert_allclose(ranked.penalties(0.5, 1), [0.5, 1.0])


def test_the_binomial_interval():
    for successes, trials in ((0, 10), (7, 10), (10, 10), (901, 1000)):
        expected = stats.binomtest(successes, trials).proportion_ci(method="exact")
        assert binomial_interval(successes, trials) == pytest.approx(
            (expected.low, expected.high), rel=1e-9
        )


# Coverage of real tables


def splits(rows, size):
    rng = np.random.default_rng(0)
    for _ in range(200):
        order = rng.permutation(rows)
        yield order[:size], order[size:]


def check_coverage(shares, size, rest, is_exact):
    """The mean of 200 splits is within three standard errors of the level."""
    expected = math.ceil(0.9 * (size + 1)) / (size + 1)
    error = 3 * math.sqrt(0.9 * 0.1 * (1 / size + 1 / rest) / len(shares))
    assert np.mean(shares) >= expected - error
    if is_exact:
        assert np.mean(shares) <= expected + error


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lac", "aps", "raps"])
def test_sets_of_digits_cover_as_they_promise(method):
    x, y = scaled_digits()
    model = keras.Sequential([keras.Input((64,)), layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    ens = SnapshotEnsemble(eager(model, loss), cycles=1, lr_init=0.5)
    ens.fit(x[:300], y[:300], epochs=3, verbose=0)
    p = special.softmax(ens.predict(x[300:], verbose=0).astype("float64"), axis=-1)
    y, shares = y[300:], []
    for one, other in splits(len(y), 500):
        rule = _learned_rule(scored(p[one], y[one]), method, [0.9])
        sets = np.asarray(class_set(p[other], rule, 0, False))
        shares.append(sets[np.arange(len(other)), y[other]].mean())
    size = 400 if method == "raps" else 500
    check_coverage(shares, size, len(y) - 500, method == "lac")


@pytest.mark.parametrize("method", ["absolute", "epistemic", "total"])
def test_intervals_of_diabetes_cover_as_they_promise(method):
    x, y = load_diabetes(return_X_y=True)
    x, y = 10 * x, (y - y.mean()) / y.std()
    ens = ensemble_of(eager(dense_of_ten(), "mse"), 3)
    ens.calibrate(one_batch(x[:100], y[:100]), verbose=0)
    found = ens.predict_uncertainty(one_batch(x[100:]), verbose=0)
    y, parts = y[100:], {name: part[:, 0].astype("float64") for name, part in found.items()}
    mean, scale = parts["mean"], parts.get(method, np.ones(len(y)))
    shares = []
    for one, other in splits(len(y), 200):
        kept = np.ones((200, 1, 1), bool)
        of = Scored("y", mean[one], y[one], kept, lambda _, one=one: scale[one], False)
        [[q]] = _learned_rule(of, method, [0.9]).quantiles
        shares.append((np.abs(y[other] - mean[other]) <= q * scale[other]).mean())
    check_coverage(shares, 200, len(y) - 200, True)


def dense_of_ten():
    return keras.Sequential([keras.Input((10,)), layers.Dense(6, "tanh"), layers.Dense(1)])


# Through an ensemble


def test_sets_and_intervals_of_predictions_are_those_of_mapie():
    x = RNG.normal(size=(250, 4)).astype("float32")
    y = RNG.integers(0, 3, 250)
    ens = ensemble_of(eager(dense()), 3)
    ens.temperature = 1.5
    ens.conformalize(one_batch(x[:200], y[:200]), confidence_level=LEVELS, verbose=0)
    p = ens.predict(one_batch(x), verbose=0).astype("float64")
    p /= p.sum(axis=-1, keepdims=True)
    expected = mapie_sets("lac", p[:200], y[:200], p[200:], LEVELS)
    np.testing.assert_array_equal(ens.predict_set(one_batch(x[200:]), verbose=0), expected)

    ens, y = ensemble_of(eager(dense("mse", 1, None), "mse"), 3), RNG.normal(size=250)
    data = one_batch(x[:200], y[:200])
    found = ens.predict_uncertainty(one_batch(x), verbose=0)
    mean, std = (found[name][:, 0].astype("float64") for name in ("mean", "std"))
    for method, scales in (("absolute", ()), ("epistemic", (std[:200], std[200:]))):
        ens.conformalize(data, confidence_level=LEVELS, method=method, verbose=0)
        lower, upper = ens.predict_interval(one_batch(x[200:]), verbose=0)
        expected = mapie_intervals(mean[:200], y[:200], mean[200:], LEVELS, *scales)
        assert lower.shape == (50, 1, 3)
        np.testing.assert_allclose(lower[:, 0], expected[:, 0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(upper[:, 0], expected[:, 1], rtol=1e-4, atol=1e-5)
