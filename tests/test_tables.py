"""The helper that formats text tables."""

import doctest

import pytest

from snapshot_ensemble import tables
from snapshot_ensemble.tables import text_table

ROWS = [("name", "a", "note"), ("x", "1.25", "long enough"), ("longer", "10", "")]


def test_the_docstring_example():
    assert doctest.testmod(tables).failed == 0


@pytest.mark.parametrize(
    ("align", "expected"),
    [
        ("lrl", "name       a  note\nx       1.25  long enough\nlonger    10"),
        ("r", "  name     a         note\n     x  1.25  long enough\nlonger    10"),
        ("lr", "name       a         note\nx       1.25  long enough\nlonger    10"),
    ],
)
def test_columns_are_aligned_and_lines_end_with_text(align, expected):
    assert text_table(ROWS, align) == expected
