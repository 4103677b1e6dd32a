"""Weights and a temperature learned on held-out data, against SciPy and NumPy written out."""

import dataclasses
import math
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from keras import layers
from models import Batches, TASKS, dense, eager, ensemble_of, ensemble_with, member_weights, one_batch
from scipy import optimize, special
from sklearn import datasets, metrics

from snapshot_ensemble import Snapshot, SnapshotEnsemble
from snapshot_ensemble.evaluation.held_out import HeldOut
from snapshot_ensemble.evaluation.member_weights import (
    Objective,
    greedy_weights,
    learn_temperature,
    learn_weights,
    likelihood_weights,
)
from snapshot_ensemble.evaluation.metrics import items_of
from snapshot_ensemble.evaluation.targets import Truth
from snapshot_ensemble.inference.combining import temper
from snapshot_ensemble.inference.output_specs import Output

TINY = 1.2e-38  # What a float32 softmax shows for a class that it rules out.




# The problem: numbers alone


@dataclasses.dataclass(frozen=True)
class Problem:
    """What members gave to what was true, and by how much they missed values."""

    likelihoods: np.ndarray
    counts: np.ndarray
    residuals: np.ndarray

    @property
    def objective(self):
        return Objective(self.likelihoods, self.counts, self.residuals @ self.residuals.T)

    @property
    def members(self):
        return len(self.residuals)

    @property
    def scale(self):
        return self.counts.sum() + (self.residuals**2).sum(axis=1).mean()

    def loss(self, weights):
        mixed = self.likelihoods @ weights
        return np.sum((weights @ self.residuals) ** 2) - np.sum(self.counts * np.log(mixed))

    def slope(self, weights):
        shares = self.counts / (self.likelihoods @ weights)
        return 2 * self.residuals @ (weights @ self.residuals) - shares @ self.likelihoods

    def above_the_optimum(self, weights):
        """At most that much: a convex function lies above its tangents."""
        slope = self.slope(weights)
        return slope @ weights - slope.min()


def classes(likelihoods, counts=None):
    rows, members = likelihoods.shape
    counts = np.full(rows, 1 / rows) if counts is None else counts
    return Problem(likelihoods, counts, np.zeros((members, 1)))


def values(residuals):
    members, rows = residuals.shape
    return Problem(np.empty((0, members)), np.empty(0), residuals / np.sqrt(rows))


def both(problem, other):
    return Problem(problem.likelihoods, problem.counts, other.residuals)


def spread(rng, rows, members):
    """Likelihoods near 0 and near 1."""
    return np.clip(rng.beta(0.5, 0.5, (rows, members)), TINY, 1)


def ruled_out_by_some(rng):
    likelihoods = rng.uniform(0.05, 1, (60, 5))
    likelihoods[rng.random(likelihoods.shape) < 0.3] = TINY
    return likelihoods


def owned(owners, members, given=0.9):
    """Only one member gives anything to what is true of a row."""
    return np.where(owners[:, None] == np.arange(members), given, TINY)


def misses(rng, scales=(1, 1.3, 0.8, 1.1), rows=200):
    shared = 0.5 * rng.normal(size=rows)
    return np.stack([scale * (rng.normal(size=rows) + shared) for scale in scales])


def problems():
    rng = np.random.default_rng(0)
    alike = spread(rng, 80, 3)[:, [0, 1, 0, 2, 1, 0]]
    with_a_perfect_one = np.insert(spread(rng, 80, 3), 1, 1, axis=1)
    without_error = misses(rng)
    without_error[2] = 0
    return {
        "random": classes(spread(rng, 120, 5)),
        "counts apart": classes(rng.uniform(0.01, 1, (70, 4)), rng.exponential(1e-2, 70)),
        "some alike": classes(alike),
        "all alike": classes(np.repeat(spread(rng, 60, 1), 4, axis=1)),
        "some rule it out": classes(ruled_out_by_some(rng)),
        "one owner a row": classes(owned(rng.integers(0, 4, 90), 4)),
        "all rule it out": classes(np.full((30, 3), TINY)),
        "one perfect": classes(with_a_perfect_one),
        "few rows, many members": classes(spread(rng, 4, 15)),
        "one row": classes(spread(rng, 1, 6)),
        "values": values(misses(rng)),
        "large values": values(1e3 * misses(rng)),
        "small values": values(1e-4 * misses(rng)),
        "values without error": values(without_error),
        "values, all alike": values(np.repeat(misses(rng, (1,)), 4, axis=0)),
        "few values, many members": values(rng.normal(size=(30, 3))),
        "both": both(classes(spread(rng, 100, 4)), values(misses(rng))),
        "both, values small": both(classes(spread(rng, 100, 4)), values(1e-4 * misses(rng))),
    }


PROBLEMS = problems()


def least_by_scipy(problem, starts=3, also=()):
    """The lowest of what SLSQP finds from the middle and from random starts."""
    rng, size = np.random.default_rng(1), problem.scale or 1
    begin = [np.full(problem.members, 1 / problem.members), *also]
    begin += list(rng.dirichlet(np.ones(problem.members), starts))
    found = [
        optimize.minimize(
            lambda w: problem.loss(w) / size,
            start,
            jac=lambda w: problem.slope(w) / size,
            method="SLSQP",
            # A weight of 0 would have the logarithm of a ruled out class jump.
            bounds=[(1e-11, 1)] * problem.members,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
            options={"ftol": 1e-15, "maxiter": 300},
        ).x
        for start in begin
    ]
    return min(problem.loss(np.maximum(x, 0) / np.maximum(x, 0).sum()) for x in found)


