"""Plots of schedules, training, members, calibration and uncertainty.

Each function draws into `ax`, or into a new figure, and returns the `Axes`; none calls `show`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from snapshot_ensemble.checks import counted
from snapshot_ensemble.cycles import Cycle
from snapshot_ensemble.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    axes,
    labelled,
    mark_restarts,
    use_integer_ticks,
)
from snapshot_ensemble.ensemble import SnapshotEnsemble
from snapshot_ensemble.evaluation import metrics
from snapshot_ensemble.evaluation.early_exit import cost_curve
from snapshot_ensemble.evaluation.gathering import gather
from snapshot_ensemble.evaluation.loss_landscape import losses_between_members, principal_components
from snapshot_ensemble.evaluation.uncertainty import error_without_least_sure
from snapshot_ensemble.report_plots import plot_diversity, plot_members, plot_risk_coverage
from snapshot_ensemble.schedules import CosineAnnealing
from snapshot_ensemble.training.lr_range_test import RangeTest

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_schedule(
    schedule: SnapshotEnsemble | CosineAnnealing | Sequence[Cycle],
    epochs: int | None = None,
    *,
    steps_per_epoch: int = 100,
    ax: "Axes | None" = None,
) -> "Axes":
    """Plots the learning rate of every step.

    Example:

    >>> ax = plot_schedule(CosineAnnealing(10, 2.0, lr_init=0.1), epochs=70)
    >>> ax.figure.savefig("schedule.png")

    Args:
        schedule: A `CosineAnnealing`, a `SnapshotEnsemble`, or a plan made by either.
        epochs: The budget. Defaults to `None`, for a plan, which has its own.
        steps_per_epoch: Points to plot per epoch. Defaults to `100`.
        ax: Defaults to `None`, a new figure.

    Returns:
        The `Axes`, with epochs on the x-axis and the learning rate on the y-axis.

    Raises:
        ValueError: If the epochs cannot be split into whole cycles.
    """
    plan = schedule if isinstance(schedule, Sequence) else schedule.plan(epochs)  # type: ignore[arg-type]
    ax = axes(ax)
    for cycle in plan:
        rates = cycle.rates(steps_per_epoch)
        ax.plot(cycle.first_epoch + np.arange(len(rates)) / steps_per_epoch, rates, color=BLUE)
    restarts = [cycle.first_epoch for cycle in plan[1:] if not cycle.offset]
    mark_restarts(ax, restarts)
    return labelled(ax, "epoch", "learning rate", legend=bool(restarts))


def plot_history(
    ensemble: SnapshotEnsemble, metric: str = "loss", *, ax: "Axes | None" = None
) -> "Axes":
    """Plots a metric and the learning rate over the epochs, and marks the restarts.

    Args:
        ensemble: A trained ensemble.
        metric: A name in `ensemble.history`; its validation values are plotted, too.
        ax: Defaults to `None`, a new figure.

    Returns:
        The `Axes` of the metric.

    Raises:
        ValueError: If the history has no such metric.
    """
    history = ensemble.history
    if metric not in history:
        raise ValueError(f"`metric` must be one of {sorted(history)}. Received: metric={metric!r}")
    ax = axes(ax)
    epochs = np.arange(1, len(history["cycle"]) + 1)
    cycles = np.asarray(history["cycle"])
    for name, color in ((metric, BLUE), (f"val_{metric}", ORANGE)):
        if name in history:
            values = np.asarray([np.nan if v is None else v for v in history[name]], "float64")
            known = np.isfinite(values)
            ax.plot(epochs[known], values[known], color=color, label=name)
    parts = [s.cycle for s in ensemble.snapshots if s.cycle is not None and not s.is_annealed]
    are_restarts = (cycles[1:] != cycles[:-1]) & ~np.isin(cycles[:-1], parts)
    mark_restarts(ax, epochs[1:][are_restarts] - 0.5)
    rate = ax.twinx()
    rate.plot(epochs, history["learning_rate"], color=GREY, alpha=0.5, linewidth=1)
    rate.set_ylabel("learning rate (end of the epoch)", color=GREY)
    # Draw the metric and the legend in front of the rate.
    ax.set_zorder(rate.get_zorder() + 1)
    ax.patch.set_visible(False)
    use_integer_ticks(ax.xaxis)
    return labelled(ax, "epoch", metric)


def plot_lr(found: RangeTest, *, ax: "Axes | None" = None) -> "Axes":
    """Plots the curve of a learning-rate range test.

    Args:
        found: The result of `ensemble.find_lr`.
        ax: Defaults to `None`, a new figure.

    Returns:
        The `Axes`, with the learning rate on a logarithmic x-axis and the loss on the y-axis.
    """
    ax = axes(ax)
    ax.plot(found.rates, found.losses, color=GREY, alpha=0.5, linewidth=1, label="each batch")
    ax.plot(found.rates, found.smoothed, color=BLUE, label="smoothed")
    label = f"suggested peak: {found.suggestion:.2g}"
    ax.axvline(found.suggestion, color=ORANGE, linestyle="--", label=label)
    ax.set_xscale("log")
    # Clip the diverging end, which would dwarf the rest of the curve.
    low, high = found.smoothed.min(), np.max(found.losses[: max(len(found.losses) // 5, 1)])
    ax.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low))
    return labelled(ax, "learning rate", "loss")


def plot_reliability(
    ensemble: SnapshotEnsemble,
    x: Any,
    y: Any = None,
    *,
    combine: str = "mean",
    bins: int = metrics.BINS,
    ax: "Axes | None" = None,
) -> "Axes":
    """Plots a reliability diagram: accuracy against confidence.

    Well-calibrated probabilities lie on the diagonal. If the ensemble has a temperature, the
    probabilities are plotted both without and with it.

    Args:
        ensemble: An ensemble of a classifier.
        x: Held-out data, as for `model.evaluate`.
        y: As for `model.evaluate`.
        combine: As for `predict`. Defaults to `"mean"`.
        bins: Number of bins, each with the same number of items. Defaults to `15`.
        ax: Defaults to `None`, a new figure.

    Returns:
        The `Axes`.

    Raises:
        ValueError: If the first output is a regression, or the data do not fit the model.
    """
    pool = ensemble._pool.now()
    indices, weights = pool.combination(combine, None)
    held = gather(pool, x, y, indices=indices)
    if not held.meanings[0].is_classes:
        raise ValueError(
            "`plot_reliability` needs a classifier. Received: a model whose first output is a "
            "regression."
        )
    ax = axes(ax)
    curves = [(1.0, "as predicted" if ensemble.temperature == 1 else "uncalibrated", ORANGE, "s")]
    if ensemble.temperature != 1:
        curves.append((ensemble.temperature, f"T = {ensemble.temperature:.3g}", BLUE, "o"))
    for temperature, label, color, marker in curves:
        combined = held.combined(combine, weights, temperature)
        logs = metrics.items_of(held.unpacked(combined)[0], held.meanings[0])
        confidence, accuracy, mass = metrics.reliability(logs, held.truths[0], bins).T
        with_error = f"{label} (ECE {mass @ np.abs(accuracy - confidence):.3f})"
        ax.plot(confidence, accuracy, color=color, marker=marker, markersize=4, label=with_error)
    ax.axline((1, 1), slope=1, color=GREY, linestyle="--", linewidth=1, label="perfect calibration")
    return labelled(ax, "confidence (probability of the predicted class)", "accuracy")


def plot_uncertainty(
    ensemble: SnapshotEnsemble, x: Any, y: Any = None, *, ax: "Axes | None" = None
) -> "Axes":
    """Plots the error on the remaining items as the least certain ones are set aside.

    The better the uncertainty identifies errors, the more steeply the curve falls. Only the first
    output is plotted.

    Args:
        ensemble: An ensemble.
        x: Held-out data, as for `model.evaluate`.
        y: As for `model.evaluate`.
        ax: Defaults to `None`, a new figure.

    Returns:
        The `Axes`, with the error rate or the mean squared error on the y-axis.

    Raises:
        ValueError: If the data do not fit the model.
    """
    pool = ensemble._pool.now()
    held = gather(pool, x, y, indices=pool.default_indices())
    ax = axes(ax)
    colors = {"total": BLUE, "aleatoric": ORANGE, "epistemic": GREEN, "std": BLUE}
    curves = error_without_least_sure(held, pool.learned.spreads)
    for name, (set_aside, error) in curves.items():
        ax.plot(set_aside, error, color=colors[name], label=f"by {name}")
    quantity = "error rate" if held.meanings[0].is_classes else "mean squared error"
    return labelled(ax, "share set aside, least certain first", f"{quantity} of the rest")


def plot_early_exit(
    ensemble: SnapshotEnsemble, x: Any, y: Any = None, *, ax: "Axes | None" = None
) -> "Axes":
    """Plots the loss against the members that run for a row, for the cascade of `early_exit=True`.

    Example:

    >>> members_a_row = ens.fit_early_exit(x_val, y_val, verbose=0)
    >>> ax = plot_early_exit(ens, x, y)

    Args:
        ensemble: An ensemble for which `fit_early_exit` was called.
        x: Held-out data, as for `model.evaluate`; other ones than for `fit_early_exit`.
        y: As for `model.evaluate`.
        ax: Defaults to `None`, a new figure.

    Returns:
        The `Axes`, with the negative log-likelihood or squared error, summed over the outputs, on
        the y-axis: of the learned thresholds; of one threshold for all stages, from always to
        never; and of the same number of members for all rows.

    Raises:
        ValueError: If nothing has been learned, or the data do not fit the model.
    """
    pool = ensemble._pool.now()
    held = gather(pool, x, y, indices=pool.cascade().members)
    curve = cost_curve(held, pool.learned.early_exit, pool.learned.temperature)  # type: ignore[arg-type]
    ax = axes(ax)
    ax.plot(*curve.first, "--", color=GREY, marker="o", label="as many members for all rows")
    ax.plot(*curve.shared, color=BLUE, label="one threshold for all stages")
    ax.plot(*curve.learned, "o", color=RED, label="learned thresholds")
    classes = all(meaning.is_classes for meaning in held.meanings)
    return labelled(ax, "members run per row", "negative log-likelihood" if classes else "loss")


def plot_landscape(
    ensemble: SnapshotEnsemble,
    x: Any,
    y: Any = None,
    *,
    points: int = 9,
    batch_size: int | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Plots the loss along the straight line from each snapshot to the next.

    Where the loss rises between them, they lie in different basins: averaging their predictions
    helps, averaging their weights does not. All weights are interpolated, including the
    statistics of `BatchNormalization`. Unlike in `average_weights`, these are not estimated
    again, so for a model with such layers part of the rise comes from them.

    Args:
        ensemble: An ensemble of at least two members.
        x: As for `model.evaluate`.
        y: As for `model.evaluate`.
        points: Number of points per line. Defaults to `9`.
        batch_size: As for `model.predict`.
        ax: Defaults to `None`, a new figure.

    Returns:
        The `Axes`, with the members' numbers on the x-axis and the loss on the y-axis.

    Raises:
        ValueError: If there are fewer than two members, or the data do not fit the model.

    References:
        - [Huang, Li, Pleiss et al., 2017](https://arxiv.org/abs/1704.00109), figure 4
    """
    positions, losses = losses_between_members(ensemble._pool.now(), x, y, points, batch_size)
    ax = axes(ax)
    ax.plot(positions, losses, color=BLUE)
    ax.plot(positions[::points], losses[::points], "o", color=RED, label="snapshot")
    use_integer_ticks(ax.xaxis)
    return labelled(ax, "member, and the line to the next", "loss")


