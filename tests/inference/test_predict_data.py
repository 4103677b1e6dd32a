"""Every kind of data that Keras accepts, read once and traced once."""

import collections

import keras
import numpy as np
import pytest
import tensorflow as tf
from inference_cases import LABELS, MEMBERS, ROWS
from keras import layers
from models import Batches, assert_close, dense, ensemble_of, sliced

# Kinds of data


def generator(*arrays):
    dataset = Batches(*arrays)
    for index in range(len(dataset)):
        yield dataset[index]


DATA = {
    "arrays": lambda *arrays: (arrays, {}),
    "small batches": lambda *arrays: (arrays, {"batch_size": 5}),
    "one batch": lambda *arrays: (arrays, {"batch_size": 100}),
    "tensors": lambda *arrays: (tuple(map(tf.constant, arrays)), {}),
    "tf.data": lambda *arrays: ((sliced(*arrays),), {}),
    "tf.data of unknown length": lambda *arrays: ((sliced(*arrays).filter(lambda *_: True),), {}),
    "tf.data without end": lambda *arrays: ((sliced(*arrays).repeat(),), {"steps": 5}),
    "generator": lambda *arrays: ((generator(*arrays),), {}),
    "generator with steps": lambda *arrays: ((generator(*arrays),), {"steps": 5}),
    "PyDataset": lambda *arrays: ((Batches(*arrays),), {}),
}

# Keras warns whenever data of unknown length ends.
ends = pytest.mark.filterwarnings("ignore:Your input ran out of data")


@pytest.mark.sampled(2)
@ends
@pytest.mark.parametrize("make", DATA.values(), ids=DATA.keys())
def test_predict_accepts_all_kinds_of_data(make, cases):
    ens, stack = cases("softmax")
    (x,), arguments = make(ROWS)
    assert_close(ens.predict(x, verbose=0, **arguments), stack.mean(axis=0))


@ends
@pytest.mark.parametrize("name", ["small batches", "tf.data", "generator", "PyDataset"])
def test_predict_members_joins_batches(name, cases):
    ens, stack = cases("softmax")
    (x,), arguments = DATA[name](ROWS)
    assert_close(ens.predict_members(x, verbose=0, **arguments), stack)


@ends
@pytest.mark.parametrize("make", DATA.values(), ids=DATA.keys())
def test_evaluate_accepts_all_kinds_of_data(make, cases):
    ens, stack = cases("softmax")
    data, arguments = make(ROWS, LABELS)
    expected = -np.log(stack.mean(axis=0)[np.arange(len(ROWS)), LABELS]).mean()
    assert_close(ens.evaluate(*data, verbose=0, **arguments), expected)


def test_steps_stop_early(cases):
    ens, stack = cases("softmax")
    actual = ens.predict(ROWS, batch_size=5, steps=2, verbose=0)
    assert_close(actual, stack.mean(axis=0)[:10])


def counted_batches(run, kind):
    """How often `run` requests each batch."""
    asked = collections.Counter()

    def batches():
        for index in range(5):
            asked[index] += 1
            yield (ROWS[index * 4 : index * 4 + 4],)

    if kind == "generator":
        run(batches())
    elif kind == "tf.data":
        spec = (tf.TensorSpec((None, 4), "float32"),)
        run(tf.data.Dataset.from_generator(batches, output_signature=spec))
    else:
        dataset = Batches(ROWS)
        asked = dataset.asked
        run(dataset)
    return asked


@ends
@pytest.mark.parametrize("kind", ["generator", "tf.data", "PyDataset"])
def test_the_data_is_read_once_whatever_the_number_of_members(kind, cases):
    ens, _ = cases("softmax")
    once = counted_batches(lambda x: ens.model.predict(x, verbose=0), kind)
    assert counted_batches(lambda x: ens.predict(x, verbose=0), kind) == once
    assert counted_batches(lambda x: ens.predict(x, members=1, verbose=0), kind) == once
    assert counted_batches(lambda x: ens.predict_members(x, verbose=0), kind) == once


