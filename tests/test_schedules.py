"""Plans and rates, compared with integer arithmetic and the formula."""

import doctest
import math

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshot_ensemble import CosineAnnealing, Cycle, schedules
from snapshot_ensemble.schedules import EqualCycles

EPOCHS = st.integers(1, 400)
ANY_SCHEDULE = st.one_of(
    st.builds(EqualCycles, cycles=st.integers(1, 40), lr_init=st.just(0.1)),
    st.builds(
        CosineAnnealing,
        cycle_length=st.integers(1, 30),
        cycle_length_multiplier=st.floats(1.0, 3.0),
        lr_init=st.just(0.1),
        lr_min=st.just(0.01),
        lr_multiplier=st.floats(0.5, 2.0),
    ),
)


def cosine(n, lr_max, lr_min):
    """Equation 5 of Loshchilov & Hutter (2017), one step at a time."""
    return [lr_min + (lr_max - lr_min) / 2 * (1 + math.cos(math.pi * t / n)) for t in range(n)]


@given(ANY_SCHEDULE, EPOCHS)
def test_a_plan_covers_each_epoch_once_and_ends_with_the_budget(schedule, epochs):
    try:
        plan = schedule.plan(epochs)
    except ValueError:
        least = getattr(schedule, "cycles", getattr(schedule, "cycle_length", None))
        assert epochs < least
        return
    covered = [e for c in plan for e in range(c.first_epoch, c.last_epoch + 1)]
    assert covered == list(range(epochs))
    assert [c.index for c in plan] == list(range(len(plan)))


@given(st.integers(1, 60), st.integers(0, 500))
def test_equal_cycles_differ_by_at_most_one_epoch_and_longer_ones_come_last(cycles, more):
    lengths = [c.length for c in EqualCycles(cycles, 0.1).plan(cycles + more)]
    assert len(lengths) == cycles
    assert lengths == sorted(lengths)
    assert lengths[-1] - lengths[0] <= 1


@given(st.integers(1, 50), st.floats(1.0, 2.5), st.integers(1, 500))
def test_lengths_grow_from_the_unrounded_product(length, multiplier, epochs):
    if epochs < length:
        return
    lengths = [c.length for c in CosineAnnealing(length, multiplier, 0.1).plan(epochs)]
    expected = [round(length * multiplier**k) for k in range(len(lengths))]
    assert lengths[:-1] == expected[:-1]
    # The epochs left over are fewer than another cycle.
    left = lengths[-1] - expected[-1]
    assert 0 <= left < round(length * multiplier ** len(lengths))


def test_lengths_of_a_schedule_that_doubles():
    assert [c.length for c in CosineAnnealing(10, 2, 0.1).plan(75)] == [10, 20, 45]


def test_bounds_are_multiplied_from_cycle_to_cycle():
    plan = CosineAnnealing(2, lr_init=0.8, lr_min=0.4, lr_multiplier=0.5).plan(6)
    assert [(c.lr_max, c.lr_min) for c in plan] == [(0.8, 0.4), (0.4, 0.2), (0.2, 0.1)]


@given(ANY_SCHEDULE, EPOCHS, st.integers(1, 7))
def test_the_rate_of_every_step_follows_the_formula(schedule, epochs, steps):
    try:
        plan = schedule.plan(epochs)
    except ValueError:
        return
    rates = schedule.rates(epochs, steps)
    assert rates.dtype == np.float64
    expected = [r for c in plan for r in cosine(c.length * steps, c.lr_max, c.lr_min)]
    np.testing.assert_allclose(rates, expected, rtol=1e-13, atol=1e-17)


def test_each_cycle_starts_at_its_peak_and_nearly_reaches_its_floor():
    rates = EqualCycles(4, 0.1, 0.001).rates(40, 100).reshape(4, 1000)
    np.testing.assert_array_equal(rates[:, 0], 0.1)
    assert (np.diff(rates, axis=1) < 0).all()
    np.testing.assert_allclose(rates[:, -1], 0.001, rtol=1e-3)


def test_boundaries_are_exact_to_ten_million_steps():
    """A float32 logarithm would be a step late."""
    rates = CosineAnnealing(1, lr_init=1.0).rates(1000, 10_000)
    assert rates.shape == (10_000_000,)
    np.testing.assert_array_equal(np.flatnonzero(rates == 1.0), np.arange(1000) * 10_000)
    doubling = CosineAnnealing(1, 2, lr_init=1.0).rates(2**10 - 1, 9773)
    starts = (2 ** np.arange(10) - 1) * 9773
    np.testing.assert_array_equal(np.flatnonzero(doubling == 1.0), starts)


def test_warmup_matches_cosine_decay_of_keras():
    rates = CosineAnnealing(5, lr_init=0.4, lr_min=0.1, warmup=2).rates(5, 10)
    theirs = keras.optimizers.schedules.CosineDecay(
        0.1, decay_steps=30, alpha=0.25, warmup_target=0.4, warmup_steps=20
    )
    np.testing.assert_allclose(rates, [float(theirs(t)) for t in range(50)], rtol=1e-5)


