"""Reference scores for tests of reports, and checks of their text, HTML and JSON."""

import collections
import json
import math
import re
from xml.etree import ElementTree

import keras
import numpy as np
from keras import layers, ops
from models import (
    assert_close,
)
from scipy import optimize

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(30, 4)).astype("float32")
LABELS = RNG.integers(0, 3, len(ROWS))


def normalized(p):
    p = np.asarray(p, "float64")
    return p / p.sum(axis=-1, keepdims=True)


def nll(p, y):
    """The mean negative log-likelihood; 0 counts as the smallest positive float32."""
    tiny = float(np.finfo("float32").tiny)
    return -np.log(np.maximum(p[np.arange(len(y)), y], tiny)).mean()


def multiclass_brier(p, y):
    return np.square(p - np.eye(p.shape[1])[y]).sum(axis=1).mean()


def calibration_error(p, y, bins=15):
    """The expected calibration error; rows of equal confidence share their accuracy."""
    confidence = np.round(p.max(axis=1), 12)
    right = (p.argmax(axis=1) == y).astype("float64")
    for level in np.unique(confidence):
        right[confidence == level] = right[confidence == level].mean()
    order = np.argsort(confidence, kind="stable")
    bin_of = np.floor((np.arange(len(y)) + 0.5) / len(y) * bins)
    total = 0.0
    for number in range(bins):
        rows = order[bin_of == number]
        if len(rows):
            total += len(rows) / len(y) * abs(confidence[rows].mean() - right[rows].mean())
    return total


def tempered(p, temperature):
    return normalized(p ** (1 / temperature))


def calibrated_nll(*outputs):
    """The loss of even rows at the temperature fitted on odd rows, plus the reverse.

    Each output is a tuple of probabilities, labels and the loss weight in the shared fit.
    """
    totals = np.zeros(len(outputs))
    for side in (0, 1):

        def loss_at(temperature, rows=slice(side, None, 2)):
            fit = sum(w * nll(tempered(p[rows], temperature), y[rows]) for p, y, w in outputs)
            squares = sum(w**2 / len(y[rows]) for _, y, w in outputs)
            prior = 4 * squares / sum(w for *_, w in outputs)
            return fit + prior * (1 / temperature + np.log(temperature))

        options = {"xatol": 1e-9}
        temperature = optimize.minimize_scalar(
            loss_at, bounds=(0.05, 20), method="bounded", options=options
        ).x
        scored = slice(1 - side, None, 2)
        for i, (p, y, _) in enumerate(outputs):
            share = len(y[scored]) / len(y)
            totals[i] += share * nll(tempered(p[scored], temperature), y[scored])
    return totals


def shares_of_votes(stack):
    """The share of votes for each class; ties go to the class with the higher mean."""
    shares = np.mean(stack.argmax(axis=-1)[..., None] == np.arange(stack.shape[-1]), axis=0)
    at_top = shares == shares.max(axis=1, keepdims=True)
    winner = np.where(at_top, stack.mean(axis=0), -1).argmax(axis=1)
    tied = np.flatnonzero(at_top.sum(axis=1) > 1)
    shares[tied, winner[tied]] *= 1 + 1e-6
    return normalized(shares)


def worth(losses):
    """The smallest count within a paired standard error of the lowest loss; `losses` are by row."""
    best = int(np.argmin(losses.mean(axis=1)))
    for k in range(best):
        difference = losses[k] - losses[best]
        if difference.mean() <= difference.std(ddof=1) / math.sqrt(len(difference)):
            return k + 1
    return best + 1


def assert_curves(report, stack, error, losses):
    """Checks the curves; `error(mean)` is one number, `losses(mean)` one for each row."""
    for curves, ordered in (
        (report.added_from_last, stack[::-1]),
        (report.added_from_first, stack),
    ):
        means = [ordered[:k].mean(axis=0) for k in range(1, len(stack) + 1)]
        assert_close(curves["error"], [error(mean) for mean in means])
        assert_close(curves["loss"], [losses(mean).mean() for mean in means])
    means = [stack[-k:].mean(axis=0) for k in range(1, len(stack) + 1)]
    assert report.worth == worth(np.stack([losses(mean) for mean in means]))


TEMPERATURE = 1.7
Digits = collections.namedtuple("Digits", "ens y plain shown p evaluated")


def table_of(text):
    """The lines of the table, and the lines below it."""
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


def cells_of(html_text):
    """The cells of the table and the paragraphs below it, from well-formed HTML."""
    root = ElementTree.fromstring(f"<div>{html_text}</div>")
    table, *paragraphs = root
    assert [table.tag, *(p.tag for p in paragraphs)] == ["table"] + ["p"] * len(paragraphs)
    rows = [[cell.text or "" for cell in row] for row in table.iter("tr")]
    return rows, ["".join(p.itertext()) for p in paragraphs]


NAME = 'a<b> & "c"'


def through_json(report):
    """The report after a round trip through strict JSON, which has no NaN."""
    return json.loads(json.dumps(report.to_dict(), allow_nan=False))


def exotic(y_true, y_pred):
    return ops.mean(ops.abs(y_true - y_pred) ** 3, axis=-1)


def linear(features, **arguments):
    model = keras.Sequential([keras.Input((features,)), layers.Dense(1)])
    model.compile("sgd", **{"loss": "mse", **arguments})
    return model


Values = collections.namedtuple("Values", "x y stack report")
