"""What is learned and reported does not depend on how the rows are split into blocks."""

import keras
import numpy as np
import pytest
from held_out_cases import AMOUNTS, LABELS, PIXELS, RNG, ROWS, YES, gathered, two_headed
from keras import layers
from models import TASKS, dense, eager, ensemble_of
from scipy import special

from snapshot_ensemble.evaluation.member_counts import curves_by_members
from snapshot_ensemble.inference import blocks

WEIGHTS = RNG.uniform(0.2, 2, 11)


def convolutional():
    model = keras.Sequential([keras.Input((4, 5, 2)), layers.Conv2D(3, 1)])
    return eager(model, keras.losses.SparseCategoricalCrossentropy(from_logits=True))


def case(name):
    """A model, its inputs and its targets."""
    if name == "pixels":
        return convolutional(), RNG.normal(size=(2, 4, 5, 2)), PIXELS
    if name == "two outputs":
        return two_headed(list), ROWS, [LABELS, AMOUNTS]
    targets = {"log-odds": YES[:, :1], "multilabel": YES, "regression": AMOUNTS}
    return eager(dense(*TASKS[name]), TASKS[name][0]), ROWS, targets.get(name, LABELS)


def learned(ens, x, y, weights):
    """Everything that the held-out data say."""
    options, values = {"sample_weight": weights, "verbose": 0}, {}
    ens.members = None
    # First, since reports use what it learns about values.
    values["calibrate"] = ens.calibrate(x, y, **options)
    ens.weights, ens.temperature, ens.members = [0.5, 0.2, 0.3], 1.3, None
    values["report"] = ens.report(x, y, **options).to_dict()
    # Rounding in float32 splits tempered votes of equal confidence.
    values["report"]["rows"].get("vote", {}).pop("ece", None)
    values["choose_members"] = ens.choose_members(x, y, **options)
    for method in ("likelihood", "greedy"):
        values[method] = ens.fit_weights(x, y, method=method, **options)
    return values


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["softmax", "log-odds", "multilabel", "regression", "pixels", "two outputs"]
)
def test_results_do_not_depend_on_blocks(name, monkeypatch):
    model, x, y = case(name)
    ens = ensemble_of(model, 3)
    weights = None if name == "pixels" else WEIGHTS
    expected = learned(ens, x, y, weights)
    monkeypatch.setattr(blocks, "NUMBERS", 30)
    held = gathered(ens, x, y)
    assert len(list(held.blocks())) > 1
    actual = learned(ens, x, y, weights)
    assert expected.keys() == actual.keys()
    for one, other in zip(*map(keras.tree.flatten, (actual, expected)), strict=True):
        if isinstance(one, str) or one is None:
            assert one == other
        else:
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("numbers", [1, 30, 10**6])
def test_curves_written_out_in_logarithms(numbers, monkeypatch):
    monkeypatch.setattr(blocks, "NUMBERS", numbers)
    ens = ensemble_of(eager(dense(), "sparse_categorical_crossentropy"), 4)
    held = gathered(ens, ROWS, LABELS, WEIGHTS)
    logs = np.log(held.outputs[0].astype("float64"))
    logs = special.log_softmax(logs, axis=-1)
    shares = WEIGHTS / WEIGHTS.sum()
    curves = curves_by_members(held, 1, -1)
    for curve, ordered in zip(curves, (logs, logs[::-1]), strict=True):
        means = np.logaddexp.accumulate(ordered, axis=0) - np.log(np.arange(1, 5))[:, None, None]
        losses = -shares * means[:, np.arange(11), LABELS]
        np.testing.assert_allclose(curve.losses, losses, rtol=1e-9)
        np.testing.assert_allclose(curve.scores["loss"], losses.sum(axis=1), rtol=1e-9)
        wrong = (means.argmax(axis=-1) != LABELS) @ shares
        np.testing.assert_allclose(curve.scores["error"], wrong, atol=1e-12)


def test_curves_of_the_smallest_probabilities():
    held = gathered(ensemble_of(eager(dense(), "sparse_categorical_crossentropy"), 3), ROWS, LABELS)
    held.outputs[0][...] = np.eye(3)[(LABELS + 1) % 3]
    [curve] = curves_by_members(held, 1)
    expected = -np.log(float(np.finfo("float32").tiny))
    np.testing.assert_allclose(curve.scores["loss"], expected, rtol=1e-12)
    assert curve.scores["error"] == [1, 1, 1]
