"""One writer per directory: others are refused, and a dead one does not block."""

import subprocess
import sys

import keras
import pytest
from resume_cases import run
from storage_cases import manifest_of

from snapshot_ensemble import SnapshotEnsemble, SnapshotError
from snapshot_ensemble.storage.directory import DirectoryStore

HOLDER = """
import sys
from snapshot_ensemble.storage.lock import DirectoryLock
import pathlib
with DirectoryLock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(interrupted_run):
    """A directory that another process writes to, and that process."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(interrupted_run)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield interrupted_run, process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_second_writer_is_refused_at_once_and_a_dead_one_does_not_block(held):
    directory, process = held
    ens = SnapshotEnsemble.load(directory)  # Reading is allowed.
    message = "Another run is writing to the directory. Received: directory="
    with pytest.raises(BlockingIOError, match=message):
        run(directory, resume=True)
    with pytest.raises(BlockingIOError, match=message):
        run(directory, overwrite=True)
    with pytest.raises(BlockingIOError, match=message):
        ens.weights = [1.0]
    assert ens.weights is None
    ens.save(directory.parent / "other")
    with pytest.raises(BlockingIOError, match=message):
        ens.save(directory)
    process.kill()
    process.wait()
    ens, _ = run(directory, resume=True)
    assert len(ens) == 3


def test_a_second_writer_in_the_same_process_is_refused(interrupted_run):
    other = SnapshotEnsemble.load(interrupted_run)

    def write(epoch, logs):
        with pytest.raises(BlockingIOError, match="Another run is writing"):
            other.weights = [1.0]
        seen.append(epoch)

    seen = []
    run(
        interrupted_run, resume=True, callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=write)]
    )
    assert seen == [3, 4, 5]
    # Now its view of the directory is outdated.
    with pytest.raises(SnapshotError, match=r"ensemble\.json' was changed by another process"):
        other.weights = [1.0]


def test_files_left_by_a_killed_writer_are_removed(interrupted_run):
    tag = manifest_of(interrupted_run)["tag"]
    left = [
        f"writing-{'0123456789abcdef' * 2}-snapshot-0009-{tag}.weights.h5",
        f"snapshot-9999-{tag}.weights.h5",
        f"state-9999-{tag}.npz",
    ]
    for name in [*left, "mine.weights.h5"]:
        (interrupted_run / name).write_bytes(b"left")
    run(interrupted_run, resume=True)
    names = {path.name for path in interrupted_run.iterdir()}
    assert not names & set(left)
    assert "mine.weights.h5" in names


def test_a_directory_with_only_files_of_a_killed_writer_counts_as_empty(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ensemble.lock").touch()
    (tmp_path / "run" / f"writing-{'0123456789abcdef' * 2}-ensemble.json").write_bytes(b"left")
    ens, _ = run(tmp_path / "run")
    assert len(ens) == 3


def test_a_reader_reads_again_if_a_writer_replaced_its_files(interrupted_run, monkeypatch):
    opened, open_store = [], DirectoryStore.open

    def overtaken(directory):
        store = open_store(directory)
        if not opened:
            opened.append(store)
            run(
                interrupted_run, resume=True, max_snapshots=1
            )  # Removes the file that the reader would read.
        return store

    monkeypatch.setattr(DirectoryStore, "open", overtaken)
    loaded = SnapshotEnsemble.load(interrupted_run)
    assert [snapshot.cycle for snapshot in loaded.snapshots] == [2]
