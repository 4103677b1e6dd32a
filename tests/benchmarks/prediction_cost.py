"""Time of an ensemble's predictions, compared with one model and a loop over weight files.

    python tests/benchmarks/prediction_cost.py

Where the time goes: with small dense models, it is Keras's loop over batches, about a millisecond
per batch. One graph runs all members, so they share this cost, and where rows are independent the
batches are larger than Keras's default of 32. If the user gives a batch size, several such batches
are read at once, and each is still run as a batch of its own. With convolutions, it is the
kernels: of the 10 ms that a batch of 32 takes with six members of the small model on two cores,
5.7 ms are the first convolution and its pooling, 2.7 ms the second and 0.6 ms the rest, and one
model alone also keeps both cores busy. Tried without success: the first convolutions of all members
as one wide convolution (saves 1 ms of 5.7, but takes twice as long for larger layers), larger
batches, and XLA (7.9 instead of 8.0 ms for the kernels alone).
"""

import argparse
import functools
import os
import pathlib
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

try:
    from benchmarks.builders import random_ensemble
    from benchmarks.timing import ratios, show
except ImportError:
    from builders import random_ensemble
    from timing import ratios, show


layers = keras.layers


def dense_net():
    hidden = [layers.Dense(64, "relu") for _ in range(2)]
    return keras.Sequential([keras.Input((64,), name="x"), *hidden, layers.Dense(10, "softmax")])


def conv_net():
    blocks = []
    for filters in (16, 32):
        blocks += [layers.Conv2D(filters, 3, activation="relu"), layers.MaxPooling2D()]
    last = [layers.Flatten(), layers.Dense(10, "softmax")]
    return keras.Sequential([keras.Input((28, 28, 1), name="x"), *blocks, *last])


def ensemble_of(make, count):
    """An ensemble whose members have random weights."""
    model = make()
    model.compile("sgd", "sparse_categorical_crossentropy")
    return random_ensemble(model, count)


def rows_of(model, count):
    shape = (count, *model.input_shape[1:])
    return np.random.default_rng(1).normal(size=shape).astype("float32")


def loop_over(make, ens, x, scratch):
    """What a user would write: load each file, predict, average."""
    model, paths = make(), []
    for i, member in enumerate(ens):
        paths.append(f"{scratch}/{make.__name__}-{i}.weights.h5")
        member.save_weights(paths[-1])

    def loop():
        outputs = []
        for path in paths:
            model.load_weights(path)
            outputs.append(model.predict(x, verbose=0))
        return np.mean(outputs, axis=0)

    return loop


def predictions(make, count, members, rounds, scratch):
    ens = ensemble_of(make, members)
    x = rows_of(ens.model, count)
    loop = loop_over(make, ens, x, scratch)
    np.testing.assert_allclose(ens.predict(x, verbose=0), loop(), atol=1e-5)
    candidates = {
        "loop": loop,
        "one": lambda: ens.model.predict(x, verbose=0),
        "ensemble": lambda: ens.predict(x, verbose=0),
        "one, 256": lambda: ens.model.predict(x, batch_size=256, verbose=0),
        "ensemble, 256": lambda: ens.predict(x, batch_size=256, verbose=0),
    }
    times, ratio = ratios(candidates, rounds)
    print(f"{make.__name__}, {count:,} rows: one model {times['one']:.3f} s")
    return ratio


def latency(members, rounds, scratch):
    """Time per row when predicting one row at a time."""
    ens = ensemble_of(dense_net, members)
    ens.export(f"{scratch}/served", verbose=False)
    served = tf.saved_model.load(f"{scratch}/served").signatures["serving_default"]
    row = tf.constant(rows_of(ens.model, 1))

    def repeated(function):
        return lambda: [function() for _ in range(200)]

    candidates = {
        "one": repeated(lambda: ens.model(row, training=False)),
        "call": repeated(lambda: ens(row)),
        "served": repeated(lambda: served(x=row)),
    }
    times, ratio = ratios(candidates, rounds)
    print(f"one row through `model(x)`: {1e3 * times['one'] / 200:.3f} ms")
    return ratio


