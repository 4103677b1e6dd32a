"""Members that exceed the memory limit run one after another, and give the same in all methods."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from benchmarks.builders import random_ensemble
from keras import layers
from models import assert_all_close, compiled, dense, ensemble_of, pool_of

from snapshot_ensemble.inference.member_pool import MemberPool

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 4)).astype("float32")
STEPS = RNG.normal(size=(40, 5, 4)).astype("float32")
TOKENS = RNG.integers(1, 7, (40, 5)) * (np.arange(5) < RNG.integers(1, 6, (40, 1)))
LABELS, TAGS = RNG.integers(0, 3, 40), RNG.integers(0, 3, (40, 5))
VALUES = RNG.normal(size=(40, 2)).astype("float32")
WEIGHT = RNG.uniform(0.5, 2, 40).astype("float32")
LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def chain(*inside, shape=(4,), loss="sparse_categorical_crossentropy", **arguments):
    model = keras.Sequential([keras.Input(shape, **arguments), *inside])
    metrics = ["mae"] if loss == "mse" else ["accuracy"]
    return compiled(model, loss, metrics=metrics, weighted_metrics=[loss])


def several_outputs():
    inputs = keras.Input((4,))
    hidden = layers.Dense(5, "tanh")(inputs)
    outputs = {"kind": layers.Dense(3, "softmax")(hidden), "size": layers.Dense(2)(hidden)}
    losses = {"kind": "sparse_categorical_crossentropy", "size": "mse"}
    weights = {"kind": 2.0, "size": 0.5}
    return compiled(
        keras.Model(inputs, outputs), losses, loss_weights=weights, metrics={"kind": ["accuracy"]}
    )


def with_ids():
    """An output beside the classes is passed through."""
    inputs = {
        "features": keras.Input((4,), name="features"),
        "id": keras.Input((), dtype="int64", name="id"),
    }
    outputs = {
        "kind": layers.Dense(3, "softmax")(inputs["features"]),
        "id": keras.ops.copy(inputs["id"]),
    }
    model = keras.Model(inputs, outputs)
    return compiled(model, {"kind": "sparse_categorical_crossentropy"})


class AlwaysDropout(layers.Dropout):
    """Monte Carlo dropout."""

    def call(self, inputs, training=None):
        return super().call(inputs, training=True)


def frozen():
    backbone = keras.Sequential([keras.Input((4,)), layers.Dense(6), layers.BatchNormalization()])
    backbone.trainable = False
    return chain(backbone, layers.Dense(3, "softmax"))


class Subclass(keras.Model):
    """Cannot be made from a config, since it takes an argument."""

    def __init__(self, units):
        super().__init__()
        self.drop, self.answer = layers.Dropout(0.5), layers.Dense(units, "softmax")

    def call(self, x):
        return self.answer(self.drop(x))


def subclass():
    model = compiled(Subclass(3), metrics=["accuracy"])
    model(X)
    return model


# The model, its inputs and its targets.
KINDS = {
    "probabilities": (lambda: dense(metrics=["accuracy"]), X, LABELS),
    "logits": (lambda: dense(LOGITS, 3, None), X, LABELS),
    "values": (lambda: chain(layers.Dense(2), loss="mse"), X, VALUES),
    "several outputs": (several_outputs, X, {"kind": LABELS, "size": VALUES}),
    "ids": (with_ids, {"features": X, "id": np.arange(40)}, {"kind": LABELS}),
    "masks": (
        lambda: chain(
            layers.Embedding(7, 4, mask_zero=True),
            layers.LSTM(4, return_sequences=True),
            layers.Dense(3, "softmax"),
            shape=(5,),
            dtype="int32",
        ),
        TOKENS,
        TAGS,
    ),
    "a state": (
        lambda: chain(
            layers.GRU(4, stateful=True),
            layers.Dense(3, "softmax"),
            shape=None,
            batch_shape=(8, 5, 4),
        ),
        STEPS,
        LABELS,
    ),
    "draws": (lambda: chain(AlwaysDropout(0.4), layers.Dense(3, "softmax")), X, LABELS),
    "batch norm": (
        lambda: chain(layers.Dense(5), layers.BatchNormalization(), layers.Dense(3, "softmax")),
        X,
        LABELS,
    ),
    "frozen": (frozen, X, LABELS),
    "half precision": (
        lambda: chain(layers.Dense(5), layers.Dense(3, "softmax", dtype="mixed_float16")),
        X,
        LABELS,
    ),
    "subclass": (subclass, X, LABELS),
    "eager": (lambda: dense(metrics=["accuracy"], run_eagerly=True), X, LABELS),
}


def ensemble(kind):
    keras.utils.set_random_seed(0)  # Layers draw the seeds of their generators.
    model = KINDS[kind][0]()
    trained = {id(variable) for variable in model.trainable_variables}
    return ensemble_of(model, 4, shared=lambda v: kind == "frozen" and id(v) not in trained)


# The same arguments for all methods, of which states depend on the size of batches.
RUN = {"batch_size": 8, "verbose": 0}


def results(ens, kind):
    """What all methods return, one after another, so that states go on from each to the next."""
    x, y = KINDS[kind][1:]
    is_classes = kind != "values"
    rows = keras.tree.map_structure(lambda array: array[:8], x)
    yield "predict", ens.predict(x, **RUN)
    yield "call", keras.tree.map_structure(np.asarray, ens(rows))
    yield "evaluate", ens.evaluate(x, y, **RUN)
    yield "evaluate by name", ens.evaluate(x, y, return_dict=True, members=[2, 0], **RUN)
    yield "members", ens.predict_members(x, **RUN)
    yield "uncertainty", ens.predict_uncertainty(x, **RUN)
    yield "weights", ens.fit_weights(x, y, **RUN)
    yield "weighted", ens.evaluate(x, y, combine="weighted", **RUN)
    if is_classes:
        yield "temperature", ens.calibrate(x, y, **RUN)
    if is_classes and kind != "several outputs":
        yield "vote", ens.evaluate(x, y, combine="vote", **RUN)
    if kind not in ("several outputs", "ids", "masks"):
        yield "sample weights", ens.evaluate(x, y, sample_weight=WEIGHT, **RUN)
        yield "weighted report", ens.report(x, y, sample_weight=WEIGHT, **RUN).to_dict()
    yield "count", ens.choose_members(x, y, **RUN)
    if kind not in ("a state", "draws"):  # What is drawn depends on the rows that are left.
        yield "early exit", ens.fit_early_exit(x, y, tolerance=2.0, **RUN)
        yield "early", ens.predict(x, early_exit=True, return_counts=True, **RUN)
        yield "early call", keras.tree.map_structure(np.asarray, ens(rows, early_exit=True))
    yield "report", ens.report(x, y, **RUN).to_dict()
    yield "some batches", ens.evaluate(x, y, steps=3, **RUN)


def numbers(result):
    """A structure of arrays, without the sentences of a report."""
    if isinstance(result, dict):
        return {name: numbers(value) for name, value in result.items() if name != "notes"}
    return result


# Each takes twenty seconds; every method meets the other kinds in the matrix of kinds.
MOST_DIFFERENT = ["several outputs", "masks", "a state", "draws", "frozen", "subclass"]


@pytest.mark.slow
@pytest.mark.sampled(1, 2)
@pytest.mark.parametrize("kind", MOST_DIFFERENT)
def test_all_methods_give_the_same(kind, monkeypatch):
    expected = dict(results(ensemble(kind), kind))
    ens = ensemble(kind)
    ens.memory_limit = 0
    monkeypatch.setattr(MemberPool, "members_model", None)
    monkeypatch.setattr(MemberPool, "evaluator", None)
    tolerance = 1e-3 if kind == "half precision" else 1e-5
    seen = []
    for name, actual in results(ens, kind):
        assert type(actual) is type(expected[name])
        try:
            assert_all_close(numbers(actual), numbers(expected[name]), tolerance)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        seen.append(name)
        assert not pool_of(ens)._cache.graphs.tensors
    assert seen == list(expected)


@pytest.mark.slow
def test_names_and_their_order_are_those_of_keras():
    ens = ensemble("probabilities")
    ens.memory_limit = 0
    of_keras = ens.model.evaluate(X, LABELS, return_dict=True, verbose=0)
    assert list(ens.evaluate(X, LABELS, return_dict=True, verbose=0)) == list(of_keras)
    only_loss = ensemble("logits")
    only_loss.memory_limit = 0
    assert isinstance(only_loss.evaluate(X, LABELS, verbose=0), float)


def test_callbacks_of_evaluate_see_one_evaluation():
    ens = ensemble("probabilities")
    ens.memory_limit = 0
    seen = []
    callback = keras.callbacks.LambdaCallback()
    callback.on_test_begin = lambda logs=None: seen.append("begin")
    callback.on_test_batch_end = lambda batch, logs=None: seen.append(batch)
    callback.on_test_end = lambda logs=None: seen.append(logs["accuracy"])
    callback.on_predict_begin = lambda logs=None: seen.append("predict")
    scores = ens.evaluate(X, LABELS, batch_size=16, callbacks=[callback], verbose=0)
    assert seen == ["begin", 0, 1, 2, scores[1]]


def test_ids_that_differ_are_refused():
    inputs = keras.Input((4,))
    kind = layers.Dense(3, "softmax", name="kind")(inputs)
    label = keras.ops.argmax(layers.Dense(3)(inputs), axis=-1)
    model = keras.Model(inputs, {"kind": kind, "label": label})
    ens = ensemble_of(compiled(model, {"kind": "sparse_categorical_crossentropy"}), 3)
    ens.memory_limit = 0
    for run in (
        lambda: ens(X),
        lambda: ens.predict(X, verbose=0),
        lambda: ens.evaluate(X, {"kind": LABELS}, verbose=0),
        lambda: ens.report(X, {"kind": LABELS}, verbose=0),
    ):
        with pytest.raises(ValueError, match="Output 'label' differs between members"):
            run()


@pytest.mark.slow
@pytest.mark.parametrize("early_exit", [False, True])
def test_gradients_of_a_call_are_those_of_all_members_at_once(early_exit):
    ens = ensemble("probabilities")
    if early_exit:
        ens.fit_early_exit(X, LABELS, tolerance=2.0, verbose=0)

    def gradient():
        x = tf.constant(X)
        with tf.GradientTape() as tape:
            tape.watch(x)
            score = tf.reduce_sum(tf.square(ens(x, early_exit=early_exit)[:, 0]))
        return tape.gradient(score, x).numpy()

    expected = gradient()
    assert np.abs(expected).max() > 1e-3
    ens.memory_limit = 0
    np.testing.assert_allclose(gradient(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_inside_a_function_all_members_are_in_its_graph():
    ens = ensemble("probabilities")
    expected = ens.predict(X, verbose=0)
    ens.memory_limit = 0
    called = tf.function(lambda x: 2 * ens(x))
    np.testing.assert_allclose(called(X), 2 * expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ens(X), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(called(X), 2 * expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_second_call_traces_nothing():
    traced = []

    class Counting(layers.Layer):
        def call(self, x):
            traced.append(1)
            return x

    ens = ensemble_of(chain(Counting(), layers.Dense(3, "softmax")), 3)
    ens.memory_limit = 0

    def run():
        ens(X[:8])
        ens(X[:5])
        ens.predict(X, verbose=0)
        ens.report(X, LABELS, verbose=0)

    run()
    count = len(traced)
    run()
    assert len(traced) == count


def test_members_that_change_are_read_again():
    ens = ensemble("probabilities")
    ens.memory_limit = 0
    ens(X)
    other = ensemble_of(dense(), 3)
    weights = [array + 1 for array in other[0].get_weights()]
    pool_of(ens).store.add_weights(weights, ens.snapshots[-1])
    expected = np.mean([member.predict(X, verbose=0) for member in ens], axis=0)
    assert len(ens) == 5
    np.testing.assert_allclose(ens(X), expected, rtol=1e-5, atol=1e-6)


# Memory


@pytest.mark.slow
def test_what_was_built_for_other_members_is_dropped_if_it_would_be_too_much():
    ens = ensemble_of(dense(), 5)
    of_one = sum(array.nbytes for array in ens.model.get_weights())
    ens.memory_limit = int(2.5 * of_one)
    cache = pool_of(ens)._cache
    for members in ([0], [1], [2, 0], [3], [2, 3], [0, 1, 2], [4], [3, 4]):
        whole = np.mean([ens[k].predict(X, verbose=0) for k in members], axis=0)
        for outputs in (ens.predict(X, members=members, verbose=0), ens(X, members=members)):
            np.testing.assert_allclose(outputs, whole, rtol=1e-5, atol=1e-6)
        ens.evaluate(X, LABELS, members=members, verbose=0)
        assert len(cache.graphs.tensors) + (cache.graphs.one_by_one is not None) <= 2


MEMORY = """
import re, sys
import keras, numpy as np
from snapshot_ensemble import SnapshotEnsemble
directory, width = sys.argv[1], int(sys.argv[2])
x = np.random.default_rng(0).normal(size=(64, width)).astype("float32")
y = np.arange(64) % 3