def check_simplex(weights, members):
    assert weights.shape == (members,)
    assert weights.dtype == "float64"
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", PROBLEMS)
def test_no_weights_are_better_by_scipy_and_by_the_tangent(name):
    problem = PROBLEMS[name]
    weights = likelihood_weights(problem.objective)
    check_simplex(weights, problem.members)
    assert problem.loss(weights) == pytest.approx(
        least_by_scipy(problem), abs=1e-7 * problem.scale, rel=0
    )
    assert problem.above_the_optimum(weights) <= 1e-7 * problem.scale


def test_no_weights_of_hundreds_of_members_are_better_by_the_tangent():
    problem = classes(spread(np.random.default_rng(2), 500, 300))
    weights = likelihood_weights(problem.objective)
    check_simplex(weights, 300)
    assert problem.above_the_optimum(weights) <= 1e-7


def test_each_member_gets_the_share_of_what_only_it_has_seen_coming():
    owners = np.repeat([0, 1, 2, 3], [10, 0, 25, 65])
    weights = likelihood_weights(classes(owned(owners, 4)).objective)
    np.testing.assert_allclose(weights, [0.1, 0, 0.25, 0.65], atol=1e-5)
    assert weights[1] == 0


def test_one_perfect_member_gets_all_the_weight():
    for name in ("one perfect", "values without error"):
        weights = likelihood_weights(PROBLEMS[name].objective)
        np.testing.assert_array_equal(weights, np.eye(4)[1 if "one" in name else 2])


def test_members_that_are_alike_get_equal_weights():
    weights = likelihood_weights(PROBLEMS["some alike"].objective)
    np.testing.assert_allclose(weights[[2, 5, 4]], weights[[0, 0, 1]], rtol=1e-5)
    for name in ("all alike", "values, all alike", "all rule it out"):
        weights = likelihood_weights(PROBLEMS[name].objective)
        np.testing.assert_allclose(weights, 1 / len(weights), rtol=1e-9)


@pytest.mark.parametrize("size", [1e-4, 1, 1e3])
def test_members_whose_errors_do_not_go_together_weigh_by_the_inverse_of_their_squares(size):
    squares = np.array([1, 2, 4, 8])
    weights = likelihood_weights(values(size * np.diag(np.sqrt(squares))).objective)
    np.testing.assert_allclose(weights, (1 / squares) / (1 / squares).sum(), atol=1e-5)


@pytest.mark.parametrize("size", [1e-4, 1, 1e3])
def test_two_members_of_values_in_closed_form(size):
    rng = np.random.default_rng(3)
    for scales in ((1, 1.2), (1, 3)):
        one, two = residuals = size * misses(rng, scales)
        expected = np.clip(two @ (two - one) / np.sum((one - two) ** 2), 0, 1)
        weights = likelihood_weights(values(residuals).objective)
        np.testing.assert_allclose(weights, [expected, 1 - expected], atol=1e-5)


def test_without_any_error_all_get_the_same():
    weights = likelihood_weights(values(np.zeros((5, 7))).objective)
    np.testing.assert_array_equal(weights, np.full(5, 0.2))


def test_the_only_member_gets_all():
    for problem in (classes(np.array([[0.2], [0.9]])), values(np.array([[1.0, 2.0]]))):
        np.testing.assert_array_equal(likelihood_weights(problem.objective), [1])


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
def test_a_member_that_diverged_does_not_blur_the_weights_of_the_others(size):
    rng = np.random.default_rng(4)
    others = misses(rng)
    problem = values(np.concatenate([others, [size * rng.normal(size=others.shape[1])]]))
    without = likelihood_weights(values(others).objective)
    weights = likelihood_weights(problem.objective)
    assert problem.loss(weights) <= problem.loss(np.append(without, 0)) * (1 + 1e-6)
    np.testing.assert_allclose(weights[:-1], without, atol=0.01)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_weights_of_any_likelihoods(data):
    shape = data.draw(st.tuples(st.integers(1, 10), st.integers(1, 6)))
    logs = data.draw(arrays.arrays("float64", shape, elements=st.floats(np.log(TINY), 0)))
    counts = data.draw(arrays.arrays("float64", shape[0], elements=st.floats(1e-3, 1)))
    problem = classes(np.exp(logs), counts / counts.sum())
    check_weights_of(problem)


@settings(deadline=None, max_examples=40)
@given(
    arrays.arrays(
        "float64",
        st.tuples(st.integers(1, 6), st.integers(1, 8)),
        elements=st.floats(-10, 10, width=32),
    ),
    st.sampled_from([1e-4, 1, 1e3]),
)
def test_weights_of_any_values(residuals, size):
    check_weights_of(values(size * residuals))


def check_weights_of(problem):
    weights = likelihood_weights(problem.objective)
    check_simplex(weights, problem.members)
    allowed = 1e-7 * problem.scale
    others = [np.full(problem.members, 1 / problem.members), *np.eye(problem.members)]
    assert problem.loss(weights) <= min(map(problem.loss, others)) + allowed
    assert problem.loss(weights) <= least_by_scipy(problem, 1, [weights]) + allowed
    # Much more than the loss is, where it is flat.
    assert problem.above_the_optimum(weights) <= 1e-4 * problem.scale


