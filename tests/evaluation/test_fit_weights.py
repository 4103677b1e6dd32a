"""`fit_weights` on real data and on every kind of data that Keras takes; members of weight 0."""

import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from models import Batches, dense, eager, ensemble_of, ensemble_with, member_weights, one_batch
from scipy import special
from sklearn import datasets
from weights_cases import (
    FEATURES,
    KINDS,
    LABELS,
    PAIRS,
    SOME,
    Problem,
    best_temperature,
    check_simplex,
    greedy_by_hand,
    least_by_scipy,
    log_probabilities,
    members_by_least_squares,
    picked,
    values,
)

# Real data: digits and diabetes, with members of different quality


@pytest.fixture(scope="module")
def diabetes():
    x, y = datasets.load_diabetes(return_X_y=True)
    x = (x * 20).astype("float32")
    model = keras.Sequential([keras.Input((10,)), layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)
    members = members_by_least_squares(x[:200], y[:200, None], (1, 1.2, 0.8, 1))
    ens = ensemble_with(model, *members)
    outputs = np.stack([x[200:].astype("float64") @ kernel + bias for kernel, bias in members])
    residuals = outputs[..., 0] - y[200:]
    return types.SimpleNamespace(
        ens=ens, data=one_batch(x[200:], y[200:]), problem=values(residuals)
    )


@pytest.mark.parametrize("data", ["digits_members", "diabetes"])
def test_weighted_is_not_worse_than_the_mean_or_the_best_member(data, request):
    case = request.getfixturevalue(data)
    case = case("multiclass") if data == "digits_members" else case
    ens, problem = case.ens, case.problem
    alone = [problem.loss(one) for one in np.eye(len(ens))]
    mean = problem.loss(np.full(len(ens), 1 / len(ens)))
    assert min(alone) < 0.7 * max(alone)  # The members must differ in quality.

    def scored(**arguments):
        return ens.evaluate(case.data, verbose=0, **arguments)

    by_keras = [scored(), scored(members=[int(np.argmin(alone))])]
    np.testing.assert_allclose(by_keras, [mean, min(alone)], rtol=1e-5)
    least = least_by_scipy(problem)
    for method in ("likelihood", "greedy"):
        weights = ens.fit_weights(case.data, method=method, verbose=0)
        np.testing.assert_array_equal(ens.weights, weights)
        check_simplex(weights, len(ens))
        actual = problem.loss(weights)
        if method == "likelihood":
            assert actual == pytest.approx(least, abs=1e-6 * problem.scale, rel=0)
        else:
            np.testing.assert_allclose(weights, greedy_by_hand(problem), atol=1e-12)
        assert actual <= min(*alone, mean) * (1 + 1e-6)
        weighted_by_keras = scored(combine="weighted")
        assert weighted_by_keras == pytest.approx(actual, rel=1e-5)
        assert weighted_by_keras <= min(by_keras) * (1 + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_and_logits_get_the_same_weights_and_temperature(kind, digits_members):
    actual = []
    for logits in (False, True):
        case = digits_members(kind, logits)
        weights = case.ens.fit_weights(case.data, verbose=0)
        loss = case.problem.loss(weights)
        assert loss == pytest.approx(least_by_scipy(case.problem), abs=1e-6)
        temperature = case.ens.calibrate(case.data, verbose=0)
        spread = case.ens.predict_uncertainty(case.rows, verbose=0)
        spread.pop("mean")
        actual.append((weights, loss, temperature, spread))
    (weights, loss, temperature, spread), (*others, other_spread) = actual
    np.testing.assert_allclose(others[0], weights, rtol=1e-3, atol=1e-6)
    assert others[1:] == pytest.approx([loss, temperature], rel=1e-5)
    for name in ("total", "aleatoric", "epistemic"):
        np.testing.assert_allclose(other_spread[name], spread[name], rtol=1e-3, atol=1e-5)


# Data as Keras takes them


def test_arrays_datasets_and_generators_have_the_same_result(informed):
    importance = np.random.default_rng(9).uniform(0, 2, len(SOME))
    columns = (SOME, LABELS, importance)
    batches = Batches(*columns, size=8)

    def forever():
        while True:
            yield from (batches[i] for i in range(len(batches)))

    weights = informed.fit_weights(SOME, LABELS, sample_weight=importance, verbose=0, batch_size=8)
    temperature = informed.calibrate(
        SOME, LABELS, sample_weight=importance, verbose=0, batch_size=8
    )
    kinds = [
        (lambda: tf.data.Dataset.from_tensor_slices(columns).batch(8), {}),
        (lambda: batches, {}),
        (forever, {"steps": len(batches)}),
    ]
    for data, options in kinds:
        actual = informed.fit_weights(data(), verbose=0, **options)
        np.testing.assert_allclose(actual, weights, rtol=1e-5)
        assert informed.calibrate(data(), verbose=0, **options) == pytest.approx(
            temperature, rel=1e-5
        )


def test_integer_sample_weights_count_like_repeated_rows(informed):
    times = np.arange(len(SOME)) % 4
    weighted = one_batch(SOME, LABELS, times)
    repeated = one_batch(np.repeat(SOME, times, axis=0), np.repeat(LABELS, times))
    for method in ("likelihood", "greedy"):
        weights = informed.fit_weights(weighted, method=method, verbose=0)
        again = informed.fit_weights(repeated, method=method, verbose=0)
        np.testing.assert_allclose(weights, again, atol=1e-5)
        plain = informed.fit_weights(PAIRS, method=method, verbose=0)
        assert not np.allclose(weights, plain, atol=1e-3)


def test_previous_weights_and_temperature_do_not_matter(informed):
    informed.weights, informed.temperature = None, 1.0
    weights = informed.fit_weights(PAIRS, verbose=0)
    temperature = informed.calibrate(PAIRS, verbose=0)
    for before in ([1, 0, 0], [0, 0.5, 0.5]):
        informed.weights, informed.temperature = before, 7.0
        np.testing.assert_array_equal(informed.fit_weights(PAIRS, verbose=0), weights)
        assert informed.temperature == 7
        assert informed.calibrate(PAIRS, verbose=0) == temperature
        np.testing.assert_array_equal(informed.weights, weights)


def three_outputs():
    inputs = keras.Input((4,))
    kind = layers.Dense(3, "softmax", name="kind")(inputs)
    marks = layers.Dense(2, name="marks")(inputs)
    amount = layers.Dense(2, name="amount")(inputs)
    model = keras.Model(inputs, {"kind": kind, "marks": marks, "amount": amount})
    model.compile(
        "sgd",
        {
            "kind": "sparse_categorical_crossentropy",
            "marks": keras.losses.BinaryCrossentropy(from_logits=True),
            "amount": "mse",
        },
        loss_weights={"kind": 0.7, "marks": 2.0, "amount": 0.25},
        run_eagerly=True,
    )
    return model


def test_several_outputs_are_weighted_by_their_compiled_loss_weights():
    ens, rng = ensemble_of(three_outputs(), 4), np.random.default_rng(10)
    own = {
        name: array.astype("float64")
        for name, array in ens.predict_members(FEATURES, verbose=0).items()
    }
    # Targets near the members' predictions, so that there is something to learn.
    kind = np.where(rng.random(31) < 0.7, own["kind"][1].argmax(axis=-1), LABELS)
    marks = (own["marks"][2] + rng.logistic(size=(31, 2)) > 0).astype(int)
    amount = own["amount"][:2].mean(axis=0) + rng.normal(size=(31, 2))
    data = one_batch(SOME, {"kind": kind, "marks": marks, "amount": amount})
    of_kind, of_marks = np.log(own["kind"]), log_probabilities("multilabel", own["marks"], True)
    logs = np.concatenate([picked(of_kind, kind), picked(of_marks, marks).reshape(4, -1)], axis=1)
    counts = np.repeat([0.7 / 31, 2 / 62], [31, 62])
    residuals = np.sqrt(0.25 / 62) * (own["amount"] - amount).reshape(4, -1)
    problem = Problem(np.exp(logs.T), counts, residuals)
    weights = ens.fit_weights(data, verbose=0)
    assert problem.loss(weights) == pytest.approx(least_by_scipy(problem), abs=1e-6)
    assert problem.above_the_optimum(weights) < 1e-6
    actual = ens.evaluate(data, combine="weighted", verbose=0, return_dict=True)
    assert actual["loss"] == pytest.approx(problem.loss(weights), rel=1e-4)

    # One temperature for all class outputs, fitted with their loss weights; none for values.
    before = ens.predict(FEATURES, verbose=0)
    temperature = ens.calibrate(data, verbose=0)
    of_mean = [special.logsumexp(logs, axis=0) - np.log(4) for logs in (of_kind, of_marks)]
    expected = best_temperature([(0.7, of_mean[0], kind), (2.0, of_mean[1], marks)])
    assert temperature == pytest.approx(expected, rel=1e-5)
    after = ens.predict(FEATURES, verbose=0)
    np.testing.assert_array_equal(after["amount"], before["amount"])
    np.testing.assert_allclose(after["marks"], before["marks"] / temperature, rtol=1e-6)


# Members of weight 0


def test_members_of_weight_0_are_neither_run_nor_exported(tmp_path):
    model = eager(dense())
    ens = ensemble_of(model, 3)
    sound = ens.predict(FEATURES, members=[0, 2], verbose=0)
    broken = [np.full(array.shape, np.nan) for array in model.get_weights()]
    own = member_weights(ens)
    ens = ensemble_with(model, own[0], broken, own[2])
    assert np.isnan(ens.predict(FEATURES, verbose=0)).all()
    ens.weights = [0.5, 0, 0.5]
    np.testing.assert_allclose(
        ens.predict(FEATURES, combine="weighted", verbose=0), sound, rtol=1e-6, atol=1e-7
    )
    assert ens.to_keras("weighted").count_params() == 2 * model.count_params()
    assert ens.to_keras("mean").count_params() == 3 * model.count_params()


def test_members_that_do_not_help_get_weight_0():
    model = eager(dense())
    own = member_weights(ensemble_of(model, 2))
    # Predicts the true class of each row with certainty.
    perfect = [0.1 * np.eye(6)[:4], np.zeros(6), 3000 * np.eye(6)[:, :3], np.zeros(3)]
    ens = ensemble_with(model, own[0], perfect, own[1])
    y = SOME[:, :3].argmax(axis=1)
    for method in ("likelihood", "greedy"):
        np.testing.assert_array_equal(
            ens.fit_weights(one_batch(SOME, y), method=method, verbose=0), [0, 1, 0]
        )
    assert ens.to_keras("weighted").count_params() == model.count_params()
