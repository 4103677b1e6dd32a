"""Arrays of many rows, computed with in blocks: what is in between takes little memory."""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

# How many numbers a block holds: enough to make the overhead of each call negligible, and few
# enough for the processor's cache.
NUMBERS = 2**18


def row_blocks(rows: int, numbers: int) -> Iterator[slice]:
    """Slices that together are all rows.

    Args:
        rows: Number of rows; if it is 0, there is one empty slice.
        numbers: How many numbers all rows hold.
    """
    size = max(1, NUMBERS * rows // max(1, numbers))
    return (slice(start, min(start + size, rows)) for start in range(0, max(1, rows), size))


def in_blocks(function: Callable[[Any], Any], arrays: Any) -> Any:
    """What a function of arrays returns, computed block by block.

    Args:
        function: Takes a structure of arrays and returns one of arrays or tensors. Each row of
            these depends only on the same row of the arrays.
        arrays: A structure of arrays with rows on the first axis.
    """
    leaves = keras.tree.flatten(arrays)
    parts = []
    for rows in row_blocks(len(leaves[0]), sum(leaf.size for leaf in leaves)):
        part = function(keras.tree.map_structure(lambda leaf, rows=rows: leaf[rows], arrays))
        parts.append(keras.tree.map_structure(keras.ops.convert_to_numpy, part))
    return keras.tree.map_structure(lambda *leaves: np.concatenate(leaves), *parts)
