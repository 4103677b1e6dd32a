"""Which members predict where nobody says."""

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
    """Members around one trained net; `noise`: how far from it each is, oldest first."""
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
    """The rule written out, of each row's losses for the last 1, 2, … members."""
    best = int(np.argmin(losses.mean(axis=1)))
    counts = []
    for k, row in enumerate(losses):
        apart = row - losses[best]
        if k == best or apart.mean() <= np.std(apart, ddof=1) / np.sqrt(len(apart)):
            counts.append(k + 1)
    return max(counts)


@pytest.mark.parametrize(
    "noise", [(2, 1, 0.1, 0.1), (0.1, 0.1, 0.1, 0.1), (3, 2, 1, 0), (0, 1, 2, 3), (0.6, 0.4, 0.3)]
)
def test_the_most_whose_mean_is_within_a_standard_error_of_the_best(noise):
    ens = ensemble_around(noise)
    members = ens.predict_members(X, verbose=0).astype("float64")
    means = [members[-k:].mean(axis=0) for k in range(1, len(noise) + 1)]
    expected = by_hand(np.stack([-np.log(mean[np.arange(200), Y]) for mean in means]))
    assert ens.choose_members(X, Y, verbose=0) == expected
    assert ens.members == (None if expected == len(noise) else expected)
    np.testing.assert_allclose(ens.predict(X, verbose=0), means[expected - 1], atol=1e-6)


def test_early_members_far_away_are_left_out_and_members_alike_are_not():
    assert ensemble_around((3, 3, 0, 0)).choose_members(X, Y, verbose=0) == 2
    assert ensemble_around((0, 0, 0, 0)).choose_members(X, Y, verbose=0) == 4


def test_of_values_the_squared_error_counts():
    ens = ensemble_around((3, 0.2, 0.1), dense("mse", 2, None))
    members = ens.predict_members(X, verbose=0).astype("float64")
    means = [members[-k:].mean(axis=0) for k in (1, 2, 3)]
    expected = by_hand(np.stack([((mean - VALUES) ** 2).mean(axis=1) for mean in means]))
    assert ens.choose_members(X, VALUES, verbose=0) == expected < 3


def test_where_it_holds_and_where_not():
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
    # Who names members gets them; each member's own output is each member's.
    np.testing.assert_allclose(ens.predict(X, members=3, verbose=0), everyone.mean(0), atol=1e-6)
    assert len(ens.predict_members(X, verbose=0)) == 3
    ens.weights = [0.5, 0.25, 0.25]
    by_weight = np.tensordot(ens.weights, everyone, 1)
    np.testing.assert_allclose(ens.predict(X, combine="weighted", verbose=0), by_weight, atol=1e-6)
    message = "Where nobody says, predictions combine of the members the last 2."
    assert message in ens.report(X, Y, verbose=0).notes
    ens.members = None
    np.testing.assert_allclose(ens.predict(X, verbose=0), everyone.mean(0), atol=1e-6)


@pytest.mark.parametrize("members", [2, [0, 2], None])
def test_it_is_kept_and_goes_when_the_members_change(members, tmp_path):
    ens = ensemble_around((1, 0.1, 0.1))
    ens.members = members
    ens.save(tmp_path / "run")
    again = SnapshotEnsemble.load(tmp_path / "run")
    assert again.members == members
    np.testing.assert_array_equal(ens.predict(X, verbose=0), again.predict(X, verbose=0))
    again.fit(X, Y, epochs=5, verbose=0)
    assert again.members is None
    assert len(again) == 8


def test_a_damaged_member_leaves_the_others_all(tmp_path):
    ens = ensemble_around((1, 0.1, 0.1))
    ens.members = 3
    ens.save(tmp_path / "run")
    sorted((tmp_path / "run").glob("*.weights.h5"))[0].write_bytes(b"")
    with pytest.warns(UserWarning, match="Loaded without what is damaged"):
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


@pytest.mark.parametrize("kind", KINDS)
def test_fit_chooses_by_its_validation_data(kind, monkeypatch):
    counts = []
    choose = SnapshotEnsemble.choose_members

    def counting(self, *args, **kwargs):
        counts.append(choose(self, *args, **kwargs))
        return counts[-1]

    monkeypatch.setattr(SnapshotEnsemble, "choose_members", counting)
    # It learns so slowly that each member is far better than the one before.
    ens = SnapshotEnsemble(dense(), cycles=4, lr_init=0.02)
    ens.fit(X, Y, epochs=4, batch_size=10, verbose=0, **KINDS[kind]())
    rows = slice(100, None) if kind == "a split" else slice(None)
    (count,) = counts
    assert ens.members == count < 4
    assert count == choose(ens, X[rows], Y[rows], verbose=0)


def test_fit_leaves_all_where_nothing_can_tell(monkeypatch):
    ens = SnapshotEnsemble(dense(), cycles=3, lr_init=0.02)
    ens.fit(X, Y, epochs=3, verbose=0)
    assert ens.members is None

    def fails(self, *args, **kwargs):
        raise ValueError

    monkeypatch.setattr(SnapshotEnsemble, "choose_members", fails)
    ens.fit(X, Y, epochs=3, verbose=0, validation_data=(X, Y))
    assert ens.members is None
    assert len(ens) == 6


def test_what_cannot_be_chosen():
    ens = ensemble_around((1, 1))
    with pytest.raises(ValueError, match=r"at most 2"):
        ens.members = 3
    with pytest.raises(ValueError, match="no targets to compare with"):
        ens.choose_members(X, verbose=0)
    assert ens.members is None
