"""Time and memory of `report` and `calibrate`, by the numbers of rows and members.

    python tests/benchmarks/report_cost.py

Each size runs in a new process. The memory is the peak above what was resident before, with the
data and the members in memory; as reported by Linux. For scale: Keras's `evaluate` of one member,
and a hand-written loop that predicts with each member and takes the negative log-likelihood and
Brier score of the members and of their mean.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

try:
    from benchmarks.builders import random_ensemble
    from benchmarks.timing import seconds
except ImportError:
    from builders import random_ensemble
    from timing import seconds

FEATURES, CLASSES = 20, 10
HEAD = ("rows", "members", "report s", "calibrate s", "peak MB", "evaluate s", "by hand s")


def dense_net():
    hidden = keras.layers.Dense(32, "relu")
    output = keras.layers.Dense(CLASSES, "softmax")
    model = keras.Sequential([keras.Input((FEATURES,)), hidden, output])
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def resident(what):
    """The resident memory (`VmRSS`) or its peak (`VmHWM`), in MB."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{what}:\s+(\d+) kB", status)[1]) / 1024


def by_hand(members, x, y):
    """What a user would write: the scores of the members and of their mean."""
    outputs = [member.predict(x, batch_size=1024, verbose=0) for member in members]
    scores = []
    for p in [*outputs, np.mean(outputs, axis=0)]:
        right = p[np.arange(len(y)), y]
        squares = np.sum(np.square(p), axis=1) - 2 * right + 1
        scores.append((-np.log(np.maximum(right, 1e-38)).mean(), squares.mean()))
    return scores


def measure(rows, members, compare):
    """One line of the table."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, FEATURES)).astype("float32")
    y = rng.integers(0, CLASSES, rows)
    ens = random_ensemble(dense_net(), members, scale=0.5)
    before = resident("VmRSS")
    line = [rows, members, seconds(lambda: ens.report(x, y, verbose=0))]
    line += [seconds(lambda: ens.calibrate(x, y, verbose=0)), resident("VmHWM") - before]
    if compare:
        alone = list(ens)
        line.append(seconds(lambda: alone[0].evaluate(x, y, verbose=0)))
        line.append(seconds(lambda: by_hand(alone, x, y)))
    return line


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--sizes", nargs="+", default=["10000x5", "100000x5", "1000000x5", "5000x200"]
    )
    parser.add_argument("--alone", action="store_true", help="without the comparisons")
    parser.add_argument("--one", action="store_true", help="one size, in this process, as JSON")
    args = parser.parse_args(argv)
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes]
    if args.one:
        print(json.dumps(measure(*sizes[0], not args.alone)))
        return None
    print(*(f"{name:>12}" for name in HEAD))
    lines = []
    for size in args.sizes:
        command = [sys.executable, __file__, "--one", "--sizes", size]
        command += ["--alone"] * args.alone
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        lines.append(json.loads(done.stdout.splitlines()[-1]))
        cells = (f"{value:,}" if i < 2 else f"{value:,.1f}" for i, value in enumerate(lines[-1]))
        print(*(f"{cell:>12}" for cell in cells), flush=True)
    return lines


if __name__ == "__main__":
    main()
