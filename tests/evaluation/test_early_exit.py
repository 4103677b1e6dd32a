"""What `fit_early_exit` learns: order, temperatures and thresholds, within the tolerance."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from benchmarks.builders import random_ensemble
from keras import layers, ops
from models import pool_of
from scipy.optimize import minimize_scalar
from storage_cases import manifest_of, write_manifest

from snapshot_ensemble import SnapshotEnsemble, SnapshotError

RNG = np.random.default_rng(2)
X = RNG.normal(size=(500, 6)).astype("float32")


def classifier(count=4):
    model = keras.Sequential(
        [keras.Input((6,)), layers.Dense(8, "relu"), layers.Dense(3, "softmax")]
    )
    model.compile("sgd", "sparse_categorical_crossentropy")
    return random_ensemble(model, count, scale=0.6)


@pytest.fixture(scope="module")
def data():
    """Labels that are drawn from what the ensemble predicts, so that its members have learned."""
    p = classifier().predict(X, verbose=0).astype("float64")
    drawn = (p.cumsum(axis=1) < RNG.random((len(p), 1))).sum(axis=1)
    return X, np.minimum(drawn, 2)


def losses(p, y):
    """Each row's negative log-likelihood and error."""
    rows = np.arange(len(y))
    return np.stack([-np.log(p[rows, y]), p.argmax(-1) != y]).astype("float64")


@pytest.mark.slow
@pytest.mark.parametrize("tolerance", [0.0, 0.5, 1.0, 3.0])
def test_loss_and_error_are_within_the_tolerance(data, tolerance):
    x, y = data
    ens = classifier()
    ens.temperature = 0.9
    cost = ens.fit_early_exit(x, y, tolerance=tolerance, verbose=0)
    p, counts = ens.predict(x, early_exit=True, return_counts=True, verbose=0)
    assert cost == pytest.approx(counts.mean(), abs=0.01)
    differences = losses(p, y) - losses(ens.predict(x, verbose=0), y)
    errors = differences.std(axis=1, ddof=1) / np.sqrt(len(y))
    assert (differences.mean(axis=1) <= tolerance * errors + 1e-6).all()


def test_a_higher_tolerance_costs_less(data):
    ens = classifier()
    costs = [ens.fit_early_exit(*data, tolerance=t, verbose=0) for t in (0.0, 2.0, 100.0)]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 1.5
    assert costs[-1] == 1.0


def best_temperature(p, y):
    def loss(temperature):
        tempered = p ** (1 / temperature)
        return -np.log((tempered / tempered.sum(-1, keepdims=True))[np.arange(len(y)), y]).mean()

    def penalised(temperature):
        return loss(temperature) + 4 / len(y) * (1 / temperature + np.log(temperature))

    options = {"xatol": 1e-8}
    found = minimize_scalar(penalised, bounds=(0.05, 20), method="bounded", options=options)
    return found.x, loss(found.x)


def test_the_order_lowers_the_tempered_loss_the_most_at_each_stage(data):
    x, y = data
    ens = classifier()
    ens.fit_early_exit(x, y, verbose=0)
    learned = pool_of(ens).learned.early_exit
    members = ens.predict_members(x, verbose=0).astype("float64")
    order = []
    for temperature in learned.temperatures:
        left = [i for i in range(4) if i not in order]
        found = {i: best_temperature(members[[*order, i]].mean(0), y) for i in left}
        order.append(min(left, key=lambda i: found[i][1]))
        assert temperature == pytest.approx(found[order[-1]][0], rel=1e-3)
    assert learned.order[:3] == order


@pytest.mark.slow
def test_regression_needs_two_members_at_least():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(8, "relu"), layers.Dense(1)])
    model.compile("sgd", "mse")
    ens = random_ensemble(model, 5, scale=0.6)
    y = ens.predict(X, verbose=0) + RNG.normal(0, 0.5, (500, 1))
    ens.fit_early_exit(X, y, verbose=0)
    p, counts = ens.predict(X, early_exit=True, return_counts=True, verbose=0)
    assert 2 <= counts.min() < counts.mean() < 5
    differences = np.square(p - y)[:, 0] - np.square(ens.predict(X, verbose=0) - y)[:, 0]
    assert differences.mean() <= differences.std(ddof=1) / np.sqrt(500) + 1e-6


@pytest.mark.slow
def test_it_is_a_row_of_the_report(data):
    x, y = data
    ens = classifier()
    assert "early exit" not in ens.report(x, y, verbose=0).rows
    cost = ens.fit_early_exit(x, y, verbose=0)
    row = ens.report(x, y, verbose=0).rows["early exit"]
    p = ens.predict(x, early_exit=True, verbose=0)
    assert row["members_run"] == pytest.approx(cost, abs=0.01)
    assert row["nll"] == pytest.approx(losses(p, y)[0].mean(), rel=1e-4)
    assert row["brier"] == pytest.approx(np.square(p - np.eye(3)[y]).sum(1).mean(), rel=1e-4)


def test_a_single_member(data):
    ens = classifier(1)
    assert ens.fit_early_exit(*data, verbose=0) == 1.0
    np.testing.assert_allclose(
        ens.predict(X, early_exit=True, verbose=0), ens.predict(X, verbose=0), rtol=1e-6
    )


