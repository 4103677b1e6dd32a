"""The report's numbers, against NumPy, SciPy, scikit-learn and `evaluate`."""

import collections
import html.parser
import json
import math
import re
from xml.etree import ElementTree

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from models import Batches, TASKS, assert_close, dense, dense_outputs, ensemble_of, ensemble_with, member_weights
from scipy import optimize, special
from sklearn.datasets import load_diabetes, load_digits
from sklearn.metrics import (
    brier_score_loss,
    log_loss,
    mean_absolute_error,
    mean_squared_error,
    zero_one_loss,
)

from snapshot_ensemble import Snapshot, SnapshotEnsemble
from snapshot_ensemble.evaluation.report import Report

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(30, 4)).astype("float32")
LABELS = RNG.integers(0, 3, len(ROWS))












def normalized(p):
    p = np.asarray(p, "float64")
    return p / p.sum(axis=-1, keepdims=True)


# Scores, written out


def nll(p, y):
    """The mean negative log-likelihood; 0 counts as the smallest positive float32."""
    tiny = float(np.finfo("float32").tiny)
    return -np.log(np.maximum(p[np.arange(len(y)), y], tiny)).mean()


def multiclass_brier(p, y):
    return np.square(p - np.eye(p.shape[1])[y]).sum(axis=1).mean()


def calibration_error(p, y, bins=15):
    """Over as many bins with as many rows each; rows of equal confidence are alike."""
    confidence = np.round(p.max(axis=1), 12)
    right = (p.argmax(axis=1) == y).astype("float64")
    for level in np.unique(confidence):
        right[confidence == level] = right[confidence == level].mean()
    order = np.argsort(confidence, kind="stable")
    which = np.floor((np.arange(len(y)) + 0.5) / len(y) * bins)
    total = 0.0
    for number in range(bins):
        rows = order[which == number]
        if len(rows):
            total += len(rows) / len(y) * abs(confidence[rows].mean() - right[rows].mean())
    return total


def tempered(p, temperature):
    return normalized(p ** (1 / temperature))


def calibrated_nll(*outputs):
    """Each half of the rows, the even and the odd, with the temperature of the other.

    Of each output its probabilities, labels, and weight in the fit of one temperature for all.
    """
    totals = np.zeros(len(outputs))
    for side in (0, 1):

        def fitted(temperature, rows=slice(side, None, 2)):
            return sum(w * nll(tempered(p[rows], temperature), y[rows]) for p, y, w in outputs)

        options = {"xatol": 1e-9}
        temperature = optimize.minimize_scalar(
            fitted, bounds=(0.05, 20), method="bounded", options=options
        ).x
        scored = slice(1 - side, None, 2)
        for i, (p, y, _) in enumerate(outputs):
            share = len(y[scored]) / len(y)
            totals[i] += share * nll(tempered(p[scored], temperature), y[scored])
    return totals


def shares_of_votes(stack):
    """The share of members for each class; of those drawn the one with the higher mean wins."""
    shares = np.mean(stack.argmax(axis=-1)[..., None] == np.arange(stack.shape[-1]), axis=0)
    first = shares == shares.max(axis=1, keepdims=True)
    winner = np.where(first, stack.mean(axis=0), -1).argmax(axis=1)
    drawn = np.flatnonzero(first.sum(axis=1) > 1)
    shares[drawn, winner[drawn]] *= 1 + 1e-6
    return normalized(shares)


def worth(losses):
    """The first whose mean is within a paired standard error of the least; `losses`: by row."""
    best = int(np.argmin(losses.mean(axis=1)))
    for k in range(best):
        apart = losses[k] - losses[best]
        if apart.mean() <= apart.std(ddof=1) / math.sqrt(len(apart)):
            return k + 1
    return best + 1


def assert_curves(report, stack, error, losses):
    """`error` and `losses` of a mean: one number, and one for each row."""
    for found, ordered in (
        (report.added_from_last, stack[::-1]),
        (report.added_from_first, stack),
    ):
        means = [ordered[:k].mean(axis=0) for k in range(1, len(stack) + 1)]
        assert_close(found["error"], [error(mean) for mean in means])
        assert_close(found["loss"], [losses(mean).mean() for mean in means])
    means = [stack[-k:].mean(axis=0) for k in range(1, len(stack) + 1)]
    assert report.worth == worth(np.stack([losses(mean) for mean in means]))


# Digits

DIGITS_ROWS = ["member 0", "member 1", "member 2", "mean", "vote", "geometric"]
TEMPERATURE = 1.7
Digits = collections.namedtuple("Digits", "ens y plain shown p evaluated")


