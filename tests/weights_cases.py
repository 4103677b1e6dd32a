"""Problems with known optimal weights, and members of different quality."""

import dataclasses

import keras
import numpy as np
import pytest
from models import (
    one_batch,
)
from scipy import optimize, special

from snapshot_ensemble.evaluation.member_weights import (
    Objective,
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The members' likelihoods of the true classes, and their residuals for values."""

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
        """An upper bound on the distance to the optimum: convex functions lie above tangents."""
        slope = self.slope(weights)
        return slope @ weights - slope.min()


def classes(likelihoods, counts=None):
    rows, members = likelihoods.shape
    counts = np.full(rows, 1 / rows) if counts is None else counts
    return Problem(likelihoods, counts, np.zeros((members, 1)))


def values(residuals):
    members, rows = residuals.shape
    return Problem(np.empty((0, members)), np.empty(0), residuals / np.sqrt(rows))


def least_by_scipy(problem, starts=3, also=()):
    """The lowest loss that SLSQP reaches from the centre and from random starting points."""
    rng, size = np.random.default_rng(1), problem.scale or 1
    starting_points = [np.full(problem.members, 1 / problem.members), *also]
    starting_points += list(rng.dirichlet(np.ones(problem.members), starts))
    minima = [
        optimize.minimize(
            lambda w: problem.loss(w) / size,
            start,
            jac=lambda w: problem.slope(w) / size,
            method="SLSQP",
            # At a weight of 0 the logarithm of an excluded class would diverge.
            bounds=[(1e-11, 1)] * problem.members,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
            options={"ftol": 1e-15, "maxiter": 300},
        ).x
        for start in starting_points
    ]
    return min(problem.loss(np.maximum(x, 0) / np.maximum(x, 0).sum()) for x in minima)


def check_simplex(weights, members):
    assert weights.shape == (members,)
    assert weights.dtype == "float64"
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1, abs=1e-12)


def greedy_by_hand(problem):
    bag, best, best_loss = [], None, np.inf
    slack = 1e-12 * problem.scale

    def weights_of(bag):
        return np.array([bag.count(m) for m in range(problem.members)]) / len(bag)

    for _ in range(25):
        losses = [problem.loss(weights_of([*bag, m])) for m in range(problem.members)]
        tied = [m for m, loss in enumerate(losses) if loss <= min(losses) + slack]
        chosen = next((m for m in tied if m in bag), tied[0])
        bag.append(chosen)
        if losses[chosen] < best_loss - slack:
            best, best_loss = weights_of(bag), losses[chosen]
    return best


def by_least_squares(x, targets, rows, penalty, sharpness):
    """The kernel and bias of one dense layer."""
    wide = np.column_stack([x, np.ones(len(x))])[rows]
    square = wide.T @ wide + penalty * np.eye(wide.shape[1])
    kernel = sharpness * np.linalg.solve(square, wide.T @ targets[rows])
    return [kernel[:-1], kernel[-1]]


def members_by_least_squares(x, targets, sharpness=(14, 4, 8, 6)):
    """Members fitted to ever more rows, with different confidence, and one random member."""
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
    """Labels as Keras takes them, and the targets of least squares."""
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
    """The log-probability of the true class, for each member and item."""
    return np.take_along_axis(logs, np.broadcast_to(labels, logs.shape[:-1])[..., None], -1)[..., 0]


SOME = np.random.default_rng(8).normal(size=(31, 4)).astype("float32")
LABELS = (SOME[:, :3].argmax(axis=1) + (np.arange(31) % 5 == 0)) % 3
FEATURES, PAIRS = one_batch(SOME), one_batch(SOME, LABELS)


def best_temperature(outputs):
    """Where the loss is stationary; it is convex in the inverse temperature."""
    squares = sum(share**2 / logs[..., 0].size for share, logs, _ in outputs)
    prior = 4 * squares / sum(share for share, *_ in outputs)

    def slope(inverse):
        total = prior * (1 - 1 / inverse)
        for share, logs, labels in outputs:
            expected = np.sum(special.softmax(inverse * logs, axis=-1) * logs, axis=-1)
            total += share * np.mean(expected - picked(logs, labels))
        return total

    return 1 / optimize.brentq(slope, 1 / 20, 20, xtol=1e-13)
