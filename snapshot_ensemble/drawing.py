"""What all plots share: colours, labels and marks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

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
    """Draws a vertical line where a cycle begins."""
    for number, epoch in enumerate(epochs):
        label = "restart" if number == 0 else None
        ax.axvline(epoch, color=GREY, linestyle=":", linewidth=1, label=label)
