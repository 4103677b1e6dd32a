"""How a report is shown: as text, HTML and JSON."""

import html.parser
import math
import sys

import numpy as np
import pandas
import pytest
from report_cases import NAME, assert_aligned, cells_of, table_of, through_json

from snapshot_ensemble.evaluation.report import Report


@pytest.mark.slow
def test_it_prints_as_an_aligned_table(digits_report):
    for report in (digits_report.plain, digits_report.shown):
        assert_aligned(report)
        assert repr(report) == str(report)
    _, remarks = table_of(str(digits_report.plain))
    assert remarks[0] == "150 rows; calibration error over 15 bins of equal mass."
    last = " ".join(f"{value:.4f}" for value in digits_report.plain.added_from_last["error"])
    assert f"error, members added from the last: {last}" in remarks
    first = " ".join(f"{value:.4f}" for value in digits_report.plain.added_from_first["loss"])
    assert f"loss, members added from the first: {first}" in remarks
    assert remarks[-1] == digits_report.plain.notes[-1]


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen = [], set()

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.slow
def test_a_notebook_shows_what_is_printed(digits_report):
    actual = digits_report.shown._repr_html_()
    tags = Tags()
    tags.feed(actual)
    tags.close()
    assert not tags.open
    assert tags.seen == {"table", "thead", "tbody", "tr", "th", "td", "p"}
    rows, paragraphs = cells_of(actual)
    lines, remarks = table_of(str(digits_report.shown))
    assert rows[0] == ["", *lines[0].split()]
    assert [row[0] for row in rows[1:]] == list(digits_report.shown.rows)
    for row, line in zip(rows[1:], lines[1:], strict=True):
        assert " ".join(cell for cell in row if cell) == " ".join(line.split())
    assert paragraphs == remarks


def made_up(**fields):
    return Report(
        **{
            "rows": {"mean": {"loss": 0.5, NAME: 123456.25}, NAME: {NAME: math.nan}},
            "examples": 3,
            "bins": 3,
            "temperature": 1.0,
            "disagreement": {NAME: np.array([[0, 0.5], [0.5, 0]]), "other": np.zeros((2, 2))},
            "added_from_last": {NAME: [0.25, 0.125]},
            "added_from_first": {NAME: [0.5, 0.125]},
            "worth": 1,
            "notes": ["1 < 2 & 3"],
            **fields,
        }
    )


def test_names_are_escaped():
    report = made_up()
    rows, paragraphs = cells_of(report._repr_html_())
    assert rows == [["", "loss", NAME], ["mean", "0.5000", "123456.2500"], [NAME, "", ""]]
    assert paragraphs == str(report).split("\n\n")[1].split("\n")
    assert paragraphs[-1] == "1 < 2 & 3"
    assert f"Mean pairwise disagreement: 0.5000 ({NAME}), 0.0000 (other)." in paragraphs


def test_long_names_and_numbers_are_aligned():
    rows = {
        "mean": {"loss": 123456789.5, "an_exceedingly_long_name": 0.0},
        "member 10": {"loss": -1.5, "disagreement": 0.25},
    }
    assert_aligned(made_up(rows=rows))


def test_its_numbers_survive_json(digits_report):
    report = digits_report.shown
    actual = through_json(report)
    for name in ("rows", "examples", "bins", "temperature", "worth", "notes"):
        assert actual[name] == getattr(report, name)
    for name in ("added_from_last", "added_from_first"):
        assert actual[name] == getattr(report, name)
    for name, matrix in report.disagreement.items():
        np.testing.assert_array_equal(actual["disagreement"][name], matrix)


def test_a_frame_has_the_numbers_of_the_table(digits_report):
    report = digits_report.shown
    frame = report.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    lines, _ = table_of(str(report))
    assert list(frame.columns) == lines[0].split()
    assert list(frame.index) == list(report.rows)
    for name, row in report.rows.items():
        present = frame.loc[name].dropna().to_dict()
        assert present == {column: value for column, value in row.items() if not math.isnan(value)}
    assert math.isnan(frame.loc["mean", "disagreement"])


def test_a_metric_of_several_values_is_one_cell_of_a_frame():
    frame = made_up(rows={"mean": {"loss": 0.5, "recall": np.array([0.25, 1.0])}}).to_frame()
    assert frame.loc["mean", "loss"] == 0.5
    assert frame.loc["mean", "recall"].tolist() == [0.25, 1.0]


def test_without_pandas_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"needs pandas\. Run: pip install pandas\."):
        made_up().to_frame()
