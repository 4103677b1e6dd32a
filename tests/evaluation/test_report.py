"""The report on digits: its numbers against NumPy, SciPy, scikit-learn and `evaluate`."""

import numpy as np
import pytest
from models import assert_close
from report_cases import (
    TEMPERATURE,
    assert_curves,
    calibrated_nll,
    calibration_error,
    multiclass_brier,
    nll,
    tempered,
)
from sklearn.metrics import (
    log_loss,
    zero_one_loss,
)

DIGITS_ROWS = ["member 0", "member 1", "member 2", "mean", "vote", "geometric"]


def test_names_of_rows_and_columns(digits_report):
    repeated = ["last snapshot", "best member"]
    assert list(digits_report.plain.rows) == [*DIGITS_ROWS[:3], *repeated, *DIGITS_ROWS[3:]]
    assert list(digits_report.shown.rows) == [*digits_report.plain.rows, "weighted"]
    scores = ["loss", "accuracy", "nll", "nll_calibrated", "brier", "ece"]
    for report in (digits_report.plain, digits_report.shown):
        for name, row in report.rows.items():
            own = name not in ("mean", "vote", "geometric", "weighted")
            assert list(row) == scores + ["disagreement"] * own
        assert (report.examples, report.bins) == (150, 15)
    assert (digits_report.plain.temperature, digits_report.shown.temperature) == (1, TEMPERATURE)


@pytest.mark.parametrize("name", DIGITS_ROWS)
def test_loss_and_metrics_are_those_of_evaluate(name, digits_report):
    expected = digits_report.evaluated[name]
    assert expected.keys() == {"loss", "accuracy"}
    assert_close(
        [digits_report.plain.rows[name][key] for key in expected], list(expected.values()), 1e-6
    )


@pytest.mark.parametrize("name", DIGITS_ROWS)
def test_negative_log_likelihood(name, digits_report):
    p = digits_report.p[name]
    # Some shares of votes are 0, which scikit-learn clips to another value.
    expected = (
        nll(p, digits_report.y)
        if name == "vote"
        else log_loss(digits_report.y, p, labels=range(10))
    )
    assert_close(digits_report.plain.rows[name]["nll"], expected)


@pytest.mark.parametrize("name", DIGITS_ROWS)
def test_brier_score(name, digits_report):
    assert_close(
        digits_report.plain.rows[name]["brier"],
        multiclass_brier(digits_report.p[name], digits_report.y),
    )


@pytest.mark.parametrize("name", DIGITS_ROWS)
def test_expected_calibration_error(name, digits_report):
    assert_close(
        digits_report.plain.rows[name]["ece"],
        calibration_error(digits_report.p[name], digits_report.y),
    )


@pytest.mark.parametrize("name", [name for name in DIGITS_ROWS if name != "vote"])
def test_calibrated_on_the_other_half(name, digits_report):
    expected = calibrated_nll((digits_report.p[name], digits_report.y, 1))
    assert_close(digits_report.plain.rows[name]["nll_calibrated"], expected)


def test_disagreement_of_pairs_of_members(digits_report):
    labels = [digits_report.p[f"member {i}"].argmax(axis=1) for i in range(3)]
    expected = np.array([[np.mean(a != b) for b in labels] for a in labels])
    report = digits_report.plain
    (matrix,) = report.disagreement.values()
    assert_close(matrix, expected)
    for i in range(3):
        assert_close(report.rows[f"member {i}"]["disagreement"], expected[i].sum() / 2)
    pairs = [expected[0, 1], expected[0, 2], expected[1, 2]]
    assert_close(list(report.to_dict()["mean_disagreement"].values()), [np.mean(pairs)])
    assert f"Mean pairwise disagreement: {np.mean(pairs):.4f}." in str(report)


def test_members_added_from_either_end(digits_report):
    y = digits_report.y
    stack = np.stack([digits_report.p[f"member {i}"] for i in range(3)])

    def losses(mean):
        return -np.log(mean[np.arange(len(y)), y])

    assert_curves(
        digits_report.plain, stack, lambda mean: zero_one_loss(y, mean.argmax(axis=1)), losses
    )


def test_last_snapshot_and_best_member(digits_report):
    for report in (digits_report.plain, digits_report.shown):
        assert report.rows["last snapshot"] == report.rows["member 2"]
        best = min(range(3), key=lambda i: nll(digits_report.p[f"member {i}"], digits_report.y))
        assert report.rows["best member"] == report.rows[f"member {best}"]


def test_the_temperature_applies_to_combinations_only(digits_report):
    rows, before = digits_report.shown.rows, digits_report.plain.rows
    for name in DIGITS_ROWS:
        for score in ("nll", "nll_calibrated"):
            assert_close(rows[name][score], before[name][score], 1e-9)
    for i in range(3):
        assert rows[f"member {i}"] == before[f"member {i}"]
    for name in ("mean", "weighted"):
        p = tempered(digits_report.p[name], TEMPERATURE)
        assert_close(rows[name]["loss"], log_loss(digits_report.y, p, labels=range(10)))
        assert_close(
            rows[name]["nll"], log_loss(digits_report.y, digits_report.p[name], labels=range(10))
        )
        assert_close(
            rows[name]["nll_calibrated"],
            calibrated_nll((digits_report.p[name], digits_report.y, 1)),
        )
        assert_close(rows[name]["brier"], multiclass_brier(p, digits_report.y))
        assert_close(rows[name]["ece"], calibration_error(p, digits_report.y))
    expected = digits_report.evaluated["tempered weighted"]
    assert_close([rows["weighted"][key] for key in expected], list(expected.values()), 1e-6)
    assert "The combinations have the temperature 1.7, the members none." in str(
        digits_report.shown
    )
    assert "The combinations have" not in str(digits_report.plain)
