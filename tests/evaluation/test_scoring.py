"""The scores in a report are those of `evaluate`, for losses and metrics of every kind."""

import keras
import numpy as np
import pytest
from held_out_cases import two_headed
from keras import layers, ops
from models import dense, ensemble_of

from snapshot_ensemble.evaluation.scoring import Scorer

RNG = np.random.default_rng(0)
# Three batches of 32, the last of which is not full.
X = RNG.normal(size=(75, 4)).astype("float32")
Y = RNG.integers(0, 3, 75)
WEIGHTS = RNG.uniform(0.1, 2, 75)


def worst(y, p):
    """Depends on which rows are in a batch together."""
    return ops.max(ops.abs(ops.cast(y, p.dtype) - p))


class Batches(keras.metrics.Metric):
    """Counts batches, and has a state that its config does not describe."""

    def __init__(self, offset):
        super().__init__(name="batches")
        self.offset = offset
        self.count = self.add_weight(name="count", initializer="zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.count.assign_add(1.0)

    def result(self):
        return {"batches": self.count + self.offset, "twice": 2 * self.count}


def metrics():
    return {
        "sparse": ["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2)],
        "one-hot": [keras.metrics.AUC(), keras.metrics.F1Score("macro"), "mse"],
    }


CASES = {
    "stock": ("sparse_categorical_crossentropy", metrics()["sparse"], Y),
    "one-hot": ("categorical_crossentropy", metrics()["one-hot"], np.eye(3)[Y]),
    "a sum": (keras.losses.SparseCategoricalCrossentropy(reduction="sum"), ["accuracy"], Y),
    "an ignored class": (keras.losses.SparseCategoricalCrossentropy(ignore_class=1), [], Y),
    "a custom metric": ("categorical_crossentropy", [worst, Batches(0.5)], np.eye(3)[Y]),
    "a custom loss": (worst, ["mae"], np.eye(3)[Y].astype("float64")),
}


@pytest.mark.slow
@pytest.mark.sampled(1, 3)
@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_evaluate(name, weights, eagerly):
    loss, scores, y = CASES[name]
    model = dense()
    weighted = ["accuracy"] if y is Y else ["mse"]
    model.compile("sgd", loss, metrics=scores, weighted_metrics=weighted, run_eagerly=eagerly)
    ens = ensemble_of(model, 2, task="multiclass")
    report = ens.report(X, y, sample_weight=weights, verbose=0)
    rows = {"member 1": {"members": [1]}, "mean": {}, "vote": {"combine": "vote"}}
    for row, arguments in rows.items():
        expected = ens.evaluate(
            X, y, sample_weight=weights, batch_size=32, return_dict=True, verbose=0, **arguments
        )
        actual = {key: report.rows[row][key] for key in expected}
        assert actual == pytest.approx(expected, rel=1e-5)


def test_a_metric_over_batches_depends_on_the_batch_size_as_in_evaluate():
    model = dense()
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=[Batches(0.0)])
    ens = ensemble_of(model, 1)
    for size, count in ((None, 3), (10, 8), (100, 1)):
        row = ens.report(X, Y, batch_size=size, verbose=0).rows["mean"]
        assert (row["batches"], row["twice"]) == (count, 2 * count)


@pytest.mark.sampled(2, 2)
@pytest.mark.parametrize("size", [None, 20])
@pytest.mark.parametrize("structure", [list, dict])
def test_scores_of_several_outputs_are_those_of_evaluate(structure, size):
    model = two_headed(structure, loss_weights={"kind": 2.0, "amount": 0.5}, metrics=None)
    if structure is list:
        model.compile("sgd", ["sparse_categorical_crossentropy", "mse"], loss_weights=[2.0, 0.5])
    ens = ensemble_of(model, 2)
    by_name = {"kind": Y, "amount": RNG.normal(size=(75, 2))}
    y = by_name if structure is dict else list(by_name.values())
    report = ens.report(X, y, batch_size=size, verbose=0)
    expected = ens.evaluate(X, y, batch_size=size or 32, return_dict=True, verbose=0)
    actual = {key: report.rows["mean"][key] for key in expected}
    assert actual == pytest.approx(expected, rel=1e-5)


def test_masked_steps_are_scored_in_the_batches_of_evaluate():
    tokens = RNG.integers(0, 7, (75, 5))
    tags = RNG.integers(0, 2, tokens.shape)
    inputs = keras.Input((5,), dtype="int32")
    hidden = layers.Embedding(7, 4, mask_zero=True)(inputs)
    model = keras.Model(inputs, layers.Dense(2, "softmax")(hidden))
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    ens = ensemble_of(model, 2)
    row = ens.report(tokens, tags, verbose=0).rows["mean"]
    expected = ens.evaluate(tokens, tags, batch_size=32, return_dict=True, verbose=0)
    assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_the_graph_is_traced_once_for_all_predictions(monkeypatch):
    steps = []
    step = Scorer.test_step
    monkeypatch.setattr(Scorer, "test_step", lambda self, data: steps.append(1) or step(self, data))
    model = dense()
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    ensemble_of(model, 12).report(X, Y, verbose=0)
    # One to create the metrics, and TensorFlow may trace a loop's body twice.
    assert len(steps) <= 3


@pytest.mark.parametrize("loss", ["categorical_crossentropy", worst])
def test_the_default_batch_size_of_evaluate_does_not_change_its_result(loss):
    x = RNG.normal(size=(1000, 4)).astype("float32")
    y = np.eye(3)[RNG.integers(0, 3, 1000)]
    model = dense()
    model.compile("sgd", loss, metrics=["mse"])
    ens = ensemble_of(model, 2, task="multiclass")
    expected = ens.evaluate(x, y, batch_size=32, verbose=0)
    assert ens.evaluate(x, y, verbose=0) == pytest.approx(expected, rel=1e-5)
