"""`choose_members`: which members predict by default."""

import numpy as np
import pytest
import tensorflow as tf
from models import Batches, dense, ensemble_with

from snapshot_ensemble import SnapshotEnsemble

RNG = np.random.default_rng(0)
X = RNG.normal(size=(200, 4)).astype("float32")
LOGITS = X @ RNG.normal(size=(4, 3)) * 2
Y = np.asarray([RNG.choice(3, p=np.exp(row) / np.exp(row).sum()) for row in LOGITS])
VALUES = (X[:, :1] * [1, -1]).astype("float32")


def ensemble_around(noise, model=None):
    """Members near one trained model; `noise` is each one's distance, oldest first."""
    model = dense() if model is None else model
    target = VALUES if model.output_shape[-1] == 2 else Y
    model.fit(X, target, epochs=30, verbose=0)
    rng = np.random.default_rng(1)
    members = [
        [w + rng.normal(0, size, w.shape).astype(w.dtype) for w in model.get_weights()]
        for size in noise
    ]
    return ensemble_with(model, *members)


def by_hand(losses):
    """The reference rule, from each row's losses for the last 1, 2, … members."""
    best = int(np.argmin(losses.mean(axis=1)))
    counts = []
    for k, row in enumerate(losses):
        difference = row - losses[best]
        error = np.std(difference, ddof=1) / np.sqrt(len(difference))
        if k == best or difference.mean() <= error:
            counts.append(k + 1)
    return max(counts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "noise", [(2, 1, 0.1, 0.1), (0.1, 0.1, 0.1, 0.1), (3, 2, 1, 0), (0, 1, 2, 3), (0.6, 0.4, 0.3)]
)
def test_it_chooses_the_most_members_within_a_standard_error_of_the_best(noise):
    ens = ensemble_around(noise)
    members = ens.predict_members(X, verbose=0).astype("float64")
    means = [members[-k:].mean(axis=0) for k in range(1, len(noise) + 1)]
    expected = by_hand(np.stack([-np.log(mean[np.arange(200), Y]) for mean in means]))
    assert ens.choose_members(X, Y, verbose=0) == expected
    assert ens.members == (None if expected == len(noise) else expected)
    np.testing.assert_allclose(ens.predict(X, verbose=0), means[expected - 1], atol=1e-6)


@pytest.mark.slow
def test_poor_early_members_are_left_out_and_identical_ones_are_kept():
    assert ensemble_around((3, 3, 0, 0)).choose_members(X, Y, verbose=0) == 2
    assert ensemble_around((0, 0, 0, 0)).choose_members(X, Y, verbose=0) == 4


@pytest.mark.slow
def test_regression_is_judged_by_the_squared_error():
    ens = ensemble_around((3, 0.2, 0.1), dense("mse", 2, None))
    members = ens.predict_members(X, verbose=0).astype("float64")
    means = [members[-k:].mean(axis=0) for k in (1, 2, 3)]
    expected = by_hand(np.stack([((mean - VALUES) ** 2).mean(axis=1) for mean in means]))
    assert ens.choose_members(X, VALUES, verbose=0) == expected < 3


