"""The greedy soup, and the quality of averaged models on digits."""

import keras
import numpy as np
import pytest
from averaging_cases import ROWS, mean_by_hand, teacher, turned
from keras import layers
from models import (
    assert_all_close,
    assert_close,
    assert_same,
    compiled,
    dense,
    ensemble_with,
    member_weights,
    scaled_digits,
    sliced,
)
from scipy import special
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LogisticRegression

from snapshot_ensemble import SnapshotEnsemble

# The quality of averaged models on digits


@pytest.fixture(scope="module")
def digits():
    return scaled_digits(400)


def normal_features(kernel, x, gamma=1.0, beta=0.0):
    hidden = x @ kernel
    spread = np.sqrt(hidden.var(axis=0) + 1e-3)
    return np.maximum((hidden - hidden.mean(axis=0)) / spread * gamma + beta, 0)


def loss_by_hand(weights, x, y, recomputed):
    """The loss of the digits model; `recomputed`: with the statistics of `x`, not its own."""
    kernel, gamma, beta, mean, variance, head, bias = (np.asarray(w, "float64") for w in weights)
    if recomputed:
        features = normal_features(kernel, x, gamma, beta)
    else:
        features = np.maximum((x @ kernel - mean) / np.sqrt(variance + 1e-3) * gamma + beta, 0)
    logs = special.log_softmax(features @ head + bias, axis=1)
    return -logs[np.arange(len(y)), y].mean()


def digits_model():
    model = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(20, use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dense(10, "softmax"),
        ]
    )
    return compiled(model)


@pytest.fixture(scope="module")
def good(digits):
    """Accurate weights for the digits: random features with a head fitted by scikit-learn."""
    x, y = digits
    kernel = np.random.default_rng(0).normal(0, 0.5, (64, 20)).astype("float32")
    head = LogisticRegression(max_iter=1000).fit(normal_features(kernel, x), y)
    hidden = x @ kernel
    one = np.ones(20)
    weights = [kernel, one, 0 * one, hidden.mean(axis=0), hidden.var(axis=0)]
    weights = [*weights, head.coef_.T, head.intercept_]
    return [array.astype("float32") for array in weights]


def test_members_that_are_one_function_average_to_it_only_with_recomputed_statistics(digits, good):
    # Normalisation cancels the scale of its inputs.
    members = []
    for scale in (1.0, 1.0, 1.0, 9.0):
        kernel, gamma, beta, mean, variance, *head = good
        members.append([scale * kernel, gamma, beta, scale * mean, scale**2 * variance, *head])
    ens = ensemble_with(digits_model(), *members)
    x, y = digits
    expected = loss_by_hand(good, x, y, recomputed=False)
    assert expected < 0.5
    recomputed = ens.average_weights(x=x, y=y, batch_size=len(x))
    assert_close(recomputed.evaluate(x, y, verbose=0), expected, 2e-3)
    with pytest.warns(UserWarning, match="batch-normalisation layers"):
        stale = ens.average_weights()
    assert stale.evaluate(x, y, verbose=0) > expected + 0.1


def test_snapshots_of_one_basin_average_to_a_model_as_good(digits, good):
    model = digits_model()
    model.set_weights(good)
    x, y = digits
    ens = SnapshotEnsemble(model, cycles=3, lr_init=0.02)
    ens.fit(x, y, epochs=3, verbose=0)
    averaged = ens.average_weights(x=x, y=y, batch_size=100)
    members = [loss_by_hand(weights, x, y, recomputed=False) for weights in member_weights(ens)]
    loss = averaged.evaluate(x, y, verbose=0)
    assert loss < max(members) + 0.02
    assert_close(loss, loss_by_hand(averaged.get_weights(), x, y, recomputed=False), 1e-4)


# The greedy soup


def soup_by_hand(members, loss):
    """The members of a greedy soup; `loss` takes weights and how many members they average."""
    alone = [loss(member, 1) for member in members]
    order = sorted(range(len(members)), key=lambda i: alone[i])
    chosen, best = [order[0]], alone[order[0]]
    for number in order[1:]:
        tried = [*chosen, number]
        tried_loss = loss(mean_by_hand([members[i] for i in tried]), len(tried))
        if tried_loss < best:
            chosen, best = tried, tried_loss
    return chosen, best


def disturbed(weights, scales, seed=0):
    rng = np.random.default_rng(seed)
    return [
        [array + (s * rng.normal(0, 1, array.shape)).astype("float32") for array in weights]
        for s in scales
    ]


def test_the_soup_on_digits_equals_the_reference(digits, good):
    x, y = digits
    members = disturbed(good, [0.25, 0.2, 0.2, 0.9])
    for member in members:
        member[4] = np.abs(member[4])  # A variance.
    chosen, least = soup_by_hand(
        members, lambda weights, count: loss_by_hand(weights, x, y, recomputed=count > 1)
    )
    assert 1 < len(chosen) < len(members)
    soup = ensemble_with(digits_model(), *members).average_weights(
        "greedy", x, y, batch_size=len(x)
    )
    expected = mean_by_hand([members[i] for i in chosen])
    expected[3:5] = (x @ expected[0]).mean(axis=0), (x @ expected[0]).var(axis=0)
    assert_all_close(soup.get_weights(), expected, 1e-4)
    actual = soup.evaluate(x, y, verbose=0)
    assert_close(actual, least, 1e-4)
    assert actual < min(loss_by_hand(member, x, y, recomputed=False) for member in members)


def test_the_soup_of_a_regression_equals_the_reference():
    x, y = load_diabetes(return_X_y=True)
    x, y = (10 * x).astype("float32"), ((y - y.mean()) / y.std()).astype("float32")
    fitted = np.linalg.lstsq(x, y, rcond=None)[0][:, None].astype("float32")
    members = disturbed([fitted, np.zeros(1, "float32")], [0.5, 0.35, 0.3, 0.4], seed=5)

    def loss(weights, count):
        return np.square(x @ weights[0] + weights[1] - y[:, None]).mean()

    chosen, least = soup_by_hand(members, loss)
    assert 1 < len(chosen) < len(members)
    # Adding members in order of time would give a different soup.
    assert chosen == [2, 0, 3]
    model = keras.Sequential([keras.Input((10,)), layers.Dense(1)])
    ens = ensemble_with(compiled(model, "mse"), *members)
    soup = ens.average_weights("greedy", x, y, batch_size=len(x))
    assert_all_close(soup.get_weights(), mean_by_hand([members[i] for i in chosen]), 1e-6)
    assert_close(loss(soup.get_weights(), 1), least)


def test_the_soup_is_the_best_member_alone_if_averaging_hurts():
    weights, y = teacher()
    worse = [weights[0], weights[1], 0.5 * weights[2], weights[3]]
    ens = ensemble_with(dense(), turned(worse), weights)
    soup = ens.average_weights("greedy", x=sliced(ROWS, y))
    assert_same(soup.get_weights(), weights)
