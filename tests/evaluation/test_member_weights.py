"""The weights with the lowest loss, on arrays alone, against SciPy and closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from models import dense
from weights_cases import Problem, check_simplex, classes, greedy_by_hand, least_by_scipy, values

from snapshot_ensemble.evaluation.held_out import HeldOut
from snapshot_ensemble.evaluation.member_weights import (
    Objective,
    greedy_weights,
    learn_weights,
    likelihood_weights,
)
from snapshot_ensemble.inference.task_words import Output

TINY = 1.2e-38  # About the smallest normal float32, for a class that a member excludes.


# The optimisation problem, without models


def with_residuals(problem, other):
    return Problem(problem.likelihoods, problem.counts, other.residuals)


def spread(rng, rows, members):
    """Likelihoods near 0 and near 1."""
    return np.clip(rng.beta(0.5, 0.5, (rows, members)), TINY, 1)


def excluded_by_some(rng):
    likelihoods = rng.uniform(0.05, 1, (60, 5))
    likelihoods[rng.random(likelihoods.shape) < 0.3] = TINY
    return likelihoods


def owned(owners, members, likelihood=0.9):
    """Only one member gives the true class of a row any probability."""
    return np.where(owners[:, None] == np.arange(members), likelihood, TINY)


def residuals_of(rng, scales=(1, 1.3, 0.8, 1.1), rows=200):
    shared = 0.5 * rng.normal(size=rows)
    return np.stack([scale * (rng.normal(size=rows) + shared) for scale in scales])


def problems():
    rng = np.random.default_rng(0)
    identical = spread(rng, 80, 3)[:, [0, 1, 0, 2, 1, 0]]
    with_a_perfect_one = np.insert(spread(rng, 80, 3), 1, 1, axis=1)
    without_error = residuals_of(rng)
    without_error[2] = 0
    return {
        "random": classes(spread(rng, 120, 5)),
        "unequal counts": classes(rng.uniform(0.01, 1, (70, 4)), rng.exponential(1e-2, 70)),
        "some identical": classes(identical),
        "all identical": classes(np.repeat(spread(rng, 60, 1), 4, axis=1)),
        "excluded by some": classes(excluded_by_some(rng)),
        "one owner per row": classes(owned(rng.integers(0, 4, 90), 4)),
        "excluded by all": classes(np.full((30, 3), TINY)),
        "one perfect": classes(with_a_perfect_one),
        "few rows, many members": classes(spread(rng, 4, 15)),
        "one row": classes(spread(rng, 1, 6)),
        "values": values(residuals_of(rng)),
        "large values": values(1e3 * residuals_of(rng)),
        "small values": values(1e-4 * residuals_of(rng)),
        "values without error": values(without_error),
        "values, all identical": values(np.repeat(residuals_of(rng, (1,)), 4, axis=0)),
        "few values, many members": values(rng.normal(size=(30, 3))),
        "both": with_residuals(classes(spread(rng, 100, 4)), values(residuals_of(rng))),
        "both, values small": with_residuals(
            classes(spread(rng, 100, 4)), values(1e-4 * residuals_of(rng))
        ),
    }


PROBLEMS = problems()


@pytest.mark.parametrize("name", PROBLEMS)
def test_weights_are_optimal_by_scipy_and_by_the_tangent_bound(name):
    problem = PROBLEMS[name]
    weights = likelihood_weights(problem.objective)
    check_simplex(weights, problem.members)
    assert problem.loss(weights) == pytest.approx(
        least_by_scipy(problem), abs=1e-7 * problem.scale, rel=0
    )
    assert problem.above_the_optimum(weights) <= 1e-7 * problem.scale


@pytest.mark.slow
def test_weights_of_hundreds_of_members_are_optimal_by_the_tangent_bound():
    problem = classes(spread(np.random.default_rng(2), 500, 300))
    weights = likelihood_weights(problem.objective)
    check_simplex(weights, 300)
    assert problem.above_the_optimum(weights) <= 1e-7


def test_each_member_gets_the_share_of_the_rows_that_only_it_predicts():
    owners = np.repeat([0, 1, 2, 3], [10, 0, 25, 65])
    weights = likelihood_weights(classes(owned(owners, 4)).objective)
    np.testing.assert_allclose(weights, [0.1, 0, 0.25, 0.65], atol=1e-5)
    assert weights[1] == 0


def test_one_perfect_member_gets_all_the_weight():
    for name in ("one perfect", "values without error"):
        weights = likelihood_weights(PROBLEMS[name].objective)
        np.testing.assert_array_equal(weights, np.eye(4)[1 if "one" in name else 2])


def test_identical_members_get_equal_weights():
    weights = likelihood_weights(PROBLEMS["some identical"].objective)
    np.testing.assert_allclose(weights[[2, 5, 4]], weights[[0, 0, 1]], rtol=1e-5)
    for name in ("all identical", "values, all identical", "excluded by all"):
        weights = likelihood_weights(PROBLEMS[name].objective)
        np.testing.assert_allclose(weights, 1 / len(weights), rtol=1e-9)


@pytest.mark.parametrize("size", [1e-4, 1, 1e3])
def test_members_with_uncorrelated_errors_are_weighted_by_inverse_squares(size):
    squares = np.array([1, 2, 4, 8])
    weights = likelihood_weights(values(size * np.diag(np.sqrt(squares))).objective)
    np.testing.assert_allclose(weights, (1 / squares) / (1 / squares).sum(), atol=1e-5)


@pytest.mark.parametrize("size", [1e-4, 1, 1e3])
def test_two_regression_members_in_closed_form(size):
    rng = np.random.default_rng(3)
    for scales in ((1, 1.2), (1, 3)):
        one, two = residuals = size * residuals_of(rng, scales)
        expected = np.clip(two @ (two - one) / np.sum((one - two) ** 2), 0, 1)
        weights = likelihood_weights(values(residuals).objective)
        np.testing.assert_allclose(weights, [expected, 1 - expected], atol=1e-5)


def test_members_without_error_get_equal_weights():
    weights = likelihood_weights(values(np.zeros((5, 7))).objective)
    np.testing.assert_array_equal(weights, np.full(5, 0.2))


def test_a_single_member_gets_all_the_weight():
    for problem in (classes(np.array([[0.2], [0.9]])), values(np.array([[1.0, 2.0]]))):
        np.testing.assert_array_equal(likelihood_weights(problem.objective), [1])


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
def test_a_diverged_member_does_not_distort_the_other_weights(size):
    rng = np.random.default_rng(4)
    others = residuals_of(rng)
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
    # The bound is loose where the loss is flat.
    assert problem.above_the_optimum(weights) <= 1e-4 * problem.scale


@pytest.mark.parametrize("name", ["random", "values", "both", "unequal counts"])
def test_loss_gradient_curvature_and_optimality_gap(name):
    problem, rng = PROBLEMS[name], np.random.default_rng(5)
    objective = problem.objective
    for weights in rng.dirichlet(np.full(problem.members, 3), 3):
        assert objective(weights) == pytest.approx(problem.loss(weights), rel=1e-12)
        step = 1e-6 * np.eye(problem.members)
        slopes = [(problem.loss(weights + d) - problem.loss(weights - d)) / 2e-6 for d in step]
        gradient = objective.gradient(weights)
        np.testing.assert_allclose(gradient, slopes, rtol=1e-5, atol=1e-7)
        curvature = [(problem.slope(weights + d) - problem.slope(weights - d)) / 2e-6 for d in step]
        np.testing.assert_allclose(objective.curvature(weights), curvature, rtol=1e-4, atol=1e-6)
        gap = objective.gap(weights)
        assert gap == pytest.approx(problem.above_the_optimum(weights))
        assert problem.loss(weights) - least_by_scipy(problem, 0) <= gap
    columns = rng.dirichlet(np.ones(problem.members), 4).T
    np.testing.assert_allclose(objective(columns), [problem.loss(w) for w in columns.T])


# Greedy selection with replacement


@pytest.mark.parametrize("name", PROBLEMS)
def test_greedy_selection_equals_the_reference(name):
    problem = PROBLEMS[name]
    weights = greedy_weights(problem.objective)
    check_simplex(weights, problem.members)
    np.testing.assert_allclose(weights, greedy_by_hand(problem), atol=1e-12)
    rounds = np.arange(1, 26)[:, None]
    whole = np.abs(weights * rounds - np.round(weights * rounds)).max(axis=1) < 1e-9
    assert whole.any()
    alone = min(problem.loss(one) for one in np.eye(problem.members))
    assert problem.loss(weights) <= alone + 1e-9 * problem.scale


def test_greedy_selection_keeps_to_one_of_several_identical_members():
    for name, chosen in (("all identical", 0), ("values, all identical", 0), ("one perfect", 1)):
        problem = PROBLEMS[name]
        np.testing.assert_array_equal(
            greedy_weights(problem.objective), np.eye(problem.members)[chosen]
        )
    weights = greedy_weights(PROBLEMS["some identical"].objective)
    assert (weights[[2, 4, 5]] == 0).all()


def test_greedy_selection_prefers_members_that_were_chosen_before():
    # In the second round, the first member and the second one again would help equally.
    problem = values(np.array([[1, -2], [-1, 0], [2, -2]]))
    weights = greedy_weights(problem.objective)
    np.testing.assert_allclose(weights, greedy_by_hand(problem), atol=1e-12)
    np.testing.assert_allclose(weights, [0, 10 / 13, 3 / 13])


def test_the_mean_is_kept_if_more_members_help_than_there_are_rounds():
    errors = np.eye(40, dtype="float32")
    meaning = Output("regression")
    held = HeldOut(dense("mse", 1, None), [errors], None, [meaning], np.zeros(40), None, {})
    assert np.count_nonzero(greedy_weights(Objective.of(held))) == 25
    for method in ("greedy", "likelihood"):
        np.testing.assert_allclose(learn_weights(held, method), 1 / 40, rtol=1e-5)
