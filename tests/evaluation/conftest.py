"""A seed for each test, and ensembles that the tests in this folder share."""

import types

import keras
import numpy as np
import pytest
from averaging_cases import normalized_input
from keras import layers
from models import (
    compiled,
    dense,
    eager,
    ensemble_of,
    ensemble_with,
    member_weights,
    one_batch,
    scaled_digits,
)
from report_cases import (
    NAME,
    TEMPERATURE,
    Digits,
    Values,
    exotic,
    linear,
    normalized,
    shares_of_votes,
)
from sklearn.datasets import load_diabetes
from weights_cases import (
    KINDS,
    classes,
    log_probabilities,
    members_by_least_squares,
    picked,
    targets_of,
)

from snapshot_ensemble import SnapshotEnsemble


@pytest.fixture(autouse=True)
def _seeded():
    # No `clear_session`: it is slower than most of these tests and would break shared fixtures.
    keras.utils.set_random_seed(0)


@pytest.fixture(scope="module")
def digits_report():
    """Reports without and with member weights and a temperature, and the expected scores."""
    keras.utils.set_random_seed(0)
    x, y = scaled_digits(450)
    model = keras.Sequential(
        [keras.Input((64,)), layers.Dense(16, "relu"), layers.Dense(10, "softmax")]
    )
    optimizer = keras.optimizers.SGD(1.0)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    ens = SnapshotEnsemble(model, cycles=3)
    ens.fit(x[:300], y[:300], epochs=6, batch_size=16, verbose=0)
    x, y = x[300:450], y[300:450]
    stack = normalized(ens.predict_members(x, verbose=0))
    plain = ens.report(x, y, verbose=0)

    def evaluate(model=ens, **arguments):
        return model.evaluate(x, y, return_dict=True, verbose=0, **arguments)

    evaluated, one = {}, ens[0]
    for i, weights in enumerate(member_weights(ens)):
        one.set_weights(weights)
        evaluated[f"member {i}"] = evaluate(one)
    evaluated |= {name: evaluate(combine=name) for name in ("mean", "vote", "geometric")}
    p = {f"member {i}": stack[i] for i in range(3)}
    p["mean"] = stack.mean(axis=0)
    p["vote"] = shares_of_votes(stack)
    p["geometric"] = normalized(np.exp(np.log(stack).mean(axis=0)))
    ens.weights, ens.temperature = [0.5, 0.2, 0.3], TEMPERATURE
    p["weighted"] = np.average(stack, axis=0, weights=ens.weights)
    evaluated["tempered weighted"] = evaluate(combine="weighted")
    return Digits(ens, y, plain, ens.report(x, y, verbose=0), p, evaluated)


@pytest.fixture(scope="module")
def diabetes_report():
    """Four linear models near the least-squares solution, and their report."""
    x, y = load_diabetes(return_X_y=True)
    x, y = 10 * x[:101], ((y[:101] - y.mean()) / y.std())[:, None]
    fitted = np.linalg.lstsq(x, y, rcond=None)[0]
    rng = np.random.default_rng(0)
    members = [(fitted + 0.5 * rng.normal(size=(10, 1)), [0.1 * i]) for i in range(4)]
    metrics = ["mae", keras.metrics.MeanMetricWrapper(exotic, name=NAME)]
    ens = ensemble_with(linear(10, metrics=metrics), *members)
    stack = np.stack([x @ kernel + bias for kernel, bias in members])
    return Values(x, y, stack, ens.report(x, y, batch_size=7, verbose=0))


@pytest.fixture(scope="module")
def normalized_ensemble():
    return ensemble_of(normalized_input())


@pytest.fixture(scope="module")
def convolutional_ensemble():
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(3, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.Dropout(0.5),
            layers.Conv2D(2, 3),
            layers.BatchNormalization(momentum=0.5),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, "softmax"),
        ]
    )
    return ensemble_of(compiled(model))


@pytest.fixture(scope="module")
def digits_members():
    """For each kind an ensemble, held-out data and the members' log-probabilities."""
    pixels, digit = scaled_digits()
    order = np.random.default_rng(7).permutation(len(pixels))
    train, held_out = order[:400], order[400:900]
    made = {}

    def case(kind, logits=False):
        if (kind, logits) not in made:
            units, activation, loss = KINDS[kind]
            outputs = layers.Dense(units, None if logits else activation, name="answer")
            model = keras.Sequential([keras.Input((64,), name="pixels"), outputs])
            model.compile("sgd", loss(from_logits=logits))
            y, targets = targets_of(kind, digit)
            members = members_by_least_squares(pixels[train], targets[train])
            ens = ensemble_with(eager(model), *members)
            x = pixels[held_out]
            odds = np.stack([x.astype("float64") @ kernel + bias for kernel, bias in members])
            logs = log_probabilities(kind, odds, True)
            problem = classes(np.exp(picked(logs, y[held_out])).reshape(len(ens), -1).T)
            made[kind, logits] = types.SimpleNamespace(
                ens=ens,
                rows=one_batch(x),
                data=one_batch(x, y[held_out]),
                y=y[held_out],
                logs=logs,
                problem=problem,
            )
        requested = made[kind, logits]
        requested.ens.weights, requested.ens.temperature = None, 1.0
        return requested

    return case


@pytest.fixture(scope="module")
def informed():
    """Three members whose predictions are better than chance."""
    rng = np.random.default_rng(11)
    members = [
        [
            0.5 * np.eye(6)[:4] + 0.1 * noise[:4, :1],
            0.1 * noise[:, 0],
            size * np.eye(6)[:, :3] + noise,
            noise[0],
        ]
        for size, noise in zip((1, 4, 9), rng.normal(size=(3, 6, 3)), strict=True)
    ]
    return ensemble_with(dense(), *members)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