@pytest.mark.slow
def test_methods_that_use_the_chosen_members_and_those_that_do_not():
    ens = ensemble_around((3, 0.1, 0.1))
    everyone = ens.predict_members(X, verbose=0)
    ens.members = 2
    chosen = everyone[-2:].mean(axis=0)
    np.testing.assert_allclose(ens.predict(X, verbose=0), chosen, atol=1e-6)
    np.testing.assert_allclose(ens(X[:5]), chosen[:5], atol=1e-6)
    np.testing.assert_allclose(ens.to_keras().predict(X, verbose=0), chosen, atol=1e-6)
    uncertain = ens.predict_uncertainty(X, verbose=0)["mean"]
    np.testing.assert_allclose(uncertain, chosen, atol=1e-6)
    assert ens.evaluate(X, Y, verbose=0) == pytest.approx(
        -np.mean(np.log(chosen[np.arange(200), Y])), rel=1e-4
    )
    # Explicit `members` take precedence, and `predict_members` returns all members.
    np.testing.assert_allclose(ens.predict(X, members=3, verbose=0), everyone.mean(0), atol=1e-6)
    assert len(ens.predict_members(X, verbose=0)) == 3
    ens.weights = [0.5, 0.25, 0.25]
    by_weight = np.tensordot(ens.weights, everyone, 1)
    np.testing.assert_allclose(ens.predict(X, combine="weighted", verbose=0), by_weight, atol=1e-6)
    message = "By default, predictions combine the last 2 members."
    assert message in ens.report(X, Y, verbose=0).notes
    ens.members = None
    np.testing.assert_allclose(ens.predict(X, verbose=0), everyone.mean(0), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("members", [2, [0, 2], None])
def test_it_is_saved_and_reset_when_the_members_change(members, tmp_path):
    ens = ensemble_around((1, 0.1, 0.1))
    ens.members = members
    ens.save(tmp_path / "run")
    again = SnapshotEnsemble.load(tmp_path / "run")
    assert again.members == members
    np.testing.assert_array_equal(ens.predict(X, verbose=0), again.predict(X, verbose=0))
    again.fit(X, Y, epochs=5, verbose=0)
    assert again.members is None
    assert len(again) == 4


@pytest.mark.slow
def test_all_remaining_members_predict_if_one_is_damaged(tmp_path):
    ens = ensemble_around((1, 0.1, 0.1))
    ens.members = 3
    ens.save(tmp_path / "run")
    sorted((tmp_path / "run").glob("*.weights.h5"))[0].write_bytes(b"")
    with pytest.warns(UserWarning, match="Loaded without damaged snapshots"):
        again = SnapshotEnsemble.load(tmp_path / "run", skip_damaged=True)
    assert len(again) == 2
    assert again.members is None


def as_dataset(x, y):
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(32)


KINDS = {
    "arrays": lambda: {"validation_data": (X, Y)},
    "with weights": lambda: {"validation_data": (X, Y, np.ones(200))},
    "a dataset": lambda: {"validation_data": as_dataset(X, Y)},
    "an endless dataset": lambda: {
        "validation_data": as_dataset(X, Y).repeat(),
        "validation_steps": 7,
    },
    "a PyDataset": lambda: {"validation_data": Batches(X, Y, size=40)},
    "a split": lambda: {"validation_split": 0.5},
}


@pytest.mark.sampled(3, 2)
@pytest.mark.parametrize("kind", KINDS)
def test_fit_chooses_by_its_validation_data(kind, monkeypatch):
    counts = []
    choose = SnapshotEnsemble.choose_members

    def counting(self, *args, **kwargs):
        counts.append(choose(self, *args, **kwargs))
        return counts[-1]

    monkeypatch.setattr(SnapshotEnsemble, "choose_members", counting)
    # The rate is so low that each member is far better than the previous one.
    ens = SnapshotEnsemble(dense(), cycles=4, lr_init=0.02)
    ens.fit(X, Y, epochs=4, batch_size=10, verbose=0, **KINDS[kind]())
    rows = slice(100, None) if kind == "a split" else slice(None)
    (count,) = counts
    assert ens.members == count < 4
    assert count == choose(ens, X[rows], Y[rows], verbose=0)


def test_fit_keeps_all_members_without_usable_validation_data(monkeypatch):
    ens = SnapshotEnsemble(dense(), cycles=3, lr_init=0.02)
    ens.fit(X, Y, epochs=3, verbose=0)
    assert ens.members is None

    def fails(self, *args, **kwargs):
        raise ValueError

    monkeypatch.setattr(SnapshotEnsemble, "choose_members", fails)
    with pytest.warns(UserWarning, match="could not be chosen by the validation data: ValueError"):
        ens.fit(X, Y, epochs=3, verbose=0, validation_data=(X, Y))
    assert ens.members is None
    assert len(ens) == 6


@pytest.mark.slow
def test_invalid_choices_are_refused():
    ens = ensemble_around((1, 1))
    with pytest.raises(ValueError, match=r"at most 2"):
        ens.members = 3
    with pytest.raises(ValueError, match="no targets to compare with"):
        ens.choose_members(X, verbose=0)
    assert ens.members is None