@pytest.fixture(scope="module")
def digits():
    """Reports without and with weights and a temperature, and what they must agree with."""
    keras.utils.set_random_seed(0)
    x, y = models.digits(450)
    model = keras.Sequential(
        [keras.Input((64,)), layers.Dense(16, "relu"), layers.Dense(10, "softmax")]
    )
    optimizer = keras.optimizers.SGD(1.0)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    ens = SnapshotEnsemble(model, cycles=3)
    ens.fit(x[:300], y[:300], epochs=6, batch_size=16, verbose=0)
    x, y = x[300:450], y[300:450]
    stack = normalized(ens.predict_members(x, verbose=0))
    plain = ens.report(x, y, verbose=0)

    def evaluate(model=ens, **arguments):
        return model.evaluate(x, y, return_dict=True, verbose=0, **arguments)

    evaluated, one = {}, ens[0]
    for i, weights in enumerate(member_weights(ens)):
        one.set_weights(weights)
        evaluated[f"member {i}"] = evaluate(one)
    evaluated |= {name: evaluate(combine=name) for name in ("mean", "vote", "geometric")}
    p = {f"member {i}": stack[i] for i in range(3)}
    p["mean"] = stack.mean(axis=0)
    p["vote"] = shares_of_votes(stack)
    p["geometric"] = normalized(np.exp(np.log(stack).mean(axis=0)))
    ens.weights, ens.temperature = [0.5, 0.2, 0.3], TEMPERATURE
    p["weighted"] = np.average(stack, axis=0, weights=ens.weights)
    evaluated["tempered weighted"] = evaluate(combine="weighted")
    return Digits(ens, y, plain, ens.report(x, y, verbose=0), p, evaluated)


def test_names_of_rows_and_columns(digits):
    alike = ["last snapshot", "best member"]
    assert list(digits.plain.rows) == [*DIGITS_ROWS[:3], *alike, *DIGITS_ROWS[3:]]
    assert list(digits.shown.rows) == [*digits.plain.rows, "weighted"]
    scores = ["loss", "accuracy", "nll", "nll_calibrated", "brier", "ece"]
    for report in (digits.plain, digits.shown):
        for name, row in report.rows.items():
            own = name not in ("mean", "vote", "geometric", "weighted")
            assert list(row) == scores + ["disagreement"] * own
        assert (report.examples, report.bins) == (150, 15)
    assert (digits.plain.temperature, digits.shown.temperature) == (1, TEMPERATURE)


@pytest.mark.parametrize("name", DIGITS_ROWS)
def test_loss_and_metrics_are_those_of_evaluate(name, digits):
    expected = digits.evaluated[name]
    assert expected.keys() == {"loss", "accuracy"}
    assert_close([digits.plain.rows[name][key] for key in expected], list(expected.values()), 1e-6)


@pytest.mark.parametrize("name", DIGITS_ROWS)
def test_negative_log_likelihood(name, digits):
    p = digits.p[name]
    # scikit-learn has another floor, which the shares of votes come to.
    expected = nll(p, digits.y) if name == "vote" else log_loss(digits.y, p, labels=range(10))
    assert_close(digits.plain.rows[name]["nll"], expected)


@pytest.mark.parametrize("name", DIGITS_ROWS)
def test_brier_score(name, digits):
    assert_close(digits.plain.rows[name]["brier"], multiclass_brier(digits.p[name], digits.y))


@pytest.mark.parametrize("name", DIGITS_ROWS)
def test_expected_calibration_error(name, digits):
    assert_close(digits.plain.rows[name]["ece"], calibration_error(digits.p[name], digits.y))


@pytest.mark.parametrize("name", [name for name in DIGITS_ROWS if name != "vote"])
def test_calibrated_on_the_other_half(name, digits):
    expected = calibrated_nll((digits.p[name], digits.y, 1))
    assert_close(digits.plain.rows[name]["nll_calibrated"], expected)


def test_disagreement_of_pairs_of_members(digits):
    labels = [digits.p[f"member {i}"].argmax(axis=1) for i in range(3)]
    expected = np.array([[np.mean(a != b) for b in labels] for a in labels])
    report = digits.plain
    (matrix,) = report.disagreement.values()
    assert_close(matrix, expected)
    for i in range(3):
        assert_close(report.rows[f"member {i}"]["disagreement"], expected[i].sum() / 2)
    pairs = [expected[0, 1], expected[0, 2], expected[1, 2]]
    assert_close(list(report.to_dict()["mean_disagreement"].values()), [np.mean(pairs)])
    assert f"Mean pairwise disagreement: {np.mean(pairs):.4f}." in str(report)


