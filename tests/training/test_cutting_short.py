"""`cycles="auto"`: whether a run stays one cycle or is cut short for several, and when."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as arrays_of
from keras import layers
from models import SimulatedCrashError, assert_same, three_classes
from resume_cases import (
    ROWS,
    X,
    Y,
    assert_same_outcome,
    crash_in_epoch,
    outcome,
    run,
)
from scipy import stats

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.evaluation.member_counts import chosen_count, paired_errors
from snapshot_ensemble.schedules import AutoCycles, EqualCycles
from snapshot_ensemble.storage.record import Progress
from snapshot_ensemble.storage.snapshot import Snapshot, annealed
from snapshot_ensemble.training.cutting_short import (
    MAX_LEFT,
    MIN_GAP,
    MIN_LAGGING_GAP,
    decide,
    described,
)
from snapshot_ensemble.training.run import Run

# After one epoch a member may be far worse than the others.
pytestmark = pytest.mark.filterwarnings("ignore:Far worse than the others")


def history(losses, val_losses=None):
    return {"loss": losses} | ({} if val_losses is None else {"val_loss": val_losses})


@pytest.mark.parametrize(
    ("losses", "val_losses", "is_cut"),
    [
        ([2.0, 1.2, 1.2], [1.9, 1.17, 1.2], False),  # Below: augmented or with dropout.
        ([2.0, 1.2, 1.2], [1.9, 1.3, 1.3], False),
        ([2.0, 1.0, 1.0], [1.9, 1.3, 1.3], False),  # The validation loss is still falling.
        ([2.0, 1.0, 1.0], [1.3, 1.4, 1.3], True),
        ([2.0, 1.0, 1.0], [1.5, 1.26, 1.26], True),  # By less than a third as much.
        ([2.0, 1.0, 1.0], [1.5, 1.24, 1.24], False),
        ([1.0, 1.0, 1.0], [1.3, 1.3, 1.3], False),  # Neither of the two has fallen.
        ([0.0, 1.0, 1.0], [1.3, 1.3, 1.3], False),
        ([2.0, 1.0, 1.0], [1.3, None, None], False),
        ([2.0, 0.5, 0.4], [1.9, 1.3, 1.3], True),
        ([2.0, 1.3, 0.4], [1.9, 1.3, 1.3], False),  # Once may be chance.
        ([2.0, 0.5, 1.2], [1.9, 1.3, 1.3], False),
        ([2.0, 1.2, 1.2], [1.1, 1.6, 1.6], False),  # At a high rate a single epoch may be bad.
        ([2.0, 0.8, 0.8], [1.1, 1.6, 1.6], True),
        ([2.0, 0.0, 0.0], [1.9, 0.0, 0.0], False),  # Nothing was memorised that did not hold.
        ([2.0, -3.0, -3.0], [1.9, -1.0, -1.0], True),  # Likelihoods of densities may be negative.
        ([2.0, -1.0, -1.0], [1.9, -1.1, -1.1], False),
        ([2.0, 1.2, 1.2], None, False),
        ([2.0, 0.1, 0.1], None, True),
        ([2.0, 0.2, 0.1], None, False),
        ([0.0, 0.0, 0.0], None, False),
        ([-1.0, -2.0, -2.0], None, False),  # Such a loss has no lower end to compare with.
        ([2.0, 0.1, np.nan], None, False),
        ([np.nan, np.nan, np.nan], [1.0, 1.0, 1.0], False),
        ([2.0, 0.4, 0.4], [np.nan, np.nan, np.nan], False),
        ([2.0, 0.4, 0.4], [np.nan, 1.3, np.nan], True),
        ([2.0, 0.4, 0.3, 0.3], [None, 1.3, None, 1.4], True),  # `validation_freq=2`
        ([0.1], [1.0], False),
        ([], None, False),
    ],
)
def test_the_losses_so_far_decide(losses, val_losses, is_cut):
    assert decide(history(losses, val_losses), 0, len(losses)).is_cut == is_cut


def test_only_the_epochs_of_the_run_decide():
    losses = history([0.0, 2.0, 1.0, 0.0], [0.1, 2.0, 1.0, 3.0])
    decision = decide(losses, 1, 3)
    assert (decision.epoch, decision.is_cut) == (3, False)
    assert (decision.first_loss, decision.loss, decision.val_loss) == (2.0, 1.0, 1.0)


@given(st.floats(1e-3, 1e3), st.floats(-1, 1))
def test_the_scale_of_the_loss_does_not_matter(scale, share):
    limits = (MIN_GAP, MIN_LAGGING_GAP, MAX_LEFT, -MAX_LEFT)
    if min(abs(share - limit) for limit in limits) < 1e-6:
        return
    losses = [scale * (1 - share)] * 2
    for before, gap in ((2, MIN_GAP), (1, MIN_LAGGING_GAP)):
        val_losses = [before * scale, scale, scale]
        assert decide(history([4 * scale, *losses], val_losses), 0, 3).is_cut == (share > gap)
    left = [abs(share) * scale] * 2
    assert decide(history([scale, *left]), 0, 3).is_cut == (abs(share) <= MAX_LEFT)


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 5))
def test_a_plan_that_is_decided_covers_the_budget(epochs, steps):
    plan = AutoCycles(0.1).plan(epochs)
    assert plan.is_decided == (epochs < 10)
    assert plan == EqualCycles(1, 0.1).plan(epochs)
    if plan.is_decided:
        return
    assert_in_parts(plan.decided(), epochs, steps)
    assert list(plan.due) == [*range(epochs // 5, epochs // 2 + 1)]
    for due in plan.due:
        assert_cut_short(plan.cut_short(due), due, epochs, steps)


def assert_in_parts(plan, epochs, steps):
    assert plan.is_decided
    ends = {round(epochs * tenths / 10) for tenths in (6, 7, 8, 9, 10)}
    assert [c.last_epoch + 1 for c in plan] == sorted(ends - {0})
    assert [e for c in plan for e in range(c.first_epoch, c.last_epoch + 1)] == [*range(epochs)]
    assert [c.index for c in plan] == [*range(len(plan))]
    assert all(c.is_kept for c in plan)
    assert [c.ends_at_floor for c in plan] == [False] * (len(plan) - 1) + [True]
    rates = np.concatenate([c.rates(steps) for c in plan])
    np.testing.assert_array_equal(rates, EqualCycles(1, 0.1).rates(epochs, steps))


def assert_cut_short(plan, due, epochs, steps):
    assert plan.is_decided
    assert [e for c in plan for e in range(c.first_epoch, c.last_epoch + 1)] == [*range(epochs)]
    cycles = sorted((2, (epochs - due) // 3, 5))[1]
    assert [c.index for c in plan] == [0, *range(cycles)]
    assert [c.ends_at_floor for c in plan] == [False] + [True] * cycles
    assert [c.is_kept for c in plan] == [False] + [True] * cycles
    # Until it is cut short, the rate is that of one ordinary run.
    lead, *others = plan
    assert lead.length == due
    ordinary = EqualCycles(1, 0.1).plan(epochs)[0].rates(steps)
    np.testing.assert_array_equal(lead.rates(steps), ordinary[: due * steps])
    rest = EqualCycles(cycles, 0.1).plan(epochs - due)
    for cycle, expected in zip(others, rest, strict=True):
        np.testing.assert_array_equal(cycle.rates(steps), expected.rates(steps))


BATCH = 12


def dense():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax")])
    # Eager, since tracing takes longer than a few steps of a small model.
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    return model


def arrays():
    return {"x": X, "y": Y, "batch_size": BATCH}


def auto(directory, data=arrays, **arguments):
    return run(directory, dense, data, cycles="auto", epochs=10, **arguments)


def memorising():
    """The weights of these validation data make their loss ten times as high."""
    return {**arrays(), "validation_data": (X, Y, np.full(ROWS, 10.0))}


def rates_by_hand(lengths, spans):
    """The rate of each epoch's last step, written out."""
    steps = ROWS // BATCH
    return [
        0.05 * (1 + np.cos(np.pi * (steps * (e + 1) - 1) / (steps * span)))
        for length, span in zip(lengths, spans, strict=True)
        for e in range(length)
    ]


