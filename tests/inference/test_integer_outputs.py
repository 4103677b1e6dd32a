"""Ids, labels and strings: passed through untouched if equal in all members, else refused.

A model that hands an id through to its output returned 16777216 for 16777217, since a mean is
computed in floats.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from models import ensemble_of, ensemble_with, member_weights

IDS = 2**24 + 1 + np.arange(7)
NAMES = tf.constant([f"row {i}" for i in range(7)])
ROWS = np.random.default_rng(0).normal(size=(7, 4)).astype("float32")
LABELS = np.arange(7) % 3
DATA = {"id": IDS, "name": NAMES, "x": ROWS}


def handing_through():
    inputs = {
        "id": keras.Input((), dtype="int64", name="id"),
        "name": keras.Input((), dtype="string", name="name"),
        "x": keras.Input((4,), name="x"),
    }
    outputs = {
        "id": inputs["id"],
        "name": inputs["name"],
        "even": ops.equal(inputs["id"] % 2, 0),
        "kind": layers.Dense(3, "softmax", name="kind")(inputs["x"]),
    }
    model = keras.Model(inputs, outputs)
    model.compile("sgd", {"kind": "sparse_categorical_crossentropy"})
    return model


@pytest.fixture(scope="module")
def ens():
    return ensemble_of(handing_through(), 3)


def assert_untouched(outputs, rows=7):
    assert outputs["id"].dtype == "int64"
    np.testing.assert_array_equal(outputs["id"], IDS[:rows])
    np.testing.assert_array_equal(np.asarray(outputs["even"]), IDS[:rows] % 2 == 0)
    assert [name.decode() for name in np.asarray(outputs["name"])] == [
        f"row {i}" for i in range(rows)
    ]


@pytest.mark.parametrize("combine", ["mean", "vote", "geometric"])
@pytest.mark.parametrize("memory_limit", [2**28, 0])
def test_predictions_pass_them_through(ens, combine, memory_limit):
    ens.memory_limit = memory_limit
    assert_untouched(ens.predict(DATA, combine=combine, verbose=0))


def test_a_call_on_a_batch_passes_them_through(ens):
    assert_untouched(ens({name: tf.convert_to_tensor(v)[:2] for name, v in DATA.items()}), 2)


def test_each_member_gives_its_own(ens):
    own = ens.predict_members(DATA, verbose=0)
    for member in range(3):
        assert_untouched({name: output[member] for name, output in own.items()})


def test_uncertainty_has_no_more_than_the_value_of_them(ens):
    uncertainty = ens.predict_uncertainty(DATA, verbose=0)
    assert_untouched({name: of["mean"] for name, of in uncertainty.items()})
    assert list(uncertainty["id"]) == ["mean"]
    assert "epistemic" in uncertainty["kind"]


@pytest.mark.slow
def test_scores_are_those_of_the_other_outputs(ens):
    y = {"kind": LABELS}
    mean = ens.predict(DATA, verbose=0)["kind"]
    loss = -np.log(mean[np.arange(7), LABELS]).mean()
    assert ens.evaluate(DATA, y, verbose=0) == pytest.approx(loss, rel=1e-5)
    report = ens.report(DATA, y, verbose=0)
    assert report.rows["mean"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert report.rows["mean"]["nll"] == pytest.approx(loss, rel=1e-5)
    assert ens.fit_weights(DATA, y, verbose=0).shape == (3,)


def test_a_merged_model_passes_them_through(ens):
    assert_untouched(ens.to_keras().predict(DATA, verbose=0))


class Labels(keras.Model):
    def predict_step(self, data):
        return ops.argmax(super().predict_step(data), axis=-1)


def labelling(members=2):
    inputs = keras.Input((4,))
    model = Labels(inputs, layers.Dense(3, "softmax", name="label")(inputs))
    model.compile("sgd", "sparse_categorical_crossentropy")
    return ensemble_of(model, members)


REFUSAL = "Output 'label' differs between members. Received: an output that is passed through"


@pytest.mark.slow
def test_labels_that_differ_are_refused_by_name():
    ens = labelling()
    for call in (
        lambda: ens.predict(ROWS, verbose=0),
        lambda: ens(ROWS),
        lambda: ens.predict_uncertainty(ROWS, verbose=0),
    ):
        with pytest.raises(ValueError, match=REFUSAL):
            call()
    with pytest.raises(tf.errors.InvalidArgumentError, match="differs between members"):
        tf.function(ens)(tf.constant(ROWS))
    ens.memory_limit = 0
    with pytest.raises(ValueError, match=REFUSAL):
        ens.predict(ROWS, verbose=0)
    own = ens.predict_members(ROWS, verbose=0)
    np.testing.assert_array_equal(own, [member.predict(ROWS, verbose=0) for member in ens])


def test_labels_that_are_equal_are_passed_through():
    ens = labelling(1)
    same = ensemble_with(ens.model, *member_weights(ens) * 3)
    expected = ens[0].predict(ROWS, verbose=0)
    np.testing.assert_array_equal(same.predict(ROWS, verbose=0), expected, strict=True)


def two_headed(scored):
    """The labels of a softmax beside its probabilities; their metric needs them in `evaluate`."""
    inputs = keras.Input((4,))
    kind = layers.Dense(3, "softmax", name="kind")(inputs)
    model = keras.Model(inputs, {"kind": kind, "label": ops.argmax(kind, axis=-1)})
    metrics = {"label": [keras.metrics.Accuracy()]} if scored else None
    model.compile("sgd", {"kind": "sparse_categorical_crossentropy", "label": None}, metrics)
    return ensemble_of(model, 2)


def test_evaluating_and_merging_labels_that_differ_is_refused():
    ens, y = two_headed(scored=False), {"kind": LABELS, "label": LABELS}
    refusal = "Output 'label' differs between members"
    with pytest.raises(ValueError, match=refusal):
        ens.evaluate(ROWS, y, verbose=0)
    with pytest.raises(ValueError, match=refusal):
        ens.report(ROWS, y, verbose=0)
    with pytest.raises(ValueError, match=refusal):
        ens.to_keras()
