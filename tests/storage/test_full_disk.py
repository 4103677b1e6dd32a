"""A disk that fills up, in a child process: an error, and everything written before is usable."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from snapshot_ensemble import SnapshotEnsemble

TESTS = pathlib.Path(__file__).parents[1]

RUN = """
import errno, json, os, resource, sys, traceback
import keras, numpy as np
from snapshot_ensemble import SnapshotEnsemble

def run(directory, limit, frozen):
    keras.utils.set_random_seed(0)
    x, y = np.ones((8, 64), "float32"), np.zeros(8, int)
    layers = keras.layers
    model = keras.Sequential([keras.Input((64,)), layers.Dense(256), layers.Dense(256, "softmax")])
    model.layers[0].trainable = not frozen
    model.compile("adam", "sparse_categorical_crossentropy", run_eagerly=True)
    ens = SnapshotEnsemble(model, cycles=4, lr_init=0.1, directory=directory)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        ens.fit(x, y, epochs=4, verbose=0)
        outcome = "finished"
    except OSError as error:
        assert error.errno in (errno.ENOSPC, errno.EFBIG), error
        assert "cannot be written to" in str(error), error
        assert f"including {len(ens)} snapshot" in str(error), error
        outcome = "refused"
    memory = SnapshotEnsemble(model, cycles=1, lr_init=0.1)
    memory.fit(x, y, epochs=1, verbose=0)
    assert len(memory) == 1
    if len(ens):
        assert np.isfinite(ens.predict(x, verbose=0)).all()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return outcome, len(ens)

for case in json.loads(sys.argv[1]):
    reading, writing = os.pipe()
    child = os.fork()  # Before TensorFlow runs anything: importing it takes longest.
    if child == 0:
        code = 1
        try:
            os.write(writing, json.dumps(run(*case)).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    status = os.waitpid(child, 0)[1]
    # A signal, such as SIGSEGV, must not have ended it.
    assert status == 0, (case, status)
    print(os.read(reading, 1000).decode(), flush=True)
"""


def run(*cases):
    """The outcome and number of members for each directory, limit of file sizes and `frozen`."""
    cases = [[str(directory), limit, frozen] for directory, limit, frozen in cases]
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(cases)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def check(directory, members):
    """The directory is as it was before the disk was full, and can be used once there is room."""
    assert not list(directory.glob("writing-*"))
    if members:
        loaded = SnapshotEnsemble.load(directory)
        assert len(loaded) == members
        assert np.isfinite(loaded.predict(np.ones((2, 64)), verbose=0)).all()
        loaded.weights = [1] + [0] * (members - 1)  # It can be written again.


@pytest.mark.slow
def test_files_that_may_not_grow(tmp_path):
    """The model's file has 340 kB, each snapshot 340 kB, and the state of training 1 MB."""
    limits = [0, 1_000, 30_000, 340_000, 700_000]
    outcomes = run(*((tmp_path / str(limit), limit, False) for limit in limits))
    assert outcomes == [("finished", 4), *[("refused", 0)] * 3, ("refused", 1)]
    for limit, (_, members) in zip(limits, outcomes, strict=True):
        check(tmp_path / str(limit), members)


@pytest.fixture
def small_disk(tmp_path_factory):
    """Mounts a file system of a given size, if this process may."""
    place, mounted = tmp_path_factory.mktemp("disks"), []

    def mount(kilobytes):
        disk = place / str(len(mounted))
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
        if shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
            pytest.skip("may not mount a file system")
        mounted.append(disk)
        return disk

    yield mount
    for disk in mounted:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_small_disks(tmp_path, small_disk):
    cases = [
        (small_disk(kilobytes) / "run", 0, frozen)
        for kilobytes in (100, 1_500, 2_500)
        for frozen in (False, True)
    ]
    outcomes = run(*cases)
    assert {outcome for outcome, _ in outcomes[:4]} == {"refused"}
    for number, ((directory, *_), (_, members)) in enumerate(zip(cases, outcomes, strict=True)):
        if not directory.exists():  # It was made and removed again.
            assert members == 0
            continue
        elsewhere = tmp_path / str(number) / "run"
        shutil.copytree(directory, elsewhere)  # Where there is room.
        check(elsewhere, members)
