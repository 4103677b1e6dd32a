"""Conformal prediction of every task and structure; what is refused, saved and forgotten."""

import functools

import keras
import numpy as np
import pytest
from held_out_cases import AMOUNTS, LABELS, ROWS, YES, two_headed
from keras import layers
from models import TASKS, dense, eager, ensemble_of, one_batch
from scipy import special
from storage_cases import manifest_of, write_manifest

from snapshot_ensemble import SnapshotEnsemble, SnapshotError
from snapshot_ensemble.storage.manifest import describe, read_record
from snapshot_ensemble.storage.record import Conformal, ConformalRule, Learned, Record

RNG = np.random.default_rng(3)
X = RNG.normal(size=(60, 4)).astype("float32")
KIND = RNG.integers(0, 3, 60)
RUN = {"verbose": 0}


def targets(task):
    units = TASKS[task][1]
    if task in ("softmax", "logits"):
        return KIND
    return RNG.normal(size=(60, units)) if task == "regression" else RNG.integers(0, 2, (60, units))


def ensemble(task, count=3, **arguments):
    loss, units, activation = TASKS[task]
    return ensemble_of(eager(dense(loss, units, activation), loss), count, **arguments)


def probabilities(ens, task, data):
    """Of all classes, no and yes for labels, in float64."""
    p = ens.predict(data, **RUN).astype("float64")
    if task in ("softmax", "logits"):
        return special.softmax(p, axis=-1) if task == "logits" else p
    yes = special.expit(p) if task == "log-odds" else p
    return np.stack([1 - yes, yes], axis=-1)


def rank(scores, level=0.8):
    """The score of the rank that the paper gives, of each column."""
    return np.sort(scores, axis=0)[int(np.ceil(level * (len(scores) + 1) - 1e-9)) - 1]


@pytest.mark.parametrize("task", [task for task in TASKS if task != "regression"])
def test_sets_of_classes(task):
    ens, y, data = ensemble(task), targets(task), one_batch(X)
    ens.conformalize(one_batch(X, y), confidence_level=0.8, **RUN)
    p = probabilities(ens, task, data)
    true = np.take_along_axis(p, y[..., None], axis=-1)[..., 0]
    q = rank(1 - true)
    expected = 1 - p <= (q if p.ndim == 2 else q[:, None]) + 1e-6
    if task in ("sigmoid", "log-odds"):
        expected = expected[:, 0]
    actual = ens.predict_set(data, **RUN)
    assert actual.dtype == bool
    np.testing.assert_array_equal(actual, expected)
    with pytest.raises(ValueError, match=r"`predict_interval` is for values, and the model has"):
        ens.predict_interval(data, **RUN)


