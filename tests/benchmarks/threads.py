"""Uses one ensemble in several threads at once, round after round, and counts what goes wrong.

    python tests/benchmarks/threads.py

In each round one thread trains, two use the same ensemble (`predict`, `ens[0]`, `evaluate`,
`calibrate`, `save`, `load`, `export` and others), and one runs plain Keras. A round is disturbed if
training ends with other weights, slots, history or snapshots than when nobody looks, or if a
reader gets wrong numbers or an error; it is kept if Keras, TensorFlow and `warnings` are as before,
and the plain models had weights of their own.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import threading
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.tensorflow.trainer import TFEpochIterator
from keras.src.initializers.random_initializers import RandomInitializer
from keras.src.ops.function import Function
from keras.src.random import seed_generator
from keras.src.saving import saving_lib
from threads_cases import MODELS, Paced, Seen, X, ensemble, fit, looking, same

from snapshot_ensemble import SnapshotEnsemble

# In this order in turn: model, optimizer, whether in a directory, and whether eager.
KINDS = [
    ("functional", "Adam", False, False),
    ("subclass", "momentum", True, True),
    ("functional", "schedule", True, True),
    ("subclass", "Adam", False, False),
]


def of_others():
    """All attributes of classes and modules that the package patches, or that are near them."""
    kinds = [keras.layers.Layer, keras.layers.Normalization, keras.layers.BatchNormalization]
    kinds += [keras.Model, keras.Sequential, type(keras.Model(i := keras.Input((1,)), i))]
    kinds += [keras.Optimizer, keras.Metric, keras.Variable, keras.layers.Dense]
    kinds += [Function, RandomInitializer, TFEpochIterator, type(tf.function(lambda: None))]
    kinds += [seed_generator, saving_lib, keras.src.backend.random]
    attributes = [(kind, name, value) for kind in kinds for name, value in vars(kind).items()]
    logger = tf.get_logger()
    process = [*warnings.filters, warnings.showwarning, logger.level, *logger.filters]
    return attributes, process


def differences(before):
    """The names of what is not as before."""
    (attributes, process), (attributes_now, process_now) = before, of_others()
    now = {(id(kind), name): value for kind, name, value in attributes_now}
    changed = [
        f"{kind.__name__}.{name}"
        for kind, name, value in attributes
        # What Python itself keeps in a class, such as its caches for `isinstance`, may change.
        if not name.startswith(("_abc_", "__")) and now.get((id(kind), name)) is not value
    ]
    known = {(id(kind), name) for kind, name, _ in attributes}
    changed += [name for kind, name in set(now) - known if not name.startswith(("_abc_", "__"))]
    return changed + ["warnings or loggers"] * (process != process_now)


class Plain(threading.Thread):
    """Builds, predicts with and saves plain Keras models, and keeps what was wrong."""

    def __init__(self):
        super().__init__()
        self.ended, self.built, self.wrong = threading.Event(), 0, []

    def run(self):
        while not self.ended.is_set():
            model = keras.Sequential(
                [keras.Input((4,)), keras.layers.Normalization(), keras.layers.Dense(8)]
            )
            model.compile("adam", "mse")
            kernel = model.layers[-1].kernel.numpy()
            if not kernel.any() or np.unique(kernel).size < 16:
                self.wrong.append("a plain model has no weights of its own")
            if not np.allclose(model(X), X / np.sqrt(1) @ kernel, atol=1e-4):
                self.wrong.append("a plain model predicts wrong numbers")
            if model.optimizer.get_config()["learning_rate"] != float(np.float32(0.001)):
                self.wrong.append("a plain optimizer has another rate")
            self.built += 1


class Using(Seen):
    """Also loads and exports the ensemble."""

    def __init__(self, ens, kind, scratch, on_disk):
        super().__init__(ens, kind, scratch)
        self.actions += [self.load] * on_disk
        self.actions.insert(2, self.export)

    def load(self):
        model = MODELS[self.kind]()
        model.compile("adam", "sparse_categorical_crossentropy")
        again = SnapshotEnsemble.load(self.ens.directory, model=model)
        self.numbers.append(again.predict_members(X, verbose=0))

    def export(self):
        self.ens.export(self.scratch / "served", overwrite=True)


def one_round(number, scratch):
    """One round: what was wrong in training or for readers, what was changed, and counts."""
    kind, optimizer, on_disk, eager = KINDS[number % len(KINDS)]

    def make(name):
        return ensemble(kind, optimizer, scratch / name if on_disk else None, eager=eager)

    expected, before = fit(make("alone")), of_others()
    ens, plain = make("used"), Plain()
    users = [Using(ens, kind, scratch / f"copy {i}", on_disk) for i in range(2)]
    plain.start()
    with looking(users[0], number), looking(users[1], number + 4):
        actual = fit(ens, callbacks=[Paced(user, 1) for user in users])
    plain.ended.set()
    plain.join()
    wrong = [
        name for name in expected if name != "random" and not same(actual[name], expected[name])
    ]
    for user in users:
        user.check(actual["members"])
        wrong += user.wrong
    looks = sum(user.looks for user in users)
    return wrong, plain.wrong + differences(before), looks, plain.built


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=24)
    arguments = parser.parse_args(arguments)
    counts = {"rounds": 0, "disturbed": 0, "kept": 0, "looks": 0, "plain models": 0}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The model cannot be saved")
        # The layers have activity regularizers.
        warnings.filterwarnings("ignore", "The scores are the compiled loss and metrics")
        count_rounds(arguments.rounds, counts)
    print("".join(f"{name:>14}" for name in counts))
    print("".join(f"{count:14}" for count in counts.values()))
    return counts


def count_rounds(rounds, counts):
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            wrong, changed, looks, built = one_round(number, pathlib.Path(folder))
        for problem in [*wrong, *changed]:
            print(f"round {number}: {problem[:500]}", flush=True)
        counts["rounds"] += 1
        counts["disturbed"] += bool(wrong)
        counts["kept"] += not changed
        counts["looks"] += looks
        counts["plain models"] += built


if __name__ == "__main__":
    main()
