"""Scores and uncertainty against scikit-learn, SciPy and NumPy written out."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers
from models import TASKS, dense, eager, ensemble_of, ensemble_with, member_weights, one_batch
from scipy import special, stats
from sklearn import metrics

from snapshot_ensemble import Snapshot, SnapshotEnsemble
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
    uncertainty,
)
from snapshot_ensemble.evaluation.targets import Truth
from snapshot_ensemble.inference.output_specs import Output

TINY = np.finfo("float32").tiny
MULTICLASS, BINARY = Output("multiclass"), Output("binary")
MULTILABEL, REGRESSION = Output("multilabel"), Output("regression")
TWINS = {
    "multiclass": (MULTICLASS, Output("multiclass", logits=True)),
    "binary": (BINARY, Output("binary", logits=True)),
    "multilabel": (MULTILABEL, Output("multilabel", logits=True)),
}




def truth_of(targets, weights=None):
    """Labels as one-hot rows, yes or no as two classes; weights that sum to 1."""
    targets = np.asarray(targets)
    if targets.ndim == 1:
        targets = np.eye(targets.max() + 1)[targets]
    weights = np.ones(len(targets)) if weights is None else np.asarray(weights, "float64")
    return Truth(targets, weights / weights.sum())


def some_classes(rng, rows=200, count=4):
    """Probabilities, labels that go with them more or less, and weights."""
    logits = 2 * rng.normal(size=(rows, count))
    labels = (logits + 2 * rng.gumbel(size=logits.shape)).argmax(axis=-1)
    return special.softmax(logits, axis=-1), labels, rng.exponential(size=rows)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# Items


@pytest.mark.parametrize("task", TWINS)
def test_logarithms_of_probabilities_and_of_logits(task, rng):
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
    np.testing.assert_allclose(items_of(logits, TWINS["multiclass"][1]), expected, atol=1e-30)
    items = items_of(np.array([[-1e4], [1e4]], "float32"), TWINS["binary"][1])
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
def test_scores_of_yes_and_no_are_those_of_scikit_learn(weighted, rng):
    yes = rng.random((150, 1))
    labels, weights = (rng.random(150) < yes[:, 0]).astype(int), rng.exponential(size=150)
    weights = weights if weighted else None
    logs, truth = items_of(yes, BINARY), truth_of(labels, weights)
    how = {"sample_weight": weights}
    assert loss(logs, truth) == pytest.approx(metrics.log_loss(labels, yes[:, 0], **how))
    assert brier_score(logs, truth, BINARY) == pytest.approx(
        metrics.brier_score_loss(labels, yes[:, 0], **how)
    )
    assert error(logs, truth) == pytest.approx(
        metrics.zero_one_loss(labels, yes[:, 0] > 0.5, **how)
    )


def test_scores_of_labels_are_the_means_over_them(rng):
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
    likeliest = targets[np.arange(60), probabilities.argmax(axis=-1)]
    assert error(logs, truth) == pytest.approx(1 - share @ likeliest)


def test_scores_where_probabilities_are_zero_and_one():
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
    """Each item goes to the bin that the middle of its mass falls into."""
    order = np.argsort(confidence, kind="stable")
    confidence, right = confidence[order], right[order]
    weights = weights[order] / weights.sum()
    middle = np.cumsum(weights) - weights / 2
    rows = []
    for low in np.arange(bins) / bins:
        here = (middle >= low - 1e-12) & (middle < low + 1 / bins - 1e-12)
        if mass := weights[here].sum():
            means = [np.average(v[here], weights=weights[here]) for v in (confidence, right)]
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
    found = reliability(logs, truth, bins)
    assert found.shape == (bins, 3)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    most = weights.max() / weights.sum() if weighted else 1e-12
    np.testing.assert_allclose(found[:, 2], 1 / bins, atol=most)
    ece = expected[:, 2] @ np.abs(expected[:, 0] - expected[:, 1])
    assert calibration_error(logs, truth, bins) == pytest.approx(ece)
    if bins == 15:
        assert calibration_error(logs, truth) == pytest.approx(ece)


def test_calibration_of_yes_and_no_looks_at_the_likelier_of_both(rng):
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
    found = reliability(items_of(probabilities, MULTICLASS), truth)
    assert found.shape == (rows, 3)
    confidence = probabilities.max(axis=-1)
    order = np.argsort(confidence)
    right = (probabilities.argmax(axis=-1) == labels)[order]
    np.testing.assert_allclose(found, np.stack([confidence[order], right, [1 / rows] * rows], 1))


def test_a_perfectly_calibrated_forecast_has_no_calibration_error():
    logs = np.log(np.repeat([[0.75, 0.25], [0.5, 0.5]], [8, 4], axis=0))
    truth = truth_of(np.repeat([0, 1, 0, 1], [6, 2, 2, 2]))
    assert calibration_error(logs, truth) == pytest.approx(0, abs=1e-12)
    turned = truth_of(np.repeat([0, 1, 0, 1], [2, 6, 2, 2]))
    assert calibration_error(logs, turned) == pytest.approx(0.5 * 8 / 12)


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


def test_items_of_equal_confidence_are_as_right_as_all_of_them():
    logs = np.log(np.repeat([[0.8, 0.2]], 12, axis=0))
    found = reliability(logs, truth_of(np.repeat([0, 1], [9, 3])), 4)
    np.testing.assert_allclose(found, [[0.8, 0.75, 0.25]] * 4)


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


def test_disagreement_of_classes_counts_the_likeliest(rng):
    logs = special.log_softmax(rng.normal(size=(3, 50, 4)), axis=-1)
    weights = rng.exponential(size=50)
    found = disagreement(logs, truth_of(np.eye(4)[[0] * 50], weights))
    labels = logs.argmax(axis=-1)
    expected = [
        [np.average(labels[i] != labels[j], weights=weights) for j in range(3)] for i in range(3)
    ]
    np.testing.assert_allclose(found, expected, atol=1e-15)
    pairs = [expected[i][j] for i, j in ((0, 1), (0, 2), (1, 2))]
    assert mean_of_pairs(found) == pytest.approx(np.mean(pairs))


def test_disagreement_of_values_is_their_distance(rng):
    values, weights = rng.normal(size=(3, 50)), rng.exponential(size=50)
    found = disagreement(values, Truth(np.zeros(50), weights / weights.sum()))
    expected = [
        [metrics.root_mean_squared_error(a, b, sample_weight=weights) for b in values]
        for a in values
    ]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_one_member_does_not_disagree():
    assert mean_of_pairs(np.zeros((1, 1))) == 0


# Uncertainty, of arrays


def of_members(outputs, meaning):
    found = uncertainty(list(outputs), [meaning])
    return {name: np.asarray(part) for name, part in found.items()}


def entropies(probabilities):
    """Total, aleatoric and epistemic by SciPy; the members first, the classes last."""
    total = stats.entropy(probabilities.mean(axis=0), axis=-1)
    aleatoric = stats.entropy(probabilities, axis=-1).mean(axis=0)
    divergence = stats.entropy(probabilities, probabilities.mean(axis=0)[None], axis=-1)
    return {"total": total, "aleatoric": aleatoric, "epistemic": divergence.mean(axis=0)}


def both_sides(yes):
    return np.stack([1 - yes, yes], axis=-1)


def check_spread(found, expected, tolerance=1e-6):
    assert list(found) == ["total", "aleatoric", "epistemic"]
    for name, part in expected.items():
        assert found[name].dtype == "float32"
        assert found[name].shape == part.shape
        np.testing.assert_allclose(found[name], part, rtol=1e-5, atol=tolerance, err_msg=name)
    assert (found["epistemic"] >= 0).all()
    np.testing.assert_allclose(
        found["total"], found["aleatoric"] + found["epistemic"], rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("task", TWINS)
def test_spread_of_classes(task, dtype, rng):
    logits = (2 * rng.normal(size=(5, 7, 3))).astype(dtype)
    wide = logits.astype("float64")
    if task == "multiclass":
        probabilities, full = special.softmax(logits, axis=-1), special.softmax(wide, axis=-1)
    else:
        probabilities, full = special.expit(logits), both_sides(special.expit(wide))
    for outputs, meaning in zip((probabilities, logits), TWINS[task], strict=True):
        check_spread(of_members(outputs, meaning), entropies(full))


def test_spread_of_values(rng):
    values = (1e3 + rng.normal(size=(4, 6, 2))).astype("float32")
    found = of_members(values, REGRESSION)
    assert list(found) == ["std"]
    assert found["std"].dtype == "float32"
    np.testing.assert_allclose(found["std"], np.std(values.astype("float64"), axis=0), rtol=1e-5)


@pytest.mark.parametrize("task", TWINS)
def test_members_that_are_alike_and_a_single_one_have_nothing_epistemic(task, rng):
    logits = rng.normal(size=(1, 6, 3)).astype("float32")
    probabilities = (special.softmax if task == "multiclass" else special.expit)(
        logits, *([-1] if task == "multiclass" else [])
    )
    for output, meaning in zip((probabilities, logits), TWINS[task], strict=True):
        for count in (1, 3):
            found = of_members(np.repeat(output, count, axis=0), meaning)
            np.testing.assert_allclose(found["epistemic"], 0, atol=1e-12)
            assert (found["epistemic"] >= 0).all()
            np.testing.assert_allclose(found["total"], found["aleatoric"], rtol=1e-6)
    assert (of_members(np.repeat(logits, 3, axis=0), REGRESSION)["std"] == 0).all()


def test_members_that_are_sure_of_different_classes():
    sure = np.eye(3, dtype="float32")[:, None]
    found = of_members(sure, MULTICLASS)
    check_spread(found, {"total": np.log([3]), "aleatoric": np.zeros(1), "epistemic": np.log([3])})
    yes = np.array([[[0.0]], [[1.0]]], "float32")
    found = of_members(yes, BINARY)
    expected = np.full((1, 1), np.log(2))
    check_spread(found, {"total": expected, "aleatoric": 0 * expected, "epistemic": expected})
    huge = 1e4 * sure
    found = of_members(huge, TWINS["multiclass"][1])
    check_spread(found, {"total": np.log([3]), "aleatoric": np.zeros(1), "epistemic": np.log([3])})


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100), st.integers(1, 6), st.integers(2, 5))
def test_spread_of_any_members(seed, size, members, count):
    logits = size * np.random.default_rng(seed).normal(size=(members, 4, count))
    found = of_members(logits, TWINS["multiclass"][1])
    check_spread(found, entropies(special.softmax(logits, axis=-1)))
    assert (found["total"] <= np.log(count) * (1 + 1e-6)).all()
    assert (found["epistemic"] <= np.log(members) + 1e-6).all()


# Uncertainty, of an ensemble

ROWS = np.random.default_rng(1).normal(size=(11, 4)).astype("float32")
DATA = one_batch(ROWS)




def check_uncertainty(found, mean, own, meaning):
    """Against the members' own outputs."""
    own = own.astype("float64")
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-6, atol=1e-7)
    if not meaning.is_classes:
        assert list(found) == ["mean", "std"]
        np.testing.assert_allclose(found["std"], np.std(own, axis=0), rtol=1e-5, atol=1e-7)
        return
    if meaning.task == "multiclass":
        probabilities = special.softmax(own, axis=-1) if meaning.logits else own
    else:
        probabilities = both_sides(special.expit(own) if meaning.logits else own)
    found = {name: part for name, part in found.items() if name != "mean"}
    check_spread(found, entropies(probabilities), 1e-5)