def test_members_added_from_either_end(digits):
    y = digits.y
    stack = np.stack([digits.p[f"member {i}"] for i in range(3)])

    def losses(mean):
        return -np.log(mean[np.arange(len(y)), y])

    assert_curves(digits.plain, stack, lambda mean: zero_one_loss(y, mean.argmax(axis=1)), losses)


def test_last_and_best(digits):
    for report in (digits.plain, digits.shown):
        assert report.rows["last snapshot"] == report.rows["member 2"]
        best = min(range(3), key=lambda i: nll(digits.p[f"member {i}"], digits.y))
        assert report.rows["best member"] == report.rows[f"member {best}"]


def test_a_temperature_is_for_combinations(digits):
    rows, before = digits.shown.rows, digits.plain.rows
    for name in DIGITS_ROWS:
        for score in ("nll", "nll_calibrated"):
            assert_close(rows[name][score], before[name][score], 1e-9)
    for i in range(3):
        assert rows[f"member {i}"] == before[f"member {i}"]
    for name in ("mean", "weighted"):
        p = tempered(digits.p[name], TEMPERATURE)
        assert_close(rows[name]["loss"], log_loss(digits.y, p, labels=range(10)))
        assert_close(rows[name]["nll"], log_loss(digits.y, digits.p[name], labels=range(10)))
        assert_close(rows[name]["nll_calibrated"], calibrated_nll((digits.p[name], digits.y, 1)))
        assert_close(rows[name]["brier"], multiclass_brier(p, digits.y))
        assert_close(rows[name]["ece"], calibration_error(p, digits.y))
    expected = digits.evaluated["tempered weighted"]
    assert_close([rows["weighted"][key] for key in expected], list(expected.values()), 1e-6)
    assert "The combinations have the temperature 1.7, the members none." in str(digits.shown)
    assert "The combinations have" not in str(digits.plain)


# How it shows itself


def table_of(text):
    """The lines of the table, and those below it."""
    lines = text.split("\n")
    end = lines.index("")
    return lines[:end], lines[end + 1 :]


def assert_aligned(report):
    lines, _ = table_of(str(report))
    columns = list(dict.fromkeys(name for row in report.rows.values() for name in row))
    assert lines[0].split() == columns
    ends = [match.end() for match in re.finditer(r"\S+", lines[0])]
    starts = [1 + max(map(len, report.rows)), *ends[:-1]]
    assert len(lines) == 1 + len(report.rows)
    for line, (name, row) in zip(lines[1:], report.rows.items(), strict=True):
        assert line[: starts[0]].rstrip() == name
        cells = [line[start:end] for start, end in zip(starts, ends, strict=True)]
        for cell, column in zip(cells, columns, strict=True):
            value = row.get(column, math.nan)
            assert cell.strip() == ("" if math.isnan(value) else f"{value:.4f}")
            assert not cell.strip() or (cell[-1] != " " and cell[0] == " ")
        assert line[ends[-1] :] == ""
        assert line == line.rstrip()


def test_it_prints_as_an_aligned_table(digits):
    for report in (digits.plain, digits.shown):
        assert_aligned(report)
        assert repr(report) == str(report)
    _, remarks = table_of(str(digits.plain))
    assert remarks[0] == "150 rows; calibration error over 15 bins of equal mass."
    last = " ".join(f"{value:.4f}" for value in digits.plain.added_from_last["error"])
    assert f"error, members added from the last: {last}" in remarks
    first = " ".join(f"{value:.4f}" for value in digits.plain.added_from_first["loss"])
    assert f"loss, members added from the first: {first}" in remarks
    assert remarks[-1] == digits.plain.notes[-1]


def cells_of(html_text):
    """The table of a report in HTML, which must be well-formed; and the paragraphs below it."""
    root = ElementTree.fromstring(f"<div>{html_text}</div>")
    table, *paragraphs = root
    assert [table.tag, *(p.tag for p in paragraphs)] == ["table"] + ["p"] * len(paragraphs)
    rows = [[cell.text or "" for cell in row] for row in table.iter("tr")]
    return rows, ["".join(p.itertext()) for p in paragraphs]


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen = [], set()

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_it_shows_in_a_notebook_what_it_prints(digits):
    found = digits.shown._repr_html_()
    tags = Tags()
    tags.feed(found)
    tags.close()
    assert not tags.open
    assert tags.seen == {"table", "thead", "tbody", "tr", "th", "td", "p"}
    rows, paragraphs = cells_of(found)
    lines, remarks = table_of(str(digits.shown))
    assert rows[0] == ["", *lines[0].split()]
    assert [row[0] for row in rows[1:]] == list(digits.shown.rows)
    for row, line in zip(rows[1:], lines[1:], strict=True):
        assert " ".join(cell for cell in row if cell) == " ".join(line.split())
    assert paragraphs == remarks


