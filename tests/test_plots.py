"""The data and labels of each plot, from real training."""

import matplotlib as mpl

mpl.use("agg")

import keras
import numpy as np
import pytest
from benchmarks.builders import random_ensemble
from matplotlib import pyplot as plt
from models import member_weights, scaled_digits

from snapshot_ensemble import CosineAnnealing, SnapshotEnsemble, plots

EPOCHS, CYCLES = 6, 3


@pytest.fixture(scope="module")
def trained():
    keras.utils.set_random_seed(0)
    x, y = scaled_digits()
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(8, "relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(10, "softmax"),
        ]
    )
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    ens = SnapshotEnsemble(model, cycles=CYCLES, lr_init=0.5)
    ens.fit(
        x[:400],
        y[:400],
        epochs=EPOCHS,
        validation_data=(x[400:500], y[400:500]),
        verbose=0,
        validation_freq=2,
    )
    return ens, x[500:700], y[500:700]


@pytest.fixture(scope="module")
def report(trained):
    ens, x, y = trained
    return ens.report(x, y, verbose=0)


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def line(ax, label):
    (curve,) = [one for one in ax.lines if one.get_label() == label]
    return np.asarray(curve.get_xdata()), np.asarray(curve.get_ydata())


def check_shown(ax, x, y):
    """The figure can be drawn, and its axes have both labels."""
    assert x in ax.get_xlabel()
    assert y in ax.get_ylabel()
    ax.figure.canvas.draw()


def test_plots_go_into_the_given_axes_or_into_a_new_figure(trained):
    ens, _, _ = trained
    _, ax = plt.subplots()
    assert plots.plot_history(ens, ax=ax) is ax
    assert plots.plot_history(ens).figure is not ax.figure


@pytest.mark.parametrize("kind", ["schedule", "plan", "ensemble"])
def test_schedule_shows_the_rate_of_each_step(trained, kind):
    schedule = CosineAnnealing(2, 2.0, lr_init=0.1, lr_min=0.01, warmup=1)
    what, epochs = {
        "schedule": (schedule, 6),
        "plan": (schedule.plan(6), None),
        "ensemble": (trained[0], 6),
    }[kind]
    ax = plots.plot_schedule(what, epochs, steps_per_epoch=10)
    lines = [one for one in ax.lines if len(one.get_xdata()) > 2]
    if kind == "ensemble":
        schedule = CosineAnnealing(2, lr_init=0.5)
    drawn = np.concatenate([one.get_ydata() for one in lines])
    np.testing.assert_allclose(drawn, schedule.rates(6, 10))
    np.testing.assert_allclose(np.concatenate([o.get_xdata() for o in lines]), np.arange(60) / 10)
    check_shown(ax, "epoch", "learning rate")


def test_history_shows_metrics_rates_and_restarts(trained):
    ens, _, _ = trained
    ax = plots.plot_history(ens, "accuracy")
    epochs, values = line(ax, "accuracy")
    np.testing.assert_array_equal(epochs, np.arange(1, EPOCHS + 1))
    np.testing.assert_array_equal(values, ens.history["accuracy"])
    epochs, values = line(ax, "val_accuracy")  # Validated every other epoch.
    np.testing.assert_array_equal(epochs, [2, 4, 6])
    np.testing.assert_array_equal(values, ens.history["val_accuracy"][1::2])
    restarts = [one.get_xdata()[0] for one in ax.lines if one.get_linestyle() == ":"]
    assert restarts == [2.5, 4.5]
    (rate,) = [other for other in ax.figure.axes if other is not ax]
    np.testing.assert_array_equal(rate.lines[0].get_ydata(), ens.history["learning_rate"])
    assert "learning rate" in rate.get_ylabel()
    check_shown(ax, "epoch", "accuracy")
    with pytest.raises(ValueError, match=r"`metric` must be one of \[.*Received: metric='auc'"):
        plots.plot_history(ens, "auc")


