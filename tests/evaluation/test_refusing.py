"""Risk and coverage, and data from elsewhere, against scikit-learn and written-out NumPy."""

import keras
import numpy as np
import pytest
from held_out_cases import two_headed
from keras import layers
from models import dense, eager, ensemble_of, one_batch
from report_cases import through_json
from scipy import special
from sklearn import metrics

from snapshot_ensemble import plots
from snapshot_ensemble.evaluation.refusing import aurc, auroc, coverage_at, fpr95, risk_coverage
from snapshot_ensemble.losses import GaussianNLL

RNG = np.random.default_rng(8)
X, OTHER = RNG.normal(size=(60, 4)).astype("float32"), RNG.normal(2, 3, (25, 4)).astype("float32")
KIND = RNG.integers(0, 3, 60)
RUN = {"verbose": 0}


def written_out(errors, scores, weights):
    """The risk as each item is added, the mean over many orders of items of equal score."""
    risks = []
    for _ in range(400):
        order = np.lexsort((RNG.random(len(scores)), scores))
        risks.append(np.cumsum((weights * errors)[order]) / np.cumsum(weights[order]))
    order = np.argsort(scores, kind="stable")
    return np.cumsum(weights[order]), np.mean(risks, axis=0)


def test_the_curve_and_its_area():
    errors, scores = RNG.integers(0, 2, 50).astype("float64"), RNG.random(50)
    weights = np.full(50, 1 / 50)
    covered, risks, is_last = risk_coverage(errors, scores, weights)
    np.testing.assert_allclose((covered, risks), written_out(errors, scores, weights), rtol=1e-9)
    assert aurc(covered, risks) == pytest.approx(risks.mean())
    for risk in (0.0, 0.3, 1.0):
        allowed = [k + 1 for k in range(50) if risks[k] <= risk]
        expected = max(allowed, default=0) / 50
        assert coverage_at(risk, covered, risks, is_last) == pytest.approx(expected)


def test_items_of_equal_score_share_their_error():
    errors, scores = RNG.random(40), RNG.integers(0, 5, 40)
    weights = np.full(40, 1 / 40)
    curve = risk_coverage(errors, scores, weights)
    np.testing.assert_allclose(curve[1], written_out(errors, scores, weights)[1], atol=0.05)
    shuffled = RNG.permutation(40)
    again = risk_coverage(errors[shuffled], scores[shuffled], weights)
    np.testing.assert_allclose(again, curve, rtol=1e-9)
    # No threshold ends within them.
    ends = {np.mean(scores <= score) for score in range(5)}
    assert {round(c, 9) for c in curve[0][curve[2]]} == {round(end, 9) for end in ends}


def test_weights_count_as_often_as_rows():
    errors, scores, times = RNG.random(20), RNG.random(20), RNG.integers(0, 4, 20)
    weighted = risk_coverage(errors, scores, times / times.sum())
    repeated = risk_coverage(
        np.repeat(errors, times), np.repeat(scores, times), np.full(times.sum(), 1 / times.sum())
    )
    for curve in (0, 1):
        kept = np.cumsum(times[times > 0][np.argsort(scores[times > 0])]) - 1
        np.testing.assert_allclose(weighted[curve], repeated[curve][kept], rtol=1e-9)