def test_only_the_first_cycle_has_a_warmup():
    schedule = CosineAnnealing(5, lr_init=0.4, warmup=2)
    assert [c.warmup for c in schedule.plan(15)] == [2, 0, 0]
    np.testing.assert_allclose(schedule.rates(10, 3)[15:], cosine(15, 0.4, 0.0), atol=1e-16)


def test_a_plan_is_a_list_of_cycles_that_prints_as_a_table():
    plan = CosineAnnealing(2, lr_init=0.1, warmup=1).plan(4)
    assert plan == [Cycle(0, 0, 1, 0.1, 0.0, 1), Cycle(1, 2, 3, 0.1, 0.0)]
    lines = str(plan).split("\n")
    assert lines[0].split() == ["cycle", "epochs", "length", "peak", "rate", "floor", "warmup"]
    assert lines[1].split() == ["0", "0-1", "2", "0.1", "0", "1"]
    assert lines[2].split() == ["1", "2-3", "2", "0.1", "0"]
    assert repr(plan) == str(plan)


@pytest.mark.parametrize(
    ("schedule", "epochs"),
    [(EqualCycles(5, 0.1), 50), (CosineAnnealing(3, 2, 0.1), 93), (CosineAnnealing(7, 1, 0.1), 35)],
)
def test_default_budget_is_ten_epochs_a_cycle_or_five_cycles(schedule, epochs):
    assert schedule.default_epochs() == epochs


def test_a_schedule_can_be_recreated_from_its_config():
    schedule = CosineAnnealing(3, 1.5, 0.2, 0.01, 0.9, 1)
    again = CosineAnnealing(**schedule.get_config())
    np.testing.assert_array_equal(again.rates(20, 3), schedule.rates(20, 3))


def test_docstring_examples():
    assert doctest.testmod(schedules).failed == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cycle_length": 0}, ValueError, "`cycle_length` must be at least 1. Received: cycle_len"),
        ({"cycle_length": 2.5}, TypeError, "`cycle_length` must be a whole number. Received: cy"),
        ({"cycle_length": True}, TypeError, "`cycle_length` must be a whole number. Received: cy"),
        ({"cycle_length_multiplier": 0}, ValueError, "`cycle_length_multiplier` must be finite an"),
        (
            {"cycle_length_multiplier": math.inf},
            ValueError,
            "Received: cycle_length_multiplier=inf",
        ),
        ({"lr_init": -0.1}, ValueError, "`lr_init` must be finite and above 0. Received: lr_init="),
        ({"lr_init": math.nan}, ValueError, "Received: lr_init=nan"),
        ({"lr_init": "high"}, TypeError, "`lr_init` must be a number. Received: lr_init='high'"),
        ({"lr_min": -1e-3}, ValueError, "`lr_min` must be finite and at least 0. Received: lr_min"),
        ({"lr_multiplier": 0.0}, ValueError, "`lr_multiplier` must be finite and above 0. Receive"),
        ({"warmup": -1}, ValueError, "`warmup` must be at least 0. Received: warmup=-1"),
        ({"warmup": 10}, ValueError, "`warmup` must be shorter than the first cycle. Received: "),
        ({"lr_init": 0.1, "lr_min": 0.2}, ValueError, "must not be above `lr_init`, the peak. Rec"),
    ],
)
def test_invalid_values_are_refused(arguments, error, message):
    with pytest.raises(error) as caught:
        CosineAnnealing(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("schedule", "epochs", "message"),
    [
        (EqualCycles(5, 0.1), 4, "Train for 5 epochs or more, or ask for 4 cycles or fewer."),
        (CosineAnnealing(10, lr_init=0.1), 9, "Train for 10 epochs or more, or use a shorter"),
        (
            CosineAnnealing(4, 0.5, lr_init=0.1),
            20,
            "Cycle 3 would be less than one epoch long. Received: cycle_length=4, "
            "cycle_length_multiplier=0.5. Train for fewer epochs (7 fill the cycles before it)",
        ),
        (CosineAnnealing(10), 20, "has no peak learning rate. Received: lr_init=None"),
        (EqualCycles(2, 0.1), 0, "`epochs` must be at least 1. Received: epochs=0"),
    ],
)
def test_impossible_budgets_are_refused_with_what_would_work(schedule, epochs, message):
    with pytest.raises(ValueError) as caught:
        schedule.plan(epochs)
    assert message in str(caught.value)


def test_steps_per_epoch_must_be_a_whole_number():
    with pytest.raises(TypeError, match="`steps_per_epoch` must be a whole number. Received: ste"):
        EqualCycles(2, 0.1).rates(4, 2.5)