NAME = 'a<b> & "c"'


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


def through_json(report):
    """Strictly: NaN is not JSON."""
    return json.loads(json.dumps(report.to_dict(), allow_nan=False))


def test_its_numbers_survive_json(digits):
    report = digits.shown
    found = through_json(report)
    for name in ("rows", "examples", "bins", "temperature", "worth", "notes"):
        assert found[name] == getattr(report, name)
    for name in ("added_from_last", "added_from_first"):
        assert found[name] == getattr(report, name)
    for name, matrix in report.disagreement.items():
        np.testing.assert_array_equal(found["disagreement"][name], matrix)


# Other tasks


def exotic(y_true, y_pred):
    return ops.mean(ops.abs(y_true - y_pred) ** 3, axis=-1)


def linear(features, **arguments):
    model = keras.Sequential([keras.Input((features,)), layers.Dense(1)])
    model.compile("sgd", **{"loss": "mse", **arguments})
    return model


Values = collections.namedtuple("Values", "x y stack report")


@pytest.fixture(scope="module")
def diabetes():
    """Four linear models about the one of least squares."""
    x, y = load_diabetes(return_X_y=True)
    x, y = 10 * x[:101], ((y[:101] - y.mean()) / y.std())[:, None]
    fitted = np.linalg.lstsq(x, y, rcond=None)[0]
    rng = np.random.default_rng(0)
    members = [(fitted + 0.5 * rng.normal(size=(10, 1)), [0.1 * i]) for i in range(4)]
    metrics = ["mae", keras.metrics.MeanMetricWrapper(exotic, name=NAME)]
    ens = ensemble_with(linear(10, metrics=metrics), *members)
    stack = np.stack([x @ kernel + bias for kernel, bias in members])
    return Values(x, y, stack, ens.report(x, y, batch_size=7, verbose=0))


def test_rows_of_a_regression(diabetes):
    y, stack, report = diabetes.y, diabetes.stack, diabetes.report
    predictions = {f"member {i}": stack[i] for i in range(4)}
    predictions |= {"mean": stack.mean(axis=0), "median": np.median(stack, axis=0)}
    assert report.rows.keys() == predictions.keys() | {"last snapshot", "best member"}
    for name, found in predictions.items():
        row = report.rows[name]
        squared = mean_squared_error(y, found)
        assert_close(row["loss"], squared)
        assert_close(row["squared_error"], squared)
        assert_close(row["mae"], mean_absolute_error(y, found))
        assert_close(row[NAME], np.mean(np.abs(y - found) ** 3))
        own = {"disagreement"} if "member" in name else set()
        assert row.keys() == {"loss", "squared_error", "mae", NAME} | own
    assert "calibration" not in str(report)


def test_disagreement_and_curves_of_a_regression(diabetes):
    y, stack, report = diabetes.y, diabetes.stack, diabetes.report
    expected = [[math.sqrt(np.square(a - b).mean()) for b in stack] for a in stack]
    (matrix,) = report.disagreement.values()
    assert_close(matrix, expected)
    for i in range(4):
        assert_close(report.rows[f"member {i}"]["disagreement"], np.sum(expected[i]) / 3)
    assert_curves(
        report,
        stack,
        lambda mean: mean_squared_error(y, mean),
        lambda mean: np.square(mean - y)[:, 0],
    )


def test_a_metric_of_any_name_is_shown_as_it_is(diabetes):
    rows, _ = cells_of(diabetes.report._repr_html_())
    assert NAME in rows[0]
    assert NAME in str(diabetes.report)
    assert through_json(diabetes.report)["rows"] == diabetes.report.rows


