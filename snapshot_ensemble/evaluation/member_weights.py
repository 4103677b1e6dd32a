"""Member weights of a weighted combination, learned on held-out data."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from snapshot_ensemble.evaluation.held_out import HeldOut

ROUNDS = 25
# How far above the optimum the loss may end, as a share of its scale (nats are about 1).
TOLERANCE = 1e-9


@dataclasses.dataclass(frozen=True)
class Objective:
    """The held-out loss of the weighted mean, a convex function of the weights `w`.

    `f(w) = -sum_r c_r log(sum_m w_m p_rm) + w' G w`: the first term is the negative
    log-likelihood of classes, the second the squared error of values (their residuals' products,
    since the weights sum to 1).

    Attributes:
        likelihoods: `p`, `(rows, members)`: what each member gave to what was true, above 0.
        counts: `c`, `(rows,)`, above 0.
        products: `G`, `(members, members)`.
    """

    likelihoods: np.ndarray
    counts: np.ndarray
    products: np.ndarray

    @classmethod
    def of(cls, held: HeldOut) -> "Objective":
        """The summed loss of all outputs."""
        members = len(held.outputs[0])
        rows, counts, products = [], [], np.zeros((members, members))
        for items, truth, weight in zip(held.items, held.truths, held.loss_weights, strict=True):
            if items.ndim == 2:
                apart = (items - truth.targets) * np.sqrt(weight * truth.weights)
                products += apart @ apart.T
                continue
            count = weight * truth.weights[:, None] * truth.targets
            rows.append(np.exp(items[:, count > 0]).T)
            counts.append(count[count > 0])
        empty = np.empty((0, members))
        return cls(np.concatenate([empty, *rows]), np.concatenate([[], *counts]), products)

    @property
    def members(self) -> int:
        return len(self.products)

    @property
    def scale(self) -> float:
        """The size of its values: about 1 nat for classes, the best member's squared error."""
        squares = np.diag(self.products)
        # Not the mean, which one member that diverged would make as large as it likes.
        return float(self.counts.sum() + max(squares.min(), 1e-12 * squares.mean()))

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """The loss of one vector of weights, or of each column of a matrix."""
        quadratic = np.sum(weights * (self.products @ weights), axis=0)
        return quadratic - self.counts @ np.log(self.likelihoods @ weights)

    def gradient(self, weights: np.ndarray) -> np.ndarray:
        shares = self.counts / (self.likelihoods @ weights)
        return 2 * self.products @ weights - self.likelihoods.T @ shares

    def curvature(self, weights: np.ndarray) -> np.ndarray:
        rows = self.likelihoods * (np.sqrt(self.counts) / (self.likelihoods @ weights))[:, None]
        return 2 * self.products + rows.T @ rows

    def gap(self, weights: np.ndarray) -> float:
        """How far above the optimum the loss is at most: by convexity `g.w - min g`."""
        gradient = self.gradient(weights)
        return float(gradient @ weights - gradient.min())


def likelihood_weights(objective: Objective) -> np.ndarray:
    """The weights of least loss on the simplex.

    By Newton steps along the central path of the logarithmic barrier (Boyd & Vandenberghe 2004,
    chapter 11). Of members that are alike each gets the same weight.
    """
    weights = np.full(objective.members, 1 / objective.members)
    scale = objective.scale
    if scale == 0:
        return weights
    barrier = (scale + np.trace(objective.products)) / objective.members
    while barrier * objective.members > TOLERANCE * scale / 10:
        barrier /= 10
        weights = _center(objective, weights, barrier)
    return _without_dust(objective, weights, scale)


def _center(objective: Objective, weights: np.ndarray, barrier: float) -> np.ndarray:
    """Minimises `f(w) - barrier * sum log w` with `sum w = 1`, by damped Newton steps."""
    count = len(weights)
    system = np.zeros((count + 1, count + 1))

    def value(w: np.ndarray) -> float:
        return float(objective(w) - barrier * np.log(w).sum())

    for _ in range(50):
        # In shares of each weight, where the barrier's curvature is `barrier` for all of them.
        slope = weights * objective.gradient(weights) - barrier
        system[:count, :count] = objective.curvature(weights) * np.outer(weights, weights)
        system[np.arange(count), np.arange(count)] += barrier
        system[count, :count] = system[:count, count] = weights
        try:
            share = np.linalg.solve(system, np.append(-slope, 0.0))[:count]
        except np.linalg.LinAlgError:  # Rounding: a flat direction, in which nothing is gained.
            return weights
        decrement = -float(slope @ share)
        if decrement < barrier * 1e-5:
            break
        step = min(1.0, 0.99 / max(1e-300, -share.min()))
        before = value(weights)
        while value(weights * (1 + step * share)) > before - step * decrement / 4:
            step /= 2
            if step < 1e-10:  # Rounding: it does not get any better.
                return weights
        weights = weights * (1 + step * share)
        weights /= weights.sum()
    return weights


def _without_dust(objective: Objective, weights: np.ndarray, scale: float) -> np.ndarray:
    """Sets to 0 what the barrier alone keeps above it."""
    # At the optimum the gradient of a member without weight is above that of the others.
    gradient = objective.gradient(weights)
    dust = weights * scale < gradient - gradient @ weights
    kept = np.where(dust, 0.0, weights)
    kept /= kept.sum()
    return kept if objective(kept) <= objective(weights) + TOLERANCE * scale else weights


def greedy_weights(objective: Objective) -> np.ndarray:
    """Selection with replacement (Caruana et al., 2004): each round adds whom it helps most.

    25 rounds, cut at the best of them; of members that help alike one that was chosen already.
    """
    counts = np.zeros(objective.members)
    best, best_value = counts, np.inf
    for taken in range(1, ROUNDS + 1):
        values = objective((counts[:, None] + np.eye(objective.members)) / taken)
        alike = np.flatnonzero(values <= values.min() + 1e-12 * objective.scale)
        chosen = alike[np.argmax(counts[alike] > 0)]
        counts = counts + np.eye(objective.members)[chosen]
        if values[chosen] < best_value - 1e-12 * objective.scale:
            best, best_value = counts / taken, values[chosen]
    return best


METHODS: dict[str, Callable[[Objective], np.ndarray]] = {
    "likelihood": likelihood_weights,
    "greedy": greedy_weights,
}


def check_method(method: Any) -> None:
    """Raises `ValueError` unless `method` names a way to learn weights."""
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"`method` must be one of {tuple(METHODS)}. Received: method={method!r}")


def learn_weights(held: HeldOut, method: str) -> np.ndarray:
    """Weights by a key of `METHODS`: never worse on these data than one member or the mean."""
    held.check_for_fitting()
    objective = Objective.of(held)
    alone = np.eye(objective.members)
    equal = np.full((objective.members, 1), 1 / objective.members)
    learned = METHODS[method](objective)[:, None]
    candidates = np.concatenate([learned, equal, alone], axis=1)
    return candidates[:, int(np.argmin(objective(candidates)))]