CUT = {"lengths": [2, 4, 4], "spans": [10, 4, 4]}


@pytest.mark.parametrize(
    ("data", "cycles", "rates"),
    [
        (arrays, [0] * 6 + [1, 2, 3, 4], {"lengths": [10], "spans": [10]}),
        (memorising, [0] * 6 + [1] * 4, CUT),
    ],
    ids=["learning", "memorising"],
)
def test_a_run_follows_what_it_decides(tmp_path, data, cycles, rates):
    is_cut = data is memorising
    ens, result = auto(tmp_path / "ensemble", data=data)
    assert result.history["cycle"] == cycles
    np.testing.assert_allclose(
        result.history["learning_rate"], rates_by_hand(**rates), rtol=1e-4, atol=1e-9
    )
    ends = [epoch for epoch in range(10) if cycles[epoch : epoch + 2] != [cycles[epoch]] * 2]
    assert [(s.cycle, s.epoch) for s in ens.snapshots] == [*enumerate(ends)]
    assert [s.is_annealed for s in ens.snapshots] == (
        [True] * 2 if is_cut else [False] * 4 + [True]
    )
    [decision] = ens.decisions
    epoch = 2 if is_cut else 5
    assert (decision.epoch, decision.is_cut) == (epoch, is_cut)
    assert decision.first_loss == result.history["loss"][0]
    assert decision.loss == result.history["loss"][epoch - 1]
    if is_cut:
        assert decision.val_loss == min(result.history["val_loss"][:2])
    else:
        assert decision.val_loss is None
    loaded = SnapshotEnsemble.load(tmp_path / "ensemble")
    assert (loaded.decisions, loaded.snapshots) == ([decision], ens.snapshots)


