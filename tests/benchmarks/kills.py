"""Kills and resumes training repeatedly, and compares the result with an uninterrupted run.

    python tests/benchmarks/kills.py --kills 50

A process is killed (SIGKILL) at random moments after the start of training, every other time in
the middle of a write, and the same script is run again with `resume=True`. All weights of all
snapshots, the final weights and the history must equal those of an uninterrupted run bit for bit.

The same must hold if a run ends because no file may grow beyond a random size, as on a full disk
(an `OSError`, not a signal), and if two processes start in one directory at the same time (one of
them is refused). For Ctrl-C at each step of a run's writes, see `interrupts.py`.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import resource
import select
import signal
import sys
import tempfile
import time
import traceback

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from snapshot_ensemble import SnapshotEnsemble

# The last one has arrays, too, and decides how many cycles it has when the first one has ended.
KINDS = ("arrays", "tf.data", "auto")
EPOCHS, CYCLES, ROWS = 12, 4, 60


def make_data(kind):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 4)).astype("float32")
    y = np.argmax(x[:, :3], axis=1)
    if kind != "tf.data":
        return {"x": x, "y": y, "batch_size": 16, "shuffle": True}
    data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(ROWS, seed=3)
    # The length is unknown to Keras, which changes how often it begins a pass.
    return {"x": data.filter(lambda x, y: True).batch(16)}


def make_model():
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(16, "relu"),
            layers.BatchNormalization(),
            layers.Dropout(0.3),
            layers.Dense(3, "softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


class Begun(keras.callbacks.Callback):
    """Notifies the parent process after the first training step."""

    def __init__(self, pipe):
        super().__init__()
        self._pipe = pipe

    def on_train_batch_end(self, batch, logs=None):
        if self._pipe is not None:
            os.write(self._pipe, b"!")
            self._pipe = None


def train(kind, directory, pipe=None):
    """A user's script; writes `result.npz` when training has ended."""
    keras.utils.set_random_seed(7)
    tf.config.experimental.enable_op_determinism()
    model = make_model()
    data = make_data(kind)
    held = (np.ones((8, 4), "float32"), np.zeros(8, int))
    stop = keras.callbacks.EarlyStopping("loss", patience=5, restore_best_weights=True)
    cycles = "auto" if kind == "auto" else CYCLES
    ens = SnapshotEnsemble(model, cycles=cycles, lr_init=0.01, directory=directory / "ensemble")
    history = ens.fit(
        **data,
        epochs=EPOCHS,
        resume=True,
        validation_data=held,
        callbacks=[stop, Begun(pipe)],
        verbose=0,
    )
    arrays = {f"model_{i}": array for i, array in enumerate(model.get_weights())}
    for snapshot in ens.snapshots:
        weights = ens[snapshot.index].get_weights()
        arrays |= {f"snapshot_{snapshot.index}_{i}": array for i, array in enumerate(weights)}
        arrays[f"snapshot_{snapshot.index}"] = np.asarray(
            [snapshot.cycle, snapshot.epoch, snapshot.step, *snapshot.metrics.values()]
        )
    arrays |= {f"history_{name}": np.asarray(v) for name, v in history.history.items()}
    arrays |= {f"kept_{name}": np.asarray(v) for name, v in ens.history.items()}
    decisions = [dataclasses.astuple(decision) for decision in ens.decisions]
    np.savez(directory / "result.npz", epoch=history.epoch, decisions=decisions, **arrays)


def die_in_write(number):
    """Kills this process after `number` file writes, before the next file is renamed."""
    fsync, left = os.fsync, [number]

    def fsync_or_die(handle):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        fsync(handle)

    os.fsync = fsync_or_die


