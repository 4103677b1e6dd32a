"""The state of training: when it is saved, and what is refused when it is read."""

import contextlib
import hashlib
import os
import re

import keras
import numpy as np
import pytest
from models import SimulatedCrashError
from resume_cases import arrays, assert_same_outcome, crash_in_epoch, dense, outcome, run
from storage_cases import manifest_of, write_manifest

from snapshot_ensemble import SnapshotEnsemble, SnapshotError
from snapshot_ensemble.storage.directory import DirectoryStore


@pytest.mark.slow
def test_snapshots_newer_than_the_state_are_taken_again(tmp_path, monkeypatch):
    expected = outcome(*run(tmp_path / "uninterrupted"))
    keep_state = DirectoryStore.keep_state

    def crash(self, write):
        if len(self.snapshots) == 2:
            raise SimulatedCrashError
        keep_state(self, write)

    monkeypatch.setattr(DirectoryStore, "keep_state", crash)
    with pytest.raises(SimulatedCrashError):
        run(tmp_path / "interrupted")
    monkeypatch.undo()
    assert len(SnapshotEnsemble.load(tmp_path / "interrupted")) == 2
    assert_same_outcome(outcome(*run(tmp_path / "interrupted", resume=True)), expected)


def state_files(directory):
    with contextlib.suppress(SnapshotError):
        DirectoryStore.open(directory)  # Waits for pending writes of this process.
    return sorted(path.name for path in directory.glob("state-*"))


@pytest.mark.slow
def test_save_every_sets_how_often_the_state_is_saved(tmp_path):
    seen = []
    record = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: seen.append(state_files(tmp_path / "run"))
    )
    run(tmp_path / "run", callbacks=[record], cycles=2, epochs=10, save_every=3)
    # After epochs 3, 5 (the cycle's end), 6 and 9; one file at any time.
    assert [seen[i] != seen[i - 1] for i in range(1, 10)] == [
        e in (3, 5, 6, 9) for e in range(1, 10)
    ]
    assert all(len(names) <= 1 for names in seen)


def test_without_a_saved_state_a_run_cannot_be_resumed(tmp_path):
    with pytest.raises(SimulatedCrashError):
        run(tmp_path / "interrupted", callbacks=[crash_in_epoch(3)], save_every=None)
    assert state_files(tmp_path / "interrupted") == []
    with pytest.raises(ValueError, match=r"no state of training to resume from\. Received: resume"):
        run(tmp_path / "interrupted", resume=True)
    assert len(SnapshotEnsemble.load(tmp_path / "interrupted")) == 1


def test_the_runs_of_a_saved_ensemble_count_as_finished(tmp_path):
    keras.utils.set_random_seed(3)
    ens = SnapshotEnsemble(dense(), cycles=2, lr_init=0.1)
    ens.fit(**arrays(), epochs=2, verbose=0)
    ens.save(tmp_path / "saved")
    again = SnapshotEnsemble(dense(), cycles=2, lr_init=0.1, directory=tmp_path / "saved")
    history = again.fit(**arrays(), epochs=2, verbose=0, resume=True)
    assert (history.epoch, history.history) == ([0, 1], ens.history)
    assert len(again) == 2


def test_a_saved_copy_of_an_interrupted_run_cannot_be_resumed_and_stays(interrupted_run, tmp_path):
    SnapshotEnsemble.load(interrupted_run).save(tmp_path / "saved")
    with pytest.raises(ValueError, match="no state of training to resume from"):
        run(tmp_path / "saved", resume=True)
    assert len(SnapshotEnsemble.load(tmp_path / "saved")) == 1


def forge_state(directory, **arrays):
    """Replaces the state, with a valid manifest."""
    path = directory / state_files(directory)[0]
    np.savez(path, **arrays)
    manifest = manifest_of(directory)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest["state"] = {"name": path.name, "size": path.stat().st_size, "sha256": digest}
    write_manifest(directory, manifest)
    return path


def arrays_of(directory):
    with np.load(directory / state_files(directory)[0]) as file:
        return {name: file[name] for name in file.files}


class Harmful:
    """Creates a folder when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("harm",))


def test_a_pickle_in_a_state_is_refused_and_not_loaded(interrupted_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    harmful = np.empty(1, object)
    harmful[0] = Harmful()
    path = forge_state(interrupted_run, **{**arrays_of(interrupted_run), "variable_0": harmful})
    with pytest.raises(SnapshotError, match=re.escape(str(path))):
        run(interrupted_run, resume=True)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("facts", [b"", b"[]", b"{}", b'{"run": "x"}', b"\xff", b"torn"], ids=repr)
def test_a_state_with_invalid_facts_is_refused_by_name(interrupted_run, facts):
    actual = {**arrays_of(interrupted_run), "facts": np.frombuffer(facts, "uint8")}
    path = forge_state(interrupted_run, **actual)
    with pytest.raises(SnapshotError, match=re.escape(str(path))):
        run(interrupted_run, resume=True)


def test_a_state_of_other_variables_is_refused(interrupted_run):
    actual = arrays_of(interrupted_run)
    del actual["variable_3"]
    forge_state(interrupted_run, **actual)
    with pytest.raises(SnapshotError, match="belongs to another model or optimizer. Received: "):
        run(interrupted_run, resume=True)
