"""Plain-text tables."""

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], align: str = "lr") -> str:
    """Rows of cells as lines of text, two spaces between columns.

    Example:

    >>> print(text_table([("name", "rows"), ("x", "100"), ("long name", "7")]))
    name       rows
    x           100
    long name     7

    Args:
        rows: The cells, the same number in each row.
        align: `"l"` or `"r"` for each column; the last one also applies to all later columns.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = align + align[-1] * (len(widths) - len(align))
    lines = []
    for row in rows:
        cells = (
            cell.ljust(width) if side == "l" else cell.rjust(width)
            for cell, width, side in zip(row, widths, sides, strict=False)
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
