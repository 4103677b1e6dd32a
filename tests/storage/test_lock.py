"""One writer per directory: others are refused, and a dead one does not block."""

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import keras
import pytest
from resume_cases import run
from storage_cases import manifest_of

from snapshot_ensemble import SnapshotEnsemble, SnapshotError
from snapshot_ensemble.storage.directory import DirectoryStore
from snapshot_ensemble.storage.lock import DirectoryLock

TESTS = str(pathlib.Path(__file__).parents[1])

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_copying_the_directory_during_a_run_does_not_release_the_lock(tmp_path):
    """With locks of POSIX, opening and closing the file anywhere in the process would."""
    directory, refused = tmp_path / "run", []

    def copy(epoch, logs):
        if epoch != 1:
            return
        with contextlib.suppress(shutil.Error):  # A file may be gone by the time it is copied.
            shutil.copytree(directory, tmp_path / f"backup-{epoch}")
        assert (tmp_path / f"backup-{epoch}" / "ensemble.lock").exists()
        other = subprocess.run(
            [sys.executable, "-c", HOLDER, str(directory)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        refused.append("BlockingIOError: Another run is writing" in other.stderr)

    run(directory, epochs=3, callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=copy)])
    assert refused == [True]
    assert len(SnapshotEnsemble.load(directory)) == 3


def test_threads_exclude_each_other(tmp_path):
    inside, most, refused = [], [], []

    def enter():
        for _ in range(200):
            try:
                with DirectoryLock(tmp_path):
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0.0005)
                    inside.pop()
            except BlockingIOError:
                refused.append(1)
                time.sleep(0.0005)

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert refused


@pytest.mark.slow
def test_without_a_lock_the_manifest_of_another_writer_is_not_replaced(tmp_path, monkeypatch):
    """Some network file systems have no locks."""
    directory = tmp_path / "run"
    monkeypatch.setattr(DirectoryLock, "acquire", lambda lock: lock.__dict__.update(ours=True))
    monkeypatch.setattr(DirectoryLock, "release", lambda lock: lock.__dict__.update(ours=False))
    monkeypatch.setattr(DirectoryLock, "held", property(lambda lock: lock.__dict__.get("ours")))
    directory.mkdir()

    def intrude(epoch, logs):
        if epoch == 1:
            run(directory, overwrite=True, epochs=3)

    message = r"ensemble\.json' was changed by another process since it was read"
    with pytest.raises(SnapshotError, match=message):
        run(
            directory,
            epochs=3,
            callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=intrude)],
        )
    loaded = SnapshotEnsemble.load(directory)
    assert [snapshot.cycle for snapshot in loaded.snapshots] == [0, 1, 2]
    assert not list(directory.glob("writing-*"))


FORK = """
import os, sys, time
import keras
from resume_cases import run

class Forks(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            self.child = os.fork()
            if self.child == 0:
                raise {error}

forks = Forks()
try:
    ens, _ = run(sys.argv[1], epochs=3, callbacks=[forks])
except BaseException as error:
    assert forks.child == 0
    print("child", type(error).__name__, flush=True)
    os._exit(7)
print("parent", len(ens), os.waitpid(forks.child, 0)[1] >> 8, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("error", ["KeyboardInterrupt", "ValueError"])
def test_a_child_forked_during_a_run_neither_hangs_nor_writes(tmp_path, error):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK.format(error=error), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([TESTS, *sys.path])},
    )
    assert done.stdout.split() == ["child", error, "parent", "3", "7"], done.stderr
    assert len(SnapshotEnsemble.load(tmp_path / "run")) == 3


def test_a_child_may_lock_another_directory_and_leaves_its_parents_lock(tmp_path):
    with DirectoryLock(tmp_path / "a") as lock:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                assert not lock.held
                lock.release()
                with DirectoryLock(tmp_path / "b") as other:
                    assert other.held
                with contextlib.suppress(BlockingIOError):
                    lock.acquire()
                    os._exit(2)
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(BlockingIOError):
            DirectoryLock(tmp_path / "a").acquire()
