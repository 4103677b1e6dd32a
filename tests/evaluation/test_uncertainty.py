"""Uncertainty and its aleatoric and epistemic parts, against SciPy."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers
from models import (
    BINARY,
    BINARY_LOGITS,
    MULTICLASS,
    MULTICLASS_LOGITS,
    MULTILABEL,
    REGRESSION,
    TASKS,
    TWINS,
    dense,
    eager,
    ensemble_of,
    ensemble_with,
    member_weights,
    one_batch,
)
from scipy import special, stats

from snapshot_ensemble.evaluation.uncertainty import uncertainty

# Uncertainty of arrays


def of_members(outputs, meaning):
    actual = uncertainty(list(outputs), [meaning])
    return {name: np.asarray(part) for name, part in actual.items()}


def entropies(probabilities):
    """Total, aleatoric and epistemic uncertainty by SciPy; members first, classes last."""
    total = stats.entropy(probabilities.mean(axis=0), axis=-1)
    aleatoric = stats.entropy(probabilities, axis=-1).mean(axis=0)
    divergence = stats.entropy(probabilities, probabilities.mean(axis=0)[None], axis=-1)
    return {"total": total, "aleatoric": aleatoric, "epistemic": divergence.mean(axis=0)}


def no_and_yes(yes):
    return np.stack([1 - yes, yes], axis=-1)


def check_spread(actual, expected, tolerance=1e-6):
    assert list(actual) == ["total", "aleatoric", "epistemic"]
    for name, part in expected.items():
        assert actual[name].dtype == "float32"
        assert actual[name].shape == part.shape
        np.testing.assert_allclose(actual[name], part, rtol=1e-5, atol=tolerance, err_msg=name)
    assert (actual["epistemic"] >= 0).all()
    np.testing.assert_allclose(
        actual["total"], actual["aleatoric"] + actual["epistemic"], rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("task", TWINS)
def test_spread_of_classes(task, dtype, rng):
    logits = (2 * rng.normal(size=(5, 7, 3))).astype(dtype)
    wide = logits.astype("float64")
    if task == "multiclass":
        probabilities, full = special.softmax(logits, axis=-1), special.softmax(wide, axis=-1)
    else:
        probabilities, full = special.expit(logits), no_and_yes(special.expit(wide))
    for outputs, meaning in zip((probabilities, logits), TWINS[task], strict=True):
        check_spread(of_members(outputs, meaning), entropies(full))


def test_spread_of_values(rng):
    values = (1e3 + rng.normal(size=(4, 6, 2))).astype("float32")
    actual = of_members(values, REGRESSION)
    assert list(actual) == ["std"]
    assert actual["std"].dtype == "float32"
    np.testing.assert_allclose(actual["std"], np.std(values.astype("float64"), axis=0), rtol=1e-5)


@pytest.mark.parametrize("task", TWINS)
def test_identical_members_and_a_single_one_have_no_epistemic_uncertainty(task, rng):
    logits = rng.normal(size=(1, 6, 3)).astype("float32")
    probabilities = (special.softmax if task == "multiclass" else special.expit)(
        logits, *([-1] if task == "multiclass" else [])
    )
    for output, meaning in zip((probabilities, logits), TWINS[task], strict=True):
        for count in (1, 3):
            actual = of_members(np.repeat(output, count, axis=0), meaning)
            np.testing.assert_allclose(actual["epistemic"], 0, atol=1e-12)
            assert (actual["epistemic"] >= 0).all()
            np.testing.assert_allclose(actual["total"], actual["aleatoric"], rtol=1e-6)
    assert (of_members(np.repeat(logits, 3, axis=0), REGRESSION)["std"] == 0).all()


def test_members_that_are_sure_of_different_classes():
    sure = np.eye(3, dtype="float32")[:, None]
    actual = of_members(sure, MULTICLASS)
    check_spread(actual, {"total": np.log([3]), "aleatoric": np.zeros(1), "epistemic": np.log([3])})
    yes = np.array([[[0.0]], [[1.0]]], "float32")
    actual = of_members(yes, BINARY)
    expected = np.full((1, 1), np.log(2))
    check_spread(actual, {"total": expected, "aleatoric": 0 * expected, "epistemic": expected})
    huge = 1e4 * sure
    actual = of_members(huge, MULTICLASS_LOGITS)
    check_spread(actual, {"total": np.log([3]), "aleatoric": np.zeros(1), "epistemic": np.log([3])})


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100), st.integers(1, 6), st.integers(2, 5))
def test_spread_of_any_members(seed, size, members, count):
    logits = size * np.random.default_rng(seed).normal(size=(members, 4, count))
    actual = of_members(logits, MULTICLASS_LOGITS)
    check_spread(actual, entropies(special.softmax(logits, axis=-1)))
    assert (actual["total"] <= np.log(count) * (1 + 1e-6)).all()
    assert (actual["epistemic"] <= np.log(members) + 1e-6).all()


# Uncertainty of an ensemble


ROWS = np.random.default_rng(1).normal(size=(11, 4)).astype("float32")
DATA = one_batch(ROWS)


def check_uncertainty(actual, mean, own, meaning):
    """Against the members' own outputs."""
    own = own.astype("float64")
    np.testing.assert_allclose(actual["mean"], mean, rtol=1e-6, atol=1e-7)
    if not meaning.is_classes:
        assert list(actual) == ["mean", "std"]
        np.testing.assert_allclose(actual["std"], np.std(own, axis=0), rtol=1e-5, atol=1e-7)
        return
    if meaning.task == "multiclass":
        probabilities = special.softmax(own, axis=-1) if meaning.logits else own
    else:
        probabilities = no_and_yes(special.expit(own) if meaning.logits else own)
    actual = {name: part for name, part in actual.items() if name != "mean"}
    check_spread(actual, entropies(probabilities), 1e-5)


