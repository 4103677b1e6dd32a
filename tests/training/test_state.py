"""The state of training: when it is saved, and what is refused when it is read."""

import contextlib
import hashlib
import os
import re

import keras
import numpy as np
import pytest
from models import BreakOffError
from resume_cases import arrays, assert_same_outcome, break_off_in, dense, outcome, run
from storage_cases import manifest_of, write_manifest

from snapshot_ensemble import SnapshotEnsemble, SnapshotError
from snapshot_ensemble.storage.directory import DirectoryStore


def test_snapshots_ahead_of_the_state_are_made_again(tmp_path, monkeypatch):
    expected = outcome(*run(tmp_path / "unbroken"))
    keep_state = DirectoryStore.keep_state

    def break_off(self, write):
        if len(self.snapshots) == 2:
            raise BreakOffError
        keep_state(self, write)

    monkeypatch.setattr(DirectoryStore, "keep_state", break_off)
    with pytest.raises(BreakOffError):
        run(tmp_path / "broken")
    monkeypatch.undo()
    assert len(SnapshotEnsemble.load(tmp_path / "broken")) == 2
    assert_same_outcome(outcome(*run(tmp_path / "broken", resume=True)), expected)


def state_files(directory):
    with contextlib.suppress(SnapshotError):
        DirectoryStore.open(directory)  # Waits for what this process is writing there.
    return sorted(path.name for path in directory.glob("state-*"))


def test_how_often_the_state_is_saved(tmp_path):
    seen = []
    look = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: seen.append(state_files(tmp_path / "run"))
    )
    run(tmp_path / "run", callbacks=[look], cycles=2, epochs=10, save_every=3)
    # After epochs 3, 5 (the cycle's end), 6 and 9; one file at any time.
    assert [seen[i] != seen[i - 1] for i in range(1, 10)] == [
        e in (3, 5, 6, 9) for e in range(1, 10)
    ]
    assert all(len(names) <= 1 for names in seen)


def test_without_states_there_is_nothing_to_go_on_from(tmp_path):
    with pytest.raises(BreakOffError):
        run(tmp_path / "broken", callbacks=[break_off_in(3)], save_every=None)
    assert state_files(tmp_path / "broken") == []
    with pytest.raises(ValueError, match=r"no state of training to resume from\. Received: resume"):
        run(tmp_path / "broken", resume=True)
    assert len(SnapshotEnsemble.load(tmp_path / "broken")) == 1


def test_an_ensemble_that_was_saved_has_ended_its_runs(tmp_path):
    keras.utils.set_random_seed(3)
    ens = SnapshotEnsemble(dense(), cycles=2, lr_init=0.1)
    ens.fit(**arrays(), epochs=2, verbose=0)
    ens.save(tmp_path / "saved")
    again = SnapshotEnsemble(dense(), cycles=2, lr_init=0.1, directory=tmp_path / "saved")
    history = again.fit(**arrays(), epochs=2, verbose=0, resume=True)
    assert (history.epoch, history.history) == ([0, 1], ens.history)
    assert len(again) == 2


def test_the_members_of_a_broken_run_that_were_saved_elsewhere_stay(broken_run, tmp_path):
    SnapshotEnsemble.load(broken_run).save(tmp_path / "saved")
    with pytest.raises(ValueError, match="no state of training to resume from"):
        run(tmp_path / "saved", resume=True)
    assert len(SnapshotEnsemble.load(tmp_path / "saved")) == 1


def forge_state(directory, **arrays):
    """Puts another state in, with a manifest that fits."""
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
    """Does something when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("harm",))


def test_a_pickle_in_a_state_is_refused_and_not_run(broken_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    harmful = np.empty(1, object)
    harmful[0] = Harmful()
    path = forge_state(broken_run, **{**arrays_of(broken_run), "variable_0": harmful})
    with pytest.raises(SnapshotError, match=re.escape(str(path))):
        run(broken_run, resume=True)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("facts", [b"", b"[]", b"{}", b'{"run": "x"}', b"\xff", b"torn"], ids=repr)
def test_a_state_without_its_facts_is_refused_by_name(broken_run, facts):
    actual = {**arrays_of(broken_run), "facts": np.frombuffer(facts, "uint8")}
    path = forge_state(broken_run, **actual)
    with pytest.raises(SnapshotError, match=re.escape(str(path))):
        run(broken_run, resume=True)


def test_a_state_of_other_variables_is_refused(broken_run):
    actual = arrays_of(broken_run)
    del actual["variable_3"]
    forge_state(broken_run, **actual)
    with pytest.raises(SnapshotError, match="not this model's and its optimizer's. Received: "):
        run(broken_run, resume=True)