@pytest.mark.parametrize("levels", [5, 10**6])
def test_auroc_and_fpr95_are_those_of_scikit_learn(levels):
    known, other = RNG.integers(0, levels, 70), RNG.integers(levels // 3, levels + 1, 45)
    truth, scores = np.repeat([0, 1], [70, 45]), np.concatenate([known, other])
    assert auroc(known, other) == pytest.approx(metrics.roc_auc_score(truth, scores))
    false, true, _ = metrics.roc_curve(truth, scores, drop_intermediate=False)
    assert fpr95(known, other) == pytest.approx(false[np.argmax(true >= 0.95)])


@pytest.mark.parametrize("kind", ["softmax", "logits"])
def test_the_report_of_a_classifier(kind):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=kind == "logits")
    ens = ensemble_of(eager(dense(loss, 3, "softmax" if kind == "softmax" else None), loss), 3)
    ens.temperature, ens.members = 1.5, 2
    report = ens.report(one_batch(X, KIND), ood=one_batch(OTHER), risk=0.6, **RUN)

    def scores(x):
        p = ens.predict(one_batch(x), **RUN)
        p = special.softmax(p, axis=-1) if kind == "logits" else p
        found = ens.predict_uncertainty(one_batch(x), **RUN)
        return {"max_probability": 1 - p.max(-1), **{n: found[n] for n in ("total", "epistemic")}}

    errors = ens.predict(one_batch(X), **RUN).argmax(-1) != KIND
    known, other = scores(X), scores(OTHER)
    assert list(report.refusing) == list(known)
    for name, row in report.refusing.items():
        risks = np.cumsum(errors[np.argsort(known[name], kind="stable")]) / np.arange(1, 61)
        truth, values = np.repeat([0, 1], [60, 25]), np.concatenate([known[name], other[name]])
        assert row["aurc"] == pytest.approx(risks.mean(), rel=1e-3)
        assert row["coverage"] == pytest.approx(np.flatnonzero(risks <= 0.6).max() / 60 + 1 / 60)
        assert row["auroc"] == pytest.approx(metrics.roc_auc_score(truth, values), abs=1e-3)
        false, true, _ = metrics.roc_curve(truth, values, drop_intermediate=False)
        assert row["fpr95"] == pytest.approx(false[np.argmax(true >= 0.95)], abs=0.02)
        np.testing.assert_allclose(report.risk_coverage[name][1], risks, atol=1e-9)
    text = str(report)
    for what in ("Area under the risk-coverage curve", "Answered at", "AUROC", "FPR95"):
        assert what in text
    assert through_json(report)["refusing"] == report.refusing
    ax = plots.plot_risk_coverage(report)
    labels = [curve.get_label() for curve in ax.lines]
    assert labels[1] == f"total (AURC {report.refusing['total']['aurc']:.3g})"
    assert "share answered" in ax.get_xlabel()
    assert "error rate" in ax.get_ylabel()


def test_the_report_of_values():
    ens = ensemble_of(eager(dense("mse", 1, None), "mse"), 3)
    y = RNG.normal(size=60)
    data = one_batch(X, y)
    report = ens.report(data, **RUN)
    assert list(report.refusing) == ["std"]
    squares = (ens.predict(one_batch(X), **RUN)[:, 0] - y) ** 2
    std = ens.predict_uncertainty(one_batch(X), **RUN)["std"][:, 0]
    risks = np.cumsum(squares[np.argsort(std)]) / np.arange(1, 61)
    assert report.refusing["std"] == {"aurc": pytest.approx(risks.mean(), rel=1e-4)}
    ens.calibrate(data, **RUN)
    assert list(ens.report(data, **RUN).refusing) == ["total", "epistemic"]
    ens = ensemble_of(eager(dense(GaussianNLL(), 2, None), GaussianNLL()), 2)
    assert list(ens.report(data, **RUN).refusing) == ["total", "epistemic"]
    ax = plots.plot_risk_coverage(ens.report(data, **RUN))
    assert "mean squared error" in ax.get_ylabel()


def test_several_outputs_and_pixels():
    ens = ensemble_of(two_headed(dict), 2)
    y = {"kind": KIND, "amount": RNG.normal(size=(60, 2))}
    report = ens.report(X, y, ood=OTHER, **RUN)
    names = {"kind max_probability", "kind total", "kind epistemic", "amount std"}
    assert set(report.refusing) == names
    assert "auroc" in report.refusing["amount std"]
    plots.plot_risk_coverage(report, "kind")
    with pytest.raises(ValueError, match=r"`output` must be one of .* Received: output='size'"):
        plots.plot_risk_coverage(report, "size")

    images, kinds = RNG.normal(size=(5, 4, 3, 2)), RNG.integers(0, 2, (5, 4, 3, 1))
    model = keras.Sequential([keras.Input((4, 3, 2)), layers.Conv2D(1, 1, activation="sigmoid")])
    ens = ensemble_of(eager(model, "binary_crossentropy"), 2)
    other = one_batch(RNG.normal(3, 1, size=(6, 4, 3, 2)))
    report = ens.report(one_batch(images, kinds), ood=other, **RUN)
    known, new = (
        ens.predict_uncertainty(x, **RUN)["total"].reshape(len(rows), -1).mean(axis=1)
        for x, rows in ((one_batch(images), range(5)), (other, range(6)))
    )
    expected = (new[:, None] > known).mean()
    assert report.refusing["total"]["auroc"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("risk", "error", "message"),
    [(-0.1, ValueError, "`risk` must be finite and at least 0"), ("low", TypeError, "`risk` must")],
)
def test_a_risk_is_a_number_of_at_least_0(risk, error, message):
    ens = ensemble_of(eager(dense()), 2)
    with pytest.raises(error, match=message):
        ens.report(X, KIND, risk=risk, **RUN)
