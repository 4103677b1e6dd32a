"""What the state of a run that has ended holds: slots, but no second copy of the last snapshot."""

import json

import keras
import numpy as np
import pytest
from models import SimulatedCrashError
from resume_cases import X, Y, assert_same_outcome, crash_in_epoch, dense, outcome, run

from snapshot_ensemble import SnapshotError
from snapshot_ensemble.storage.directory import DirectoryStore


def state_of(directory):
    """The names of the arrays in the state, and its facts."""
    with np.load(DirectoryStore.open(directory).state) as file:
        facts = json.loads(file["facts"].tobytes())
        return {name for name in file.files if name.startswith("variable")}, facts


@pytest.mark.slow
def test_an_ended_run_leaves_out_the_weights_of_its_last_snapshot(tmp_path):
    with pytest.raises(SimulatedCrashError):
        run(tmp_path / "interrupted", callbacks=[crash_in_epoch(5)])
    ens, _ = run(tmp_path / "ended")
    weights = len(ens.model.weights)
    held, facts = state_of(tmp_path / "ended")
    assert facts["snapshot"] == 2
    assert len(facts["shared"]) == weights
    assert not held & {f"variable_{number}" for number in facts["shared"]}
    in_the_middle, facts = state_of(tmp_path / "interrupted")
    assert facts["snapshot"] is None
    assert len(in_the_middle) == len(held) + weights


@pytest.mark.slow
@pytest.mark.parametrize("max_snapshots", [1, None])
def test_a_second_fit_after_it_is_resumed_like_an_uninterrupted_one(tmp_path, max_snapshots):
    def twice(directory, resume=False, callbacks=()):
        ens, _ = run(directory, resume=resume, max_snapshots=max_snapshots)
        history = ens.fit(
            X, Y, epochs=3, verbose=0, resume=resume, callbacks=list(callbacks), batch_size=8
        )
        return ens, history

    expected = outcome(*twice(tmp_path / "uninterrupted"))
    with pytest.raises(SimulatedCrashError):
        twice(tmp_path / "interrupted", callbacks=[crash_in_epoch(0)])
    assert_same_outcome(outcome(*twice(tmp_path / "interrupted", resume=True)), expected)


@pytest.mark.slow
def test_weights_that_a_callback_sets_in_the_end_are_kept(tmp_path):
    class Zero(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            self.model.layers[0].kernel.assign(keras.ops.zeros((4, 5)))

    ens, _ = run(tmp_path / "run", callbacks=[Zero()])
    _, facts = state_of(tmp_path / "run")
    assert len(facts["shared"]) == len(ens.model.weights) - 1
    again, _ = run(tmp_path / "run", callbacks=[Zero()], resume=True)
    np.testing.assert_array_equal(again.model.layers[0].kernel, np.zeros((4, 5)))
    for one, other in zip(again.model.weights, ens.model.weights, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_a_missing_snapshot_is_named(tmp_path):
    run(tmp_path / "run")
    store = DirectoryStore.open(tmp_path / "run")
    with pytest.raises(SnapshotError, match="run' has no snapshot of cycle 7, whose weights its"):
        store.base(dense(), 7)