def test_it_is_saved_and_forgotten_when_the_members_change(data, tmp_path):
    ens = classifier()
    ens.members = 3
    ens.fit_early_exit(*data, verbose=0)
    learned = pool_of(ens).learned.early_exit
    assert set(learned.order) == {1, 2, 3}
    ens.save(tmp_path / "saved")
    again = SnapshotEnsemble.load(tmp_path / "saved")
    assert pool_of(again).learned.early_exit == learned
    again.calibrate(*data, verbose=0)  # The stages keep their own temperatures.
    assert pool_of(again).learned.early_exit == learned
    again.members = 2
    with pytest.raises(ValueError, match="none learned for these members"):
        again.predict(X, early_exit=True)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "changes",
    [
        {"order": [0, 1, 4]},
        {"order": [0, 0, 1]},
        {"order": []},
        {"thresholds": [0.5]},
        {"temperatures": [1.0, 0.0]},
        {"scales": [0.0]},
        {"scales": [-1.0, 2.0]},
    ],
)
def test_a_forged_manifest_is_refused(data, tmp_path, changes):
    ens = classifier(3)
    ens.fit_early_exit(*data, verbose=0)
    ens.save(tmp_path / "saved")
    manifest = manifest_of(tmp_path / "saved")
    manifest["ensemble"]["early_exit"].update(changes)
    write_manifest(tmp_path / "saved", manifest)
    with pytest.raises(SnapshotError, match="`early_exit` is not valid for 3 members"):
        SnapshotEnsemble.load(tmp_path / "saved")


class Centred(layers.Layer):
    def call(self, inputs):
        return inputs - ops.mean(inputs, axis=0, keepdims=True)


REFUSED = {
    "mean": (Centred, {"shape": (6,)}, "a row alone and the same row in a batch"),
    "stateful": (
        lambda: layers.GRU(4, stateful=True),
        {"batch_shape": (10, 3, 2)},
        "a stateful layer",
    ),
    "one size": (
        lambda: layers.Lambda(lambda t: ops.reshape(t, (10, 6))),
        {"batch_shape": (10, 6)},
        "a batch must have one size",
    ),
}


@pytest.mark.parametrize("data", ["arrays", "dataset"])
@pytest.mark.parametrize("kind", REFUSED)
def test_rows_that_depend_on_each_other_are_refused(kind, data):
    inside, shape, why = REFUSED[kind]
    model = keras.Sequential([keras.Input(**shape), inside(), layers.Dense(3, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    ens = random_ensemble(model, 2, scale=0.6)
    x, y, arguments = X.reshape(500, *model.input_shape[1:]), np.zeros(500), {"batch_size": 10}
    if data == "dataset":
        x, y, arguments = tf.data.Dataset.from_tensor_slices((x, y)).batch(10), None, {}
    message = f"rows that do not depend on each other.*Received: model=.*{why}"
    with pytest.raises(ValueError, match=message):
        ens.fit_early_exit(x, y, verbose=0, **arguments)


def two_inputs():
    inputs = [keras.Input((6,)), keras.Input((6,))]
    return keras.Model(inputs, layers.Dense(3, "softmax")(layers.Add()(inputs)))


def drawing():
    inputs = keras.Input((6,))
    hidden = layers.Dropout(0.5)(inputs, training=True)
    return keras.Model(inputs, layers.Dense(3, "softmax")(hidden))


def in_bfloat16():
    dense = [layers.Dense(64, "relu", dtype="mixed_bfloat16") for _ in range(3)]
    return keras.Sequential([keras.Input((6,)), *dense, layers.Dense(3, "softmax")])


@pytest.mark.parametrize("make", [two_inputs, drawing, in_bfloat16])
def test_rows_that_do_not_depend_on_each_other(make, data):
    model = make()
    model.compile("sgd", "sparse_categorical_crossentropy")
    ens = random_ensemble(model, 2, scale=0.3)
    x = [X, X] if make is two_inputs else X
    assert 1 <= ens.fit_early_exit(x, data[1], verbose=0) <= 2


def test_rounding_moves_no_row(data):
    """Thresholds are amid the doubts of the data, not at one of them."""
    ens = classifier()
    for rows, tolerance in ((500, 1.0), (200, 1.0), (200, 100.0)):
        ens.fit_early_exit(X[:rows], data[1][:rows], tolerance=tolerance, verbose=0)
        learned = pool_of(ens).learned.early_exit
        members = ens.predict_members(X[:rows], verbose=0).astype("float64")
        for k, threshold in enumerate(learned.thresholds):
            p = members[learned.order[: k + 1]].mean(0) ** (1 / learned.temperatures[k])
            doubt = 1 - (p / p.sum(-1, keepdims=True)).max(-1)
            gaps = np.diff(np.sort(doubt))
            assert np.abs(doubt - threshold).min() > 0.4 * gaps.min()


def test_arguments_and_data_that_are_refused(data):
    x, y = data
    ens = classifier()
    with pytest.raises(
        ValueError, match=r"`tolerance` must be .* at least 0\. Received: tolerance=-1"
    ):
        ens.fit_early_exit(x, y, tolerance=-1)
    with pytest.raises(ValueError, match="Too few rows to learn from. Received: 1 row"):
        ens.fit_early_exit(x[:1], y[:1], verbose=0)
    with pytest.raises(ValueError, match="no members yet"):
        SnapshotEnsemble(ens.model).fit_early_exit(x, y)
    assert pool_of(ens).learned.early_exit is None