def test_callbacks_see_each_batch_once(cases):
    ens, _ = cases("softmax")
    seen = []
    callback = keras.callbacks.LambdaCallback()
    callback.on_predict_batch_end = lambda batch, logs: seen.append(batch)
    callback.on_test_batch_end = lambda batch, logs: seen.append(batch)
    ens.predict(ROWS, batch_size=5, callbacks=[callback], verbose=0)
    ens.evaluate(ROWS, LABELS, batch_size=5, callbacks=[callback], verbose=0)
    assert seen == [0, 1, 2, 3, 4] * 2


class WithCounter(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3, "softmax")
        self.counter = [0]

    def call(self, inputs):
        return self.dense(inputs)

    def count(self):
        self.counter[0] += 1


def test_callbacks_use_attributes_of_the_users_own_model():
    model = WithCounter()
    model.compile("sgd", "sparse_categorical_crossentropy")
    model(ROWS[:1])
    callback = keras.callbacks.LambdaCallback()
    callback.on_predict_batch_end = lambda batch, logs: callback.model.count()
    callback.on_test_batch_end = lambda batch, logs: callback.model.count()
    ens = ensemble_of(model, MEMBERS)
    ens.predict(ROWS, batch_size=5, callbacks=[callback], verbose=0)
    ens.evaluate(ROWS, LABELS, batch_size=5, callbacks=[callback], verbose=0)
    assert model.counter == [2 * -(-len(ROWS) // 5)]
    with pytest.raises(AttributeError, match="has no attribute 'inputs'"):
        _ = callback.model.inputs


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "options",
    [
        {"jit_compile": False},
        {"jit_compile": True},
        {"run_eagerly": True},
        {"steps_per_execution": 3},
    ],
    ids=lambda options: next(iter(options)) + str(next(iter(options.values()))),
)
def test_the_ensemble_runs_as_the_model_was_compiled(options, cases):
    _, stack = cases("softmax")
    model = dense(**options)
    ens = ensemble_of(model, MEMBERS)
    assert_close(ens.predict(ROWS, batch_size=4, verbose=0), stack.mean(axis=0))
    expected = -np.log(stack.mean(axis=0)[np.arange(len(ROWS)), LABELS]).mean()
    assert_close(ens.evaluate(ROWS, LABELS, batch_size=4, verbose=0), expected)


# Traced once


class Counting(layers.Layer):
    """Counts how often it is traced."""

    calls = 0

    def call(self, inputs):
        Counting.calls += 1
        return inputs * 1.0


@pytest.fixture
def counting():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3), Counting(), layers.Softmax()])
    model.compile("sgd", "sparse_categorical_crossentropy")
    ens = ensemble_of(model, MEMBERS)
    ens.weights = [0.1, 0.2, 0.3, 0.4]
    return ens


@pytest.mark.parametrize("combine", ["mean", "vote", "weighted"])
def test_a_second_predict_traces_nothing(combine, counting):
    first = counting.predict(ROWS, combine=combine, batch_size=5, verbose=0)
    traced = Counting.calls
    second = counting.predict(ROWS.copy(), combine=combine, batch_size=5, verbose=0)
    assert Counting.calls == traced
    np.testing.assert_array_equal(first, second)


def test_other_calls_in_between_cause_no_retracing(counting):
    actions = [
        lambda: counting.predict(ROWS, verbose=0),
        lambda: counting.predict(ROWS, members=2, verbose=0),
        lambda: counting.predict(ROWS, members=[2, 3], verbose=0),  # The same two.
        lambda: counting.predict_members(ROWS, verbose=0),
        lambda: counting.evaluate(ROWS, LABELS, verbose=0),
    ]
    for action in actions:
        action()
    traced = Counting.calls
    for action in reversed(actions):
        action()
    assert Counting.calls == traced


def test_the_same_members_by_number_and_by_index_are_traced_once(counting):
    counting.predict(ROWS, members=2, verbose=0)
    traced = Counting.calls
    counting.predict(ROWS, members=[2, 3], verbose=0)
    counting.predict(ROWS, members=[-2, -1], verbose=0)
    assert Counting.calls == traced
