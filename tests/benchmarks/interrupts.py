"""Presses Ctrl-C at each step of the writes of a run, and looks at what is left.

    python tests/benchmarks/interrupts.py

A step is a write, a flush, a rename, a removal, or the release of the lock, in the training thread
or in the background. After each interrupted `fit` there must be: `KeyboardInterrupt` and nothing
else; every cycle that had ended, in memory and in the directory; no temporary files, no thread and
no lock; and the resumed run must end with the same weights, bit for bit, as an uninterrupted one.
"""

import argparse
import contextlib
import dataclasses
import itertools
import os
import pathlib
import shutil
import signal
import tempfile
import threading
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.storage import weight_files
from snapshot_ensemble.storage.atomic_file import Draft
from snapshot_ensemble.storage.lock import DirectoryLock

X = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
Y = np.argmax(X[:, :3], axis=1)
EPOCHS, CYCLES = 4, 2

STEPS = {
    "write": (Draft, "write"),
    "weights": (weight_files, "weights_file"),
    "flush": (os, "fsync"),
    "rename": (os, "replace"),
    "remove": (os, "unlink"),
    "unlock": (DirectoryLock, "release"),
}


@contextlib.contextmanager
def each_step(act):
    """Calls a function with the name of each step before it is taken."""
    with contextlib.ExitStack() as stack:
        for name, (owner, attribute) in STEPS.items():
            function = getattr(owner, attribute)

            def stepped(*args, function=function, name=name, **kwargs):
                act(name)
                return function(*args, **kwargs)

            stack.enter_context(mock.patch.object(owner, attribute, stepped))
        yield


class Ended(keras.callbacks.Callback):
    """Counts the cycles that have ended, as the user sees it."""

    def __init__(self):
        super().__init__()
        self.cycles = 0

    def on_epoch_end(self, epoch, logs=None):
        self.cycles += (epoch + 1) % (EPOCHS // CYCLES) == 0


def train(directory, ended=None, **arguments):
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(5, "relu"), layers.Dense(3, "softmax")]
    )
    # Eager, since tracing takes longer than a few steps.
    model.compile("adam", "sparse_categorical_crossentropy", run_eagerly=True)
    ens = SnapshotEnsemble(model, cycles=CYCLES, lr_init=0.1, directory=directory, max_snapshots=2)
    callbacks, error = [] if ended is None else [ended], None
    try:
        ens.fit(X, Y, epochs=EPOCHS, batch_size=16, verbose=0, callbacks=callbacks, **arguments)
    except BaseException as caught:
        error = caught
    return ens, error


def weights_of(ens):
    return [array for member in ens for array in member.get_weights()]


def uninterrupted_steps(directory):
    """The names of the steps of a run that overwrites an earlier one."""
    train(directory)
    steps = []
    with each_step(steps.append):
        train(directory, overwrite=True)
    return steps


@dataclasses.dataclass
class Interrupted:
    """A run that was interrupted at a step, and what was wrong afterwards."""

    step: int
    wrong: list


def interrupted_runs(scratch, steps):
    """Interrupts an overwriting run at each of the steps, and resumes it."""
    expected, _ = train(pathlib.Path(scratch) / "expected", overwrite=True)
    source = pathlib.Path(scratch) / "source"
    train(source)
    return [_interrupted(source, pathlib.Path(scratch) / "run", s, expected) for s in steps]


def _interrupted(source, directory, step, expected):
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(source, directory)
    number, ended = itertools.count(), Ended()

    def act(name):
        if next(number) == step:
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with each_step(act):
            ens, error = train(directory, ended, overwrite=True)
            cycles = ended.cycles
    finally:
        signal.signal(signal.SIGINT, before)
    return Interrupted(step, list(_wrong(directory, ens, error, cycles, expected)))


def _wrong(directory, ens, error, cycles, expected):
    # Python drops an exception in the callback of a weak reference. Then the run ends as always.
    if type(error) is not KeyboardInterrupt and (error is not None or len(ens) < CYCLES):
        yield f"raised {error!r}"
    if any(thread.name.startswith("snapshot-ensemble") for thread in threading.enumerate()):
        yield "a thread goes on"
    if left := [path.name for path in directory.iterdir() if path.name.startswith("writing-")]:
        yield f"left over: {left}"
    with DirectoryLock(directory):
        pass
    # A run that has saved its state before its first snapshot cannot be loaded, only resumed.
    if len(ens):
        loaded = SnapshotEnsemble.load(directory)
        if loaded.snapshots != ens.snapshots or loaded.history != ens.history:
            yield "memory and directory differ"
    if len(ens) < cycles:
        yield f"{len(ens)} of {cycles} cycles were kept"
    again, error = train(directory, resume=True)
    if error is not None:
        yield f"cannot be resumed: {error!r}"
    elif not all(map(np.array_equal, weights_of(again), weights_of(expected))):
        yield "the resumed run ends differently"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="interrupt at every n-th step")
    every = parser.parse_args(arguments).every
    with tempfile.TemporaryDirectory() as scratch:
        names = uninterrupted_steps(pathlib.Path(scratch) / "steps")
        results = interrupted_runs(scratch, range(0, len(names), every))
    print(f"{'step':10}{'interrupted':>13}{'nothing lost':>14}")
    for kind in [*STEPS, "all"]:
        chosen = [r for r in results if kind in (names[r.step], "all")]
        print(f"{kind:10}{len(chosen):13}{sum(not r.wrong for r in chosen):14}")
    for result in results:
        for wrong in result.wrong:
            print(f"step {result.step} ({names[result.step]}): {wrong}")
    return results


if __name__ == "__main__":
    main()