@pytest.mark.slow
def test_a_network_that_is_still_learning_gets_what_one_ordinary_run_gives():
    actual, history_of_auto = auto(None)
    expected, history_of_one = run(None, dense, arrays, cycles=1, epochs=10)
    (*_, last, model, optimizer), _ = outcome(actual, history_of_auto)
    assert_same([last, model, optimizer], outcome(expected, history_of_one)[0])
    columns = [{**history.history, "cycle": 0} for history in (history_of_auto, history_of_one)]
    np.testing.assert_equal(*columns)
    # Without validation data the earlier members do not predict.
    assert actual.members == 1
    np.testing.assert_array_equal(actual.predict(X, verbose=0), expected.predict(X, verbose=0))


@pytest.fixture(scope="module", params=[arrays, memorising], ids=["learning", "memorising"])
def whole_run(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "run"
    return request.param, outcome(*auto(directory, data=request.param))


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [1, 2, 4, 7])
def test_a_resumed_run_decides_the_same(whole_run, tmp_path, epoch):
    data, expected = whole_run
    with pytest.raises(SimulatedCrashError):
        auto(tmp_path / "killed", data=data, callbacks=[crash_in_epoch(epoch)])
    ens, result = auto(tmp_path / "killed", data=data, resume=True)
    assert_same_outcome(outcome(ens, result), expected)
    assert len(ens.decisions) == 1