def test_members_shows_the_error_as_members_are_added(report):
    ax = plots.plot_members(report)
    for where in ("last", "first"):
        counts, errors = line(ax, f"from the {where}")
        np.testing.assert_array_equal(counts, np.arange(1, CYCLES + 1))
        np.testing.assert_array_equal(errors, getattr(report, f"added_from_{where}")["error"])
    worth, _ = line(ax, f"enough members: {report.worth}")
    assert set(worth) == {report.worth}
    check_shown(ax, "number of members", "error")
    ax = plots.plot_members(report, "loss")
    for where in ("last", "first"):
        _, losses = line(ax, f"from the {where}")
        np.testing.assert_array_equal(losses, getattr(report, f"added_from_{where}")["loss"])
    check_shown(ax, "number of members", "loss")
    with pytest.raises(ValueError, match=r"'error' or 'loss'\. Received: metric='accuracy'"):
        plots.plot_members(report, "accuracy")


def test_diversity_shows_the_disagreement_of_each_pair(trained, report):
    ens, x, _ = trained
    ax = plots.plot_diversity(report)
    labels = ens.predict_members(x, verbose=0).argmax(-1)
    expected = [[np.mean(one != other) for other in labels] for one in labels]
    np.testing.assert_allclose(ax.images[0].get_array(), expected)
    assert len(ax.texts) == CYCLES**2
    check_shown(ax, "member", "member")
    with pytest.raises(ValueError, match=r"`output` must be one of \[.*Received: output='other'"):
        plots.plot_diversity(report, "other")


def in_bins(probabilities, y, bins):
    order = np.argsort(probabilities.max(-1), kind="stable")
    confidence = probabilities.max(-1)[order]
    right = (probabilities.argmax(-1) == y)[order]
    parts = np.array_split(np.arange(len(order)), bins)
    return [confidence[p].mean() for p in parts], [right[p].mean() for p in parts]


def test_reliability_without_and_with_a_temperature(trained):
    ens, x, y = trained
    ax = plots.plot_reliability(ens, x, y, bins=10)
    (label,) = [one.get_label() for one in ax.lines if "as predicted" in one.get_label()]
    before = ens.predict(x, verbose=0)
    np.testing.assert_allclose(line(ax, label), in_bins(before, y, 10), atol=1e-5)
    ens.temperature = 2.0
    try:
        ax = plots.plot_reliability(ens, x, y, bins=10)
        after = ens.predict(x, verbose=0)
    finally:
        ens.temperature = 1.0
    labels = [one.get_label() for one in ax.lines]
    assert [label.split(" (")[0] for label in labels] == [
        "uncalibrated",
        "T = 2",
        "perfect calibration",
    ]
    np.testing.assert_allclose(line(ax, labels[0]), in_bins(before, y, 10), atol=1e-5)
    np.testing.assert_allclose(line(ax, labels[1]), in_bins(after, y, 10), atol=1e-5)
    check_shown(ax, "confidence", "accuracy")


def test_uncertainty_shows_the_error_when_the_least_certain_are_set_aside(trained):
    ens, x, y = trained
    ax = plots.plot_uncertainty(ens, x, y)
    wrong = ens.predict(x, verbose=0).argmax(-1) != y
    actual = ens.predict_uncertainty(x, verbose=0)
    for name in ("total", "aleatoric", "epistemic"):
        aside, errors = line(ax, f"by {name}")
        kept = wrong[np.argsort(actual[name], kind="stable")]
        np.testing.assert_allclose(errors, np.cumsum(kept) / np.arange(1, len(y) + 1), atol=0.02)
        np.testing.assert_allclose(aside, 1 - np.arange(1, len(y) + 1) / len(y), atol=1e-9)
        assert errors[-1] == pytest.approx(wrong.mean())
    check_shown(ax, "set aside", "error rate")


