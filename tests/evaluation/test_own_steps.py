"""`evaluate` and `report` of models with steps or losses of their own: right, or said so.

A model's own loss terms were dropped without a word: 6.05 against 1.23.
"""

import keras
import numpy as np
import pytest
from keras import layers, ops
from models import assert_close, ensemble_of

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(9, 4)).astype("float32")
VALUES = RNG.normal(size=(9, 2)).astype("float32")


class OwnTestStep(keras.Model):
    def test_step(self, data):
        return {"loss": ops.convert_to_tensor(7.0)}


class OwnLoss(keras.Model):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return 5 + super().compute_loss(x, y, y_pred, sample_weight)


class OwnMetrics(keras.Model):
    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return {**super().compute_metrics(x, y, y_pred, sample_weight), "own": 1.0}


class AddsLoss(layers.Layer):
    def call(self, inputs):
        self.add_loss(ops.mean(ops.square(inputs)))
        return inputs


class Endpoint(layers.Layer):
    """Computes the loss of its first input, from targets that are an input."""

    def call(self, inputs):
        values, targets = inputs
        self.add_loss(ops.mean(ops.square(values - targets)))
        return values


def model_of(kind=keras.Model, *, behind=None, loss="mse", **dense):
    inputs = keras.Input((4,))
    outputs = layers.Dense(2, **dense)(inputs)
    model = kind(inputs, outputs if behind is None else behind(outputs))
    model.compile("sgd", loss, metrics=["mae"])
    return model


KINDS = {
    "its own `test_step`": lambda: model_of(OwnTestStep),
    "its own `compute_loss`": lambda: model_of(OwnLoss),
    "its own `compute_metrics`": lambda: model_of(OwnMetrics),
    "the losses that its layers add (`add_loss`, activity regularizers)": lambda: model_of(
        behind=AddsLoss()
    ),
    "the penalties on its weights (regularizers)": lambda: model_of(kernel_regularizer="l2"),
    "the losses that its layers add (`add_loss`": lambda: model_of(activity_regularizer="l2"),
}


@pytest.mark.sampled(3, 2)
@pytest.mark.parametrize("left_out", KINDS)
def test_the_scores_are_the_compiled_ones_and_say_what_they_leave_out(left_out):
    ens = ensemble_of(KINDS[left_out](), 2, task="regression")
    error = np.mean([m.predict(ROWS, verbose=0) for m in ens], axis=0) - VALUES
    expected = [np.square(error).mean(), np.abs(error).mean()]
    for _ in range(2):  # The second time, no graph is traced.
        with pytest.warns(UserWarning, match="leave out") as caught:
            assert_close(ens.evaluate(ROWS, VALUES, verbose=0), expected)
        [warning] = caught
        assert left_out in str(warning.message)
        assert "Use `ens[k].evaluate` for a member's scores with them." in str(warning.message)
        assert warning.filename == __file__
    report = ens.report(ROWS, VALUES, verbose=0)
    assert_close([report.rows["mean"][name] for name in ("loss", "mae")], expected)
    assert left_out in report.notes[-1]


def test_a_plain_model_leaves_nothing_out():
    ens = ensemble_of(model_of(), 2)
    assert_close(
        ens.evaluate(ROWS, VALUES, members=[0], verbose=0), ens[0].evaluate(ROWS, VALUES, verbose=0)
    )
    assert "leave out" not in ens.report(ROWS, VALUES, verbose=0).notes[-1]


def endpoint():
    values, targets = keras.Input((4,)), keras.Input((2,))
    model = keras.Model([values, targets], Endpoint()([layers.Dense(2)(values), targets]))
    model.compile("sgd", loss=None)
    return ensemble_of(model, 2, task="regression")


def test_a_model_without_a_compiled_loss_cannot_be_evaluated():
    ens, data = endpoint(), [ROWS, VALUES]
    with pytest.raises(ValueError) as caught:
        ens.evaluate(data, VALUES, verbose=0)
    assert str(caught.value) == (
        "The combined outputs cannot be evaluated, since the model was compiled without a loss. "
        f"Received: model='{ens.model.name}' of class Functional. Use `ens[k].evaluate` for a "
        "member, or compute your scores from `ens.predict`."
    )
    error = np.mean([m.predict(data, verbose=0) for m in ens], axis=0) - VALUES
    report = ens.report(data, VALUES, verbose=0)
    assert "loss" not in report.rows["mean"]
    assert_close(report.rows["mean"]["squared_error"], np.square(error).mean())
    assert "no columns for the compiled loss and metrics, since the model was" in report.notes[-1]


def test_an_evaluate_of_its_own_is_pointed_to():
    class Own(keras.Model):
        def evaluate(self, x, y, **arguments):
            return super().evaluate(x * 2, y, **arguments)

    ens = ensemble_of(model_of(Own), 2)
    with pytest.raises(ValueError, match=r"its own `evaluate`.*Use `ens\[k\].evaluate`"):
        ens.evaluate(ROWS, VALUES, verbose=0)
    report = ens.report(ROWS, VALUES, verbose=0)
    assert "loss" not in report.rows["mean"]
    assert "since the model has its own `evaluate`" in report.notes[-1]


def test_a_predict_step_that_changes_what_is_scored_is_pointed_to():
    class Doubled(keras.Model):
        def predict_step(self, data):
            return 2 * super().predict_step(data)

    class Prepared(keras.Model):
        def predict_step(self, data):
            return self(2 * keras.utils.unpack_x_y_sample_weight(data)[0])

    class Plain(keras.Model):
        def predict_step(self, data):
            return super().predict_step(data)

    for kind in (Doubled, Prepared):
        ens = ensemble_of(model_of(kind), 2, task="regression")
        with pytest.raises(ValueError, match="own `predict_step` is not what its loss"):
            ens.evaluate(ROWS, VALUES, verbose=0)
    ens = ensemble_of(model_of(Plain), 2)
    expected = ens[0].evaluate(ROWS, VALUES, verbose=0)
    assert_close(ens.evaluate(ROWS, VALUES, members=[0], verbose=0), expected)


def test_metrics_with_a_value_for_each_class_are_shown():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(3, "softmax")(inputs))
    model.compile("sgd", "categorical_crossentropy", metrics=[keras.metrics.F1Score()])
    ens = ensemble_of(model, 2)
    y = np.eye(3, dtype="float32")[np.arange(9) % 3]
    report = ens.report(ROWS, y, verbose=0)
    expected = np.asarray(ens.evaluate(ROWS, y, return_dict=True, verbose=0)["f1_score"])
    assert expected.shape == (3,)
    assert_close(report.rows["mean"]["f1_score"], expected)
    assert " ".join(f"{value:.4f}" for value in expected) in str(report)
    assert_close(report.to_dict()["rows"]["mean"]["f1_score"], expected.tolist())