@pytest.mark.parametrize("seen_at", [4, 5, 7, 9, 10])
@pytest.mark.parametrize("memorises_at", [0, 3, 5, 6, 7, 9])
def test_a_fifth_to_a_half_of_the_epochs_may_decide(memorises_at, seen_at):
    """Whether epoch after epoch is asked, or all at once when a run is resumed."""
    losses = [1.0] * memorises_at + [0.4] * 20
    plan, progress = AutoCycles(0.1).plan(20), Progress()
    asked = Run(plan, 0, None, None, None, progress)
    resumed = Run(plan, 0, None, None, None, Progress())
    progress.history = resumed.progress.history = {"loss": losses, "val_loss": [1.0] * len(losses)}
    decisions = [decision for epoch in range(seen_at + 1) if (decision := asked.decide(epoch))]
    assert asked.decide(seen_at) is None  # Once is enough.
    cut = max(4, memorises_at + 2)  # After two epochs that show it.
    expected = plan.decided() if seen_at == 10 else plan
    expected = plan.cut_short(cut) if cut <= seen_at else expected
    assert asked.plan == expected
    assert asked.plan.is_decided == (cut <= seen_at or seen_at == 10)
    decision = resumed.decide(seen_at)
    assert decisions == ([] if decision is None else [decision])
    assert (resumed.plan, resumed.progress.decisions) == (asked.plan, progress.decisions)


@pytest.mark.slow
def test_each_fit_decides_for_itself():
    ens, _ = auto(None, data=memorising)
    ens.fit(X, Y, batch_size=BATCH, epochs=20, initial_epoch=10, verbose=0)
    assert [(own.epoch, own.is_cut) for own in ens.decisions] == [(2, True), (15, False)]
    assert ens.history["cycle"][10:] == [2] * 6 + [3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_cycle_that_is_cut_short_goes_on_without_a_restart(restarts):
    arguments = {"cycles": "auto", "lr_init": 0.1, "shrink": 0.0}
    ens = SnapshotEnsemble(dense(), **arguments)
    for _ in range(restarts):
        ens.fit(X, Y, batch_size=BATCH, epochs=1, verbose=0)
    seen = {}

    def at_end(epoch, logs):
        seen[epoch] = ens.model.get_weights()[0]

    def at_start(batch, logs):
        if batch == 0:
            seen[f"start {callback.epoch}"] = ens.model.get_weights()[0]

    callback = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: setattr(callback, "epoch", epoch),
        on_train_batch_begin=at_start,
        on_epoch_end=at_end,
    )
    ens.fit(**memorising(), epochs=10, verbose=0, callbacks=[callback])
    assert ens.decisions[-1].is_cut
    is_new = [not np.array_equal(seen[f"start {e}"], seen[e - 1]) for e in range(1, 10)]
    assert is_new == [epoch == 6 for epoch in range(1, 10)]


def test_overwriting_forgets_decisions():
    ens, _ = auto(None)
    ens.fit(X, Y, batch_size=BATCH, epochs=1, overwrite=True, verbose=0)
    assert ens.decisions == []


@pytest.mark.slow
def test_a_callback_sees_the_whole_budget():
    seen = []
    callback = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append((callback.params["epochs"], logs["cycle"]))
    )
    auto(None, data=memorising, callbacks=[callback])
    assert seen == [(10, cycle) for cycle in [0] * 6 + [1] * 4]


