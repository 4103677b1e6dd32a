"""What it costs to save the state of training: as a share of the time of training.

    python tests/benchmarks/recovery_cost.py

The same training in memory, with snapshots in a directory, and with the state of training saved
there after each epoch, in turn, several times; the ratio is the median over the rounds. Most of the
cost is that the file is flushed to the disk and its hash is taken, both proportional to its size:
three times the weights with Adam.
"""

import argparse
import os
import statistics
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

from snapshot_ensemble import SnapshotEnsemble

WAYS = {"in memory": None, "snapshots on disk": None, "and the state of training": 1}


def make_model(width):
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(width, "relu"),
            layers.Dense(width, "relu"),
            layers.Dense(10, "softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


def seconds(model, data, epochs, way, scratch):
    directory = None if way == "in memory" else tempfile.mkdtemp(dir=scratch) + "/run"
    ens = SnapshotEnsemble(model, cycles=2, lr_init=1e-3, directory=directory)
    start = time.perf_counter()
    ens.fit(*data, batch_size=128, epochs=epochs, verbose=0, save_every=WAYS[way])
    return time.perf_counter() - start


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(arguments)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(arguments.rows, 64)).astype("float32")
    data = (x, rng.integers(0, 10, arguments.rows))
    model = make_model(arguments.width)
    times = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        seconds(model, data, 2, "in memory", scratch)  # Warm.
        for _ in range(arguments.rounds):
            for way, found in times.items():
                found.append(seconds(model, data, arguments.epochs, way, scratch))
    first = times["in memory"]
    ratios = {
        way: statistics.median(t / f for t, f in zip(found, first, strict=True))
        for way, found in times.items()
    }
    epoch = statistics.median(first) / arguments.epochs
    weights = model.count_params() * 4 / 1e6
    print(f"{weights:.1f} MB of weights, {epoch:.2f} s an epoch, {arguments.rounds} rounds")
    for way, ratio in ratios.items():
        print(f"{way:28}{ratio:8.3f}")
    return ratios


if __name__ == "__main__":
    main()
