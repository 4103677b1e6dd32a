"""Plots of a report. They are among the names of `snapshot_ensemble.plots`."""

from typing import TYPE_CHECKING

import numpy as np

from snapshot_ensemble.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    axes,
    labelled,
    show_pairs,
    use_integer_ticks,
)
from snapshot_ensemble.evaluation.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_members(report: Report, metric: str = "error", *, ax: "Axes | None" = None) -> "Axes":
    """Plots the error of the mean of 1, 2, … members, added from the last and from the first.

    Args:
        report: The result of `ensemble.report`.
        metric: `"error"`, the error rate or the mean squared error of each output, or `"loss"`,
            the compiled loss. Defaults to `"error"`.
        ax: Defaults to `None`, a new figure.

    Returns:
        The `Axes`, with the number of members on the x-axis and the error or loss on the y-axis.

    Raises:
        ValueError: If `metric` is neither.
    """
    if metric not in ("error", "loss"):
        raise ValueError(f"`metric` must be 'error' or 'loss'. Received: metric={metric!r}")
    ax = axes(ax)
    names = [name for name in report.added_from_last if (name == "loss") == (metric == "loss")]
    styles = ("-", "--", ":", "-.")
    for name, style in zip(names, styles * len(names), strict=False):
        suffix = "" if len(names) == 1 else f" ({name})"
        for curves, end, color in (
            (report.added_from_last, "last", BLUE),
            (report.added_from_first, "first", ORANGE),
        ):
            counts = np.arange(1, len(curves[name]) + 1)
            label = f"from the {end}{suffix}"
            ax.plot(counts, curves[name], style, color=color, marker="o", label=label)
    ax.axvline(report.worth, color=GREY, linestyle=":", label=f"enough members: {report.worth}")
    use_integer_ticks(ax.xaxis)
    return labelled(ax, "number of members", metric)


def plot_diversity(
    report: Report, output: str | None = None, *, ax: "Axes | None" = None
) -> "Axes":
    """Plots the disagreement between each pair of members.

    Args:
        report: The result of `ensemble.report`.
        output: The name of an output. Defaults to `None`, the first output.
        ax: Defaults to `None`, a new figure.

    Returns:
        The `Axes`, with the share of rows for which a pair predicts different classes; for
        regression, the root of their mean squared difference. The members of a merged ensemble
        are shown chain by chain, with lines between the chains.

    Raises:
        ValueError: If there is no such output.
    """
    matrix = report.disagreement[_chosen(report, output)]
    ax = axes(ax)
    image = show_pairs(ax, matrix, report.chains)
    ax.figure.colorbar(image, ax=ax, label="disagreement")
    ax.set_xlabel("member")
    ax.set_ylabel("member")
    return ax


def plot_risk_coverage(
    report: Report, output: str | None = None, *, ax: "Axes | None" = None
) -> "Axes":
    """Plots the risk of what is answered against its share, as the least sure items are refused.

    Example:

    >>> ax = plot_risk_coverage(ens.report(x_val, y_val, verbose=0))

    Args:
        report: The result of `ensemble.report`.
        output: The name of an output. Defaults to `None`, the first output.
        ax: Defaults to `None`, a new figure.

    Returns:
        The `Axes`, with the share of the items that are answered on the x-axis, and their error
        rate or mean squared error on the y-axis: one curve for each score of uncertainty.

    Raises:
        ValueError: If there is no such output.
    """
    name = _chosen(report, output)
    prefix = f"{name} " if len(report.disagreement) > 1 else ""
    colors = {"max_probability": ORANGE, "total": BLUE, "epistemic": GREEN, "std": BLUE}
    ax = axes(ax)
    for score, color in colors.items():
        if (curve := report.risk_coverage.get(prefix + score)) is not None:
            label = f"{score} (AURC {report.refusing[prefix + score]['aurc']:.3g})"
            ax.plot(*curve, color=color, label=label)
    has_classes = prefix + "max_probability" in report.risk_coverage
    quantity = "error rate" if has_classes else "mean squared error"
    return labelled(ax, "share answered, surest first", f"{quantity} of what is answered")


def _chosen(report: Report, output: str | None) -> str:
    """The name of the output, by default the first; or an error."""
    names = list(report.disagreement)
    if output is not None and output not in names:
        raise ValueError(f"`output` must be one of {names}. Received: output={output!r}")
    return names[0] if output is None else output