# Keras says this of all data whose number of steps it does not know.
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("is_known", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_steps_per_epoch_and_datasets(is_known):
    def endless():
        data = tf.data.Dataset.from_tensor_slices((X, Y))
        weighted = (X, Y, np.full(ROWS, 10.0))
        given = {"x": data.repeat().batch(BATCH), "steps_per_epoch": ROWS // BATCH}
        if not is_known:
            given = {"x": data.filter(lambda x, y: True).batch(BATCH)}
        return {**given, "batch_size": None, "shuffle": False, "validation_data": weighted}

    ens, result = auto(None, data=endless)
    expected = rates_by_hand(**CUT)
    # Without a known number of steps the first epoch runs at its mean rate.
    first = 0 if is_known else 1
    actual = result.history["learning_rate"]
    np.testing.assert_allclose(actual[first:], expected[first:], rtol=1e-4, atol=1e-9)
    assert len(ens) == 2


@pytest.mark.slow
def test_what_is_decided_is_said(capsys):
    ens = SnapshotEnsemble(dense(), cycles="auto", lr_init=0.1)
    ens.fit(X, Y, batch_size=BATCH, epochs=10, verbose=2)
    first, loss = ens.history["loss"][0], ens.history["loss"][4]
    sentence = f"one cosine to the end (loss {loss:.4f}, in the first epoch {first:.4f})"
    assert f"It is still learning: {sentence}" in capsys.readouterr().out
    ens = SnapshotEnsemble(dense(), cycles="auto", lr_init=0.1)
    ens.fit(**memorising(), epochs=10, verbose=2)
    loss, val_loss = ens.history["loss"][1], min(ens.history["val_loss"][:2])
    sentence = f"several cycles in the rest (loss {loss:.4f}, lowest val_loss {val_loss:.4f})"
    assert f"It begins to memorise: {sentence}" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_is_said(recwarn):
    assert "the loss is not finite" in described(decide(history([1.0, np.nan]), 0, 2))


PARTS = (19, 22, 25, 28)


def test_a_plan_says_what_is_not_decided():
    plan = SnapshotEnsemble(dense(), cycles="auto", lr_init=0.1).plan(30)
    assert [(c.first_epoch, c.last_epoch, c.is_decided) for c in plan] == [(0, 29, False)]
    _, _, condition, otherwise = str(plan).splitlines()
    assert condition.endswith("after one of the epochs 5-14: then up to 5 cycles.")
    assert otherwise == "Otherwise: snapshots after the epochs 17, 20, 23, 26 and 29."
    first, *rest = (line.split("  ")[-1].strip() for line in str(plan.decided()).splitlines()[1:])
    assert [first, *rest] == [f"{a}-{b} of 30" for a, b in ((1, 18), *((e, e + 2) for e in PARTS))]
    assert "1-6 of 30" in str(plan.cut_short(6))
    assert "Otherwise" not in str(plan.decided()) + str(plan.cut_short(6))


@pytest.mark.parametrize("cycles", ["five", "5", ""])
def test_other_words_are_refused(cycles):
    with pytest.raises(ValueError, match=r"whole number or 'auto'\. Received: cycles='"):
        SnapshotEnsemble(dense(), cycles=cycles)


@pytest.mark.slow
def test_one_member_that_predicts_alone_is_said_in_the_report():
    ens, _ = auto(None, data=memorising)
    ens.members = 1
    note = "By default, the last member predicts alone, so there is no disagreement"
    assert any(note in own for own in ens.report(X, Y, verbose=0).notes)
    ens.members = [0]
    assert any("By default, member 0 predicts" in n for n in ens.report(X, Y, verbose=0).notes)
    assert not ens.predict_uncertainty(X, verbose=0)["epistemic"].any()


def learning(rows=60):
    """Validation data on which no number of members is the best by chance alone."""
    return {**arrays(), "validation_data": three_classes(rows)}


def test_members_of_one_cosine_predict_where_they_lower_the_loss_beyond_chance():
    ens, _ = auto(None, data=learning)
    x, y = learning()["validation_data"]
    members = ens.predict_members(x, members=len(ens), verbose=0).astype("float64")
    assert len(ens) == 5
    last, *others = (
        -np.log(members[-count:].mean(axis=0)[np.arange(len(y)), y]) for count in range(1, 6)
    )
    best = min(others, key=np.mean)
    is_lower = (last - best).mean() > stats.sem(last - best)
    count = 2 + [*map(np.mean, others)].index(best.mean()) if is_lower else 1
    assert ens.members == (None if count == len(ens) else count)


def kept(marks):
    return [Snapshot(index, is_annealed=mark == "+") for index, mark in enumerate(marks)]


@pytest.mark.parametrize(
    ("marks", "losses", "error", "count"),
    [
        # Losses of the last one, of the last two, …
        ("+++", [3, 1, 2], 1, 3),
        ("+++", [3, 1, 2], 0.9, 2),
        ("+++", [1, 3, 2], 1, 3),
        ("---+", [3, 2.5, 2.5, 2.5], 1, 1),
        ("---+", [3, 2.5, 1.9, 2.5], 1, 3),
        ("---+", [3, 2.5, 2.4, 1.9], 1, 4),
        ("--++", [3, 2.5, 2.4, 2.3], 1, 2),
        ("--++", [3, 2.5, 2.4, 1.3], 1, 4),
        ("++-+", [3, 2.5, 1.9, 2.5], 1, 4),  # What came before them are members as any other.
        ("++-+", [3, 2.5, 1.9, 3], 1, 3),
        ("+--", [3, 2.5, 2.5], 1, 1),  # Training was stopped on its way.
        ("+--", [3, 2.5, 1.9], 1, 3),
        ("-", [3], 0, 1),
    ],
)
def test_which_members_of_one_cosine_are_added(marks, losses, error, count):
    losses, snapshots = np.asarray(losses, "float64"), kept(marks)
    assert chosen_count(losses, np.full((len(marks),) * 2, error), snapshots) == count


@given(st.integers(1, 6).flatmap(lambda n: arrays_of(float, (n, 4), elements=st.floats(-9, 9))))
def test_errors_of_differences_are_those_of_pairs(parts):
    expected = [[2 * stats.sem(one - other) * 2 for other in parts] for one in parts]
    np.testing.assert_allclose(paired_errors(parts), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ("+", None),
        ("+++", None),
        ("--+", 1),
        ("-++", 2),
        ("+-+", [0, 2]),
        ("++-", [0, 1]),
        ("--", 1),
    ],
)
def test_who_predicts_until_members_are_chosen(marks, expected):
    assert annealed(kept(marks)) == expected


@pytest.mark.slow
def test_a_run_that_is_stopped_on_its_way_keeps_what_there_is():
    stop = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: setattr(stop.model, "stop_training", epoch == 7)
    )
    ens, _ = auto(None, callbacks=[stop])
    assert [(s.epoch, s.is_annealed) for s in ens.snapshots] == [(e, False) for e in (5, 6, 7)]
    assert ens.members == 1


