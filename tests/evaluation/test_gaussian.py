"""Models that predict a mean and a log-variance: the loss, the mixture, and what is learned."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conformal_cases import mapie_intervals
from keras import layers, ops
from models import dense, eager, ensemble_of, one_batch
from output_cases import ending_in, meaning
from scipy import optimize, special, stats

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.inference.combining import mean, mixture, temper
from snapshot_ensemble.inference.task_words import Output
from snapshot_ensemble.losses import GaussianNLL
from snapshot_ensemble.training.distilling import GaussianCrossEntropy

RNG = np.random.default_rng(6)
X = RNG.normal(size=(80, 4)).astype("float32")
Y = RNG.normal(size=(80, 2)) * [1, 3]
DATA, PAIRS = one_batch(X), one_batch(X, Y)
RUN = {"verbose": 0}


def normal(output):
    """The distributions that an output describes."""
    center, logs = np.split(np.asarray(output, "float64"), 2, axis=-1)
    return stats.norm(center, np.exp(logs / 2))


def moments(stack, weights=None):
    """The mean and variance of a mixture, from the moments of its parts."""
    center, variance = normal(stack).mean(), normal(stack).var()
    first = np.average(center, axis=0, weights=weights)
    return first, np.average(variance + center**2, axis=0, weights=weights) - first**2


@pytest.fixture(scope="module")
def ens():
    return ensemble_of(eager(dense(GaussianNLL(), 4, None), GaussianNLL()), 3)


@pytest.fixture(scope="module")
def own(ens):
    return ens.predict_members(DATA, **RUN).astype("float64")


@pytest.fixture(autouse=True)
def _nothing_learned(ens):
    ens.temperature, ens.weights = 1.0, None


# The loss


def test_the_loss_is_the_log_likelihood():
    output = RNG.normal(size=(7, 4)).astype("float32")
    values = RNG.normal(size=(7, 2))
    expected = -normal(output).logpdf(values).mean()
    assert float(GaussianNLL()(values, output)) == pytest.approx(expected, rel=1e-5)
    rows = -normal(output).logpdf(values).mean(axis=-1)
    np.testing.assert_allclose(GaussianNLL("none")(values, output), rows, rtol=1e-5)
    one = -normal(output[:, ::2]).logpdf(values[:, :1]).mean()
    assert float(GaussianNLL()(values[:, 0], output[:, ::2])) == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("shapes", [((7, 2), (7, 2)), ((7, 2), (7, 6)), ((7, 3, 2), (7, 4))])
def test_the_output_is_twice_as_long_as_the_targets(shapes):
    with pytest.raises(ValueError, match="must hold a mean and a log-variance for each value of"):
        GaussianNLL()(*map(np.zeros, shapes))


def test_keras_saves_the_loss(tmp_path):
    model = dense(GaussianNLL(), 4, None)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.loss) is GaussianNLL
    assert loaded.evaluate(X, Y, **RUN) == pytest.approx(model.evaluate(X, Y, **RUN), rel=1e-6)


def test_the_task_is_read_off_the_loss():
    for loss in (GaussianNLL(), GaussianNLL):
        assert meaning(layers.Dense(4), loss) == Output("gaussian")
    assert meaning(layers.Dense(4), "mse", "gaussian") == Output("gaussian")
    with pytest.raises(ValueError, match=r"mean and a log-variance for each value\. Received"):
        SnapshotEnsemble(ending_in(layers.Dense(3), "mse"), task="gaussian")


@pytest.mark.parametrize("combine", ["vote", "geometric", "median"])
def test_members_form_a_mixture(combine, ens):
    with pytest.raises(ValueError, match=rf"form a mixture\. Received: combine='{combine}'"):
        ens.predict(DATA, combine=combine, **RUN)


# The mixture


@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.3]])
def test_the_mixture_has_the_moments_of_samples(weights):
    stack = RNG.normal(size=(3, 2, 4))
    first, second = moments(stack, weights)
    actual = normal(mixture(stack, None if weights is None else np.array(weights)))
    np.testing.assert_allclose(actual.mean(), first, rtol=1e-12)
    np.testing.assert_allclose(actual.var(), second, rtol=1e-12)
    part = RNG.choice(3, 10**6, p=weights)
    for row in range(2):
        drawn = normal(stack[part, row]).rvs((10**6, 2), RNG)
        error = drawn.std(axis=0) / 1e3
        assert (np.abs(drawn.mean(axis=0) - first[row]) < 5 * error).all()
        np.testing.assert_allclose(drawn.var(axis=0), second[row], rtol=0.01)


def test_members_that_agree_have_a_gradient():
    stack = tf.Variable(np.zeros((3, 2, 4), "float32"))
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(mixture(stack))
    np.testing.assert_allclose(tape.gradient(total, stack), np.full((3, 2, 4), 1 / 3), rtol=1e-6)


def test_one_member_is_its_own_mixture():
    stack = RNG.normal(size=(1, 5, 4))
    np.testing.assert_allclose(mean(stack, "gaussian", False), stack[0], atol=1e-12)


def test_a_temperature_multiplies_the_variance():
    output = RNG.normal(size=(5, 4))
    after = normal(temper(output, "gaussian", False, 2.5))
    np.testing.assert_allclose(after.mean(), normal(output).mean())
    np.testing.assert_allclose(after.var(), 2.5 * normal(output).var())


# Of an ensemble


@pytest.mark.parametrize("memory_limit", [2**28, 0])
def test_predictions_and_uncertainty(memory_limit, ens, own):
    ens.memory_limit, ens.weights, ens.temperature = memory_limit, [0.2, 0.5, 0.3], 1.5
    for combine, weights in (("mean", None), ("weighted", ens.weights)):
        first, second = moments(own, weights)
        actual = normal(ens.predict(X, combine=combine, **RUN))
        np.testing.assert_allclose(actual.mean(), first, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(actual.var(), 1.5 * second, rtol=1e-4)
    found = ens.predict_uncertainty(X, **RUN)
    first, second = moments(own)
    assert list(found) == ["mean", "total", "aleatoric", "epistemic"]
    center, variance = normal(own).mean(), normal(own).var()
    expected = [first, second**0.5, variance.mean(axis=0) ** 0.5, center.std(axis=0)]
    for part, wanted in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(part, wanted, rtol=1e-4, atol=1e-5)
    ens.memory_limit = 2**28


def test_the_compiled_loss_and_the_report(ens, own):
    first, second = moments(own)
    logs = stats.norm(first, np.sqrt(second)).logpdf(Y)
    assert ens.evaluate(PAIRS, **RUN) == pytest.approx(-logs.mean(), rel=1e-4)
    report = ens.report(PAIRS, **RUN)
    assert list(report.rows)[-1] == "mean"
    row = report.rows["mean"]
    assert list(row) == ["loss", "nll", "nll_calibrated", "squared_error"]
    assert row["nll"] == pytest.approx(-logs.mean(), rel=1e-4)
    assert row["squared_error"] == pytest.approx(np.square(first - Y).mean(), rel=1e-4)
    standardized = np.square(Y - first) / second
    calibrated = 0
    for one, other in ((0, 1), (1, 0)):
        t = variance_factor(standardized[one::2])
        part = stats.norm(first, np.sqrt(t * second)).logpdf(Y)[other::2]
        calibrated -= part.mean() / 2
    assert row["nll_calibrated"] == pytest.approx(calibrated, rel=1e-4)
    errors = [np.square(moments(own[-k:])[0] - Y).mean() for k in (1, 2, 3)]
    np.testing.assert_allclose(report.added_from_last["error"], errors, rtol=1e-4)
    losses = []
    for k in (1, 2, 3):
        center, variance = moments(own[:k])
        losses.append(-stats.norm(center, np.sqrt(variance)).logpdf(Y).mean())
    np.testing.assert_allclose(report.added_from_first["loss"], losses, rtol=1e-4)
    assert 1 <= ens.choose_members(X, Y, **RUN) <= 3
    ens.members = None


def variance_factor(squares):
    """The mean squared standardized error; the prior counts as eight of them that are 1."""
    return (np.sum(squares) + 8) / (np.size(squares) + 8)


def test_the_temperature_is_the_mean_squared_standardized_error(ens, own):
    first, second = moments(own)
    expected = variance_factor(np.square(Y - first) / second)
    assert ens.calibrate(PAIRS, **RUN) == pytest.approx(expected, rel=1e-4)
    assert ens.temperature == pytest.approx(expected, rel=1e-4)


def test_the_temperature_is_shared_with_classes():
    inputs = keras.Input((4,))
    outputs = [layers.Dense(3, "softmax")(inputs), layers.Dense(2)(inputs)]
    losses = ["sparse_categorical_crossentropy", GaussianNLL()]
    ens = ensemble_of(eager(keras.Model(inputs, outputs), losses, loss_weights=[1.0, 0.5]), 2)
    kind = RNG.integers(0, 3, 80)
    p, amount = ens.predict(X, **RUN)
    logs = np.log(p.astype("float64"))

    def loss(t):
        own = special.log_softmax(logs / t, axis=-1)[np.arange(80), kind].mean()
        scale = np.sqrt(t) * normal(amount).std()
        fit = -own - 0.5 * stats.norm(normal(amount).mean(), scale).logpdf(Y[:, :1]).mean()
        count = 1.5**2 / (1 / 80 + 0.5**2 / 80)
        return fit + 1.5 * 4 / count * (1 / t + np.log(t))

    best = optimize.minimize_scalar(loss, bounds=(0.05, 20), method="bounded").x
    assert ens.calibrate(X, [kind, Y[:, :1]], **RUN) == pytest.approx(best, rel=1e-3)


def test_the_weights_maximise_the_density_of_the_mixture(ens, own):
    weights = ens.fit_weights(PAIRS, **RUN)
    density = np.stack([normal(member).pdf(Y).reshape(-1) for member in own], axis=-1)
    best = optimize.minimize(
        lambda w: -np.log(density @ w).mean(),
        np.full(3, 1 / 3),
        bounds=[(1e-9, 1)] * 3,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
    )
    assert -np.log(density @ weights).mean() <= best.fun + 1e-6


def test_one_file_and_early_exit(ens, own, tmp_path):
    first, second = moments(own)
    expected = np.concatenate([first, np.log(second)], axis=-1)
    merged = ens.to_keras()
    np.testing.assert_allclose(merged.predict(DATA, **RUN), expected, rtol=1e-4, atol=1e-4)
    ens.export(tmp_path / "served")
    served = tf.saved_model.load(tmp_path / "served").signatures["serving_default"]
    np.testing.assert_allclose(served(features=X)["answer"], expected, rtol=1e-4, atol=1e-4)
    ens.save(tmp_path / "saved")
    loaded = SnapshotEnsemble.load(tmp_path / "saved")
    np.testing.assert_allclose(loaded.predict(X, **RUN), expected, rtol=1e-4, atol=1e-4)
    cost = ens.fit_early_exit(X, Y, tolerance=3.0, **RUN)
    p, counts = ens.predict(X, early_exit=True, return_counts=True, **RUN)
    assert 1 <= cost < 3
    all_run = counts == 3
    np.testing.assert_allclose(p[all_run], expected[all_run], rtol=1e-4, atol=1e-4)


def test_intervals_are_scaled_by_the_predicted_deviation(ens, own):
    first, second = moments(own)
    ens.conformalize(one_batch(X[:60], Y[:60]), confidence_level=[0.8, 0.9], **RUN)
    lower, upper = ens.predict_interval(one_batch(X[60:]), **RUN)
    assert lower.shape == (20, 2, 2)
    for unit in range(2):
        center, std = first[:, unit], np.sqrt(second[:, unit])
        expected = mapie_intervals(
            center[:60], Y[:60, unit], center[60:], [0.8, 0.9], std[:60], std[60:]
        )
        np.testing.assert_allclose(lower[:, unit], expected[:, 0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(upper[:, unit], expected[:, 1], rtol=1e-4, atol=1e-4)


def test_each_pixel_has_a_distribution():
    images, y = RNG.normal(size=(6, 3, 2, 2)).astype("float32"), RNG.normal(size=(6, 3, 2, 1))
    model = keras.Sequential([keras.Input((3, 2, 2)), layers.Conv2D(2, 1)])
    ens = ensemble_of(eager(model, GaussianNLL()), 2)
    first, second = moments(ens.predict_members(one_batch(images), **RUN))
    loss = -stats.norm(first, np.sqrt(second)).logpdf(y).mean()
    report = ens.report(one_batch(images, y), **RUN)
    assert report.rows["mean"]["nll"] == pytest.approx(loss, rel=1e-4)
    found = ens.predict_uncertainty(one_batch(images), **RUN)
    np.testing.assert_allclose(found["total"], np.sqrt(second), rtol=1e-4)


def test_a_student_learns_distributions():
    teacher, student = RNG.normal(size=(2, 5, 4)).astype("float32")
    actual = float(GaussianCrossEntropy()(teacher, student))
    drawn = normal(teacher).rvs((20000, 5, 2), RNG)
    assert actual == pytest.approx(-normal(student).logpdf(drawn).mean(), rel=0.02)
    closest = [float(GaussianCrossEntropy()(teacher, teacher + shift)) for shift in (0, 0.1, -0.1)]
    assert closest[0] == min(closest)
    ens = ensemble_of(dense(GaussianNLL(), 4, None), 2, cycles=2)
    small = ens.distill(X, epochs=1, **RUN)
    assert small.output_shape == (None, 4)


# Values without a distribution


def spread_nll(params, variances, squares):
    total = params[0] ** 2 * variances + np.asarray(params[1:]) ** 2
    return (np.log(total) + squares / total).sum() / 2


def test_the_spread_minimises_the_likelihood(tmp_path):
    ens = ensemble_of(eager(dense("mse", 2, None), "mse"), 4)
    own = ens.predict_members(DATA, **RUN).astype("float64")
    std, center = own.std(axis=0), own.mean(axis=0)
    y = center + np.sqrt((2 * std) ** 2 + np.square([0.1, 5.0])) * RNG.normal(size=(80, 2))
    scale = ens.calibrate(one_batch(X, y), **RUN)
    found = ens.predict_uncertainty(DATA, **RUN)
    assert list(found) == ["mean", "std", "total", "aleatoric", "epistemic"]
    np.testing.assert_allclose(found["std"], std, rtol=1e-4)
    np.testing.assert_allclose(found["epistemic"], scale * std, rtol=1e-4)
    floors = found["aleatoric"][0].astype("float64")
    np.testing.assert_allclose(found["aleatoric"], np.tile(floors, (80, 1)))
    np.testing.assert_allclose(found["total"] ** 2, (scale * std) ** 2 + floors**2, rtol=1e-4)
    learned = spread_nll([scale, *floors], std**2, np.square(y - center))
    for start in ([1, 1, 1], [3, 0.1, 5], [0.1, 1, 8]):
        best = optimize.minimize(
            spread_nll, start, args=(std**2, np.square(y - center)), method="Nelder-Mead"
        )
        assert learned <= best.fun + 1e-3
    ens.save(tmp_path / "saved")
    loaded = SnapshotEnsemble.load(tmp_path / "saved")
    np.testing.assert_allclose(
        loaded.predict_uncertainty(X, **RUN)["total"], found["total"], rtol=1e-4
    )
    ens.conformalize(one_batch(X, y), **RUN)
    lower, upper = ens.predict_interval(DATA, **RUN)
    np.testing.assert_allclose(
        (upper - lower) / found["total"],
        np.tile(((upper - lower) / found["total"])[:1], (80, 1)),
        rtol=1e-3,
    )
    ens.calibrate(one_batch(X[:40], y[:40]), **RUN)
    with pytest.raises(ValueError, match="needs quantiles, and none are learned"):
        ens.predict_interval(DATA, **RUN)


def test_one_member_has_a_floor_alone():
    ens = ensemble_of(eager(dense("mse", 2, None), "mse"), 1)
    errors = Y - ens.predict(DATA, **RUN)
    assert ens.calibrate(PAIRS, **RUN) == 1.0
    found = ens.predict_uncertainty(DATA, **RUN)
    np.testing.assert_allclose(found["total"][0], np.sqrt((errors**2).mean(axis=0)), rtol=1e-4)
    assert (found["epistemic"] == 0).all()


def test_total_needs_what_calibrate_learns():
    ens = ensemble_of(eager(dense("mse", 2, None), "mse"), 2)
    with pytest.raises(ValueError, match=r"is not known\. Received: method='total'\. Call `cali"):
        ens.conformalize(PAIRS, method="total", **RUN)


def test_a_regressor_of_scikit_learn_predicts_values():
    from snapshot_ensemble.sklearn import SnapshotEnsembleRegressor

    regressor = SnapshotEnsembleRegressor(dense(GaussianNLL(), 4, None), epochs=1, cycles=1)
    with pytest.raises(ValueError, match="predicts values, and this model predicts a mean and a"):
        regressor.fit(X, Y)


def test_a_loss_of_ones_own_with_the_word():
    def loss(y, output):
        return ops.mean(GaussianNLL("none")(y, output))

    ens = ensemble_of(eager(dense(loss, 4, None), loss), 2, task="gaussian")
    assert list(ens.predict_uncertainty(DATA, **RUN)) == ["mean", "total", "aleatoric", "epistemic"]