def resident(name):
    with open("/proc/self/status") as file:
        return int(re.search(name + r":\\s+(\\d+) kB", file.read())[1]) / 1024

def grows(run):
    start = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # Resets the peak.
    run()
    return resident("VmHWM") - start

ens = SnapshotEnsemble.load(directory)
keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]).predict(x[:, :4], verbose=0)
ens.memory_limit = 0
data = {"x": x, "y": y, "verbose": 0}
print("predict", grows(lambda: ens.predict(x, verbose=0)))
print("call", grows(lambda: ens(x)))
print("evaluate", grows(lambda: ens.evaluate(**data)))
print("report", grows(lambda: ens.report(**data)))
print("choose_members", grows(lambda: ens.choose_members(**data)))
ens.members = None
print("fit_early_exit", grows(lambda: ens.fit_early_exit(**data)))
ens.memory_limit = 2**40
print("at once", grows(lambda: ens.predict(x, verbose=0)))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
@pytest.mark.slow
def test_the_memory_of_the_process_grows_by_one_member(tmp_path):
    """Peaks of all memory of a new process, with all that TensorFlow and NumPy take."""
    width, count = 1400, 8
    hidden = [layers.Dense(width, "relu") for _ in range(2)]
    model = chain(*hidden, layers.Dense(3, "softmax"), shape=(width,))
    of_one = sum(array.nbytes for array in model.get_weights()) / 2**20
    random_ensemble(model, count, scale=0.01).save(tmp_path / "saved")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "saved"), str(width)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peaks = [line.rsplit(" ", 1) for line in done.stdout.splitlines()]
    grown = {name: float(peak) / of_one for name, peak in peaks}
    assert grown.pop("at once") > count - 1
    assert len(grown) == 6
    assert max(grown.values()) < 4, grown
