"""Files that a reader needs stay until it has ended."""

import gc

import numpy as np
import pytest

from snapshot_ensemble import Snapshot, SnapshotError
from snapshot_ensemble.storage.atomic_file import Draft
from snapshot_ensemble.storage.memory import MemoryStore
from snapshot_ensemble.storage.record import Learned, Progress
from snapshot_ensemble.storage.view import FilesInUse, View


def view_of(*files):
    return View([], 0, Learned(), Progress, lambda *_: [], lambda *_: None, frozenset(files))


def test_a_file_is_removed_once_no_view_needs_it(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).touch()

    def names():
        gc.collect()
        return sorted(path.name for path in tmp_path.iterdir())

    files = FilesInUse(tmp_path)
    first, second = files.add(view_of("a", "b")), files.add(view_of("b"))
    files.remove({"a", "b", "c", "missing"})
    assert names() == ["a", "b"]
    del first
    assert names() == ["b"]
    del second
    assert names() == []


def test_a_view_stays_as_it_is():
    store = MemoryStore()
    store.add_weights([np.zeros(2)], Snapshot(0))
    store.learn(store.version, temperature=2.0)
    before = store.view()
    store.record.progress.record_epoch({"loss": 1.0})
    store.record.progress.done.epochs = 1
    store.add_weights([np.ones(2)], Snapshot(1))
    assert (len(before.snapshots), len(store.view().snapshots)) == (1, 2)
    assert before.learned.temperature == 2
    assert store.view().learned.temperature == 1
    assert before.progress().history == {}
    assert store.view().progress().history == {"loss": [1.0]}
    store.learn(before.version, temperature=3.0)  # Of other members: forgotten.
    assert store.view().learned.temperature == 1


def test_a_file_that_could_not_be_written_is_named(tmp_path):
    draft = Draft(tmp_path, "some.npz", lambda path: None)
    with pytest.raises(SnapshotError, match=r"some\.npz' could not be written"):
        draft.checked(tmp_path)
