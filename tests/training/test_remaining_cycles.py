"""`cycles="auto"`: how many cycles the rest of a budget is split into, and when it is decided."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from models import SimulatedCrashError
from resume_cases import (
    ROWS,
    X,
    Y,
    arrays,
    assert_same_outcome,
    crash_in_epoch,
    dense,
    outcome,
    run,
)

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.schedules import AutoCycles, EqualCycles
from snapshot_ensemble.training.remaining_cycles import MAX_LEFT, MIN_GAP, decide

# After one epoch a member may be far worse than the others.
pytestmark = pytest.mark.filterwarnings("ignore:Far worse than the others")


def history(losses, val_losses=None):
    return {"loss": losses} | ({} if val_losses is None else {"val_loss": val_losses})


LEARNING, MEMORISED = 1, AutoCycles.CYCLES - 1


@pytest.mark.parametrize(
    ("losses", "val_losses", "cycles"),
    [
        ([2.0, 1.2], [1.9, 1.17], LEARNING),  # Below: augmented or with dropout.
        ([2.0, 1.2], [1.9, 1.3], LEARNING),
        ([2.0, 0.4], [1.9, 1.3], MEMORISED),
        ([2.0, 0.0], [1.9, 0.0], LEARNING),  # Nothing was memorised that did not hold.
        ([2.0, -3.0], [1.9, -1.0], MEMORISED),  # Likelihoods of densities may be negative.
        ([2.0, -1.0], [1.9, -1.1], LEARNING),
        ([2.0, 1.2], None, LEARNING),
        ([2.0, 0.1], None, MEMORISED),
        ([2.0, 0.2], None, LEARNING),
        ([0.0, 0.0], None, LEARNING),
        ([-1.0, -2.0], None, LEARNING),  # Such a loss has no lower end to compare with.
        ([2.0, np.nan], None, LEARNING),
        ([np.nan, np.nan], [1.0, 1.0], LEARNING),
        ([2.0, 0.4], [np.nan, np.nan], LEARNING),
        ([2.0, 0.4, 0.1], [None, 1.3, None], MEMORISED),  # `validation_freq=2`
        ([1.5, 1.2, 0.1], [None, 1.3, None], LEARNING),
        ([], None, LEARNING),
    ],
)
def test_the_losses_of_the_first_cycle_decide(losses, val_losses, cycles):
    assert decide(history(losses, val_losses), 0, len(losses)).cycles == cycles


@given(st.floats(1e-3, 1e3), st.floats(-1, 1))
def test_the_scale_of_the_loss_does_not_matter(scale, share):
    if abs(share - MIN_GAP) < 1e-6:
        return
    decision = decide(history([2.0, scale * (1 - share)], [2.0, scale]), 0, 2)
    assert (decision.cycles == MEMORISED) == (share > MIN_GAP)
    if abs(share - MAX_LEFT) < 1e-6:
        return
    decision = decide(history([scale, abs(share) * scale]), 0, 2)
    assert (decision.cycles == MEMORISED) == (abs(share) <= MAX_LEFT)


@given(st.integers(1, 400))
def test_a_plan_that_is_split_equally_is_that_of_five_cycles(epochs):
    plan = AutoCycles(0.1).plan(epochs)
    if plan.is_decided:
        assert epochs == 1
        return
    assert plan.with_rest_in(1) == plan
    if epochs >= AutoCycles.CYCLES:
        assert plan.with_rest_in(AutoCycles.CYCLES - 1) == EqualCycles(5, 0.1).plan(epochs)
    else:
        assert [c.length for c in plan.with_rest_in(4)] == [1] * epochs


def auto(directory, **arguments):
    return run(directory, cycles="auto", epochs=5, **arguments)


def memorising():
    """The weights of these validation data make their loss ten times as high."""
    return {**arrays(), "validation_data": (X, Y, np.full(ROWS, 10.0))}


@pytest.mark.parametrize(("data", "lengths"), [(arrays, [1, 4]), (memorising, [1, 1, 1, 1, 1])])
def test_a_run_follows_what_it_decides(tmp_path, data, lengths):
    ens, result = auto(tmp_path / "ensemble", data=data)
    assert result.history["cycle"] == [k for k, n in enumerate(lengths) for _ in range(n)]
    # The rates are those of cycles of these lengths: each epoch's last step.
    steps = ROWS // 8
    expected = [
        0.05 * (1 + np.cos(np.pi * (steps * (e + 1) - 1) / (steps * n)))
        for n in lengths
        for e in range(n)
    ]
    np.testing.assert_allclose(result.history["learning_rate"], expected, rtol=1e-5)
    [decision] = ens.decisions
    assert (decision.epoch, decision.cycles) == (1, len(lengths) - 1)
    assert decision.first_loss == result.history["loss"][0]
    assert decision.loss == result.history["loss"][0]
    assert decision.val_loss == result.history.get("val_loss", [None])[0]
    assert SnapshotEnsemble.load(tmp_path / "ensemble").decisions == [decision]


@pytest.fixture(scope="module", params=[arrays, memorising], ids=["learning", "memorising"])
def whole_run(request, tmp_path_factory):
    return request.param, outcome(
        *auto(tmp_path_factory.mktemp("whole") / "run", data=request.param)
    )


@pytest.mark.parametrize("epoch", [0, 1, 2, 4])
def test_a_resumed_run_decides_the_same(whole_run, tmp_path, epoch):
    data, expected = whole_run
    with pytest.raises(SimulatedCrashError):
        auto(tmp_path / "killed", data=data, callbacks=[crash_in_epoch(epoch)])
    ens, result = auto(tmp_path / "killed", data=data, resume=True)
    assert_same_outcome(outcome(ens, result), expected)
    assert len(ens.decisions) == 1


def test_each_fit_decides_for_itself(tmp_path):
    ens, _ = auto(None, data=memorising)
    ens.fit(X, Y, batch_size=8, epochs=15, initial_epoch=10, verbose=0)
    assert [(own.epoch, own.cycles) for own in ens.decisions] == [(1, 4), (6, 1)]
    assert ens.history["cycle"] == [*range(5), 5, 6, 6, 6, 6]


def test_overwriting_forgets_decisions():
    ens, _ = auto(None)
    ens.fit(X, Y, batch_size=8, epochs=1, overwrite=True, verbose=0)
    assert ens.decisions == []


def test_a_callback_sees_the_whole_budget(tmp_path):
    seen = []
    callback = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append((callback.params["epochs"], logs["cycle"]))
    )
    auto(None, callbacks=[callback])
    assert seen == [(5, 0)] + [(5, 1)] * 4


def test_steps_per_epoch_and_datasets():
    def endless():
        data = tf.data.Dataset.from_tensor_slices((X, Y)).repeat().batch(8)
        return {"x": data, "steps_per_epoch": 4, "batch_size": None, "shuffle": False}

    ens, result = auto(None, data=endless)
    rates = result.history["learning_rate"]
    np.testing.assert_allclose(rates[1], 0.05 * (1 + np.cos(np.pi * 3 / 16)), rtol=1e-5)
    np.testing.assert_allclose(rates[-1], 0.05 * (1 + np.cos(np.pi * 15 / 16)), rtol=1e-4)
    assert len(ens) == 2


def test_what_is_decided_is_said(capsys):
    ens = SnapshotEnsemble(dense(), cycles="auto", lr_init=0.1)
    ens.fit(X, Y, batch_size=8, epochs=3, verbose=2)
    loss, first_loss = ens.history["loss"][0], ens.history["loss"][0]
    sentence = f"1 cycle (loss {loss:.4f} against {first_loss:.4f} in the first epoch)"
    assert f"The rest of the epochs: {sentence}" in capsys.readouterr().out
    ens = SnapshotEnsemble(dense(), cycles="auto", lr_init=0.1)
    ens.fit(**memorising(), epochs=5, verbose=2)
    losses = (ens.history["val_loss"][0], ens.history["loss"][0])
    sentence = "4 cycles (val_loss {:.4f} against loss {:.4f})".format(*losses)
    assert f"The rest of the epochs: {sentence}" in capsys.readouterr().out


def test_a_plan_says_what_is_not_decided():
    plan = SnapshotEnsemble(dense(), cycles="auto", lr_init=0.1).plan(30)
    assert [(c.first_epoch, c.last_epoch, c.is_decided) for c in plan] == [
        (0, 5, True),
        (6, 29, False),
    ]
    head, first, rest = str(plan).splitlines()
    assert head.split("  ")[-1].strip() == "decided later"
    assert rest.endswith("1 or more cycles")
    assert not first.rstrip().endswith("cycles")


@pytest.mark.parametrize("cycles", ["five", "5", ""])
def test_other_words_are_refused(cycles):
    with pytest.raises(ValueError, match=r"whole number or 'auto'\. Received: cycles='"):
        SnapshotEnsemble(dense(), cycles=cycles)


def test_a_short_first_cycle_does_not_predict_without_validation_data(tmp_path):
    ens, _ = auto(tmp_path / "ensemble")
    assert ens.members == [1]
    np.testing.assert_array_equal(ens.predict(X, verbose=0), ens[1].predict(X, verbose=0))
    note = "By default, member 1 predicts alone, so there is no disagreement"
    assert any(note in own for own in ens.report(X, Y, verbose=0).notes)
    assert not ens.predict_uncertainty(X, verbose=0)["epistemic"].any()
    # Two more members, of which the newer one is again of a long cycle.
    ens.fit(X, Y, batch_size=8, epochs=5, verbose=0)
    assert ens.members == [1, 3]


def test_with_validation_data_members_are_chosen_by_them():
    ens, _ = auto(None, data=lambda: {**arrays(), "validation_data": (X, Y)})
    by_fit, ens.members = ens.members, None
    ens.choose_members(X, Y, verbose=0)
    assert ens.members == by_fit