def test_intervals_of_values_have_a_width_for_each_unit():
    ens, y, data = ensemble("regression"), targets("regression") * [1, 100], one_batch(X)
    ens.conformalize(one_batch(X, y), confidence_level=0.8, **RUN)
    mean = ens.predict(data, **RUN)
    q = rank(np.abs(y - mean))
    lower, upper = ens.predict_interval(data, **RUN)
    np.testing.assert_allclose(lower, mean - q, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(upper, mean + q, rtol=1e-5, atol=1e-5)
    assert q[1] > 20 * q[0]
    with pytest.raises(ValueError, match=r"`predict_set` is for classes.*Use `predict_interval`"):
        ens.predict_set(data, **RUN)


def test_a_combination_of_some_members_and_several_levels_in_batches():
    ens = ensemble_of(dense(), 3)
    ens.weights, ens.temperature = [0.5, 0.1, 0.4], 2.0
    levels = [0.9, 0.5]
    ens.conformalize(
        X, KIND, confidence_level=levels, method="aps", combine="weighted", members=[0, 2], **RUN
    )
    sets = ens.predict_set(X, batch_size=7, **RUN)
    assert sets.shape == (60, 3, 2)
    covered = sets[np.arange(60), KIND].mean(axis=0)
    assert covered[0] >= 0.9
    assert covered[1] >= 0.5
    assert (sets[..., 0] >= sets[..., 1]).all()
    p = ens.predict(X, combine="weighted", members=[0, 2], **RUN)
    most = p.argmax(axis=-1)
    assert sets[np.arange(60), most].all()  # Sets of APS hold the most probable class.


@pytest.mark.parametrize("structure", [list, dict])
def test_several_outputs_have_a_set_and_an_interval(structure):
    ens = ensemble_of(two_headed(structure), 3)
    y = {"kind": LABELS, "amount": AMOUNTS}
    y = y if structure is dict else [LABELS, AMOUNTS]
    method = {"kind": "raps", "amount": None}
    methods = {"kind": "aps", "amount": "epistemic"}
    if structure is list:
        method, methods = ["raps", None], ["aps", "epistemic"]
    ens.conformalize(ROWS, y, confidence_level=0.6, method=method, **RUN)
    ens.conformalize(ROWS, y, confidence_level=0.6, method=methods, **RUN)
    sets, (lower, upper) = ens.predict_set(ROWS, **RUN), ens.predict_interval(ROWS, **RUN)
    kind, amount = ("kind", "amount") if structure is dict else (0, 1)
    assert sets[kind].shape == (11, 3)
    assert sets[amount] is lower[kind] is upper[kind] is None
    assert sets[kind][np.arange(11), LABELS].mean() >= 0.6
    assert ((lower[amount] <= AMOUNTS) & (upper[amount] >= AMOUNTS)).mean(axis=0).min() >= 0.6
    report = ens.report(ROWS, y, **RUN)
    assert set(report.coverage) == {"kind 0.6", "amount 0.6"}


def test_each_pixel_has_a_set_and_ignored_ones_do_not_count():
    images, kinds = RNG.normal(size=(12, 5, 4, 2)), RNG.integers(0, 3, (12, 5, 4))
    kinds[RNG.random(kinds.shape) < 0.3] = -1
    model = keras.Sequential([keras.Input((5, 4, 2)), layers.Conv2D(3, 1)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    ens = ensemble_of(eager(model, loss), 3)
    ens.conformalize(one_batch(images, kinds), confidence_level=0.75, **RUN)
    sets = ens.predict_set(one_batch(images), **RUN)
    assert sets.shape == (12, 5, 4, 3)
    covered = np.take_along_axis(sets, np.maximum(kinds, 0)[..., None], axis=-1)[..., 0]
    shares = [row[kind >= 0].mean() for row, kind in zip(covered, kinds, strict=True)]
    assert 0.75 * 13 / 12 <= np.mean(shares) < 0.9
    row = ens.report(one_batch(images, kinds), **RUN).coverage["0.75"]
    assert row["coverage"] == pytest.approx(np.mean(shares))
    sizes = sets.sum(axis=-1)
    expected = [size[kind >= 0].mean() for size, kind in zip(sizes, kinds, strict=True)]
    assert row["size"] == pytest.approx(np.mean(expected))


def test_each_pixel_and_channel_has_an_interval():
    images = RNG.normal(size=(12, 5, 4, 2)).astype("float32")
    y = RNG.normal(size=(12, 5, 4, 2)) * [1, 10]
    ens = ensemble_of(eager(keras.Sequential([keras.Input((5, 4, 2)), layers.Conv2D(2, 1)]), "mse"))
    ens.conformalize(one_batch(images, y), confidence_level=0.5, method="epistemic", **RUN)
    lower, upper = ens.predict_interval(one_batch(images), **RUN)
    covered = ((lower <= y) & (y <= upper)).mean(axis=(0, 1, 2))
    np.testing.assert_allclose(covered, 0.5 * 13 / 12, atol=0.01)


def test_the_report_measures_coverage_and_size():
    ens = ensemble("softmax")
    assert ens.report(one_batch(X, KIND), **RUN).coverage == {}
    ens.conformalize(one_batch(X[:30], KIND[:30]), confidence_level=[0.6, 0.9], **RUN)
    report = ens.report(one_batch(X[30:], KIND[30:]), **RUN)
    sets = ens.predict_set(one_batch(X[30:]), **RUN)
    for k, name in enumerate(("0.6", "0.9")):
        row = report.coverage[name]
        assert row["coverage"] == pytest.approx(sets[np.arange(30), KIND[30:], k].mean())
        assert row["size"] == pytest.approx(sets[..., k].sum(axis=-1).mean())
        assert row["low"] < row["coverage"] < row["high"]
        assert f"Sets and intervals at {name}: {row['coverage']:.1%} of the targets" in str(report)
    assert report.to_dict()["coverage"] == report.coverage


def test_it_is_saved_and_loaded(tmp_path):
    ens = ensemble("regression")
    ens.weights = [0.2, 0.3, 0.5]
    ens.conformalize(one_batch(X, targets("regression")), method="epistemic", **RUN)
    before = ens.predict_interval(one_batch(X), **RUN)
    ens.save(tmp_path / "saved")
    loaded = SnapshotEnsemble.load(tmp_path / "saved")
    np.testing.assert_allclose(loaded.predict_interval(X, **RUN), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", ["weights", "temperature", "fit"])
def test_it_is_forgotten_when_predictions_change(change):
    ens = ensemble("softmax", cycles=1)
    ens.conformalize(one_batch(X, KIND), **RUN)
    ens.members, ens.temperature = 2, 1.0  # It has members of its own, and this is no change.
    ens.predict_set(one_batch(X), **RUN)
    if change == "fit":
        ens.fit(X, KIND, epochs=1, **RUN)
    else:
        setattr(ens, change, [0.2, 0.3, 0.5] if change == "weights" else 2.0)
    with pytest.raises(ValueError, match="`predict_set` needs quantiles, and none are learned"):
        ens.predict_set(one_batch(X), **RUN)


@pytest.mark.parametrize(
    "forged",
    [
        {"confidence_level": 1.5},
        {"confidence_level": []},
        {"members": [0, 7]},
        {"members": [1, 1]},
        {"rules": [{"method": "lac", "quantiles": []}]},
        {"rules": [{"method": "lac", "quantiles": [[]]}]},
        {"rules": [{"method": "lac", "quantiles": [["inf"]]}]},
        {"rules": [{"method": "raps", "quantiles": [[0.5]], "penalties": [1, 2], "free": [1]}]},
        {"rules": [{"method": "sums", "quantiles": [[0.5]]}]},
        {"combine": 3},
    ],
    ids=str,
)
def test_a_forged_rule_is_refused(forged):
    rule = ConformalRule("lac", [[0.5]])
    ensemble = describe(Record(learned=Learned(conformal=Conformal(0.9, "mean", [0, 2], [rule]))))
    read_record(ensemble).learned.check_for(3)
    ensemble["conformal"].update(forged)
    with pytest.raises(ValueError, match="conformal|combine"):
        read_record(ensemble).learned.check_for(3)


def test_a_forged_spread_is_refused(tmp_path):
    ens = ensemble("regression")
    ens.calibrate(one_batch(X, targets("regression")), **RUN)
    ens.save(tmp_path / "saved")
    manifest = manifest_of(tmp_path / "saved")
    manifest["ensemble"]["spreads"][0]["floors"][0] = -1.0
    write_manifest(tmp_path / "saved", manifest)
    with pytest.raises(SnapshotError, match="`spreads` must be at least 0"):
        SnapshotEnsemble.load(tmp_path / "saved")


# Refusals


@functools.cache
def conformalized(task, count):
    """An ensemble, and its sets or intervals."""
    ens = ensemble(task, count)
    ens.conformalize(one_batch(X, targets(task)), confidence_level=0.5, **RUN)
    predict = ens.predict_interval if task == "regression" else ens.predict_set
    return ens, predict(one_batch(X), **RUN)


def check_refused(
    message, task="softmax", y=None, error=ValueError, count=3, weights=(), **arguments
):
    ens, before = conformalized(task, count)
    predict = ens.predict_interval if task == "regression" else ens.predict_set
    data = [X, targets(task) if y is None else y, *weights]
    with pytest.raises(error) as caught:
        ens.conformalize(one_batch(*data), **arguments, **RUN)
    assert message in str(caught.value)
    np.testing.assert_array_equal(predict(one_batch(X), **RUN), before)


@pytest.mark.parametrize("level", [0.0, 1.0, 1.5, [], [0.5, 0.5], [0.9, 1]])
def test_levels_are_between_0_and_1(level):
    error = f"Received: confidence_level={0.0 if level == 0 else level!r}"
    check_refused(error, confidence_level=level)


def test_a_level_is_a_number():
    check_refused("`confidence_level` must be a number", error=TypeError, confidence_level="90%")


def test_methods_fit_the_task():
    check_refused("`method` must be one of ('lac', 'aps', 'raps') for classes", method="LAC")
    check_refused("is multiclass, for which `method` can be one of ('lac',", method="absolute")
    check_refused("Output 'answer' is regression, for which", "regression", method="lac")
    check_refused("`method` must be one name, or one for each", method=["lac", "aps"])
    check_refused("does not disagree with itself", "regression", method="epistemic", count=1)


@pytest.mark.parametrize(("method", "least"), [("lac", 99), ("raps", 124)])
def test_too_few_rows_for_a_level(method, least):
    message = f"A confidence level of 0.99 needs at least {least} rows. Received: 60 rows"
    check_refused(message, method=method, confidence_level=[0.5, 0.99])


def test_weights_and_shares_of_classes_are_refused():
    check_refused("has no sample weights: all rows must come from", weights=[np.ones(60)])
    check_refused(
        "each target must be one class. Received: `y` of output 'answer'",
        "multilabel",
        y=np.full((60, 3), 0.5),
    )


def test_members_are_needed():
    ens = SnapshotEnsemble(dense())
    for call in (ens.predict_set, ens.predict_interval):
        with pytest.raises(ValueError, match="The ensemble has no members yet"):
            call(X, **RUN)


def test_labels_of_a_multilabel_output_have_a_quantile_each():
    ens = ensemble("multilabel")
    y = np.resize(YES, (60, 3))
    ens.conformalize(one_batch(X, y), confidence_level=0.7, method="aps", **RUN)
    sets = ens.predict_set(one_batch(X), **RUN)
    assert sets.shape == (60, 3, 2)
    assert (np.take_along_axis(sets, y[..., None], -1)[..., 0].mean(axis=0) >= 0.7).all()