@pytest.mark.slow
def test_landscape_shows_the_loss_between_snapshots(trained):
    ens, x, y = trained
    ax = plots.plot_landscape(ens, x, y, points=2)
    (curve,) = [one for one in ax.lines if one.get_marker() == "None"]
    np.testing.assert_allclose(curve.get_xdata(), [0, 0.5, 1, 1.5, 2])
    members = member_weights(ens)
    model = ens[0]
    for position, loss in zip(*curve.get_data(), strict=True):
        first = min(int(position), CYCLES - 2)
        share = position - first
        pairs = zip(members[first], members[first + 1], strict=True)
        model.set_weights([a + share * (b - a) for a, b in pairs])
        assert loss == pytest.approx(model.evaluate(x, y, verbose=0)[0], rel=1e-4)
    np.testing.assert_allclose(line(ax, "snapshot")[0], [0, 1, 2])
    check_shown(ax, "member", "loss")


@pytest.mark.slow
def test_early_exit_shows_the_cost_and_the_loss():
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    ens, (x, y) = random_ensemble(model, 3), scaled_digits()
    with pytest.raises(ValueError, match="needs thresholds"):
        plots.plot_early_exit(ens, x, y)
    ens.fit_early_exit(x[:300], y[:300], verbose=0)
    x, y = x[300:600], y[300:600]
    ax = plots.plot_early_exit(ens, x, y)

    def loss(p):
        return -np.log(p[np.arange(len(y)), y]).mean()

    p, ran = ens.predict(x, early_exit=True, return_counts=True, verbose=0)
    learned = np.ravel(line(ax, "learned thresholds"))
    np.testing.assert_allclose(learned, [ran.mean(), loss(p)], rtol=1e-4)
    counts, means = line(ax, "as many members for all rows")
    np.testing.assert_array_equal(counts, [1, 2, 3])
    assert means[-1] == pytest.approx(loss(ens.predict(x, verbose=0)), rel=1e-4)
    costs, losses = line(ax, "one threshold for all stages")
    assert (costs[0], costs[-1]) == (3, 1)
    assert (np.diff(costs) <= 0).all()
    np.testing.assert_allclose([losses[0], losses[-1]], [means[-1], means[0]])
    check_shown(ax, "members run per row", "negative log-likelihood")


def test_trajectory_shows_the_principal_components_of_the_weights(trained):
    from sklearn.decomposition import PCA

    ens, _, _ = trained
    ax = plots.plot_trajectory(ens)
    rows = [np.concatenate([v.numpy().ravel() for v in m.trainable_weights]) for m in ens]
    pca = PCA(2).fit(np.stack(rows))
    expected = pca.transform(np.stack(rows))
    drawn = ax.lines[0].get_xydata()
    np.testing.assert_allclose(np.abs(drawn), np.abs(expected), rtol=1e-3, atol=1e-4)
    assert [text.get_text() for text in ax.texts] == ["0", "1", "2"]
    check_shown(ax, f"{pca.explained_variance_ratio_[0]:.0%}", "principal component 2")


def regression(members):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)
    ens = SnapshotEnsemble(model, cycles=members, lr_init=0.1)
    x = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
    y = x.sum(axis=1)
    ens.fit(x, y, epochs=members, verbose=0)
    return ens, x, y


def test_plots_of_a_regression():
    ens, x, y = regression(2)
    squares = (ens.predict(x, verbose=0)[:, 0] - y) ** 2
    _, errors = line(plots.plot_uncertainty(ens, x, y), "by std")
    assert errors[-1] == pytest.approx(squares.mean(), rel=1e-4)
    check_shown(plots.plot_members(ens.report(x, y, verbose=0)), "members", "error")
    ens.fit_early_exit(x, y, verbose=0)
    ax = plots.plot_early_exit(ens, x, y)
    assert line(ax, "one threshold for all stages")[1][0] == pytest.approx(squares.mean(), rel=1e-4)
    check_shown(ax, "members run per row", "loss")
    with pytest.raises(ValueError, match=r"needs a classifier\. Received: a model whose first"):
        plots.plot_reliability(ens, x, y)


def test_too_few_members_are_refused():
    ens, x, y = regression(1)
    with pytest.raises(ValueError, match=r"at least two members\. Received: 1 member"):
        plots.plot_landscape(ens, x, y)
    with pytest.raises(ValueError, match=r"at least three members\. Received: 1 member"):
        plots.plot_trajectory(ens)