@pytest.mark.parametrize("name", ["random", "values", "both", "counts apart"])
def test_loss_gradient_curvature_and_certificate(name):
    problem, rng = PROBLEMS[name], np.random.default_rng(5)
    objective = problem.objective
    for weights in rng.dirichlet(np.full(problem.members, 3), 3):
        assert objective(weights) == pytest.approx(problem.loss(weights), rel=1e-12)
        step = 1e-6 * np.eye(problem.members)
        slopes = [(problem.loss(weights + d) - problem.loss(weights - d)) / 2e-6 for d in step]
        gradient = objective.gradient(weights)
        np.testing.assert_allclose(gradient, slopes, rtol=1e-5, atol=1e-7)
        bends = [(problem.slope(weights + d) - problem.slope(weights - d)) / 2e-6 for d in step]
        np.testing.assert_allclose(objective.curvature(weights), bends, rtol=1e-4, atol=1e-6)
        gap = objective.gap(weights)
        assert gap == pytest.approx(problem.above_the_optimum(weights))
        assert problem.loss(weights) - least_by_scipy(problem, 0) <= gap
    columns = rng.dirichlet(np.ones(problem.members), 4).T
    np.testing.assert_allclose(objective(columns), [problem.loss(w) for w in columns.T])


# Selection with replacement


def greedy_by_hand(problem):
    bag, best, best_loss = [], None, np.inf
    slack = 1e-12 * problem.scale

    def weights_of(bag):
        return np.array([bag.count(m) for m in range(problem.members)]) / len(bag)

    for _ in range(25):
        losses = [problem.loss(weights_of([*bag, m])) for m in range(problem.members)]
        alike = [m for m, loss in enumerate(losses) if loss <= min(losses) + slack]
        chosen = next((m for m in alike if m in bag), alike[0])
        bag.append(chosen)
        if losses[chosen] < best_loss - slack:
            best, best_loss = weights_of(bag), losses[chosen]
    return best


@pytest.mark.parametrize("name", PROBLEMS)
def test_greedy_selection_is_as_written_out(name):
    problem = PROBLEMS[name]
    weights = greedy_weights(problem.objective)
    check_simplex(weights, problem.members)
    np.testing.assert_allclose(weights, greedy_by_hand(problem), atol=1e-12)
    rounds = np.arange(1, 26)[:, None]
    whole = np.abs(weights * rounds - np.round(weights * rounds)).max(axis=1) < 1e-9
    assert whole.any()
    alone = min(problem.loss(one) for one in np.eye(problem.members))
    assert problem.loss(weights) <= alone + 1e-9 * problem.scale


def test_greedy_selection_stays_with_one_of_those_that_are_alike():
    for name, taken in (("all alike", 0), ("values, all alike", 0), ("one perfect", 1)):
        problem = PROBLEMS[name]
        np.testing.assert_array_equal(
            greedy_weights(problem.objective), np.eye(problem.members)[taken]
        )
    weights = greedy_weights(PROBLEMS["some alike"].objective)
    assert (weights[[2, 4, 5]] == 0).all()


def test_greedy_selection_prefers_whom_it_has_already():
    # In the second round the first member would help just as much as the second once more.
    problem = values(np.array([[1, -2], [-1, 0], [2, -2]]))
    weights = greedy_weights(problem.objective)
    np.testing.assert_allclose(weights, greedy_by_hand(problem), atol=1e-12)
    np.testing.assert_allclose(weights, [0, 10 / 13, 3 / 13])


def test_the_mean_is_kept_where_more_members_help_than_there_are_rounds():
    errors = np.eye(40, dtype="float32")
    meaning = Output("regression")
    held = HeldOut(dense("mse", 1, None), [errors], None, [meaning], np.zeros(40), None, {})
    assert np.count_nonzero(greedy_weights(Objective.of(held))) == 25
    for method in ("greedy", "likelihood"):
        np.testing.assert_allclose(learn_weights(held, method), 1 / 40, rtol=1e-5)


# Real data: digits and diabetes, by members of different quality








def by_least_squares(x, targets, rows, penalty, sharpness):
    """The kernel and bias of one dense layer."""
    wide = np.column_stack([x, np.ones(len(x))])[rows]
    square = wide.T @ wide + penalty * np.eye(wide.shape[1])
    kernel = sharpness * np.linalg.solve(square, wide.T @ targets[rows])
    return [kernel[:-1], kernel[-1]]