MEANINGS = {
    "softmax": MULTICLASS,
    "logits": TWINS["multiclass"][1],
    "sigmoid": BINARY,
    "log-odds": TWINS["binary"][1],
    "multilabel": MULTILABEL,
    "regression": REGRESSION,
}


@pytest.mark.parametrize("task", TASKS)
def test_uncertainty_of_every_task(task):
    loss, units, activation = TASKS[task]
    ens = ensemble_of(eager(dense(loss, units, activation), loss), 4)
    ens.temperature = 3.0
    found = ens.predict_uncertainty(DATA, verbose=0)
    ens.temperature = 1.0  # It has no part in it.
    mean, own = ens.predict(DATA, verbose=0), ens.predict_members(DATA, verbose=0)
    check_uncertainty(found, mean, own, MEANINGS[task])
    shape = (11,) if MEANINGS[task].task == "multiclass" else (11, units)
    assert {part.shape for name, part in found.items() if name != "mean"} == {shape}


def test_uncertainty_is_traced_and_goes_by_batches():
    ens = ensemble_of(dense(), 3)
    found = ens.predict_uncertainty(ROWS, members=[0, 2], batch_size=4, verbose=0)
    mean = ens.predict(ROWS, members=[0, 2], batch_size=4, verbose=0)
    own = ens.predict_members(ROWS, members=[0, 2], batch_size=4, verbose=0)
    check_uncertainty(found, mean, own, MULTICLASS)


