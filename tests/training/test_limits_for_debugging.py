"""Keras's own limits for debugging runs: `max_epochs` and `max_steps_per_epoch`."""

import keras
import pytest
from training_cases import (
    FLOOR,
    PEAK,
    arrays,
    cosine,
    descend,
    ensemble,
    fitted,
    members,
    one_weight,
)

from snapshot_ensemble import CosineAnnealing, SnapshotEnsemble
from snapshot_ensemble.schedules import EqualCycles

limited = pytest.mark.filterwarnings("ignore:Limiting:UserWarning", "ignore:Your input ran out")


@pytest.fixture
def limits():
    """Sets the limits, and removes them afterwards."""

    def set_limits(epochs=None, steps=None):
        keras.config.set_max_epochs(epochs)
        keras.config.set_max_steps_per_epoch(steps)

    yield set_limits
    set_limits()


@limited
@pytest.mark.parametrize(
    ("cycles", "lengths"), [(1, [3]), (2, [1, 2]), (3, [1, 1, 1]), (5, [1, 1, 1])]
)
def test_the_cycles_end_where_keras_ends(cycles, lengths, limits):
    limits(epochs=3)
    ens = ensemble(one_weight(), cycles)
    history = ens.fit(**arrays(), epochs=50, verbose=0)
    assert members(ens) == descend(*(cosine(8 * length) for length in lengths))
    assert len(history.epoch) == 3
    assert [cycle.length for cycle in ens.plan(50)] == lengths


@limited
def test_automatic_cycles_are_those_of_the_limit(limits):
    limits(epochs=3)
    ens = ensemble(one_weight(), "auto")
    assert ens.plan(50) == EqualCycles(1, PEAK, FLOOR).plan(3)
    ens.fit(**arrays(), epochs=50, verbose=0)
    assert members(ens) == descend(cosine(24))


@limited
@pytest.mark.parametrize(("epochs", "lengths"), [(1, [1]), (3, [3]), (9, [4, 5])])
def test_a_schedule_is_shortened(epochs, lengths, limits):
    limits(epochs=epochs)
    schedule = CosineAnnealing(cycle_length=4, lr_init=0.1, warmup=2)
    ens = SnapshotEnsemble(one_weight(), schedule=schedule, task="regression")
    ens.fit(**arrays(), verbose=0)
    assert [snapshot.epoch + 1 for snapshot in ens.snapshots] == [lengths[0], sum(lengths)][
        -len(lengths) :
    ]


@limited
def test_a_limit_counts_from_the_first_epoch_as_in_keras(limits):
    limits(epochs=4)
    assert members(fitted(epochs=50, initial_epoch=2)) == descend(cosine(8), cosine(8))


@limited
def test_a_limit_that_leaves_no_epoch_is_refused(limits):
    limits(epochs=2)
    message = r"Received: max_epochs=2, initial_epoch=2\. Remove the limit with"
    with pytest.raises(ValueError, match=message):
        fitted(epochs=50, initial_epoch=2)


@limited
def test_a_limit_above_the_budget_changes_nothing(limits):
    limits(epochs=4)
    assert members(fitted(epochs=4)) == descend(cosine(16), cosine(16))


@limited
@pytest.mark.parametrize(("most", "steps"), [(3, [3, 3, 2, 3]), (8, [8] * 4), (20, [8] * 4)])
def test_rates_are_exact_with_a_limit_of_steps(most, steps, limits):
    limits(steps=most)
    first, second = sum(steps[:2]), sum(steps[2:])
    assert members(fitted(epochs=4)) == descend(cosine(first), cosine(second))


@limited
def test_a_student_learns_through_the_whole_cycle(limits):
    ens = fitted(epochs=4)
    limits(epochs=2)
    student = ens.distill(**arrays(), epochs=50, alpha=1.0, verbose=0)
    assert len(student.history.epoch) == 2
    assert student.history.history["learning_rate"][-1] == pytest.approx(cosine(16)[-1])