@pytest.mark.slow
def test_what_is_left_of_uncertainty_is_said_in_the_report():
    ens, _ = auto(None)
    note = "Members that predict by default are of one cosine"
    assert not any(note in own for own in ens.report(X, Y, verbose=0).notes)
    for members in (2, [0, 4]):
        ens.members = members
        assert any(note in own for own in ens.report(X, Y, verbose=0).notes)


@pytest.mark.slow
def test_the_last_of_each_chain_predict_when_runs_of_one_cosine_are_merged(tmp_path):
    runs = []
    for seed in (1, 2):
        keras.utils.set_random_seed(seed)
        runs.append(SnapshotEnsemble(dense(), cycles="auto", lr_init=0.1))
        runs[-1].fit(X, Y, batch_size=BATCH, epochs=10, verbose=0)
    for directory in (None, tmp_path / "merged"):
        merged = SnapshotEnsemble.merge(runs, directory)
        assert [s.is_annealed for s in merged.snapshots] == [False] * 8 + [True] * 2
        assert merged.members == 2
        expected = np.mean([one.predict(X, verbose=0) for one in runs], axis=0)
        np.testing.assert_allclose(merged.predict(X, verbose=0), expected, rtol=1e-6)
    assert SnapshotEnsemble.load(tmp_path / "merged").members == 2


@pytest.mark.slow
def test_a_network_that_was_trained_before_stays_one_run(capsys):
    model = dense()
    model.layers[-1].bias.assign([0.1, 0.0, -0.1])
    tuned = keras.Sequential([keras.Input((4,)), *model.layers, layers.Dense(3, "softmax")])
    tuned.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    ens = SnapshotEnsemble(tuned, lr_init=0.1)
    ens.fit(**memorising(), epochs=10, verbose=2)
    [decision] = ens.decisions
    assert (decision.epoch, decision.is_cut, decision.is_pretrained) == (5, False, True)
    assert "It was trained before: one cosine to the end" in capsys.readouterr().out
    assert [s.is_annealed for s in ens.snapshots] == [False] * 4 + [True]
