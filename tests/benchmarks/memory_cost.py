"""Disk and memory use of an ensemble, compared with one model.

    python tests/benchmarks/memory_cost.py

Peaks are the largest resident sets of new processes, as reported by Linux. The members are in a
directory and too large to be in memory together, so they predict one after another.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras

try:
    from benchmarks.builders import random_ensemble
    from benchmarks.timing import show
except ImportError:
    from builders import random_ensemble
    from timing import show


PEAK = """
import re, sys
import keras, numpy as np
directory, limit, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
x = np.random.default_rng(0).normal(size=(64, width)).astype("float32")
if limit < 0:
    keras.models.load_model(directory).predict(x, verbose=0)
else:
    from snapshot_ensemble import SnapshotEnsemble
    ens = SnapshotEnsemble.load(directory)
    ens.memory_limit = limit or ens.memory_limit
    ens.predict(x, verbose=0)
# Not `getrusage`, which includes the parent process.
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024)
"""


def peak(path, limit, width):
    """The peak memory of a new process in MB."""
    command = [sys.executable, "-c", PEAK, str(path), str(limit), str(width)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def net(width, heads=False):
    backbone = [keras.layers.Dense(width, "relu") for _ in range(3)]
    layers = [keras.Input((width,)), *backbone, keras.layers.Dense(10, "softmax")]
    for layer in backbone:
        layer.trainable = not heads
    model = keras.Sequential(layers)
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


def bytes_in(directory):
    return sum(path.stat().st_size for path in pathlib.Path(directory).iterdir())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--members", type=int, default=12)
    parser.add_argument("--width", type=int, default=2_000)
    parser.add_argument(
        "--limit", type=int, default=0, help="memory_limit (default: the ensemble's)"
    )
    args = parser.parse_args(argv)
    model = net(args.width)
    of_weights = sum(array.nbytes for array in model.get_weights())
    with tempfile.TemporaryDirectory() as scratch:
        random_ensemble(model, args.members, scale=0.01).save(f"{scratch}/run")
        model.save(f"{scratch}/one.keras")
        one = peak(f"{scratch}/one.keras", -1, args.width)
        many = peak(f"{scratch}/run", args.limit, args.width)
        snapshots = [path.stat().st_size for path in pathlib.Path(scratch, "run").glob("snap*")]
        frozen = net(args.width, heads=True)
        on_backbone = random_ensemble(frozen, 6, scale=0.01)
        on_backbone.save(f"{scratch}/shared")
        on_disk = bytes_in(f"{scratch}/shared")
    head = frozen.count_params() - sum(v.numpy().size for v in frozen.non_trainable_variables)
    ideal = sum(v.numpy().nbytes for v in frozen.non_trainable_variables) + 6 * 4 * head
    arrays = {id(a): a.nbytes for weights in on_backbone._pool.weights(range(6)) for a in weights}
    megabytes = of_weights / 1e6
    print(f"{args.members} members of {megabytes:.1f} MB, peaks: {one:.0f} MB for one model, ")
    print(f"{many:.0f} MB for the ensemble\n")
    return show(
        [
            (f"peak, {args.members} members from disk", "one model, MB more", many - one, 100),
            ("a snapshot on disk", "its weights", max(snapshots) / of_weights, 1.02),
            ("6 heads on a frozen backbone, directory", "once + heads", on_disk / ideal, 1.05),
            ("the same in memory", "once + heads", sum(arrays.values()) / ideal, 1.05),
        ]
    )


if __name__ == "__main__":
    main()