@pytest.mark.parametrize("task", ["log-odds", "multilabel", "logits"])
def test_rows_of_classes_of_other_kinds(task):
    ens = ensemble_of(dense(*TASKS[task]), 2)
    outputs = np.stack([dense_outputs(weights, ROWS) for weights in member_weights(ens)])
    if task == "logits":
        y, p = LABELS, special.softmax(outputs, axis=-1)
        both, truth = p, y
        brier = multiclass_brier
    else:
        y = np.random.default_rng(1).integers(0, 2, outputs.shape[1:])
        p = special.expit(outputs)
        # Each unit is a row with two classes.
        both = np.stack([1 - p, p], axis=-1).reshape(2, -1, 2)
        truth = y.reshape(-1)

        def brier(p, y):
            return brier_score_loss(y, p[:, 1])

    report = ens.report(ROWS, y, verbose=0)
    logs = np.log(both).mean(axis=0)
    found = {"member 0": both[0], "member 1": both[1], "mean": both.mean(axis=0)}
    found["geometric"] = normalized(np.exp(logs))
    for name, probabilities in found.items():
        row = report.rows[name]
        expected = log_loss(truth, probabilities)
        assert_close([row["nll"], row["loss"]], expected)
        assert_close(row["brier"], brier(probabilities, truth))
        assert_close(row["ece"], calibration_error(probabilities, truth))
    shares = (both == both.max(axis=-1, keepdims=True)).mean(axis=0)
    assert_close(report.rows["vote"]["brier"], brier(shares, truth))
    differ = np.mean(both[0].argmax(axis=-1) != both[1].argmax(axis=-1))
    (matrix,) = report.disagreement.values()
    assert_close(matrix, [[0, differ], [differ, 0]])
    if task == "log-odds":
        assert_close(report.rows["mean"]["nll_calibrated"], calibrated_nll((found["mean"], truth, 1)))


OUTPUTS = {"kind": LABELS, "flag": (ROWS[:, 3:] > 0).astype("int64"), "amount": ROWS[:, :2] ** 2}
SHARES = {"kind": 2.0, "flag": 0.75, "amount": 0.5}


@pytest.fixture(scope="module")
def several():
    """An ensemble with outputs by names that their layers do not have, and the report."""
    inputs = keras.Input((4,))
    outputs = {
        "kind": layers.Dense(3, "softmax", name="third")(inputs),
        "flag": layers.Dense(1, "sigmoid", name="first")(inputs),
        "amount": layers.Dense(2, name="second")(inputs),
    }
    model = keras.Model(inputs, outputs)
    losses = ["sparse_categorical_crossentropy", "binary_crossentropy", "mse"]
    model.compile(
        "sgd",
        dict(zip(OUTPUTS, losses, strict=True)),
        loss_weights=SHARES,
        metrics={"kind": ["accuracy"], "amount": ["mae"]},
    )
    ens = ensemble_of(model, 3)
    ens.weights = [0.2, 0.3, 0.5]
    found = []
    for weights in member_weights(ens):
        # The kernels differ in their number of units.
        pairs = zip(weights[::2], weights[1::2], strict=True)
        by_units = {len(bias): ROWS @ kernel + bias for kernel, bias in pairs}
        yes = special.expit(by_units[1])
        flag = np.concatenate([1 - yes, yes], axis=1)
        found.append({"kind": special.softmax(by_units[3], axis=-1), "flag": flag})
        found[-1]["amount"] = by_units[2]
    stacks = {name: np.stack([outputs[name] for outputs in found]) for name in OUTPUTS}
    return stacks, ens.report(ROWS, OUTPUTS, verbose=0)


def of(row, output, score):
    """A score of one output, whatever its column is called."""
    names = {"kind": ("kind", "third"), "flag": ("flag", "first"), "amount": ("amount", "second")}
    (found,) = [row[f"{name}_{score}"] for name in names[output] if f"{name}_{score}" in row]
    return found


def losses_by_hand(outputs):
    return {
        "kind": log_loss(LABELS, normalized(outputs["kind"])),
        "flag": log_loss(OUTPUTS["flag"], normalized(outputs["flag"])),
        "amount": mean_squared_error(OUTPUTS["amount"], outputs["amount"]),
    }