def test_uncertainty_of_each_pixel():
    images = np.random.default_rng(2).normal(size=(3, 5, 4, 2)).astype("float32")
    model = keras.Sequential([keras.Input((5, 4, 2)), layers.Conv2D(3, 1)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    ens = ensemble_of(eager(model, loss), 3)
    data = tf.data.Dataset.from_tensors(images)
    found = ens.predict_uncertainty(data, verbose=0)
    assert found["mean"].shape == (3, 5, 4, 3)
    assert found["total"].shape == (3, 5, 4)
    own = ens.predict_members(data, verbose=0)
    check_uncertainty(found, ens.predict(data, verbose=0), own, TWINS["multiclass"][1])


@pytest.mark.parametrize("structure", [list, dict])
def test_uncertainty_of_several_outputs_has_their_structure(structure):
    inputs = keras.Input((4,))
    outputs = {
        "kind": layers.Dense(3, "softmax", name="kind")(inputs),
        "amount": layers.Dense(2, name="amount")(inputs),
    }
    model = keras.Model(inputs, outputs if structure is dict else list(outputs.values()))
    loss = {"kind": "sparse_categorical_crossentropy", "amount": "mse"}
    ens = ensemble_of(eager(model, loss if structure is dict else list(loss.values())), 3)
    found = ens.predict_uncertainty(DATA, verbose=0)
    mean, own = ens.predict(DATA, verbose=0), ens.predict_members(DATA, verbose=0)
    assert type(found) is structure
    keys = ("kind", "amount") if structure is dict else (0, 1)
    for key, meaning in zip(keys, (MULTICLASS, REGRESSION), strict=True):
        check_uncertainty(found[key], mean[key], own[key], meaning)


def test_members_that_are_alike_are_unsure_but_of_one_mind():
    model = eager(dense(), "sparse_categorical_crossentropy")
    (own,) = member_weights(ensemble_of(model, 1))
    ens = ensemble_with(model, own, own, own)
    found = ens.predict_uncertainty(DATA, verbose=0)
    np.testing.assert_allclose(found["epistemic"], 0, atol=1e-12)
    assert (found["total"] > 0.1).all()
