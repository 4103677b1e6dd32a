"""How far values lie from their prediction, learned from the members' disagreement."""

import numpy as np

from snapshot_ensemble.evaluation.held_out import HeldOut
from snapshot_ensemble.evaluation.metrics import items_of
from snapshot_ensemble.storage.record import Spread

# The factor of the members' standard deviation, and the constant part as a share of the root mean
# squared error, lie within these bounds.
SCALES = (1e-2, 1e2)
FLOORS = (1e-3, 2.0)


def spreads_of(held: HeldOut, combined: list[np.ndarray]) -> list[Spread | None]:
    """The spread of each flat output that has values; None for the others.

    Args:
        held: The members' predictions and the targets.
        combined: The combined output of each output with targets.
    """
    found: list[Spread | None] = [None] * (len(held.numbers) + len(held.rest))
    for i, number in enumerate(held.numbers):
        meaning, truth = held.meanings[i], held.truths[i]
        if meaning.is_classes or meaning.is_gaussian:
            continue
        shape = np.shape(combined[i])
        units = shape[-1] if len(shape) > 1 else 1
        stack = held.outputs[i].astype("float64")
        squares = np.square(truth.targets - items_of(combined[i], meaning))
        found[number] = learn_spread(
            stack.var(axis=0).reshape(-1, units),
            squares.reshape(-1, units),
            truth.weights.reshape(-1, units),
        )
    return found


def learn_spread(variances: np.ndarray, squares: np.ndarray, weights: np.ndarray) -> Spread:
    """The spread with the lowest negative log-likelihood of normal distributions.

    `sum w (log(s^2 v + f^2) + e^2 / (s^2 v + f^2)) / 2` over the members' variances `v` and the
    squared errors `e^2`, with one scale `s`, and one floor `f` for each unit.

    Args:
        variances: `(items, units)`, over the members.
        squares: `(items, units)`, the squared errors.
        weights: `(items, units)`.
    """
    from scipy import optimize  # noqa: PLC0415  It takes long to import.

    totals = np.maximum(weights.sum(axis=0), np.finfo(float).tiny)
    mean_squares = (weights * squares).sum(axis=0) / totals
    mean_squares = np.maximum(mean_squares, np.finfo("float32").tiny)
    # In units of the mean squared error.
    v, e = variances / mean_squares, squares / mean_squares

    def loss(logs: np.ndarray) -> tuple[float, np.ndarray]:
        scale, floors = np.exp(logs[0]), np.exp(logs[1:])
        total = scale * v + floors
        slope = weights * (1 - e / total) / total / 2
        value = float((weights * (np.log(total) + e / total)).sum() / 2)
        return value, np.append((slope * v).sum() * scale, slope.sum(axis=0) * floors)

    bounds = [tuple(2 * np.log(pair)) for pair in (SCALES, *[FLOORS] * v.shape[1])]
    mean = float((weights * v).sum() / totals.sum())
    if mean == 0:  # The members agree, as a single one does.
        return Spread(1.0, np.sqrt(mean_squares).tolist())
    starts = [(share / mean, 1 - share) for share in (0.01, 0.5, 0.99)]
    best = min(
        (
            optimize.minimize(
                loss,
                np.clip(np.log([scale, *[floor] * v.shape[1]]), *np.transpose(bounds)),
                jac=True,
                method="L-BFGS-B",
                bounds=bounds,
            )
            for scale, floor in starts
        ),
        key=lambda found: found.fun,
    )
    scale, *floors = np.exp(best.x / 2)
    return Spread(float(scale), (np.sqrt(mean_squares) * floors).tolist())