def test_scores_of_several_outputs(several):
    stacks, report = several
    combined = {f"member {i}": {n: s[i] for n, s in stacks.items()} for i in range(3)}
    combined["mean"] = {name: stack.mean(axis=0) for name, stack in stacks.items()}
    weighted = {n: np.average(s, axis=0, weights=[0.2, 0.3, 0.5]) for n, s in stacks.items()}
    combined["weighted"] = weighted
    assert report.rows.keys() == combined.keys() | {"last snapshot", "best member"}
    flags = OUTPUTS["flag"][:, 0]
    for name, outputs in combined.items():
        row, losses = report.rows[name], losses_by_hand(outputs)
        kind, flag, amount = outputs.values()
        assert_close(row["loss"], sum(SHARES[output] * losses[output] for output in OUTPUTS))
        for output in OUTPUTS:
            assert_close(row[f"{output}_loss"], losses[output])
        assert_close(row["kind_accuracy"], np.mean(kind.argmax(axis=1) == LABELS))
        assert_close(row["amount_mae"], mean_absolute_error(OUTPUTS["amount"], amount))
        assert_close(of(row, "amount", "squared_error"), losses["amount"])
        assert_close(of(row, "kind", "brier"), multiclass_brier(kind, LABELS))
        assert_close(of(row, "flag", "brier"), brier_score_loss(flags, flag[:, 1]))
        calibrated = calibrated_nll((kind, LABELS, 2), (flag, flags, 0.75))
        for output, p, y, expected in (
            ("kind", kind, LABELS, calibrated[0]),
            ("flag", flag, flags, calibrated[1]),
        ):
            assert_close(of(row, output, "nll"), losses[output])
            assert_close(of(row, output, "ece"), calibration_error(p, y))
            assert_close(of(row, output, "nll_calibrated"), expected)
    labels = stacks["kind"].argmax(axis=-1)
    differ = np.mean(labels[0] != labels[1]), np.mean(labels[0] != labels[2])
    assert_close(of(report.rows["member 0"], "kind", "disagreement"), np.mean(differ))
    amounts = stacks["amount"]
    apart = [math.sqrt(mean_squared_error(amounts[2], amounts[i])) for i in (0, 1)]
    assert_close(of(report.rows["member 2"], "amount", "disagreement"), np.mean(apart))


def test_curves_of_several_outputs(several):
    stacks, report = several
    for k in (1, 2, 3):
        mean = {name: stack[-k:].mean(axis=0) for name, stack in stacks.items()}
        found = {name: errors[k - 1] for name, errors in report.added_from_last.items()}
        losses = losses_by_hand(mean)
        assert_close(of(found, "amount", "error"), losses["amount"])
        for output in ("kind", "flag"):
            wrong = zero_one_loss(OUTPUTS[output].ravel(), mean[output].argmax(axis=1))
            assert_close(of(found, output, "error"), wrong)
        assert_close(found["loss"], sum(SHARES[output] * losses[output] for output in OUTPUTS))


def test_columns_of_several_outputs_are_called_as_evaluate_calls_them(several):
    _, report = several
    compiled = {"loss", *(f"{output}_loss" for output in OUTPUTS), "kind_accuracy", "amount_mae"}
    scores = ("nll", "nll_calibrated", "brier", "ece")
    own = {f"{output}_{score}" for output in ("kind", "flag") for score in scores}
    own.add("amount_squared_error")
    assert report.rows["mean"].keys() == compiled | own
    disagreement = {f"{output}_disagreement" for output in OUTPUTS}
    assert report.rows["member 0"].keys() == compiled | own | disagreement
    assert report.disagreement.keys() == OUTPUTS.keys()
    assert report.added_from_last.keys() == {f"{output}_error" for output in OUTPUTS} | {"loss"}


def test_padding_is_not_scored():
    tokens = np.array([[1, 2, 3, 0, 0], [4, 5, 0, 0, 0], [1, 1, 1, 1, 0]])
    tags = np.random.default_rng(3).integers(0, 2, tokens.shape)
    inputs = keras.Input((5,), dtype="int32")
    hidden = layers.Embedding(7, 4, mask_zero=True)(inputs)
    model = keras.Model(inputs, layers.Dense(2, "softmax")(hidden))
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    ens = ensemble_of(model, 2)
    p = np.stack([special.softmax(e[tokens] @ w + b, axis=-1) for e, w, b in member_weights(ens)])
    p, y = p[:, tokens != 0], tags[tokens != 0]
    report = ens.report(tokens, tags, verbose=0)
    for name, found in {"member 1": p[1], "mean": p.mean(axis=0)}.items():
        row = report.rows[name]
        assert_close([row["loss"], row["nll"]], log_loss(y, normalized(found)))
        assert_close(row["accuracy"], np.mean(found.argmax(axis=1) == y))
        assert_close(row["brier"], multiclass_brier(found, y))
    assert_close(report.rows["member 0"]["disagreement"], np.mean(p[0].argmax(1) != p[1].argmax(1)))


# Data