def members_by_least_squares(x, targets, sharpness=(14, 4, 8, 6)):
    """Trained on more and more rows, more and less sure of it, and one without any use."""
    rng, rows = np.random.default_rng(6), len(x)
    sizes = [rows // 8, rows // 4, rows // 2, rows]
    members = [
        by_least_squares(x, targets, rng.choice(rows, size, replace=False), 3.0, sharp)
        for size, sharp in zip(sizes, sharpness, strict=True)
    ]
    shapes = [array.shape for array in members[0]]
    return [*members, [rng.normal(0, 0.2, shape) for shape in shapes]]


KINDS = {
    "multiclass": (10, "softmax", keras.losses.SparseCategoricalCrossentropy),
    "binary": (1, "sigmoid", keras.losses.BinaryCrossentropy),
    "multilabel": (3, "sigmoid", keras.losses.BinaryCrossentropy),
}


def targets_of(kind, digit):
    """Labels as Keras takes them, and what least squares aim at."""
    if kind == "multiclass":
        return digit, np.eye(10)[digit] - 0.1
    columns = [digit >= 5, digit % 2 == 0, digit == 3]
    labels = np.stack(columns[: KINDS[kind][0]], axis=1).astype(int)
    return labels, 2 * labels - 1


def log_probabilities(kind, outputs, logits):
    """In float64, the classes (of binary and multilabel: no and yes) on the last axis."""
    outputs = np.asarray(outputs, "float64")
    if kind == "multiclass":
        return special.log_softmax(outputs if logits else np.log(outputs), axis=-1)
    odds = outputs if logits else special.logit(outputs)
    return np.stack([special.log_expit(-odds), special.log_expit(odds)], axis=-1)


def picked(logs, labels):
    """The log-probability of what is true, of each member and item."""
    return np.take_along_axis(logs, np.broadcast_to(labels, logs.shape[:-1])[..., None], -1)[..., 0]


@pytest.fixture(scope="module")
def digits():
    """For each kind and form an ensemble, rows it has not seen, and the members' logarithms."""
    pixels, digit = models.digits()
    order = np.random.default_rng(7).permutation(len(pixels))
    train, held = order[:400], order[400:900]
    made = {}

    def case(kind, logits=False):
        if (kind, logits) not in made:
            units, activation, loss = KINDS[kind]
            outputs = layers.Dense(units, None if logits else activation, name="answer")
            model = keras.Sequential([keras.Input((64,), name="pixels"), outputs])
            model.compile("sgd", loss(from_logits=logits))
            y, aims = targets_of(kind, digit)
            members = members_by_least_squares(pixels[train], aims[train])
            ens = ensemble_with(eager(model), *members)
            x = pixels[held]
            odds = np.stack([x.astype("float64") @ kernel + bias for kernel, bias in members])
            logs = log_probabilities(kind, odds, True)
            problem = classes(np.exp(picked(logs, y[held])).reshape(len(ens), -1).T)
            made[kind, logits] = types.SimpleNamespace(
                ens=ens,
                rows=one_batch(x),
                data=one_batch(x, y[held]),
                y=y[held],
                logs=logs,
                problem=problem,
            )
        found = made[kind, logits]
        found.ens.weights, found.ens.temperature = None, 1.0
        return found

    return case


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


@pytest.mark.parametrize("data", ["digits", "diabetes"])
def test_weighted_is_not_worse_than_the_mean_or_the_best_member(data, request):
    case = request.getfixturevalue(data)
    case = case("multiclass") if data == "digits" else case
    ens, problem = case.ens, case.problem
    alone = [problem.loss(one) for one in np.eye(len(ens))]
    mean = problem.loss(np.full(len(ens), 1 / len(ens)))
    assert min(alone) < 0.7 * max(alone)  # Of different quality, as they should be.

    def scored(**how):
        return ens.evaluate(case.data, verbose=0, **how)

    by_keras = [scored(), scored(members=[int(np.argmin(alone))])]
    np.testing.assert_allclose(by_keras, [mean, min(alone)], rtol=1e-5)
    least = least_by_scipy(problem)
    for method in ("likelihood", "greedy"):
        weights = ens.fit_weights(case.data, method=method, verbose=0)
        np.testing.assert_array_equal(ens.weights, weights)
        check_simplex(weights, len(ens))
        found = problem.loss(weights)
        if method == "likelihood":
            assert found == pytest.approx(least, abs=1e-6 * problem.scale, rel=0)
        else:
            np.testing.assert_allclose(weights, greedy_by_hand(problem), atol=1e-12)
        assert found <= min(*alone, mean) * (1 + 1e-6)
        by_keras_too = scored(combine="weighted")
        assert by_keras_too == pytest.approx(found, rel=1e-5)
        assert by_keras_too <= min(by_keras) * (1 + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_and_logits_are_told_the_same(kind, digits):
    found = []
    for logits in (False, True):
        case = digits(kind, logits)
        weights = case.ens.fit_weights(case.data, verbose=0)
        loss = case.problem.loss(weights)
        assert loss == pytest.approx(least_by_scipy(case.problem), abs=1e-6)
        temperature = case.ens.calibrate(case.data, verbose=0)
        spread = case.ens.predict_uncertainty(case.rows, verbose=0)
        spread.pop("mean")
        found.append((weights, loss, temperature, spread))
    (weights, loss, temperature, spread), (*others, other_spread) = found
    np.testing.assert_allclose(others[0], weights, rtol=1e-3, atol=1e-6)
    assert others[1:] == pytest.approx([loss, temperature], rel=1e-5)
    for name in ("total", "aleatoric", "epistemic"):
        np.testing.assert_allclose(other_spread[name], spread[name], rtol=1e-3, atol=1e-5)


# Data as Keras takes them

SOME = np.random.default_rng(8).normal(size=(31, 4)).astype("float32")
LABELS = (SOME[:, :3].argmax(axis=1) + (np.arange(31) % 5 == 0)) % 3
FEATURES, PAIRS = one_batch(SOME), one_batch(SOME, LABELS)


@pytest.fixture(scope="module")
def small():
    """Three members that know something of three classes; traced once."""
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




def test_arrays_datasets_and_generators_teach_the_same(small):
    importance = np.random.default_rng(9).uniform(0, 2, len(SOME))
    columns = (SOME, LABELS, importance)
    batches = Batches(*columns, size=8)

    def forever():
        while True:
            yield from (batches[i] for i in range(len(batches)))

    weights = small.fit_weights(SOME, LABELS, sample_weight=importance, verbose=0, batch_size=8)
    temperature = small.calibrate(SOME, LABELS, sample_weight=importance, verbose=0, batch_size=8)
    kinds = [
        (lambda: tf.data.Dataset.from_tensor_slices(columns).batch(8), {}),
        (lambda: batches, {}),
        (forever, {"steps": len(batches)}),
    ]
    for data, how in kinds:
        found = small.fit_weights(data(), verbose=0, **how)
        np.testing.assert_allclose(found, weights, rtol=1e-5)
        assert small.calibrate(data(), verbose=0, **how) == pytest.approx(temperature, rel=1e-5)


def test_whole_sample_weights_count_like_rows_that_come_again(small):
    times = np.arange(len(SOME)) % 4
    weighted = one_batch(SOME, LABELS, times)
    repeated = one_batch(np.repeat(SOME, times, axis=0), np.repeat(LABELS, times))
    for method in ("likelihood", "greedy"):
        weights = small.fit_weights(weighted, method=method, verbose=0)
        again = small.fit_weights(repeated, method=method, verbose=0)
        np.testing.assert_allclose(weights, again, atol=1e-5)
        plain = small.fit_weights(PAIRS, method=method, verbose=0)
        assert not np.allclose(weights, plain, atol=1e-3)
    temperature = small.calibrate(weighted, verbose=0)
    assert small.calibrate(repeated, verbose=0) == pytest.approx(temperature, rel=1e-5)
    assert small.calibrate(PAIRS, verbose=0) != pytest.approx(temperature, rel=1e-3)


def test_neither_weights_nor_temperature_from_before_matter(small):
    small.weights, small.temperature = None, 1.0
    weights = small.fit_weights(PAIRS, verbose=0)
    temperature = small.calibrate(PAIRS, verbose=0)
    for before in ([1, 0, 0], [0, 0.5, 0.5]):
        small.weights, small.temperature = before, 7.0
        np.testing.assert_array_equal(small.fit_weights(PAIRS, verbose=0), weights)
        assert small.temperature == 7
        assert small.calibrate(PAIRS, verbose=0) == temperature
        np.testing.assert_array_equal(small.weights, weights)


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


def test_several_outputs_count_by_their_compiled_loss_weights():
    ens, rng = ensemble_of(three_outputs(), 4), np.random.default_rng(10)
    own = {
        name: array.astype("float64")
        for name, array in ens.predict_members(FEATURES, verbose=0).items()
    }
    # Near to what the members say, so that there is something to learn.
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
    found = ens.evaluate(data, combine="weighted", verbose=0, return_dict=True)
    assert found["loss"] == pytest.approx(problem.loss(weights), rel=1e-4)

    # One temperature for the outputs of classes, each by its loss weight; none for values.
    before = ens.predict(FEATURES, verbose=0)
    temperature = ens.calibrate(data, verbose=0)
    of_mean = [special.logsumexp(logs, axis=0) - np.log(4) for logs in (of_kind, of_marks)]
    expected = best_temperature([(0.7, of_mean[0], kind), (2.0, of_mean[1], marks)])
    assert temperature == pytest.approx(expected, rel=1e-5)
    after = ens.predict(FEATURES, verbose=0)
    np.testing.assert_array_equal(after["amount"], before["amount"])
    np.testing.assert_allclose(after["marks"], before["marks"] / temperature, rtol=1e-6)


# Members without weight


def test_who_has_no_weight_is_not_run_nor_part_of_the_model(tmp_path):
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


def test_a_fit_leaves_out_who_does_not_help():
    model = eager(dense())
    own = member_weights(ensemble_of(model, 2))
    # Gives each row the class that it has, with certainty.
    perfect = [0.1 * np.eye(6)[:4], np.zeros(6), 3000 * np.eye(6)[:, :3], np.zeros(3)]
    ens = ensemble_with(model, own[0], perfect, own[1])
    y = SOME[:, :3].argmax(axis=1)
    for method in ("likelihood", "greedy"):
        np.testing.assert_array_equal(
            ens.fit_weights(one_batch(SOME, y), method=method, verbose=0), [0, 1, 0]
        )
    assert ens.to_keras("weighted").count_params() == model.count_params()


# The temperature


def best_temperature(outputs):
    """Where the loss is stationary: it is convex in the inverse of the temperature."""

    def slope(inverse):
        total = 0
        for share, logs, labels in outputs:
            expected = np.sum(special.softmax(inverse * logs, axis=-1) * logs, axis=-1)
            total += share * np.mean(expected - picked(logs, labels))
        return total

    return 1 / optimize.brentq(slope, 1 / 20, 20, xtol=1e-13)


def cooled(kind, probabilities, temperature):
    """`p^(1/T)`, normalised."""
    powers = np.asarray(probabilities, "float64") ** (1 / temperature)
    if kind == "multiclass":
        return powers / powers.sum(axis=-1, keepdims=True)
    rest = (1 - np.asarray(probabilities, "float64")) ** (1 / temperature)
    return powers / (powers + rest)


@pytest.mark.parametrize("kind", KINDS)
def test_the_temperature_is_that_of_least_loss(kind, digits):
    case = digits(kind)
    ens, y = case.ens, case.y
    mean = special.logsumexp(case.logs, axis=0) - np.log(len(ens))
    expected = best_temperature([(1, mean, y)])
    assert abs(np.log(expected)) > 0.1  # There is something to learn.
    before = ens.predict(case.rows, verbose=0)
    first = ens.calibrate(case.data, verbose=0)
    assert first == pytest.approx(expected, rel=1e-5)
    assert ens.temperature == first
    after = ens.predict(case.rows, verbose=0)
    np.testing.assert_allclose(after, cooled(kind, before, first), rtol=1e-4, atol=1e-7)
    assert ens.calibrate(case.data, verbose=0) == first
    by_keras = ens.evaluate(case.data, verbose=0)
    expected_loss = -picked(special.log_softmax(mean / expected, axis=-1), y).mean()
    assert by_keras == pytest.approx(expected_loss, rel=1e-4)
    if kind == "multiclass":
        np.testing.assert_array_equal(after.argmax(axis=-1), before.argmax(axis=-1))
        assert by_keras == pytest.approx(metrics.log_loss(y, after), rel=1e-4)
    else:
        np.testing.assert_array_equal(after > 0.5, before > 0.5)
    ens.temperature = 1.0
    np.testing.assert_array_equal(ens.predict(case.rows, verbose=0), before)


def test_the_temperature_of_a_combination_of_some_members(digits):
    case = digits("multiclass")
    case.ens.weights = [0.1, 0.2, 0.3, 0.4, 0]
    how = {"combine": "weighted", "members": [0, 2]}
    mean = special.logsumexp(case.logs[[0, 2]], axis=0, b=np.array([0.25, 0.75])[:, None, None])
    found = case.ens.calibrate(case.data, verbose=0, **how)
    assert found == pytest.approx(best_temperature([(1, mean, case.y)]), rel=1e-5)
    mean = special.log_softmax(case.logs[1:3].mean(axis=0), axis=-1)
    how = {"combine": "geometric", "members": [1, 2]}
    found = case.ens.calibrate(case.data, verbose=0, **how)
    assert found == pytest.approx(best_temperature([(1, mean, case.y)]), rel=1e-5)


def learned(probabilities, labels):
    probabilities = np.asarray(probabilities)
    truth = Truth(np.eye(probabilities.shape[1])[labels], np.full(len(labels), 1 / len(labels)))
    return learn_temperature([items_of(probabilities, Output("multiclass"))], [truth], [1.0])


def test_the_temperature_ends_at_its_bounds():
    sure = np.array([[0.9, 0.1], [0.2, 0.8]])
    assert learned(sure, [0, 1]) == pytest.approx(0.05, abs=1e-12)
    assert learned(sure, [1, 0]) == pytest.approx(20, abs=1e-12)
    assert learned(sure, [0, 1]) >= 0.05
    assert learned(sure, [1, 0]) <= 20


def test_probabilities_that_are_all_equal_need_no_temperature():
    assert learned(np.full((4, 2), 0.5), [0, 1, 1, 0]) == 1


def test_temperature_and_weights_are_in_models_exports_and_directories(tmp_path, small):
    model = eager(dense())
    ens = ensemble_with(model, *member_weights(small))
    ens.weights, ens.temperature = [0.25, 0, 0.75], 2.5
    probabilities = ens.predict_members(FEATURES, verbose=0)
    expected = cooled("multiclass", 0.25 * probabilities[0] + 0.75 * probabilities[2], 2.5)
    found = {
        "predict": ens.predict(FEATURES, combine="weighted", verbose=0),
        "to_keras": ens.to_keras("weighted").predict(FEATURES, verbose=0),
    }
    ens.export(tmp_path / "served", combine="weighted")
    served = tf.saved_model.load(tmp_path / "served")
    found["export"] = served.signatures["serving_default"](features=SOME)["answer"].numpy()
    ens.save(tmp_path / "saved")
    loaded = SnapshotEnsemble.load(tmp_path / "saved")
    assert loaded.temperature == 2.5
    found["load"] = loaded.predict(FEATURES, combine="weighted", verbose=0)
    for name, outputs in found.items():
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6, err_msg=name)
    # Two members' weights are in it, not the third's.
    held = sum(np.size(variable.numpy()) for variable in served.variables)
    assert held == 2 * model.count_params()


def test_what_was_learned_goes_when_another_fit_adds_members(small):
    model = eager(dense())
    ens = ensemble_of(model, 2, cycles=1, lr_init=0.1)
    ens.weights, ens.temperature = [0.25, 0.75], 2.5
    ens.fit(SOME, LABELS, epochs=1, verbose=0)
    assert len(ens) == 3
    assert ens.weights is None
    assert ens.temperature == 1
    probabilities = ens.predict_members(FEATURES, verbose=0)
    np.testing.assert_allclose(
        ens.predict(FEATURES, verbose=0), probabilities.mean(axis=0), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize(
    ("temperature", "error", "message"),
    [
        (0, ValueError, "`temperature` must be finite and above 0. Received: temperature=0"),
        (-1.0, ValueError, "`temperature` must be finite and above 0. Received: temperature=-1.0"),
        (np.inf, ValueError, "`temperature` must be finite and above 0. Received: temperature=inf"),
        (np.nan, ValueError, "`temperature` must be finite and above 0. Received: temperature=nan"),
        (True, TypeError, "`temperature` must be a number. Received: temperature=True"),
        ("2", TypeError, "`temperature` must be a number. Received: temperature='2'"),
        (None, TypeError, "`temperature` must be a number. Received: temperature=None"),
        ([1, 2], TypeError, "`temperature` must be a number. Received: temperature=[1, 2]"),
    ],
)
def test_what_is_no_temperature(temperature, error, message, small):
    small.weights, small.temperature = [0.2, 0.3, 0.5], 1.7
    with pytest.raises(error) as caught:
        small.temperature = temperature
    assert str(caught.value) == message
    assert small.temperature == 1.7
    np.testing.assert_allclose(small.weights, [0.2, 0.3, 0.5])


# The likeliest class stays, whatever the temperature

TEMPERATURES = st.floats(0.05, 20)
DTYPES = st.sampled_from(["float32", "float64"])


@st.composite
def near_ties(draw, highest):
    """Rows whose largest numbers lie some steps of the type apart, or are equal."""
    dtype = draw(DTYPES)
    shape = (8, draw(st.integers(2, 6)))
    top = draw(arrays.arrays(dtype, (8, 1), elements=highest))
    steps = draw(arrays.arrays("int8", shape, elements=st.integers(-3, 3)))
    near = top + steps * np.spacing(top)
    far = draw(arrays.arrays("bool", shape))
    far[far.all(axis=-1)] = False
    down = draw(arrays.arrays(dtype, shape, elements=st.floats(0, 1, width=32)))
    return near.astype(dtype), down, far


@settings(deadline=None, max_examples=40)
@given(near_ties(st.floats(0.125, 0.5, width=32)), TEMPERATURES)
def test_the_likeliest_of_probabilities_stays(drawn, temperature):
    near, down, far = drawn
    probabilities = np.where(far, near.min(axis=-1, keepdims=True) * down, near)
    after = np.asarray(temper(probabilities, "multiclass", False, temperature))
    assert after.dtype == probabilities.dtype
    np.testing.assert_array_equal(after.argmax(axis=-1), probabilities.argmax(axis=-1))
    np.testing.assert_allclose(
        after,
        cooled("multiclass", np.maximum(probabilities, np.finfo("float32").tiny), temperature),
        rtol=1e-3,
        atol=1e-6,
    )


@settings(deadline=None, max_examples=40)
@given(near_ties(st.floats(0.125, 0.5, width=32)), TEMPERATURES)
def test_the_likeliest_of_log_probabilities_stays(drawn, temperature):
    near, down, far = drawn
    logs = np.log(np.where(far, near.min(axis=-1, keepdims=True) * np.maximum(down, 1e-30), near))
    logs = logs - special.logsumexp(logs, axis=-1, keepdims=True)
    after = np.asarray(temper(logs, "multiclass", True, temperature))
    assert after.dtype == logs.dtype
    np.testing.assert_array_equal(after.argmax(axis=-1), logs.argmax(axis=-1))
    expected = special.log_softmax(logs.astype("float64") / temperature, axis=-1)
    np.testing.assert_allclose(after, expected, rtol=1e-3, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(near_ties(st.just(0.5)), TEMPERATURES)
def test_the_side_of_one_half_stays(drawn, temperature):
    near, down, far = drawn
    probabilities = np.where(far, down, near)
    after = np.asarray(temper(probabilities, "binary", False, temperature))
    np.testing.assert_array_equal(np.sign(after - 0.5), np.sign(probabilities - 0.5))
    clear = np.clip(probabilities, 1e-6, 1 - 1e-6)
    expected = cooled("binary", clear, temperature)
    inside = probabilities == clear
    np.testing.assert_allclose(after[inside], expected[inside], rtol=2e-2, atol=2e-6)
    assert ((after >= 0) & (after <= 1)).all()


@settings(deadline=None, max_examples=40)
@given(
    arrays.arrays(
        "float32",
        (8, 3),
        elements=st.one_of(st.just(0.0), st.floats(2.0**-100, 2.0**100, width=32)),
    ),
    arrays.arrays("bool", (8, 3)),
    TEMPERATURES,
)
def test_the_sign_of_log_odds_stays(sizes, negative, temperature):
    odds = np.where(negative, -sizes, sizes)
    after = np.asarray(temper(odds, "multilabel", True, temperature))
    np.testing.assert_array_equal(np.sign(after), np.sign(odds))
    np.testing.assert_allclose(after, odds / temperature, rtol=1e-6)


# What makes no sense, and leaves what was learned before


@pytest.fixture(scope="module")
def refusing():
    """Ensembles by task, with weights and a temperature."""
    made = {
        "multiclass": ensemble_of(eager(dense()), 3),
        "binary": ensemble_of(eager(dense("binary_crossentropy", 1, "sigmoid")), 3),
        "multilabel": ensemble_of(eager(dense("binary_crossentropy", 3, "sigmoid")), 3),
        "regression": ensemble_of(eager(dense("mse", 2, None)), 3),
    }
    own = member_weights(made["multiclass"])
    own[1] = [np.full(array.shape, np.nan) for array in own[1]]
    made["one broken"] = ensemble_with(made["multiclass"].model, *own)
    for ens in made.values():
        ens.weights, ens.temperature = [0.2, 0.3, 0.5], 1.7
    return made


def check_refusal(call, ens, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
    np.testing.assert_allclose(ens.weights, [0.2, 0.3, 0.5])
    assert ens.temperature == 1.7


def changed(array, place, value):
    array = np.array(array, "float64")
    array[place] = value
    return array


SHARES = np.eye(3)[LABELS]
ODDS = np.arange(31)[:, None] % 2
MARKS = np.stack([np.arange(31) % n == 0 for n in (2, 3, 4)], axis=1).astype(int)
WRONG_TARGETS = [
    ("multiclass", np.where(LABELS == 1, 0, LABELS), "y without class 1 of output 'answer'"),
    ("multiclass", np.zeros(31, int), "y without class 1, 2 of output 'answer'"),
    ("multiclass", np.eye(3)[np.where(LABELS == 2, 0, LABELS)], "y without class 2 of output"),
    (
        "multiclass",
        LABELS[:30],
        "`y` must be as long as `x`. Received: y of shape (30,), x with 31",
    ),
    ("multiclass", changed(LABELS, 4, np.nan), "`y` must be finite. Received: y with NaN"),
    ("multiclass", changed(LABELS, 4, np.inf), "`y` must be finite. Received: y with NaN or inf"),
    (
        "multiclass",
        changed(LABELS, 4, 3),
        "`y` must be whole numbers from 0 to 2, the model's classes. Received: y from 0.0 to 3.0",
    ),
    ("multiclass", changed(LABELS, 4, -1), "from 0 to 2, the model's classes. Received: y from -1"),
    ("multiclass", changed(LABELS, 4, 0.5), "`y` must be whole numbers from 0 to 2"),
    ("multiclass", SHARES * 2, "`y` must have for each row probabilities that sum to 1. Received"),
    ("multiclass", changed(SHARES, (slice(None), 0), -1), "`y` must have for each row probabil"),
    (
        "multiclass",
        SHARES[:, :2],
        "`y` does not fit the model's output. Received: y of shape (31, ",
    ),
    ("multiclass", None, "There are no targets to compare with. Received: x="),
    (
        "binary",
        ODDS + 1,
        "`y` of a binary output must lie from 0 to 1. Received: y from 1.0 to 2.0",
    ),
    ("binary", 2 * ODDS - 1, "`y` of a binary output must lie from 0 to 1. Received: y from -1.0"),
    ("binary", np.zeros((31, 1)), "y without class 1 of output 'answer'"),
    ("multilabel", MARKS * 2, "`y` of a multilabel output must lie from 0 to 1"),
    ("multilabel", MARKS[:, 0], "`y` does not fit the model's output. Received: y of shape (31,)"),
    ("regression", SOME[:, :3], "y of shape (31, 3), where (31, 2) is needed"),
    ("regression", changed(SOME[:, :2], 0, np.nan), "`y` must be finite"),
]


@pytest.mark.parametrize(("task", "y", "message"), WRONG_TARGETS)
def test_targets_that_cannot_be(task, y, message, refusing):
    ens = refusing[task]
    check_refusal(lambda: ens.fit_weights(FEATURES, y, verbose=0), ens, ValueError, message)


@pytest.mark.parametrize("case", [0, 3, 4, 9, 13])
def test_calibrating_on_targets_that_cannot_be(case, refusing):
    task, y, message = WRONG_TARGETS[case]
    ens = refusing[task]
    check_refusal(lambda: ens.calibrate(FEATURES, y, verbose=0), ens, ValueError, message)


def test_targets_that_are_no_numbers(refusing):
    ens = refusing["multiclass"]
    names = np.array(["cat", "dog", "eel"])[LABELS]
    for call in (ens.fit_weights, ens.calibrate):
        check_refusal(
            lambda call=call: call(FEATURES, names, verbose=0),
            ens,
            TypeError,
            "`y` must be numbers. Received: y of dtype <U3",
        )


@pytest.mark.parametrize(
    ("sample_weight", "message"),
    [
        (np.zeros(31), "`sample_weight` must be at least 0 and not 0 everywhere. Received: "),
        (changed(np.ones(31), 3, -1), "and not 0 everywhere. Received: sample_weight from -1.0"),
        (changed(np.ones(31), 3, np.nan), "`sample_weight` must be finite"),
        (
            np.ones(30),
            "`sample_weight` must be as long as `x`. Received: sample_weight of shape (30",
        ),
        (np.ones((31, 2)), "`sample_weight` does not fit the model's output"),
        ((LABELS != 1).astype(float), "y without class 1 of output 'answer'"),
    ],
)
def test_sample_weights_that_cannot_be(sample_weight, message, refusing):
    ens = refusing["multiclass"]
    check_refusal(
        lambda: ens.fit_weights(FEATURES, LABELS, sample_weight=sample_weight, verbose=0),
        ens,
        ValueError,
        message,
    )


def test_data_that_cannot_be(refusing):
    ens = refusing["multiclass"]
    for call in (ens.fit_weights, ens.calibrate):
        for x, y, message in (
            (SOME[:1], LABELS[:1], "Nothing can be learned from so few data. Received: 1 row."),
            (changed(SOME, 2, np.nan), LABELS, "Received: NaN from each member. Look at `x`."),
        ):
            data = one_batch(x, y)
            check_refusal(lambda c=call, data=data: c(data, verbose=0), ens, ValueError, message)
        check_refusal(
            lambda call=call: call(PAIRS, LABELS, verbose=0),
            ens,
            ValueError,
            "`y` must not be given where `x` brings the targets itself. Received: x=",
        )


def test_a_member_that_gives_nan_is_named(refusing):
    ens = refusing["one broken"]
    for call in (ens.fit_weights, ens.calibrate):
        check_refusal(
            lambda call=call: call(FEATURES, LABELS, verbose=0),
            ens,
            ValueError,
            "A prediction is NaN. Received: NaN from member 1. Make an ensemble without it.",
        )


@pytest.mark.parametrize("task", ["regression", "logits"])
def test_a_member_that_gives_infinity_is_named(task):
    loss, units, activation = TASKS[task]
    model = eager(dense(loss, units, activation))
    own = member_weights(ensemble_of(model, 3))
    own[1] = [
        *(np.zeros_like(array) for array in own[1][:-1]),
        np.array([np.inf] + [0] * (units - 1)),
    ]
    ens = ensemble_with(model, *own)
    ens.weights, ens.temperature = [0.2, 0.3, 0.5], 1.7
    data = one_batch(SOME, SOME[:, :2]) if task == "regression" else PAIRS
    for call in (ens.fit_weights, ens.calibrate)[: 1 if task == "regression" else 2]:
        check_refusal(
            lambda call=call: call(data, verbose=0), ens, ValueError, "from member 1. Make an ensem"
        )


@pytest.mark.parametrize("method", ["Greedy", "mean", None, 3])
def test_unknown_methods(method, refusing):
    ens = refusing["multiclass"]
    check_refusal(
        lambda: ens.fit_weights(FEATURES, LABELS, method=method, verbose=0),
        ens,
        ValueError,
        f"`method` must be one of ('likelihood', 'greedy'). Received: method={method!r}",
    )


def test_a_regression_has_no_temperature(refusing):
    ens = refusing["regression"]
    check_refusal(
        lambda: ens.calibrate(FEATURES, SOME[:, :2], verbose=0),
        ens,
        ValueError,
        "A temperature is for classes: it sharpens or flattens probabilities, and values have none",
    )


def test_without_members_nothing_is_learned():
    ens = SnapshotEnsemble(dense())
    for call in (ens.fit_weights, ens.calibrate):
        with pytest.raises(ValueError, match="The ensemble has no members yet. Call `fit`, or"):
            call(SOME, LABELS, verbose=0)
    assert ens.weights is None
    assert ens.temperature == 1
