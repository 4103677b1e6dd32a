"""Computing in blocks of rows gives what computing at once gives."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from snapshot_ensemble.inference import blocks
from snapshot_ensemble.inference.blocks import in_blocks, row_blocks


@given(st.integers(0, 3000), st.integers(0, 10**4))
def test_blocks_are_all_rows_in_order(rows, each):
    parts = list(row_blocks(rows, rows * each))
    covered = np.concatenate([np.arange(rows)[part] for part in parts])
    np.testing.assert_array_equal(covered, np.arange(rows))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) <= max(1, blocks.NUMBERS // max(1, each)) or len(parts) == 1
    # All but the last one are equally large.
    assert len(set(sizes[:-1])) <= 1


@pytest.mark.parametrize("numbers", [1, 7, 40, 10**6])
def test_structures_are_computed_in_blocks(numbers, monkeypatch):
    monkeypatch.setattr(blocks, "NUMBERS", numbers)
    arrays = {"a": np.arange(30.0).reshape(10, 3), "b": np.arange(10)}
    seen = []

    def function(part):
        seen.append(len(part["b"]))
        return [ops.sum(part["a"], axis=1), {"twice": 2 * part["b"]}]

    first, rest = in_blocks(function, arrays)
    np.testing.assert_allclose(first, arrays["a"].sum(axis=1))
    np.testing.assert_array_equal(rest["twice"], 2 * arrays["b"])
    assert isinstance(first, np.ndarray)
    assert sum(seen) == 10
    assert max(seen) == max(1, min(10, numbers // 4))


def test_no_rows_are_one_empty_block():
    assert in_blocks(lambda part: part + 1, np.zeros((0, 3))).shape == (0, 3)