@pytest.fixture(scope="module")
def weighted_rows():
    """An ensemble of two, data with sample weights, and the report of them as arrays."""
    members = [(np.arange(4)[:, None] / 4, [0.5]), (np.ones((4, 1)), [-0.5])]
    ens = ensemble_with(linear(4, weighted_metrics=["mae"]), *members)
    y = ROWS.sum(axis=1, keepdims=True) + 0.3
    counts = np.random.default_rng(5).random(len(ROWS)) * 3
    return ens, (ROWS, y, counts), ens.report(ROWS, y, sample_weight=counts, verbose=0)


def test_sample_weights(weighted_rows):
    ens, (x, y, counts), report = weighted_rows
    stack = np.stack([x @ kernel + bias for kernel, bias in member_weights(ens)])
    expected = {"member 0": stack[0], "member 1": stack[1], "mean": stack.mean(axis=0)}
    for name, found in expected.items():
        row = report.rows[name]
        squared = mean_squared_error(y, found, sample_weight=counts)
        assert_close(row["squared_error"], squared)
        assert_close(row["mae"], mean_absolute_error(y, found, sample_weight=counts))
        assert_close(row["loss"], np.mean(counts * np.square(found - y)[:, 0]))
    apart = math.sqrt(mean_squared_error(*stack, sample_weight=counts))
    assert_close(report.rows["member 0"]["disagreement"], apart)
    evaluated = ens.evaluate(x, y, sample_weight=counts, return_dict=True, verbose=0)
    assert_close([report.rows["mean"][name] for name in evaluated], list(evaluated.values()), 1e-6)


def assert_alike(report, other):
    assert report.rows.keys() == other.rows.keys()
    for name, row in report.rows.items():
        assert row.keys() == other.rows[name].keys()
        assert_close(list(row.values()), list(other.rows[name].values()), 1e-6)
    assert_close(report.added_from_last["loss"], other.added_from_last["loss"], 1e-6)
    assert (report.worth, report.examples) == (other.worth, other.examples)


def test_a_data_set_of_tensorflow_gives_the_same(weighted_rows, capsys):
    ens, arrays, report = weighted_rows
    dataset = tf.data.Dataset.from_tensor_slices(arrays).batch(7)
    assert_alike(ens.report(dataset, verbose=0), report)
    assert capsys.readouterr().out == ""


def test_the_data_is_gone_through_once(weighted_rows):
    ens, arrays, report = weighted_rows
    dataset, once = Batches(*arrays), Batches(*arrays)
    ens.model.predict(once, verbose=0)
    assert_alike(ens.report(dataset, verbose=0), report)
    assert dataset.asked == once.asked


def test_one_row_of_data():
    ens = ensemble_of(dense(), 2)
    report = ens.report(ROWS[:1], LABELS[:1], verbose=0)
    p = [special.softmax(dense_outputs(weights, ROWS[:1]), axis=-1) for weights in member_weights(ens)]
    assert (report.examples, report.bins) == (1, 1)
    for name, found in {"member 0": p[0], "member 1": p[1], "mean": np.mean(p, axis=0)}.items():
        row = report.rows[name]
        assert_close([row["loss"], row["nll"]], nll(found, LABELS[:1]))
        assert_close(row["ece"], calibration_error(found, LABELS[:1], bins=1))
        # There is no other half.
        assert math.isnan(row["nll_calibrated"])
    assert_aligned(report)
    through_json(report)


def test_a_report_without_members():
    with pytest.raises(ValueError) as caught:
        SnapshotEnsemble(dense()).report(ROWS, LABELS)
    assert str(caught.value) == (
        "The ensemble has no members yet. Call `fit`, or make it with `load` or `from_weights`."
    )


def test_a_report_without_targets(weighted_rows):
    ens, _, _ = weighted_rows
    with pytest.raises(ValueError, match="There are no targets to compare with"):
        ens.report(ROWS, verbose=0)


# Notes


def about(errors):
    """Linear members that are off by so much everywhere, and the targets."""
    ens = ensemble_with(linear(4), *((np.ones((4, 1)), [error]) for error in errors))
    return ens, ROWS.sum(axis=1)


def worse_than(report):
    """The note that the mean is worse than a member, or None."""
    return next((note for note in report.notes if "is worse than" in note), None)


