"""What all plots share: colours, labels and marks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.image import AxesImage

# Distinguishable with any colour vision (Okabe & Ito, 2008).
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777"


def axes(ax: "Axes | None") -> "Axes":
    """The given axes, or those of a new figure."""
    if ax is not None:
        return ax
    from matplotlib import pyplot as plt  # noqa: PLC0415  Slow to import.

    return plt.subplots(figsize=(6, 4), layout="constrained")[1]


def labelled(ax: "Axes", x: str, y: str, legend: bool = True) -> "Axes":
    """Labels both axes, and adds a grid and perhaps a legend."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(alpha=0.3)
    if legend:
        ax.legend(frameon=False)
    return ax


def use_integer_ticks(axis: "Axis") -> None:
    """Puts ticks only at whole numbers."""
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    axis.set_major_locator(MaxNLocator(integer=True))


def mark_restarts(ax: "Axes", epochs: Sequence[float]) -> None:
    """Draws a vertical line where a cycle begins with a restart."""
    for number, epoch in enumerate(epochs):
        label = "restart" if number == 0 else None
        ax.axvline(epoch, color=GREY, linestyle=":", linewidth=1, label=label)


def show_pairs(ax: "Axes", matrix: np.ndarray, groups: Sequence[int]) -> "AxesImage":
    """Shows a value for each pair of members.

    Args:
        ax: Where to draw.
        matrix: The values.
        groups: The group of each member; empty if there are none. Members are then shown group by
            group, with lines between the groups.
    """
    order = np.argsort(groups or np.zeros(len(matrix)), kind="stable")
    matrix = matrix[np.ix_(order, order)]
    image = ax.imshow(matrix, cmap="cividis", vmin=0)
    if len(matrix) <= 12:
        for (i, j), value in np.ndenumerate(matrix):
            color = "black" if value > matrix.max() / 2 else "white"
            ax.text(j, i, f"{value:.2g}", ha="center", va="center", color=color, fontsize=8)
    if not groups:
        for axis in (ax.xaxis, ax.yaxis):
            use_integer_ticks(axis)
        return image
    for border in np.flatnonzero(np.diff(np.asarray(groups)[order])) + 0.5:
        ax.axhline(border, color="white", linewidth=1.5)
        ax.axvline(border, color="white", linewidth=1.5)
    step = -(-len(order) // 24)  # At most that many labels.
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks(range(0, len(order), step), [str(member) for member in order[::step]])
    return image