def attempt(kind, directory, alive=None, writes=None):
    """Trains in a new process, and kills it.

    It is killed `alive` seconds after training began, or in a write after `writes` others. It is
    forked before TensorFlow runs anything, so that it need not import TensorFlow again.

    Returns:
        Whether it was killed.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)
            if writes is not None:
                die_in_write(writes)
            train(kind, directory, writing)
            code = 0
        except BaseException:
            # `os._exit` prints no traceback.
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    select.select([reading], [], [])
    os.close(reading)
    if alive is not None:
        time.sleep(alive)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status):
        sys.exit("a run failed")
    return False


REFUSED = 3


def start(kind, directory, refusal, largest_file=None):
    """Starts training in a new process, which ends with `REFUSED` after an error of this class."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if largest_file is not None:
                limits = (largest_file, resource.RLIM_INFINITY)
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            train(kind, directory)
            code = 0
        except refusal:
            code = REFUSED
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def ending(child):
    """The exit code of a process, negative if a signal has ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def full_disk(kind, directory, rng):
    """Trains where no file may grow beyond a random size; returns whether it ended as it must."""
    return ending(start(kind, directory, OSError, rng.randrange(60_000))) in (0, REFUSED)


def two_processes(kind, directory, rng):
    """Trains in two processes at once; returns whether one has finished, and none has failed."""
    children = [start(kind, directory, BlockingIOError)]
    time.sleep(rng.uniform(0, 0.5))
    children.append(start(kind, directory, BlockingIOError))
    codes = [ending(child) for child in children]
    return 0 in codes and set(codes) <= {0, REFUSED}


OTHER_ENDINGS = {"full disk": full_disk, "two processes": two_processes}


def survive_others(kind, rounds, seed):
    """Counts of each other ending, and of those after which the resumed run is the same."""
    rng, rows = random.Random(seed), []
    with tempfile.TemporaryDirectory() as scratch:
        home = pathlib.Path(scratch)
        (home / "uninterrupted").mkdir()
        attempt(kind, home / "uninterrupted")
        expected = load(home / "uninterrupted")
        for name, end in OTHER_ENDINGS.items():
            equal = 0
            for number in range(rounds):
                directory = home / f"{name} {number}"
                directory.mkdir()
                if end(kind, directory, rng):
                    attempt(kind, directory)
                    equal += is_same(load(directory), expected)
            rows.append({"kind": kind, "ending": name, "runs": rounds, "equal": equal})
    return rows


def is_same(actual, expected):
    """Whether two results are equal bit for bit."""
    same = [np.array_equal(actual[name], expected[name]) for name in expected]
    return set(actual) == set(expected) and all(same)


def load(directory):
    with np.load(directory / "result.npz") as file:
        return {name: file[name] for name in file.files}


def survive(kind, kills, seed, longest):
    """Kills and resumes runs until there were at least `kills` kills.

    Returns:
        The numbers of kills, of kills during a write, of completed runs, and of completed runs
        equal to the uninterrupted one.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        home = pathlib.Path(scratch)
        (home / "uninterrupted").mkdir()
        attempt(kind, home / "uninterrupted")
        expected = load(home / "uninterrupted")
        killed = in_write = runs = equal = 0
        while killed < kills:
            directory = home / str(runs)
            directory.mkdir()
            while True:
                options = {"alive": rng.uniform(0, longest)}
                if killed % 2:
                    options = {"writes": rng.randrange(8)}
                if not attempt(kind, directory, **(options if killed < kills else {})):
                    break
                killed += 1
                in_write += any((directory / "ensemble").glob("writing-*"))
            runs += 1
            equal += is_same(load(directory), expected)
        return {
            "kind": kind,
            "kills": killed,
            "in a write": in_write,
            "runs": runs,
            "equal": equal,
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="kills for each kind of data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=0.4, help="maximum seconds until a kill")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--others", type=int, default=10, help="runs of each other ending")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows, others = [], []
    for kind in arguments.kinds:
        if arguments.kills:
            rows.append(survive(kind, arguments.kills, arguments.seed, arguments.longest))
        if arguments.others:
            others += survive_others(kind, arguments.others, arguments.seed)
    if arguments.json:
        print(json.dumps(rows + others))
        return
    print(f"{'data':10}{'kills':>7}{'in a write':>12}{'runs':>6}{'equal bit for bit':>20}")
    for row in rows:
        figures = f"{row['kills']:7}{row['in a write']:12}{row['runs']:6}{row['equal']:20}"
        print(f"{row['kind']:10}{figures}")
    print(f"\n{'data':10}{'ending':16}{'runs':>6}{'equal bit for bit':>20}")
    for row in others:
        print(f"{row['kind']:10}{row['ending']:16}{row['runs']:6}{row['equal']:20}")


if __name__ == "__main__":
    main()