def test_a_mean_that_is_worse_than_the_best_member_is_told():
    # Of the means from the last, that of two is best: (0.5 + -0.3) / 2 is 0.1.
    ens, y = about([9.0, 0.2, -0.3, 0.5])
    report = ens.report(ROWS, y, verbose=0)
    assert_close(report.added_from_last["loss"], [0.25, 0.01, (0.4 / 3) ** 2, 2.35**2])
    assert worse_than(report) == (
        "The mean of all members (loss 5.5225) is worse than member 1 alone (0.0400). Try "
        "members=2 (the last 2: 0.0100) or fit_weights on held-out data."
    )
    assert worse_than(report) in str(report)
    # The offsets are the same in each row, so that the standard error is nothing.
    assert report.worth == 2


def test_fewer_members_are_not_proposed_where_all_are_best():
    ens, y = about([0.0, 4.0, 8.0])
    ens.weights = [0.75, 0.25, 0.0]
    report = ens.report(ROWS, y, verbose=0)
    assert worse_than(report) == (
        "The mean of all members (loss 16.0000) is worse than member 0 alone (0.0000). Try "
        "combine='weighted'."
    )
    assert_close(report.rows["weighted"]["loss"], 1)


def test_a_mean_that_is_better_than_each_member_has_no_more_to_say(diabetes):
    y, stack, report = diabetes.y, diabetes.stack, diabetes.report
    alone = [mean_squared_error(y, member) for member in stack]
    assert mean_squared_error(y, stack.mean(axis=0)) < min(alone)
    assert report.notes == [
        f"Worth it: {report.worth} of 4 members. The mean of the last {report.worth} is within "
        "one standard error of the best such mean."
    ]


def alike(count):
    """An ensemble of equal members, and data with which the sums compared round differently."""
    (weights,) = member_weights(ensemble_of(dense(), 1))
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(30, 4)).astype("float32"), rng.integers(0, 3, 30)
    return ensemble_with(dense(), *[weights] * count), x, y


def test_members_that_are_alike_are_not_worse_than_themselves():
    ens, x, y = alike(3)
    report = ens.report(x, y, verbose=0)
    assert worse_than(report) is None
    assert report.worth == 1


def test_one_member_is_its_own_mean():
    ens, x, y = alike(1)
    report = ens.report(x, y, verbose=0)
    combinations = ["mean", "vote", "geometric"]
    assert list(report.rows) == ["member 0", "last snapshot", "best member", *combinations]
    scores = dict(report.rows["member 0"])
    assert scores.pop("disagreement") == 0
    for name in ("mean", "geometric"):
        assert report.rows[name].keys() == scores.keys()
        assert_close(list(report.rows[name].values()), list(scores.values()))
    (matrix,) = report.disagreement.values()
    np.testing.assert_array_equal(matrix, [[0]])
    assert report.worth == 1
    (note,) = report.notes
    assert note.startswith("Worth it: 1 of 1 member.")


# What the user compiled


class Total(keras.metrics.Metric):
    """Keeps a state, and cannot be made anew from a config."""

    def __init__(self, factor):
        super().__init__(name="total")
        self.factor = factor
        self.sum = self.add_weight(name="sum", initializer="zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.sum.assign_add(self.factor * ops.sum(ops.cast(y_pred, "float32")))

    def result(self):
        return self.sum


def test_a_loss_and_metrics_of_ones_own():
    total = Total(2.0)
    model = linear(4, loss=lambda y, p: ops.mean(ops.abs(y - p) ** 3), metrics=[total])
    y = ROWS.sum(axis=1, keepdims=True)
    model.evaluate(ROWS, y, verbose=0)
    state, own = total.sum.numpy(), model.get_weights()
    assert state != 0
    members = [(np.ones((4, 1)), [0.5]), (np.ones((4, 1)), [1.5])]
    ens = ensemble_with(model, *members, task="regression")
    report = ens.report(ROWS, y, verbose=0)
    for name, error in {"member 0": 0.5, "member 1": 1.5, "mean": 1.0}.items():
        row = report.rows[name]
        assert_close(row["loss"], error**3)
        assert_close(row["squared_error"], error**2)
        assert_close(row["total"], 2 * np.sum(y + error), 1e-4)
    # The user's model is as before.
    assert total.sum.numpy() == state
    for array, before in zip(model.get_weights(), own, strict=True):
        np.testing.assert_array_equal(array, before)


def test_a_compiled_metric_keeps_its_name_and_value():
    model = dense()
    seven = keras.metrics.MeanMetricWrapper(lambda y, p: 7 * ops.ones_like(p[:, 0]), name="brier")
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=[seven])
    report = ensemble_of(model, 1).report(ROWS, LABELS, verbose=0)
    assert report.rows["mean"]["brier"] == 7
