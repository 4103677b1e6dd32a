"""Training time of an ensemble, compared with a plain `model.fit` of as many epochs.

    python tests/benchmarks/training_cost.py                  # epochs of about a second
    python tests/benchmarks/training_cost.py --rows 120000    # longer epochs

Measures training in memory, in a directory with the state of training after each epoch, and as in
version 1.0, with a callback that sets the rate before each batch. All of them, including plain
`fit`, train and trace a new model, at the same batch size. What is left is looking the rate up in
the graph, seen best with steps of about a millisecond (`--pairs`), and, with a directory, copying
weights and slots; hashing and flushing run during the next epoch.
"""

import argparse
import math
import os
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

try:
    from benchmarks.timing import ratios, show
except ImportError:
    from timing import ratios, show

from snapshot_ensemble import Cycle, SnapshotEnsemble
from snapshot_ensemble.training.learning_rate import AnnealedRate

PEAK = 1e-3


class RateByCallback(keras.callbacks.Callback):
    """The method of version 1.0: a new rate before each batch, a weight file after each cycle."""

    def __init__(self, epochs_in_cycle, directory):
        super().__init__()
        self.length, self.directory = epochs_in_cycle, directory

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch % self.length

    def on_train_batch_begin(self, batch, logs=None):
        steps = self.params["steps"]
        part = (self.epoch * steps + batch) / (self.length * steps)
        self.model.optimizer.learning_rate = PEAK / 2 * (1 + math.cos(math.pi * part))

    def on_epoch_end(self, epoch, logs=None):
        if self.epoch == self.length - 1:
            self.model.save_weights(f"{self.directory}/{epoch}.weights.h5")


def make_model(width, steps_per_execution=1):
    hidden = [keras.layers.Dense(width, "relu") for _ in range(2)]
    model = keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10, "softmax")])
    model.compile(
        keras.optimizers.Adam(PEAK),
        "sparse_categorical_crossentropy",
        steps_per_execution=steps_per_execution,
    )
    return model


def rate_alone(x, y, pairs):
    """The time of small steps with the rate looked up, relative to Keras's own compiled steps.

    A `fit` of such steps takes seconds, in which a machine's speed changes by more than the rate
    costs. So the compiled functions of both are called in turn, on the same batches.
    """
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(64)
    plain, ours = make_model(128), make_model(128)
    rate = AnnealedRate(ours)

    def steps(model):
        return lambda: [model.train_function(iterator) for iterator in [iter(batches)] * count]

    count = len(batches)
    with rate.installed():
        rate.begin_epoch(Cycle(0, 0, 0, PEAK, 0.0), 0, [count * (pairs + 1)])
        plain.make_train_function()
        ours.make_train_function()
        times, ratio = ratios({"plain": steps(plain), "ours": steps(ours)}, pairs)
    step = 1e3 * times["plain"] / count
    print(f"dense 64-128-128-10, batch 64, {step:.2f} ms a step, {pairs} pairs of {count} steps")
    return ratio("ours", "plain")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--small", type=int, default=32, help="width of the small net")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--cycles", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=25, help="rounds of the small steps")
    args = parser.parse_args(argv)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(args.rows, 64)).astype("float32")
    data = {"x": x, "y": rng.integers(0, 10, args.rows), "epochs": args.epochs, "verbose": 0}
    large = {**data, "batch_size": 128}
    width, cycles = args.width, args.cycles

    def ensemble(model, **arguments):
        return SnapshotEnsemble(model, cycles=cycles, lr_init=PEAK, **arguments)

    with tempfile.TemporaryDirectory() as scratch:

        def new_folder():
            return tempfile.mkdtemp(dir=scratch)

        def by_callback():
            callback = RateByCallback(args.epochs // cycles, new_folder())
            make_model(width).fit(**large, callbacks=[callback])

        candidates = {
            "plain": lambda: make_model(width).fit(**large),
            "memory": lambda: ensemble(make_model(width)).fit(**large),
            "disk": lambda: ensemble(make_model(width), directory=f"{new_folder()}/run").fit(
                **large
            ),
            "callback": by_callback,
            "small": lambda: make_model(args.small).fit(**data),
            "steps": lambda: ensemble(make_model(args.small, 32)).fit(**data),
        }
        times, ratio = ratios(candidates, args.rounds)
    rate = rate_alone(x, data["y"], args.pairs)
    epoch = times["plain"] / args.epochs
    megabytes = make_model(width).count_params() * 4 / 1e6
    print(f"{megabytes:.1f} MB of weights with Adam, {epoch:.2f} s an epoch, {cycles} cycles in")
    print(f"{args.epochs} epochs, medians of {args.rounds} rounds\n")
    is_long = epoch > 3
    return show(
        [
            ("fit, in memory", "model.fit", ratio("memory", "plain"), 1.02 if is_long else 1.05),
            (
                "fit, directory and state",
                "model.fit",
                ratio("disk", "plain"),
                1.05 if is_long else 1.1,
            ),
            (
                "rate set by a callback, as in 1.0",
                "model.fit",
                ratio("callback", "plain"),
                math.nan,
            ),
            ("fit, 32 steps an execution, small net", "model.fit", ratio("steps", "small"), 0.6),
            ("a small step, with the rate looked up", "model.fit", rate, 1.02),
        ]
    )


if __name__ == "__main__":
    main()