MEANINGS = {
    "softmax": MULTICLASS,
    "logits": MULTICLASS_LOGITS,
    "sigmoid": BINARY,
    "log-odds": BINARY_LOGITS,
    "multilabel": MULTILABEL,
    "regression": REGRESSION,
}


@pytest.mark.parametrize("task", TASKS)
def test_uncertainty_of_every_task(task):
    loss, units, activation = TASKS[task]
    ens = ensemble_of(eager(dense(loss, units, activation), loss), 4)
    ens.temperature = 3.0
    actual = ens.predict_uncertainty(DATA, verbose=0)
    ens.temperature = 1.0  # The temperature must not affect the uncertainty.
    mean, own = ens.predict(DATA, verbose=0), ens.predict_members(DATA, verbose=0)
    check_uncertainty(actual, mean, own, MEANINGS[task])
    shape = (11,) if MEANINGS[task].task == "multiclass" else (11, units)
    assert {part.shape for name, part in actual.items() if name != "mean"} == {shape}


def test_uncertainty_in_graph_mode_and_in_batches():
    ens = ensemble_of(dense(), 3)
    actual = ens.predict_uncertainty(ROWS, members=[0, 2], batch_size=4, verbose=0)
    mean = ens.predict(ROWS, members=[0, 2], batch_size=4, verbose=0)
    own = ens.predict_members(ROWS, members=[0, 2], batch_size=4, verbose=0)
    check_uncertainty(actual, mean, own, MULTICLASS)


def test_uncertainty_of_each_pixel():
    images = np.random.default_rng(2).normal(size=(3, 5, 4, 2)).astype("float32")
    model = keras.Sequential([keras.Input((5, 4, 2)), layers.Conv2D(3, 1)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    ens = ensemble_of(eager(model, loss), 3)
    data = tf.data.Dataset.from_tensors(images)
    actual = ens.predict_uncertainty(data, verbose=0)
    assert actual["mean"].shape == (3, 5, 4, 3)
    assert actual["total"].shape == (3, 5, 4)
    own = ens.predict_members(data, verbose=0)
    check_uncertainty(actual, ens.predict(data, verbose=0), own, MULTICLASS_LOGITS)


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
    actual = ens.predict_uncertainty(DATA, verbose=0)
    mean, own = ens.predict(DATA, verbose=0), ens.predict_members(DATA, verbose=0)
    assert type(actual) is structure
    keys = ("kind", "amount") if structure is dict else (0, 1)
    for key, meaning in zip(keys, (MULTICLASS, REGRESSION), strict=True):
        check_uncertainty(actual[key], mean[key], own[key], meaning)


def test_identical_members_are_uncertain_but_do_not_disagree():
    model = eager(dense(), "sparse_categorical_crossentropy")
    (own,) = member_weights(ensemble_of(model, 1))
    ens = ensemble_with(model, own, own, own)
    actual = ens.predict_uncertainty(DATA, verbose=0)
    np.testing.assert_allclose(actual["epistemic"], 0, atol=1e-12)
    assert (actual["total"] > 0.1).all()