def plot_trajectory(ensemble: SnapshotEnsemble, *, ax: "Axes | None" = None) -> "Axes":
    """Plots the snapshots in the plane of the first two principal components of their weights.

    A line leads through the snapshots of each chain.

    Args:
        ensemble: An ensemble of at least three members.
        ax: Defaults to `None`, a new figure.

    Returns:
        The `Axes`; its labels give each component's share of the variance.

    Raises:
        ValueError: If there are fewer than three members.
    """
    if len(ensemble) < 3:
        raise ValueError(
            "`plot_trajectory` needs at least three members. Received: "
            f"{counted(len(ensemble), 'member')}."
        )
    points, shares = principal_components(ensemble._pool.now())
    ax = axes(ax)
    chains = np.asarray([snapshot.chain or 0 for snapshot in ensemble.snapshots])
    for chain in range(chains.max() + 1):
        ax.plot(*points[chains == chain].T, color=GREY, linewidth=1, zorder=1)
    ax.scatter(points[:, 0], points[:, 1], c=range(len(points)), cmap="cividis", zorder=2)
    for index, point in enumerate(points):
        ax.annotate(str(index), point, xytext=(5, 5), textcoords="offset points")
    ax.margins(0.1)
    labels = [f"principal component {k + 1} ({shares[k]:.0%} of the variance)" for k in (0, 1)]
    return labelled(ax, labels[0], labels[1], legend=False)


__all__ = [
    "plot_diversity",
    "plot_early_exit",
    "plot_history",
    "plot_landscape",
    "plot_lr",
    "plot_members",
    "plot_reliability",
    "plot_risk_coverage",
    "plot_schedule",
    "plot_trajectory",
    "plot_uncertainty",
]
