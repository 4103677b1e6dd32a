"""Member weights of a weighted combination, learned on held-out data."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from snapshot_ensemble.evaluation.held_out import HeldOut
from snapshot_ensemble.evaluation.metrics import LOG_FLOOR, losses
from snapshot_ensemble.inference.blocks import row_blocks

ROUNDS = 25
# How far above the optimum the loss may end, relative to its scale (about 1 for nats).
TOLERANCE = 1e-9


@dataclasses.dataclass(frozen=True)
class Objective:
    """The held-out loss of the weighted mean, a convex function of the member weights `w`.

    `f(w) = -sum_r c_r log(sum_m w_m p_rm) + w' G w`: the first term is the negative
    log-likelihood of class outputs, the second the squared error of regression outputs (`G` holds
    the inner products of the members' residuals, which is exact since the weights sum to 1).

    Attributes:
        likelihoods: `p`, `(rows, members)`: the probability of the true class, above 0; for
            distributions of values their density, up to a factor for each row.
        counts: `c`, `(rows,)`: the weight of each row, above 0.
        products: `G`, `(members, members)`: inner products of the residuals.
    """

    likelihoods: np.ndarray
    counts: np.ndarray
    products: np.ndarray

    @classmethod
    def of(cls, held: HeldOut) -> "Objective":
        """The objective that sums the losses of all outputs."""
        members = len(held.outputs[0])
        rows, counts, products = [], [], np.zeros((members, members))
        for block in held.blocks():
            for items, truth, weight in zip(
                block.items, block.truths, held.loss_weights, strict=True
            ):
                if truth.is_gaussian:
                    # Relative to the largest, which changes the loss by a constant.
                    logs = -losses(items, truth)
                    kept = truth.weights > 0
                    rows.append(np.exp(np.maximum(logs - logs.max(axis=0), LOG_FLOOR))[:, kept].T)
                    counts.append(weight * truth.weights[kept])
                    continue
                if items.ndim == 2:
                    residuals = (items - truth.targets) * np.sqrt(weight * truth.weights)
                    products += residuals @ residuals.T
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
        """The magnitude of the loss: about 1 nat for classes, plus the best squared error."""
        squares = np.diag(self.products)
        # Not the mean: a single diverged member would dominate it.
        return float(self.counts.sum() + max(squares.min(), 1e-12 * squares.mean()))

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """The loss for one weight vector, or for each column of a matrix."""
        quadratic = np.sum(weights * (self.products @ weights), axis=0)
        return quadratic - self.counts @ np.log(self.likelihoods @ weights)

    def gradient(self, weights: np.ndarray) -> np.ndarray:
        shares = self.counts / (self.likelihoods @ weights)
        return 2 * self.products @ weights - self.likelihoods.T @ shares

    def curvature(self, weights: np.ndarray) -> np.ndarray:
        curvature = 2 * self.products
        for rows in row_blocks(len(self.likelihoods), self.likelihoods.size):
            likelihoods = self.likelihoods[rows]
            scaled = likelihoods * (np.sqrt(self.counts[rows]) / (likelihoods @ weights))[:, None]
            curvature += scaled.T @ scaled
        return curvature

    def gap(self, weights: np.ndarray) -> float:
        """An upper bound on the distance to the optimum: by convexity `g.w - min g`."""
        gradient = self.gradient(weights)
        return float(gradient @ weights - gradient.min())


def likelihood_weights(objective: Objective) -> np.ndarray:
    """The weights with the lowest loss on the simplex.

    Newton's method follows the central path of the logarithmic barrier (Boyd & Vandenberghe 2004,
    chapter 11). Identical members get equal weights.
    """
    weights = np.full(objective.members, 1 / objective.members)
    scale = objective.scale
    if scale == 0:
        return weights
    barrier = (scale + np.trace(objective.products)) / objective.members
    while barrier * objective.members > TOLERANCE * scale / 10:
        barrier /= 10
        weights = _center(objective, weights, barrier)
    return _without_negligible(objective, weights, scale)


def _center(objective: Objective, weights: np.ndarray, barrier: float) -> np.ndarray:
    """Minimises `f(w) - barrier * sum log w` with `sum w = 1`, by damped Newton steps."""
    count = len(weights)
    system = np.zeros((count + 1, count + 1))

    def barrier_loss(w: np.ndarray) -> float:
        return float(objective(w) - barrier * np.log(w).sum())

    before = barrier_loss(weights)
    for _ in range(50):
        # Steps are relative to each weight, so the barrier's curvature is `barrier` for all.
        slope = weights * objective.gradient(weights) - barrier
        system[:count, :count] = objective.curvature(weights) * np.outer(weights, weights)
        system[np.arange(count), np.arange(count)] += barrier
        system[count, :count] = system[:count, count] = weights
        try:
            direction = np.linalg.solve(system, np.append(-slope, 0.0))[:count]
        except np.linalg.LinAlgError:  # Rounding: the loss is flat in some direction.
            return weights
        decrement = -float(slope @ direction)
        if decrement < barrier * 1e-5:
            break
        step = min(1.0, 0.99 / max(1e-300, -direction.min()))
        while (loss := barrier_loss(weights * (1 + step * direction))) > (
            before - step * decrement / 4
        ):
            step /= 2
            if step < 1e-10:  # Rounding: no further decrease is possible.
                return weights
        weights, before = weights * (1 + step * direction), loss
        weights /= weights.sum()
    return weights


def _without_negligible(objective: Objective, weights: np.ndarray, scale: float) -> np.ndarray:
    """Sets the weights to 0 that only the barrier keeps above 0."""
    # At the optimum, a member of weight 0 has a larger gradient than members with weight.
    gradient = objective.gradient(weights)
    negligible = weights * scale < gradient - gradient @ weights
    kept = np.where(negligible, 0.0, weights)
    kept /= kept.sum()
    return kept if objective(kept) <= objective(weights) + TOLERANCE * scale else weights


def greedy_weights(objective: Objective) -> np.ndarray:
    """Greedy selection with replacement (Caruana et al., 2004).

    Each of 25 rounds adds the member that lowers the loss most, and the weights after the best
    round are returned. Ties go to members that were chosen before.
    """
    counts = np.zeros(objective.members)
    best, best_value = counts, np.inf
    for number in range(1, ROUNDS + 1):
        values = objective((counts[:, None] + np.eye(objective.members)) / number)
        tied = np.flatnonzero(values <= values.min() + 1e-12 * objective.scale)
        chosen = tied[np.argmax(counts[tied] > 0)]
        counts = counts + np.eye(objective.members)[chosen]
        if values[chosen] < best_value - 1e-12 * objective.scale:
            best, best_value = counts / number, values[chosen]
    return best


METHODS: dict[str, Callable[[Objective], np.ndarray]] = {
    "likelihood": likelihood_weights,
    "greedy": greedy_weights,
}


def check_method(method: Any) -> None:
    """Raises `ValueError` unless `method` is a key of `METHODS`."""
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"`method` must be one of {tuple(METHODS)}. Received: method={method!r}")


def learn_weights(held: HeldOut, method: str) -> np.ndarray:
    """Learns member weights; on these data never worse than any one member or the plain mean."""
    held.check_for_fitting()
    objective = Objective.of(held)
    alone = np.eye(objective.members)
    equal = np.full((objective.members, 1), 1 / objective.members)
    learned = METHODS[method](objective)[:, None]
    candidates = np.concatenate([learned, equal, alone], axis=1)
    return candidates[:, int(np.argmin(objective(candidates)))]
