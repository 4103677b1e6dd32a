"""Reports on other tasks, on several outputs, and with custom losses and metrics."""

import math

import keras
import numpy as np
import pytest
from keras import layers, ops
from models import (
    TASKS,
    assert_close,
    dense,
    dense_outputs,
    ensemble_of,
    ensemble_with,
    member_weights,
)
from report_cases import (
    LABELS,
    NAME,
    ROWS,
    assert_curves,
    calibrated_nll,
    calibration_error,
    cells_of,
    linear,
    multiclass_brier,
    normalized,
    through_json,
)
from scipy import special
from sklearn.metrics import (
    brier_score_loss,
    log_loss,
    mean_absolute_error,
    mean_squared_error,
    zero_one_loss,
)

# Other tasks


def test_rows_of_a_regression(diabetes_report):
    y, stack, report = diabetes_report.y, diabetes_report.stack, diabetes_report.report
    predictions = {f"member {i}": stack[i] for i in range(4)}
    predictions |= {"mean": stack.mean(axis=0), "median": np.median(stack, axis=0)}
    assert report.rows.keys() == predictions.keys() | {"last snapshot", "best member"}
    for name, actual in predictions.items():
        row = report.rows[name]
        squared = mean_squared_error(y, actual)
        assert_close(row["loss"], squared)
        assert_close(row["squared_error"], squared)
        assert_close(row["mae"], mean_absolute_error(y, actual))
        assert_close(row[NAME], np.mean(np.abs(y - actual) ** 3))
        own = {"disagreement"} if "member" in name else set()
        assert row.keys() == {"loss", "squared_error", "mae", NAME} | own
    assert "calibration" not in str(report)


def test_disagreement_and_curves_of_a_regression(diabetes_report):
    y, stack, report = diabetes_report.y, diabetes_report.stack, diabetes_report.report
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


def test_any_metric_name_is_shown_unchanged(diabetes_report):
    rows, _ = cells_of(diabetes_report.report._repr_html_())
    assert NAME in rows[0]
    assert NAME in str(diabetes_report.report)
    assert through_json(diabetes_report.report)["rows"] == diabetes_report.report.rows


@pytest.mark.parametrize("task", ["log-odds", "multilabel", "logits"])
def test_rows_of_other_class_outputs(task):
    ens = ensemble_of(dense(*TASKS[task]), 2)
    outputs = np.stack([dense_outputs(weights, ROWS) for weights in member_weights(ens)])
    if task == "logits":
        y, p = LABELS, special.softmax(outputs, axis=-1)
        both, truth = p, y
        brier = multiclass_brier
    else:
        y = np.random.default_rng(1).integers(0, 2, outputs.shape[1:])
        p = special.expit(outputs)
        # Each unit counts as a row with two classes.
        both = np.stack([1 - p, p], axis=-1).reshape(2, -1, 2)
        truth = y.reshape(-1)

        def brier(p, y):
            return brier_score_loss(y, p[:, 1])

    report = ens.report(ROWS, y, verbose=0)
    logs = np.log(both).mean(axis=0)
    actual = {"member 0": both[0], "member 1": both[1], "mean": both.mean(axis=0)}
    actual["geometric"] = normalized(np.exp(logs))
    for name, probabilities in actual.items():
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
        assert_close(
            report.rows["mean"]["nll_calibrated"], calibrated_nll((actual["mean"], truth, 1))
        )


OUTPUTS = {"kind": LABELS, "flag": (ROWS[:, 3:] > 0).astype("int64"), "amount": ROWS[:, :2] ** 2}
SHARES = {"kind": 2.0, "flag": 0.75, "amount": 0.5}


@pytest.fixture(scope="module")
def several():
    """The outputs of an ensemble whose output names differ from its layers', and its report."""
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
    by_member = []
    for weights in member_weights(ens):
        # The kernels differ in their number of units.
        pairs = zip(weights[::2], weights[1::2], strict=True)
        by_units = {len(bias): ROWS @ kernel + bias for kernel, bias in pairs}
        yes = special.expit(by_units[1])
        flag = np.concatenate([1 - yes, yes], axis=1)
        by_member.append({"kind": special.softmax(by_units[3], axis=-1), "flag": flag})
        by_member[-1]["amount"] = by_units[2]
    stacks = {name: np.stack([outputs[name] for outputs in by_member]) for name in OUTPUTS}
    return stacks, ens.report(ROWS, OUTPUTS, verbose=0)


def of(row, output, score):
    """A score of one output, under the name of its key or of its layer."""
    names = {"kind": ("kind", "third"), "flag": ("flag", "first"), "amount": ("amount", "second")}
    columns = [f"{name}_{score}" for name in names[output]]
    (value,) = [row[column] for column in columns if column in row]
    return value


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
    distances = [math.sqrt(mean_squared_error(amounts[2], amounts[i])) for i in (0, 1)]
    assert_close(of(report.rows["member 2"], "amount", "disagreement"), np.mean(distances))


def test_curves_of_several_outputs(several):
    stacks, report = several
    for k in (1, 2, 3):
        mean = {name: stack[-k:].mean(axis=0) for name, stack in stacks.items()}
        actual = {name: errors[k - 1] for name, errors in report.added_from_last.items()}
        losses = losses_by_hand(mean)
        assert_close(of(actual, "amount", "error"), losses["amount"])
        for output in ("kind", "flag"):
            wrong = zero_one_loss(OUTPUTS[output].ravel(), mean[output].argmax(axis=1))
            assert_close(of(actual, output, "error"), wrong)
        assert_close(actual["loss"], sum(SHARES[output] * losses[output] for output in OUTPUTS))


def test_columns_of_several_outputs_have_the_names_that_evaluate_uses(several):
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
    for name, actual in {"member 1": p[1], "mean": p.mean(axis=0)}.items():
        row = report.rows[name]
        assert_close([row["loss"], row["nll"]], log_loss(y, normalized(actual)))
        assert_close(row["accuracy"], np.mean(actual.argmax(axis=1) == y))
        assert_close(row["brier"], multiclass_brier(actual, y))
    assert_close(report.rows["member 0"]["disagreement"], np.mean(p[0].argmax(1) != p[1].argmax(1)))


# Custom losses and metrics


class Total(keras.metrics.Metric):
    """Has a state and cannot be created from its config."""

    def __init__(self, factor):
        super().__init__(name="total")
        self.factor = factor
        self.sum = self.add_weight(name="sum", initializer="zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.sum.assign_add(self.factor * ops.sum(ops.cast(y_pred, "float32")))

    def result(self):
        return self.sum


def test_a_custom_loss_and_custom_metrics():
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
    # The user's model is unchanged.
    assert total.sum.numpy() == state
    for array, before in zip(model.get_weights(), own, strict=True):
        np.testing.assert_array_equal(array, before)


def test_a_compiled_metric_keeps_its_name_and_value():
    model = dense()
    seven = keras.metrics.MeanMetricWrapper(lambda y, p: 7 * ops.ones_like(p[:, 0]), name="brier")
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=[seven])
    report = ensemble_of(model, 1).report(ROWS, LABELS, verbose=0)
    assert report.rows["mean"]["brier"] == 7