def growth(count, largest, rounds):
    """The time with 2, 4, … members, relative to the time with one."""
    sizes = [2**k for k in range(largest.bit_length())]
    ens = ensemble_of(dense_net, sizes[-1])
    x = rows_of(ens.model, count)
    candidates = {m: lambda m=m: ens.predict(x, members=m, verbose=0) for m in sizes}
    _, ratio = ratios(candidates, rounds)
    return {m: ratio(m, 1) for m in sizes[1:]}


def text_net():
    inside = [layers.Embedding(100, 8), layers.Bidirectional(layers.LSTM(8))]
    last = layers.Dense(3, "softmax")
    return keras.Sequential([keras.Input((20,), dtype="int32", name="x"), *inside, last])


def first_prediction(members, rounds, scratch):
    """The time of the first prediction, in which graphs are traced; each time of new objects."""
    x = np.random.default_rng(1).integers(0, 100, (64, 20)).astype("int32")
    seconds = {"loop": [], "ensemble": []}
    for _ in range(rounds):
        ens = ensemble_of(text_net, members)
        loop = loop_over(text_net, ens, x, scratch)
        runs = {"loop": loop, "ensemble": functools.partial(ens.predict, x, verbose=0)}
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    loop, ensemble = (float(np.median(seconds[name])) for name in ("loop", "ensemble"))
    print(f"first prediction of {members} BiLSTMs: {ensemble:.1f} s; the loop: {loop:.1f} s")
    return ensemble / loop


def import_time(rounds):
    """Seconds to import the package after Keras, with compiled bytecode as `pip` installs it."""
    # Keras has its own bytecode already.
    code = "import keras, sys, time; sys.dont_write_bytecode, sys.pycache_prefix = 0, sys.argv[1]; "
    code += "t = time.perf_counter(); import snapshot_ensemble; print(time.perf_counter() - t)"
    with tempfile.TemporaryDirectory() as compiled:
        command = [sys.executable, "-c", code, compiled]
        seconds = [
            float(subprocess.run(command, capture_output=True, check=True).stdout)
            for _ in range(rounds + 1)
        ]
    return float(np.median(seconds[1:]))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--members", type=int, default=6)
    parser.add_argument("--dense-rows", type=int, default=20_000)
    parser.add_argument("--conv-rows", type=int, default=4_000)
    parser.add_argument("--largest", type=int, default=32, help="members of the largest ensemble")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    args = parser.parse_args(argv)
    keras.utils.set_random_seed(0)
    many = args.members
    with tempfile.TemporaryDirectory() as scratch:
        dense = predictions(dense_net, args.dense_rows, many, args.rounds, scratch)
        conv = predictions(conv_net, args.conv_rows, many, args.rounds, scratch)
        single = latency(many, args.rounds, pathlib.Path(scratch))
        first = first_prediction(args.largest, min(args.rounds, 3), scratch)
    more = growth(args.dense_rows // 4, args.largest, args.rounds)
    imported = import_time(args.rounds)
    print(f"{many} members, medians of {args.rounds} rounds\n")
    rows = [
        ("predict, small dense net", "loop over files", dense("ensemble", "loop"), 0.15),
        ("predict, small dense net", "one model, its batches of 32", dense("ensemble", "one"), 0.3),
        ("the same, batch_size=256 in both", "one model", dense("ensemble, 256", "one, 256"), 1.15),
        ("predict, small conv net", "loop over files", conv("ensemble", "loop"), 0.5),
        ("predict, small conv net", f"{many} x one", conv("ensemble", "one") / many, 0.65),
        (
            "the same, batch_size=256 in both",
            f"{many} x one",
            conv("ensemble, 256", "one, 256") / many,
            0.85,
        ),
        ("one row, ens(x)", "model(x)", single("call", "one"), 2.0),
        ("one row, SavedModel", "model(x)", single("served", "one"), 2.0),
        (f"first predict, {args.largest} BiLSTMs", "loop over files", first, 1.0),
        ("import snapshot_ensemble", "import keras, seconds more", imported, 0.05),
    ]
    rows += [(f"predict, {m} members", "one member", value, m) for m, value in more.items()]
    return show(rows)


if __name__ == "__main__":
    main()
