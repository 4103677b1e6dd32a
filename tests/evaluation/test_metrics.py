"""Scores, calibration and diversity against scikit-learn, SciPy and NumPy references."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    BINARY,
    BINARY_LOGITS,
    MULTICLASS,
    MULTICLASS_LOGITS,
    MULTILABEL,
    REGRESSION,
    TWINS,
)
from scipy import special
from sklearn import metrics

from snapshot_ensemble.evaluation.metrics import (
    brier_score,
    calibration_error,
    class_logs,
    disagreement,
    error,
    items_of,
    loss,
    losses,
    mean_of_pairs,
    reliability,
)
from snapshot_ensemble.evaluation.targets import Truth

TINY = np.finfo("float32").tiny


def truth_of(targets, weights=None):
    """One-hot targets, also for binary labels, and weights that sum to 1."""
    targets = np.asarray(targets)
    if targets.ndim == 1:
        targets = np.eye(targets.max() + 1)[targets]
    weights = np.ones(len(targets)) if weights is None else np.asarray(weights, "float64")
    return Truth(targets, weights / weights.sum())


def some_classes(rng, rows=200, count=4):
    """Probabilities, labels that are correlated with them, and weights."""
    logits = 2 * rng.normal(size=(rows, count))
    labels = (logits + 2 * rng.gumbel(size=logits.shape)).argmax(axis=-1)
    return special.softmax(logits, axis=-1), labels, rng.exponential(size=rows)


# Items


@pytest.mark.parametrize("task", TWINS)
def test_log_probabilities_of_probabilities_and_of_logits(task, rng):
    shape = (3, 5, 1 if task == "binary" else 4)
    logits = 3 * rng.normal(size=shape)
    if task == "multiclass":
        probabilities, expected = special.softmax(logits, -1), special.log_softmax(logits, -1)
    else:
        probabilities = special.expit(logits)
        expected = np.stack([special.log_expit(-logits), special.log_expit(logits)], axis=-1)
    for output, meaning in zip((probabilities, logits), TWINS[task], strict=True):
        np.testing.assert_allclose(class_logs(output, meaning), expected, rtol=1e-9)
        items = items_of(output.astype("float32"), meaning)
        assert items.dtype == "float64"
        np.testing.assert_allclose(items, expected.reshape(-1, expected.shape[-1]), rtol=1e-4)


def test_values_are_their_own_items(rng):
    values = rng.normal(size=(4, 3, 2)).astype("float32")
    items = items_of(values, REGRESSION)
    assert items.dtype == "float64"
    np.testing.assert_array_equal(items, values.reshape(-1))


def test_zero_and_one_have_finite_logarithms():
    items = items_of(np.array([[0, 1, 0], [0.5, 0.5, 0]], "float32"), MULTICLASS)
    np.testing.assert_allclose(
        items, np.log([[TINY, 1, TINY], [0.5, 0.5, TINY]]), rtol=1e-12, atol=1e-30
    )
    step = float(np.finfo("float32").epsneg)
    items = items_of(np.array([[0], [1], [0.5]], "float32"), BINARY)
    np.testing.assert_allclose(
        items,
        np.log([[1, TINY], [step / 2, 1 - step / 2], [0.5, 0.5]]),
        rtol=1e-9,
        atol=1e-30,
    )
    logits = np.array([[-1e4, 0, 1e4], [-np.inf, 0, 0]], "float32")
    expected = np.log([[TINY, TINY, 1], [TINY, 0.5, 0.5]])
    np.testing.assert_allclose(items_of(logits, MULTICLASS_LOGITS), expected, atol=1e-30)
    items = items_of(np.array([[-1e4], [1e4]], "float32"), BINARY_LOGITS)
    np.testing.assert_allclose(items, np.log([[1, TINY], [TINY, 1]]), atol=1e-30)


# The log-likelihood, the Brier score and the error


@pytest.mark.parametrize("weighted", [False, True])
def test_scores_of_classes_are_those_of_scikit_learn(weighted, rng):
    probabilities, labels, weights = some_classes(rng)
    weights = weights if weighted else None
    logs, truth = items_of(probabilities, MULTICLASS), truth_of(labels, weights)
    assert loss(logs, truth) == pytest.approx(
        metrics.log_loss(labels, probabilities, sample_weight=weights)
    )
    assert brier_score(logs, truth, MULTICLASS) == pytest.approx(
        metrics.brier_score_loss(labels, probabilities, sample_weight=weights, scale_by_half=False)
    )
    assert error(logs, truth) == pytest.approx(
        metrics.zero_one_loss(labels, probabilities.argmax(axis=-1), sample_weight=weights)
    )
    np.testing.assert_allclose(
        losses(logs, truth), -np.log(probabilities[np.arange(len(labels)), labels])
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_scores_of_binary_labels_are_those_of_scikit_learn(weighted, rng):
    yes = rng.random((150, 1))
    labels, weights = (rng.random(150) < yes[:, 0]).astype(int), rng.exponential(size=150)
    weights = weights if weighted else None
    logs, truth = items_of(yes, BINARY), truth_of(labels, weights)
    options = {"sample_weight": weights}
    assert loss(logs, truth) == pytest.approx(metrics.log_loss(labels, yes[:, 0], **options))
    assert brier_score(logs, truth, BINARY) == pytest.approx(
        metrics.brier_score_loss(labels, yes[:, 0], **options)
    )
    assert error(logs, truth) == pytest.approx(
        metrics.zero_one_loss(labels, yes[:, 0] > 0.5, **options)
    )


def test_multilabel_scores_are_the_means_over_labels(rng):
    yes, labels = rng.random((90, 3)), rng.integers(0, 2, (90, 3))
    logs, truth = items_of(yes, MULTILABEL), truth_of(labels.reshape(-1))
    each = range(3)
    assert loss(logs, truth) == pytest.approx(
        np.mean([metrics.log_loss(labels[:, i], yes[:, i]) for i in each])
    )
    assert brier_score(logs, truth, MULTILABEL) == pytest.approx(np.mean((yes - labels) ** 2))
    assert error(logs, truth) == pytest.approx(np.mean((yes > 0.5) != labels))


def test_scores_of_values_are_those_of_scikit_learn(rng):
    values, targets = rng.normal(size=(2, 70))
    weights = rng.exponential(size=70)
    truth = Truth(targets, weights / weights.sum())
    expected = metrics.mean_squared_error(targets, values, sample_weight=weights)
    assert loss(values, truth) == pytest.approx(expected)
    assert error(values, truth) == pytest.approx(expected)
    np.testing.assert_allclose(losses(values, truth), (values - targets) ** 2)


def test_scores_of_soft_targets(rng):
    probabilities, _, weights = some_classes(rng, 60)
    targets = rng.dirichlet(np.ones(4), 60)
    logs, truth = items_of(probabilities, MULTICLASS), truth_of(targets, weights)
    share = weights / weights.sum()
    assert loss(logs, truth) == pytest.approx(-share @ (targets * np.log(probabilities)).sum(1))
    assert brier_score(logs, truth, MULTICLASS) == pytest.approx(
        share @ ((probabilities - targets) ** 2).sum(axis=1)
    )
    correctness = targets[np.arange(60), probabilities.argmax(axis=-1)]
    assert error(logs, truth) == pytest.approx(1 - share @ correctness)


def test_scores_of_probabilities_of_zero_and_one():
    probabilities = np.array([[0, 1, 0], [1, 0, 0]], "float32")
    logs = items_of(probabilities, MULTICLASS)
    right, wrong = truth_of([[0, 1, 0], [1, 0, 0]]), truth_of([[0, 0, 1], [1, 0, 0]])
    assert loss(logs, right) == 0
    assert loss(logs, wrong) == pytest.approx(-np.log(TINY) / 2)
    briers = [brier_score(logs, truth, MULTICLASS) for truth in (right, wrong)]
    assert briers == pytest.approx([0, 1], abs=1e-12)
    assert [error(logs, truth) for truth in (right, wrong)] == [0, 0.5]
    assert [calibration_error(logs, truth) for truth in (right, wrong)] == [0, 0.5]
    logs = items_of(np.array([[0.0], [1.0]], "float32"), BINARY)
    right, wrong = truth_of([[1, 0], [0, 1]]), truth_of([[0, 1], [1, 0]])
    assert loss(logs, right) == pytest.approx(0, abs=1e-7)
    assert loss(logs, wrong) == pytest.approx(-np.log([TINY, 2.0**-25]).mean(), rel=1e-6)
    assert brier_score(logs, wrong, BINARY) == pytest.approx(1, abs=1e-6)
    assert [error(logs, truth) for truth in (right, wrong)] == [0, 1]


# Calibration


def bins_by_hand(confidence, right, weights, bins):
    """Each item goes to the bin that contains the midpoint of its mass."""
    order = np.argsort(confidence, kind="stable")
    confidence, right = confidence[order], right[order]
    weights = weights[order] / weights.sum()
    middle = np.cumsum(weights) - weights / 2
    rows = []
    for low in np.arange(bins) / bins:
        in_bin = (middle >= low - 1e-12) & (middle < low + 1 / bins - 1e-12)
        if mass := weights[in_bin].sum():
            means = [np.average(v[in_bin], weights=weights[in_bin]) for v in (confidence, right)]
            rows.append([*means, mass])
    return np.array(rows)


@pytest.mark.parametrize("bins", [1, 7, 15])
@pytest.mark.parametrize("weighted", [False, True])
def test_bins_hold_equal_mass(weighted, bins, rng):
    probabilities, labels, weights = some_classes(rng, 210)
    weights = weights if weighted else np.ones(210)
    logs, truth = items_of(probabilities, MULTICLASS), truth_of(labels, weights)
    right = (probabilities.argmax(axis=-1) == labels).astype(float)
    expected = bins_by_hand(probabilities.max(axis=-1), right, weights, bins)
    actual = reliability(logs, truth, bins)
    assert actual.shape == (bins, 3)
    np.testing.assert_allclose(actual, expected, rtol=1e-9)
    most = weights.max() / weights.sum() if weighted else 1e-12
    np.testing.assert_allclose(actual[:, 2], 1 / bins, atol=most)
    ece = expected[:, 2] @ np.abs(expected[:, 0] - expected[:, 1])
    assert calibration_error(logs, truth, bins) == pytest.approx(ece)
    if bins == 15:
        assert calibration_error(logs, truth) == pytest.approx(ece)


def test_calibration_of_binary_labels_uses_the_more_probable_class(rng):
    yes = rng.random((60, 1))
    labels = rng.integers(0, 2, 60)
    logs, truth = items_of(yes, BINARY), truth_of(labels)
    confidence, right = np.maximum(yes, 1 - yes)[:, 0], (yes[:, 0] > 0.5) == labels
    expected = bins_by_hand(confidence, right.astype(float), np.ones(60), 15)
    np.testing.assert_allclose(reliability(logs, truth), expected, rtol=1e-9)


def test_calibration_of_soft_targets(rng):
    probabilities, _, weights = some_classes(rng, 90)
    targets = rng.dirichlet(np.ones(4), 90)
    logs, truth = items_of(probabilities, MULTICLASS), truth_of(targets, weights)
    right = targets[np.arange(90), probabilities.argmax(axis=-1)]
    expected = bins_by_hand(probabilities.max(axis=-1), right, weights, 15)
    np.testing.assert_allclose(reliability(logs, truth), expected, rtol=1e-9)


@pytest.mark.parametrize("rows", [1, 2, 14])
def test_there_are_no_more_bins_than_items(rows, rng):
    probabilities, labels, _ = some_classes(rng, rows)
    truth = truth_of(np.eye(4)[labels])
    actual = reliability(items_of(probabilities, MULTICLASS), truth)
    assert actual.shape == (rows, 3)
    confidence = probabilities.max(axis=-1)
    order = np.argsort(confidence)
    right = (probabilities.argmax(axis=-1) == labels)[order]
    np.testing.assert_allclose(actual, np.stack([confidence[order], right, [1 / rows] * rows], 1))


def test_a_perfectly_calibrated_forecast_has_no_calibration_error():
    logs = np.log(np.repeat([[0.75, 0.25], [0.5, 0.5]], [8, 4], axis=0))
    truth = truth_of(np.repeat([0, 1, 0, 1], [6, 2, 2, 2]))
    assert calibration_error(logs, truth) == pytest.approx(0, abs=1e-12)
    swapped = truth_of(np.repeat([0, 1, 0, 1], [2, 6, 2, 2]))
    assert calibration_error(logs, swapped) == pytest.approx(0.5 * 8 / 12)


def shuffled(logs, truth, order):
    return logs[order], Truth(truth.targets[order], truth.weights[order])


@pytest.mark.parametrize("weighted", [False, True])
@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from([0.5, 0.6, 0.7, 0.9, 1.0]), min_size=2, max_size=40),
    st.integers(0, 2**32 - 1),
)
def test_the_order_of_rows_does_not_matter(weighted, confidence, seed):
    rng = np.random.default_rng(seed)
    rows = len(confidence)
    logs = items_of(np.stack([confidence, 1 - np.array(confidence)], axis=1), MULTICLASS)
    weights = rng.integers(1, 4, rows) if weighted else None
    truth = truth_of(np.eye(2)[rng.integers(0, 2, rows)], weights)
    other = shuffled(logs, truth, rng.permutation(rows))
    np.testing.assert_allclose(reliability(*other), reliability(logs, truth), atol=1e-12)
    assert calibration_error(*other) == pytest.approx(calibration_error(logs, truth), abs=1e-12)


def test_items_of_equal_confidence_share_their_accuracy():
    logs = np.log(np.repeat([[0.8, 0.2]], 12, axis=0))
    actual = reliability(logs, truth_of(np.repeat([0, 1], [9, 3])), 4)
    np.testing.assert_allclose(actual, [[0.8, 0.75, 0.25]] * 4)


def test_items_without_weight_do_not_count(rng):
    probabilities, labels, _ = some_classes(rng, 80)
    weights = (np.arange(80) % 3 > 0).astype(float)
    kept = weights > 0
    logs, truth = items_of(probabilities, MULTICLASS), truth_of(np.eye(4)[labels], weights)
    other = logs[kept], truth_of(np.eye(4)[labels[kept]])
    for score in (loss, error, calibration_error):
        assert score(logs, truth) == pytest.approx(score(*other))
    assert brier_score(logs, truth, MULTICLASS) == pytest.approx(brier_score(*other, MULTICLASS))


# Diversity


def test_disagreement_of_classes_compares_predicted_classes(rng):
    logs = special.log_softmax(rng.normal(size=(3, 50, 4)), axis=-1)
    weights = rng.exponential(size=50)
    actual = disagreement(logs, truth_of(np.eye(4)[[0] * 50], weights))
    labels = logs.argmax(axis=-1)
    expected = [
        [np.average(labels[i] != labels[j], weights=weights) for j in range(3)] for i in range(3)
    ]
    np.testing.assert_allclose(actual, expected, atol=1e-15)
    pairs = [expected[i][j] for i, j in ((0, 1), (0, 2), (1, 2))]
    assert mean_of_pairs(actual) == pytest.approx(np.mean(pairs))


def test_disagreement_of_values_is_their_mean_squared_difference(rng):
    values, weights = rng.normal(size=(3, 50)), rng.exponential(size=50)
    actual = disagreement(values, Truth(np.zeros(50), weights / weights.sum()))
    expected = [
        [metrics.mean_squared_error(a, b, sample_weight=weights) for b in values] for a in values
    ]
    np.testing.assert_allclose(actual, expected, atol=1e-12)


def test_a_single_member_has_no_disagreement():
    assert mean_of_pairs(np.zeros((1, 1))) == 0
