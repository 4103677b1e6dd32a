"""`calibrate` fits the temperature with the lowest loss; predicted classes do not change."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from models import dense, eager, ensemble_of, ensemble_with, member_weights
from scipy import special
from sklearn import metrics
from weights_cases import FEATURES, KINDS, LABELS, SOME, best_temperature, picked

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.evaluation.calibration import learn_temperature
from snapshot_ensemble.evaluation.metrics import items_of
from snapshot_ensemble.evaluation.targets import Truth
from snapshot_ensemble.inference.combining import temper
from snapshot_ensemble.inference.task_words import Output

# The temperature


def tempered(kind, probabilities, temperature):
    """`p^(1/T)`, normalised."""
    powers = np.asarray(probabilities, "float64") ** (1 / temperature)
    if kind == "multiclass":
        return powers / powers.sum(axis=-1, keepdims=True)
    rest = (1 - np.asarray(probabilities, "float64")) ** (1 / temperature)
    return powers / (powers + rest)


@pytest.mark.parametrize("kind", KINDS)
def test_the_temperature_minimises_the_loss(kind, digits_members):
    case = digits_members(kind)
    ens, y = case.ens, case.y
    mean = special.logsumexp(case.logs, axis=0) - np.log(len(ens))
    expected = best_temperature([(1, mean, y)])
    assert abs(np.log(expected)) > 0.1  # Otherwise there is nothing to fit.
    before = ens.predict(case.rows, verbose=0)
    first = ens.calibrate(case.data, verbose=0)
    assert first == pytest.approx(expected, rel=1e-5)
    assert ens.temperature == first
    after = ens.predict(case.rows, verbose=0)
    np.testing.assert_allclose(after, tempered(kind, before, first), rtol=1e-4, atol=1e-7)
    assert ens.calibrate(case.data, verbose=0) == first
    by_keras = ens.evaluate(case.data, verbose=0)
    expected_loss = -picked(special.log_softmax(mean / expected, axis=-1), y).mean()
    assert by_keras == pytest.approx(expected_loss, rel=1e-4)
    if kind == "multiclass":
        np.testing.assert_array_equal(after.argmax(axis=-1), before.argmax(axis=-1))
        assert by_keras == pytest.approx(metrics.log_loss(y, after), rel=1e-4)
    else:
        np.testing.assert_array_equal(after > 0.5, before > 0.5)
    ens.temperature = 1.0
    np.testing.assert_array_equal(ens.predict(case.rows, verbose=0), before)


def test_the_temperature_of_a_combination_of_some_members(digits_members):
    case = digits_members("multiclass")
    case.ens.weights = [0.1, 0.2, 0.3, 0.4, 0]
    arguments = {"combine": "weighted", "members": [0, 2]}
    mean = special.logsumexp(case.logs[[0, 2]], axis=0, b=np.array([0.25, 0.75])[:, None, None])
    actual = case.ens.calibrate(case.data, verbose=0, **arguments)
    assert actual == pytest.approx(best_temperature([(1, mean, case.y)]), rel=1e-5)
    mean = special.log_softmax(case.logs[1:3].mean(axis=0), axis=-1)
    arguments = {"combine": "geometric", "members": [1, 2]}
    actual = case.ens.calibrate(case.data, verbose=0, **arguments)
    assert actual == pytest.approx(best_temperature([(1, mean, case.y)]), rel=1e-5)


def learned(probabilities, labels):
    probabilities = np.asarray(probabilities)
    truth = Truth(np.eye(probabilities.shape[1])[labels], np.full(len(labels), 1 / len(labels)))
    return learn_temperature([items_of(probabilities, Output("multiclass"))], [truth], [1.0])


def test_the_temperature_stays_within_its_bounds():
    unsure, sure = ([[1 - p, p]] * 20_000 for p in (0.45, 0.001))
    assert learned(unsure, [0] * 20_000) == pytest.approx(0.05, abs=1e-12)
    assert learned(sure, [1] * 20_000) == pytest.approx(20, abs=1e-12)
    assert learned(unsure, [0] * 20_000) >= 0.05
    assert learned(sure, [1] * 20_000) <= 20


def test_uniform_probabilities_keep_the_temperature_1():
    assert learned(np.full((4, 2), 0.5), [0, 1, 1, 0]) == 1


def test_temperature_and_weights_are_exported_and_saved(tmp_path, informed):
    model = eager(dense())
    ens = ensemble_with(model, *member_weights(informed))
    ens.weights, ens.temperature = [0.25, 0, 0.75], 2.5
    probabilities = ens.predict_members(FEATURES, verbose=0)
    expected = tempered("multiclass", 0.25 * probabilities[0] + 0.75 * probabilities[2], 2.5)
    actual = {
        "predict": ens.predict(FEATURES, combine="weighted", verbose=0),
        "to_keras": ens.to_keras("weighted").predict(FEATURES, verbose=0),
    }
    ens.export(tmp_path / "served", combine="weighted")
    served = tf.saved_model.load(tmp_path / "served")
    actual["export"] = served.signatures["serving_default"](features=SOME)["answer"].numpy()
    ens.save(tmp_path / "saved")
    loaded = SnapshotEnsemble.load(tmp_path / "saved")
    assert loaded.temperature == 2.5
    actual["load"] = loaded.predict(FEATURES, combine="weighted", verbose=0)
    for name, outputs in actual.items():
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6, err_msg=name)
    # It contains the weights of two members; the third has weight 0.
    exported = sum(np.size(variable.numpy()) for variable in served.variables)
    assert exported == 2 * model.count_params()


def test_weights_and_temperature_are_reset_when_a_fit_adds_members(informed):
    model = eager(dense())
    ens = ensemble_of(model, 2, cycles=1, lr_init=0.1)
    ens.weights, ens.temperature = [0.25, 0.75], 2.5
    ens.fit(SOME, LABELS, epochs=1, verbose=0)
    assert len(ens) == 3
    assert ens.weights is None
    assert ens.temperature == 1
    probabilities = ens.predict_members(FEATURES, verbose=0)
    np.testing.assert_allclose(
        ens.predict(FEATURES, verbose=0), probabilities.mean(axis=0), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize(
    ("temperature", "error", "message"),
    [
        (0, ValueError, "`temperature` must be finite and above 0. Received: temperature=0"),
        (-1.0, ValueError, "`temperature` must be finite and above 0. Received: temperature=-1.0"),
        (np.inf, ValueError, "`temperature` must be finite and above 0. Received: temperature=inf"),
        (np.nan, ValueError, "`temperature` must be finite and above 0. Received: temperature=nan"),
        (True, TypeError, "`temperature` must be a number. Received: temperature=True"),
        ("2", TypeError, "`temperature` must be a number. Received: temperature='2'"),
        (None, TypeError, "`temperature` must be a number. Received: temperature=None"),
        ([1, 2], TypeError, "`temperature` must be a number. Received: temperature=[1, 2]"),
    ],
)
def test_invalid_temperatures_are_refused(temperature, error, message, informed):
    informed.weights, informed.temperature = [0.2, 0.3, 0.5], 1.7
    with pytest.raises(error) as caught:
        informed.temperature = temperature
    assert str(caught.value) == message
    assert informed.temperature == 1.7
    np.testing.assert_allclose(informed.weights, [0.2, 0.3, 0.5])


# The predicted class is the same at any temperature


TEMPERATURES = st.floats(0.05, 20)
DTYPES = st.sampled_from(["float32", "float64"])


@st.composite
def near_ties(draw, highest):
    """Rows whose largest numbers are equal or differ by a few floating-point steps."""
    dtype = draw(DTYPES)
    shape = (8, draw(st.integers(2, 6)))
    top = draw(arrays.arrays(dtype, (8, 1), elements=highest))
    steps = draw(arrays.arrays("int8", shape, elements=st.integers(-3, 3)))
    near = top + steps * np.spacing(top)
    far = draw(arrays.arrays("bool", shape))
    far[far.all(axis=-1)] = False
    down = draw(arrays.arrays(dtype, shape, elements=st.floats(0, 1, width=32)))
    return near.astype(dtype), down, far


@settings(deadline=None, max_examples=40)
@given(near_ties(st.floats(0.125, 0.5, width=32)), TEMPERATURES)
def test_the_most_probable_class_stays_for_probabilities(drawn, temperature):
    near, down, far = drawn
    probabilities = np.where(far, near.min(axis=-1, keepdims=True) * down, near)
    after = np.asarray(temper(probabilities, "multiclass", False, temperature))
    assert after.dtype == probabilities.dtype
    np.testing.assert_array_equal(after.argmax(axis=-1), probabilities.argmax(axis=-1))
    np.testing.assert_allclose(
        after,
        tempered("multiclass", np.maximum(probabilities, np.finfo("float32").tiny), temperature),
        rtol=1e-3,
        atol=1e-6,
    )


@settings(deadline=None, max_examples=40)
@given(near_ties(st.floats(0.125, 0.5, width=32)), TEMPERATURES)
def test_the_most_probable_class_stays_for_log_probabilities(drawn, temperature):
    near, down, far = drawn
    logs = np.log(np.where(far, near.min(axis=-1, keepdims=True) * np.maximum(down, 1e-30), near))
    logs = logs - special.logsumexp(logs, axis=-1, keepdims=True)
    after = np.asarray(temper(logs, "multiclass", True, temperature))
    assert after.dtype == logs.dtype
    np.testing.assert_array_equal(after.argmax(axis=-1), logs.argmax(axis=-1))
    expected = special.log_softmax(logs.astype("float64") / temperature, axis=-1)
    np.testing.assert_allclose(after, expected, rtol=1e-3, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(near_ties(st.just(0.5)), TEMPERATURES)
def test_binary_probabilities_stay_on_their_side_of_one_half(drawn, temperature):
    near, down, far = drawn
    probabilities = np.where(far, down, near)
    after = np.asarray(temper(probabilities, "binary", False, temperature))
    np.testing.assert_array_equal(np.sign(after - 0.5), np.sign(probabilities - 0.5))
    clear = np.clip(probabilities, 1e-6, 1 - 1e-6)
    expected = tempered("binary", clear, temperature)
    inside = probabilities == clear
    np.testing.assert_allclose(after[inside], expected[inside], rtol=2e-2, atol=2e-6)
    assert ((after >= 0) & (after <= 1)).all()


@settings(deadline=None, max_examples=40)
@given(
    arrays.arrays(
        "float32",
        (8, 3),
        elements=st.one_of(st.just(0.0), st.floats(2.0**-100, 2.0**100, width=32)),
    ),
    arrays.arrays("bool", (8, 3)),
    TEMPERATURES,
)
def test_the_sign_of_log_odds_stays(sizes, negative, temperature):
    odds = np.where(negative, -sizes, sizes)
    after = np.asarray(temper(odds, "multilabel", True, temperature))
    np.testing.assert_array_equal(np.sign(after), np.sign(odds))
    np.testing.assert_allclose(after, odds / temperature, rtol=1e-6)
