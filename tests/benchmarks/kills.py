"""Kills training again and again until it is done, and compares with the run that was not broken.

    python tests/benchmarks/kills.py --kills 50

A process is killed (SIGKILL) at random moments after training began, every other time in the
middle of a write, and the same script goes on with `resume=True`. Every weight of every snapshot,
the final weights and the history must be those of the unbroken run, to the bit.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
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

KINDS = ("arrays", "tf.data")
EPOCHS, CYCLES, ROWS = 12, 4, 60


def make_data(kind):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 4)).astype("float32")
    y = np.argmax(x[:, :3], axis=1)
    if kind == "arrays":
        return {"x": x, "y": y, "batch_size": 16, "shuffle": True}
    data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(ROWS, seed=3)
    # Of a length that Keras does not know, which changes how often it begins a pass.
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
    """Tells the parent that training has begun, once the first step has been traced."""

    def __init__(self, pipe):
        super().__init__()
        self._pipe = pipe

    def on_train_batch_end(self, batch, logs=None):
        if self._pipe is not None:
            os.write(self._pipe, b"!")
            self._pipe = None


def train(kind, directory, pipe=None):
    """The script of a user; leaves `result.npz` when it is done."""
    keras.utils.set_random_seed(7)
    tf.config.experimental.enable_op_determinism()
    model = make_model()
    data = make_data(kind)
    held = (np.ones((8, 4), "float32"), np.zeros(8, int))
    stop = keras.callbacks.EarlyStopping("loss", patience=5, restore_best_weights=True)
    ens = SnapshotEnsemble(model, cycles=CYCLES, lr_init=0.01, directory=directory / "ensemble")
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
    np.savez(directory / "result.npz", epoch=history.epoch, **arrays)


def die_in_write(number):
    """Lets this process be killed when it has written so many files, before they are in place."""
    fsync, left = os.fsync, [number]

    def fsync_or_die(handle):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        fsync(handle)

    os.fsync = fsync_or_die


def attempt(kind, directory, alive=None, writes=None):
    """Trains in a process of its own, and kills it.

    It dies so many seconds after training began, or in a write after so many others. It is forked
    before anything ran in TensorFlow, so that none waits for its import.

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
            # Nobody else would: a forked process leaves without a word.
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


def load(directory):
    with np.load(directory / "result.npz") as file:
        return {name: file[name] for name in file.files}


def survive(kind, kills, seed, longest):
    """Kills until it was done as often as wanted.

    Returns:
        Numbers of kills, of those that hit a write, of runs that came to their end, and of those
        equal to the unbroken one.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        home = pathlib.Path(scratch)
        (home / "unbroken").mkdir()
        attempt(kind, home / "unbroken")
        expected = load(home / "unbroken")
        killed = in_write = runs = equal = 0
        while killed < kills:
            broken = home / str(runs)
            broken.mkdir()
            while True:
                how = {"alive": rng.uniform(0, longest)}
                if killed % 2:
                    how = {"writes": rng.randrange(8)}
                if not attempt(kind, broken, **(how if killed < kills else {})):
                    break
                killed += 1
                in_write += any((broken / "ensemble").glob("writing-*"))
            found = load(broken)
            runs += 1
            same = [np.array_equal(found[name], expected[name]) for name in expected]
            equal += set(found) == set(expected) and all(same)
        return {
            "kind": kind,
            "kills": killed,
            "in a write": in_write,
            "runs": runs,
            "equal": equal,
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="of each kind of data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=0.4, help="seconds until a kill, at most")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = [survive(k, arguments.kills, arguments.seed, arguments.longest) for k in arguments.kinds]
    if arguments.json:
        print(json.dumps(rows))
        return
    print(f"{'data':10}{'kills':>7}{'in a write':>12}{'runs':>6}{'equal, to the bit':>20}")
    for row in rows:
        figures = f"{row['kills']:7}{row['in a write']:12}{row['runs']:6}{row['equal']:20}"
        print(f"{row['kind']:10}{figures}")


if __name__ == "__main__":
    main()
