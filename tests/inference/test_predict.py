"""What an ensemble predicts and how it scores, against its members by NumPy."""

import collections
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from scipy import special

from snapshot_ensemble import SnapshotEnsemble

MEMBERS = 4
RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(23, 4)).astype("float32")
STEPS = RNG.normal(size=(9, 5, 3)).astype("float32")
IMAGES = RNG.normal(size=(5, 6, 6, 2)).astype("float32")


@pytest.fixture(autouse=True)
def _seeded():
    # Clearing the session takes longer than most of these tests.
    keras.utils.set_random_seed(0)


def ensemble_of(model, directory, members=MEMBERS, **arguments):
    """An ensemble of random members; the model has weights that are none of theirs."""
    rng, own, paths = np.random.default_rng(1), model.get_weights(), []
    for index in range(members):
        model.set_weights([rng.normal(size=array.shape) for array in own])
        paths.append(directory / f"{index}.weights.h5")
        model.save_weights(paths[-1])
    model.set_weights(own)
    return SnapshotEnsemble.from_weights(model, paths, **arguments)


def dense(units, activation, loss, inputs=4, **compile_arguments):
    model = keras.Sequential([keras.Input((inputs,)), layers.Dense(units, activation)])
    model.compile("sgd", loss, **compile_arguments)
    return model


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


# The numbers, for every task


def log_mean(logs, weights):
    weights = np.reshape(weights, (-1,) + (1,) * (logs.ndim - 1))
    return special.logsumexp(logs, axis=0, b=weights)


def mean_by_hand(stack, task, logits, weights=None):
    """In float64, with SciPy."""
    stack = np.asarray(stack, "float64")
    weights = np.full(len(stack), 1 / len(stack)) if weights is None else np.asarray(weights)
    if not logits:
        return np.average(stack, axis=0, weights=weights)
    if task == "multiclass":
        return log_mean(special.log_softmax(stack, axis=-1), weights)
    return log_mean(special.log_expit(stack), weights) - log_mean(
        special.log_expit(-stack), weights
    )


def shares_by_hand(stack, task, logits):
    """The share of members that vote for each class."""
    if task == "multiclass":
        votes = np.asarray(stack).argmax(axis=-1)
        return np.mean(votes[..., None] == np.arange(np.shape(stack)[-1]), axis=0)
    return np.mean(np.asarray(stack) > (0 if logits else 0.5), axis=0)


def to_probabilities(outputs, task, logits):
    outputs = np.asarray(outputs, "float64")
    if not logits:
        return outputs
    return special.softmax(outputs, axis=-1) if task == "multiclass" else special.expit(outputs)


Kind = collections.namedtuple("Kind", "task logits units activation loss")
KINDS = {
    "softmax": Kind("multiclass", False, 3, "softmax", "sparse_categorical_crossentropy"),
    "softmax logits": Kind(
        "multiclass", True, 3, None, keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    ),
    "sigmoid": Kind("binary", False, 1, "sigmoid", "binary_crossentropy"),
    "log-odds": Kind("binary", True, 1, None, keras.losses.BinaryCrossentropy(from_logits=True)),
    "labels": Kind("multilabel", False, 3, "sigmoid", "binary_crossentropy"),
    "log-odds of labels": Kind(
        "multilabel", True, 3, None, keras.losses.BinaryCrossentropy(from_logits=True)
    ),
    "values": Kind("regression", False, 2, None, "mse"),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """For each kind an ensemble, and what `ens[i].predict` gives, made when first asked for."""
    made = {}

    def case(name):
        if name not in made:
            kind = KINDS[name]
            model = dense(kind.units, kind.activation, kind.loss)
            ens = ensemble_of(model, tmp_path_factory.mktemp("case"))
            stack = np.stack([member.predict(ROWS, verbose=0) for member in ens])
            made[name] = ens, stack
        return made[name]

    return case


@pytest.fixture
def classifier(tmp_path):
    model = dense(3, "softmax", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return ensemble_of(model, tmp_path)


@pytest.fixture
def regressor(tmp_path):
    return ensemble_of(dense(2, None, "mse"), tmp_path)


LABELS = np.random.default_rng(2).integers(0, 3, len(ROWS))


@pytest.mark.parametrize("name", KINDS)
def test_mean(name, cases):
    ens, stack = cases(name)
    task, logits = KINDS[name][:2]
    found = ens.predict(ROWS, verbose=0)
    assert found.dtype == "float32"
    assert found.shape == stack.shape[1:]
    close(found, mean_by_hand(stack, task, logits))


@pytest.mark.parametrize("name", KINDS)
def test_weighted(name, cases):
    ens, stack = cases(name)
    task, logits = KINDS[name][:2]
    weights = [0.4, 0.0, 0.35, 0.25]
    ens.weights = weights
    found = ens.predict(ROWS, combine="weighted", verbose=0)
    close(found, mean_by_hand(stack, task, logits, weights))


@pytest.mark.parametrize("name", [name for name in KINDS if name != "values"])
def test_vote(name, cases):
    ens, stack = cases(name)
    task, logits = KINDS[name][:2]
    found = to_probabilities(ens.predict(ROWS, combine="vote", verbose=0), task, logits)
    shares = shares_by_hand(stack, task, logits)
    np.testing.assert_allclose(found, shares, atol=2e-6)
    means = to_probabilities(stack, task, logits).mean(axis=0)
    if task == "multiclass":
        drawn = np.where(shares == shares.max(axis=-1, keepdims=True), means, -1)
        np.testing.assert_array_equal(found.argmax(axis=-1), drawn.argmax(axis=-1))
    else:
        np.testing.assert_array_equal(found > 0.5, np.where(shares == 0.5, means, shares) > 0.5)


CHOICES = [
    (None, [0, 1, 2, 3]),
    (1, [3]),
    (2, [2, 3]),
    (4, [0, 1, 2, 3]),
    (np.int32(3), [1, 2, 3]),
    ([0], [0]),
    ([2, 0], [0, 2]),
    ([-1, 0], [0, 3]),
    (range(1, 3), [1, 2]),
    (np.array([3, 1]), [1, 3]),
]


@pytest.mark.parametrize(("members", "chosen"), CHOICES)
def test_mean_of_chosen_members(members, chosen, cases):
    ens, stack = cases("softmax")
    close(ens.predict(ROWS, members=members, verbose=0), stack[chosen].mean(axis=0))


@pytest.mark.parametrize(("members", "chosen"), CHOICES[1:5])
def test_vote_of_chosen_members(members, chosen, cases):
    ens, stack = cases("softmax")
    found = ens.predict(ROWS, combine="vote", members=members, verbose=0)
    np.testing.assert_allclose(found, shares_by_hand(stack[chosen], "multiclass", False), atol=1e-6)


@pytest.mark.parametrize(("members", "chosen"), CHOICES[:3])
def test_weights_of_chosen_members_sum_to_one_again(members, chosen, cases):
    ens, stack = cases("values")
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    ens.weights = weights
    found = ens.predict(ROWS, combine="weighted", members=members, verbose=0)
    close(found, np.average(stack[chosen], axis=0, weights=weights[chosen]))


def test_weights_follow_the_order_of_chosen_members(cases):
    ens, stack = cases("values")
    ens.weights = [0.1, 0.2, 0.3, 0.4]
    found = ens.predict(ROWS, combine="weighted", members=[3, 0], verbose=0)
    close(found, 0.8 * stack[3] + 0.2 * stack[0])


@pytest.mark.parametrize("name", KINDS)
def test_each_members_own_output(name, cases):
    ens, stack = cases(name)
    found = ens.predict_members(ROWS, verbose=0)
    assert found.shape == stack.shape
    assert found.dtype == stack.dtype
    np.testing.assert_allclose(found, stack, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("members", "chosen"), [(2, [2, 3]), ([2, 0], [2, 0]), ([-1], [3])])
def test_own_outputs_come_in_the_order_that_was_asked_for(members, chosen, cases):
    ens, stack = cases("values")
    close(ens.predict_members(ROWS, members=members, verbose=0), stack[chosen])


def test_logits_softmax_and_sigmoid_models_agree(tmp_path):
    # The same weights under three last layers, two of them without its activation.
    models = {name: dense(*KINDS[name][2:]) for name in ("softmax", "softmax logits")}
    found = {}
    for name, model in models.items():
        (tmp_path / name).mkdir()
        found[name] = ensemble_of(model, tmp_path / name).predict(ROWS, verbose=0)
    close(special.softmax(found["softmax logits"], axis=-1), found["softmax"])
    close(special.logsumexp(found["softmax logits"], axis=-1), 0)


# Structures and shapes


def two_inputs(inputs, outputs, loss):
    model = keras.Model(inputs, outputs)
    model.compile("sgd", loss)
    return model


def lists():
    a, b = keras.Input((4,)), keras.Input((3,))
    hidden = layers.Concatenate()([a, b])
    outputs = [layers.Dense(3)(hidden), layers.Dense(2, "sigmoid")(hidden), layers.Dense(1)(b)]
    categorical = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = two_inputs([a, b], outputs, [categorical, "binary_crossentropy", "mse"])
    x = [ROWS, ROWS[:, :3]]
    return model, x, [("multiclass", True), ("multilabel", False), ("regression", False)]


def dicts():
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    hidden = layers.Concatenate()([a, b])
    outputs = {"z": layers.Dense(3)(hidden), "c": layers.Dense(2)(hidden)}
    loss = {"z": keras.losses.CategoricalCrossentropy(from_logits=True), "c": "mae"}
    model = two_inputs({"a": a, "b": b}, outputs, loss)
    x = {"a": ROWS, "b": ROWS[:, :3]}
    return model, x, [("regression", False), ("multiclass", True)]


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.z, self.c = layers.Dense(1), layers.Dense(2)

    def call(self, inputs):
        return {"z": self.z(inputs["a"]), "c": self.c(inputs["b"])}


def subclassed():
    model, x = Subclassed(), {"a": ROWS, "b": ROWS[:, :3]}
    model.compile("sgd", {"z": keras.losses.BinaryCrossentropy(from_logits=True), "c": "mse"})
    model.predict(x, verbose=0)
    return model, x, [("regression", False), ("binary", True)]


def sequences():
    inputs = keras.Input((5, 3))
    model = keras.Model(inputs, layers.Dense(4)(layers.SimpleRNN(3, return_sequences=True)(inputs)))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model, STEPS, [("multiclass", True)]


def images():
    model = keras.Sequential([keras.Input((6, 6, 2)), layers.Conv2D(3, 3, activation="softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model, IMAGES, [("multiclass", False)]


def numbers_without_an_axis():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(1, "sigmoid")(inputs)[:, 0])
    model.compile("sgd", "binary_crossentropy")
    return model, ROWS, [("binary", False)]


def double_precision():
    inputs = keras.Input((4,), dtype="float64")
    model = keras.Model(inputs, layers.Dense(3, "softmax", dtype="float64")(inputs))
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model, ROWS.astype("float64"), [("multiclass", False)]


STRUCTURES = [
    lists,
    dicts,
    subclassed,
    sequences,
    images,
    numbers_without_an_axis,
    double_precision,
]


@pytest.mark.parametrize("make", STRUCTURES)
def test_outputs_have_the_models_structure_and_each_its_own_meaning(make, tmp_path):
    model, x, meanings = make()
    ens = ensemble_of(model, tmp_path, 3)
    members = [keras.tree.flatten(member.predict(x, verbose=0)) for member in ens]
    found, like = ens.predict(x, verbose=0), model.predict(x, verbose=0)
    keras.tree.assert_same_structure(found, like)
    own = ens.predict_members(x, verbose=0)
    keras.tree.assert_same_structure(own, like)
    for i, (task, logits) in enumerate(meanings):
        output, expected = keras.tree.flatten(found)[i], keras.tree.flatten(like)[i]
        assert type(output) is np.ndarray
        assert (output.shape, output.dtype) == (expected.shape, expected.dtype)
        stack = np.stack([member[i] for member in members])
        close(output, mean_by_hand(stack, task, logits))
        close(keras.tree.flatten(own)[i], stack)


@pytest.mark.parametrize("make", [sequences, images])
def test_votes_at_each_step_and_pixel(make, tmp_path):
    model, x, [(task, logits)] = make()
    ens = ensemble_of(model, tmp_path, 3)
    stack = np.stack([member.predict(x, verbose=0) for member in ens])
    found = ens.predict(x, combine="vote", verbose=0)
    shares = shares_by_hand(stack, task, logits)
    np.testing.assert_allclose(to_probabilities(found, task, logits), shares, atol=2e-6)


def test_half_precision_is_combined_in_single_precision(tmp_path):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(3, "softmax", dtype="mixed_float16")(inputs))
    model.compile("sgd", "sparse_categorical_crossentropy")
    ens = ensemble_of(model, tmp_path)
    own = ens.predict_members(ROWS, verbose=0)
    assert own.dtype == "float16"
    found = ens.predict(ROWS, verbose=0)
    assert found.dtype == "float32"
    np.testing.assert_allclose(found, own.astype("float64").mean(axis=0), atol=1e-6)


# Ways to hand over data


class Batches(keras.utils.PyDataset):
    def __init__(self, *arrays, size=5):
        super().__init__()
        self.arrays, self.size, self.asked = arrays, size, collections.Counter()

    def __len__(self):
        return math.ceil(len(self.arrays[0]) / self.size)

    def __getitem__(self, index):
        self.asked[index] += 1
        part = slice(index * self.size, (index + 1) * self.size)
        return tuple(array[part] for array in self.arrays)


def generator(*arrays):
    dataset = Batches(*arrays)
    for index in range(len(dataset)):
        yield dataset[index]


def sliced(*arrays):
    dataset = tf.data.Dataset.from_tensor_slices(arrays if len(arrays) > 1 else arrays[0])
    return dataset.batch(5)


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


# Keras says so whenever data of unknown length ends.
ends = pytest.mark.filterwarnings("ignore:Your input ran out of data")


@ends
@pytest.mark.parametrize("make", DATA.values(), ids=DATA.keys())
def test_predict_takes_all_kinds_of_data(make, cases):
    ens, stack = cases("softmax")
    (x,), arguments = make(ROWS)
    close(ens.predict(x, verbose=0, **arguments), stack.mean(axis=0))


@ends
@pytest.mark.parametrize("name", ["small batches", "tf.data", "generator", "PyDataset"])
def test_predict_members_joins_batches(name, cases):
    ens, stack = cases("softmax")
    (x,), arguments = DATA[name](ROWS)
    close(ens.predict_members(x, verbose=0, **arguments), stack)


@ends
@pytest.mark.parametrize("make", DATA.values(), ids=DATA.keys())
def test_evaluate_takes_all_kinds_of_data(make, cases):
    ens, stack = cases("softmax")
    data, arguments = make(ROWS, LABELS)
    expected = -np.log(stack.mean(axis=0)[np.arange(len(ROWS)), LABELS]).mean()
    close(ens.evaluate(*data, verbose=0, **arguments), expected)


def test_steps_stop_early(cases):
    ens, stack = cases("softmax")
    found = ens.predict(ROWS, batch_size=5, steps=2, verbose=0)
    close(found, stack.mean(axis=0)[:10])


def counted_batches(run, kind):
    """How many batches `run` asks for."""
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
def test_the_data_is_gone_through_once_however_many_members(kind, cases):
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


@pytest.mark.parametrize(
    "how",
    [
        {"jit_compile": False},
        {"jit_compile": True},
        {"run_eagerly": True},
        {"steps_per_execution": 3},
    ],
    ids=lambda how: next(iter(how)) + str(next(iter(how.values()))),
)
def test_the_ensemble_runs_as_the_model_was_compiled(how, cases, tmp_path):
    _, stack = cases("softmax")
    model = dense(3, "softmax", "sparse_categorical_crossentropy", **how)
    ens = ensemble_of(model, tmp_path)
    close(ens.predict(ROWS, batch_size=4, verbose=0), stack.mean(axis=0))
    expected = -np.log(stack.mean(axis=0)[np.arange(len(ROWS)), LABELS]).mean()
    close(ens.evaluate(ROWS, LABELS, batch_size=4, verbose=0), expected)


# Traced once


class Counting(layers.Layer):
    """Counts how often Python runs it, which is once for each tracing."""

    calls = 0

    def call(self, inputs):
        Counting.calls += 1
        return inputs * 1.0


@pytest.fixture
def counting(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3), Counting(), layers.Softmax()])
    model.compile("sgd", "sparse_categorical_crossentropy")
    ens = ensemble_of(model, tmp_path)
    ens.weights = [0.1, 0.2, 0.3, 0.4]
    return ens


@pytest.mark.parametrize("combine", ["mean", "vote", "weighted"])
def test_a_second_predict_traces_nothing(combine, counting):
    first = counting.predict(ROWS, combine=combine, batch_size=5, verbose=0)
    traced = Counting.calls
    again = counting.predict(ROWS.copy(), combine=combine, batch_size=5, verbose=0)
    assert Counting.calls == traced
    np.testing.assert_array_equal(first, again)


def test_other_calls_in_between_change_nothing(counting):
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


# Scores


def test_loss_and_metrics_are_those_of_the_combined_output(classifier):
    stack = np.stack([member.predict(ROWS, verbose=0) for member in classifier])
    mean = stack.mean(axis=0)
    expected = [
        -np.log(mean[np.arange(len(ROWS)), LABELS]).mean(),
        np.mean(mean.argmax(axis=-1) == LABELS),
    ]
    found = classifier.evaluate(ROWS, LABELS, verbose=0)
    assert isinstance(found, list)
    close(found, expected)
    named = classifier.evaluate(ROWS, LABELS, return_dict=True, verbose=0)
    assert list(named) == list(classifier.model.evaluate(ROWS, LABELS, return_dict=True, verbose=0))
    close([named["loss"], named["accuracy"]], expected)


def test_loss_and_metrics_of_votes(classifier):
    shares = classifier.predict(ROWS, combine="vote", verbose=0)
    picked = np.maximum(shares[np.arange(len(ROWS)), LABELS], keras.config.epsilon())
    expected = [-np.log(picked).mean(), np.mean(shares.argmax(axis=-1) == LABELS)]
    close(classifier.evaluate(ROWS, LABELS, combine="vote", verbose=0), expected, 1e-4)


def test_loss_and_metrics_of_chosen_members_by_weight(classifier):
    classifier.weights = [0.4, 0.3, 0.2, 0.1]
    stack = np.stack([member.predict(ROWS, verbose=0) for member in classifier])
    combined = (0.2 * stack[2] + 0.1 * stack[3]) / 0.3
    expected = [
        -np.log(combined[np.arange(len(ROWS)), LABELS]).mean(),
        np.mean(combined.argmax(axis=-1) == LABELS),
    ]
    found = classifier.evaluate(ROWS, LABELS, combine="weighted", members=2, verbose=0)
    close(found, expected)


@pytest.mark.parametrize("name", ["softmax logits", "log-odds", "log-odds of labels"])
def test_the_loss_of_logits_is_that_of_the_mean_probability(name, cases):
    ens, stack = cases(name)
    task, logits, units, *_ = KINDS[name]
    mean = to_probabilities(stack, task, logits).mean(axis=0)
    if task == "multiclass":
        y = LABELS
        expected = -np.log(mean[np.arange(len(ROWS)), y]).mean()
    else:
        y = np.random.default_rng(3).integers(0, 2, (len(ROWS), units)).astype("float32")
        expected = -np.mean(y * np.log(mean) + (1 - y) * np.log(1 - mean))
    close(ens.evaluate(ROWS, y, verbose=0), expected)


@pytest.mark.parametrize("batch_size", [5, 32])
def test_sample_weights(batch_size, tmp_path):
    model = dense(2, None, "mse", metrics=["mae"], weighted_metrics=["mse"])
    ens = ensemble_of(model, tmp_path)
    y = np.ones((len(ROWS), 2))
    weights = np.random.default_rng(3).random(len(ROWS))
    error = np.mean([member.predict(ROWS, verbose=0) for member in ens], axis=0) - y
    found = ens.evaluate(
        ROWS, y, sample_weight=weights, batch_size=batch_size, return_dict=True, verbose=0
    )
    squares = (error**2).mean(axis=1)
    close(found["loss"], (weights * squares).mean())
    close(found["mae"], np.abs(error).mean())
    close(found["mse"], (weights * squares).sum() / weights.sum())


def test_sample_weights_in_the_data(tmp_path):
    model = dense(2, None, "mse")
    ens = ensemble_of(model, tmp_path)
    y, weights = np.ones((len(ROWS), 2)), np.random.default_rng(3).random(len(ROWS))
    expected = ens.evaluate(ROWS, y, sample_weight=weights, verbose=0)
    close(ens.evaluate(sliced(ROWS, y, weights), verbose=0), expected)
    close(ens.evaluate(Batches(ROWS, y, weights), verbose=0), expected)


def named_outputs(structure):
    inputs = keras.Input((4,))
    kind = layers.Dense(3, "softmax", name="kind")(inputs)
    amount = layers.Dense(2, name="amount")(inputs)
    outputs = {"kind": kind, "amount": amount} if structure is dict else [kind, amount]
    model = keras.Model(inputs, outputs)
    model.compile(
        "sgd",
        {"amount": "mse", "kind": "sparse_categorical_crossentropy"},
        loss_weights={"amount": 0.5, "kind": 2.0},
        metrics={"amount": ["mae"], "kind": ["accuracy"]},
    )
    return model


@pytest.mark.parametrize("structure", [list, dict])
def test_losses_and_metrics_of_several_outputs(structure, tmp_path):
    model = named_outputs(structure)
    ens = ensemble_of(model, tmp_path)
    values = np.ones((len(ROWS), 2))
    y = {"kind": LABELS, "amount": values} if structure is dict else [LABELS, values]
    outputs = [member.predict(ROWS, verbose=0) for member in ens]
    first, second = ("kind", "amount") if structure is dict else (0, 1)
    kinds = np.mean([output[first] for output in outputs], axis=0)
    error = np.mean([output[second] for output in outputs], axis=0) - values
    expected = {
        "kind_loss": -np.log(kinds[np.arange(len(ROWS)), LABELS]).mean(),
        "amount_loss": (error**2).mean(),
        "kind_accuracy": np.mean(kinds.argmax(axis=-1) == LABELS),
        "amount_mae": np.abs(error).mean(),
    }
    expected["loss"] = 2 * expected["kind_loss"] + 0.5 * expected["amount_loss"]
    found = ens.evaluate(ROWS, y, return_dict=True, verbose=0)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        close(found[name], value)


def test_scores_of_one_member_are_what_its_model_gives(tmp_path):
    # Names, order and values, where Keras puts them itself.
    model = named_outputs(list)
    ens = ensemble_of(model, tmp_path, 2)
    y = [LABELS, np.ones((len(ROWS), 2))]
    close(ens.evaluate(ROWS, y, members=1, verbose=0), ens[1].evaluate(ROWS, y, verbose=0))


def test_penalties_on_weights_are_not_in_the_loss(tmp_path):
    inputs = keras.Input((4,))
    dense_layer = layers.Dense(
        2, kernel_regularizer=keras.regularizers.L2(0.5), activity_regularizer="l1"
    )
    model = keras.Model(inputs, dense_layer(inputs))
    model.compile("sgd", "mse")
    ens = ensemble_of(model, tmp_path)
    y = np.ones((len(ROWS), 2))
    error = np.mean([member.predict(ROWS, verbose=0) for member in ens], axis=0) - y
    close(ens.evaluate(ROWS, y, verbose=0), (error**2).mean())
    assert (
        model.evaluate(ROWS, y, verbose=0)
        > 1.1 * ((model.predict(ROWS, verbose=0) - y) ** 2).mean()
    )


def test_masked_steps_are_not_scored(tmp_path):
    tokens = np.array([[1, 2, 3, 0, 0], [4, 5, 0, 0, 0], [1, 1, 1, 1, 0]])
    tags = np.random.default_rng(3).integers(0, 2, tokens.shape)
    inputs = keras.Input((5,), dtype="int32")
    hidden = layers.Embedding(7, 4, mask_zero=True)(inputs)
    model = keras.Model(inputs, layers.Dense(2, "softmax")(hidden))
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    ens = ensemble_of(model, tmp_path)
    mean = np.mean([member.predict(tokens, verbose=0) for member in ens], axis=0)
    picked = np.take_along_axis(mean, tags[..., None], axis=-1)[..., 0]
    real = tokens != 0
    expected = [-np.log(picked[real]).mean(), (mean.argmax(axis=-1) == tags)[real].mean()]
    found = ens.evaluate(tokens, tags, verbose=0)
    close(found, expected)
    close(
        ens.evaluate(tokens, tags, members=[0], verbose=0), ens[0].evaluate(tokens, tags, verbose=0)
    )


def test_scores_start_anew_each_time(classifier):
    first = classifier.evaluate(ROWS, LABELS, verbose=0)
    classifier.evaluate(ROWS[::-1], LABELS, verbose=0)
    assert classifier.evaluate(ROWS, LABELS, verbose=0) == first


def test_scores_follow_a_new_compile(classifier):
    classifier.evaluate(ROWS, LABELS, verbose=0)
    classifier.model.compile("sgd", "sparse_categorical_crossentropy", metrics=[always_seven])
    found = classifier.evaluate(ROWS, LABELS, return_dict=True, verbose=0)
    assert found.keys() == {"loss", "always_seven"}
    assert found["always_seven"] == 7


def always_seven(y_true, y_pred):
    return ops.zeros_like(y_pred[:, 0]) + 7


# The members


def test_length_and_iteration(classifier):
    assert len(classifier) == MEMBERS
    members = list(classifier)
    assert len(members) == MEMBERS
    for index, member in enumerate(members):
        for found, expected in zip(
            member.get_weights(), classifier[index].get_weights(), strict=True
        ):
            np.testing.assert_array_equal(found, expected)


def test_snapshots_of_weight_files_know_only_their_place(classifier):
    assert [snapshot.index for snapshot in classifier.snapshots] == [0, 1, 2, 3]
    assert {snapshot.epoch for snapshot in classifier.snapshots} == {None}


@pytest.mark.parametrize("index", [0, 3, -1, -4, np.int64(2)])
def test_indices_count_from_either_end(index, regressor):
    own = regressor.predict_members(ROWS, verbose=0)
    close(regressor[index].predict(ROWS, verbose=0), own[index])


@pytest.mark.parametrize("index", [4, -5, 100])
def test_indices_out_of_range(index, classifier):
    with pytest.raises(IndexError, match="out of range"):
        classifier[index]
    assert len(classifier) == MEMBERS


@pytest.mark.parametrize("index", [1.0, "0", None, slice(2)])
def test_indices_of_a_wrong_type(index, classifier):
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        classifier[index]


def test_how_it_shows_itself(tmp_path):
    model = dense(3, "softmax", "sparse_categorical_crossentropy")
    model.name = "mine"
    assert repr(SnapshotEnsemble(model)) == "<SnapshotEnsemble of 'mine': 0 members in memory>"
    ens = ensemble_of(model, tmp_path, 2)
    assert repr(ens) == "<SnapshotEnsemble of 'mine': 2 members in memory>"
    kept = SnapshotEnsemble(model, directory=tmp_path / "kept")
    assert repr(kept) == f"<SnapshotEnsemble of 'mine': 0 members in '{tmp_path / 'kept'}'>"


# Weights


def test_weights_are_none_until_they_are_set(classifier):
    assert classifier.weights is None
    classifier.weights = [0.25, 0.25, 0.5, 0]
    np.testing.assert_array_equal(classifier.weights, [0.25, 0.25, 0.5, 0])
    assert classifier.weights.dtype == "float64"
    classifier.weights = None
    assert classifier.weights is None


def test_weights_are_a_copy(classifier):
    given = np.array([0.25, 0.25, 0.25, 0.25])
    classifier.weights = given
    given[:] = 0
    classifier.weights[:] = 0
    np.testing.assert_array_equal(classifier.weights, [0.25, 0.25, 0.25, 0.25])


def test_new_weights_count_at_once(cases):
    ens, stack = cases("values")
    for index in (0, 2):
        ens.weights = np.eye(MEMBERS)[index]
        close(ens.predict(ROWS, combine="weighted", verbose=0), stack[index])


def test_weights_stay_when_only_some_members_are_asked(classifier):
    classifier.weights = [0.1, 0.2, 0.3, 0.4]
    classifier.predict(ROWS, combine="weighted", members=[0, 1], verbose=0)
    np.testing.assert_allclose(classifier.weights, [0.1, 0.2, 0.3, 0.4])


def test_a_new_fit_clears_the_weights_and_adds_members(tmp_path):
    model = dense(3, "softmax", "sparse_categorical_crossentropy")
    ens = ensemble_of(model, tmp_path, 2, cycles=2, lr_init=0.1)
    ens.weights = [0.5, 0.5]
    before = ens.predict_members(ROWS, verbose=0)
    ens.predict(ROWS, combine="weighted", verbose=0)
    ens.fit(ROWS, LABELS, epochs=2, verbose=0)
    assert ens.weights is None
    assert len(ens) == 4
    own = ens.predict_members(ROWS, verbose=0)
    assert own.shape == (4, len(ROWS), 3)
    np.testing.assert_array_equal(own[:2], before)
    close(own[3], model.predict(ROWS, verbose=0))
    close(ens.predict(ROWS, verbose=0), own.mean(axis=0))
    with pytest.raises(ValueError, match="needs weights"):
        ens.predict(ROWS, combine="weighted", verbose=0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.5], "`weights` must be one number for each of the 4 members. Received: weights="),
        (1.0, "`weights` must be one number for each of the 4 members. Received: weights="),
        ([1, 1, 1, 1], "`weights` must be finite, at least 0 and sum to 1. Received: weights="),
        ([2, -1, 0, 0], "`weights` must be finite, at least 0 and sum to 1. Received: weights="),
        ([np.nan] * 4, "`weights` must be finite, at least 0 and sum to 1. Received: weights="),
    ],
)
def test_bad_weights_leave_the_good_ones(weights, message, classifier):
    classifier.weights = [0.1, 0.2, 0.3, 0.4]
    with pytest.raises(ValueError) as caught:
        classifier.weights = weights
    assert str(caught.value).startswith(message)
    np.testing.assert_allclose(classifier.weights, [0.1, 0.2, 0.3, 0.4])
    assert len(classifier) == MEMBERS


# What makes no sense


def calls(ens):
    return [
        lambda **arguments: ens.predict(ROWS, verbose=0, **arguments),
        lambda **arguments: ens.evaluate(ROWS, LABELS, verbose=0, **arguments),
    ]


def test_predicting_without_members():
    ens = SnapshotEnsemble(dense(3, "softmax", "sparse_categorical_crossentropy"))
    for call in [*calls(ens), lambda: ens.predict_members(ROWS, verbose=0)]:
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == (
            "The ensemble has no members yet. Call `fit`, or make it with `load` or `from_weights`."
        )
    assert len(ens) == 0
    assert list(ens) == []
    with pytest.raises(IndexError, match="out of range"):
        ens[0]


@pytest.mark.parametrize("combine", ["max", "Mean", None, 3])
def test_unknown_combinations(combine, classifier):
    for call in calls(classifier):
        with pytest.raises(ValueError, match="`combine` must be one of") as caught:
            call(combine=combine)
        assert str(caught.value).endswith(f"Received: combine={combine!r}")
    assert len(classifier) == MEMBERS


def test_a_vote_on_values(regressor):
    y = np.ones((len(ROWS), 2))
    for call in (regressor.predict, lambda x, **a: regressor.evaluate(x, y, **a)):
        with pytest.raises(ValueError, match="`combine='vote'` is for classes, and output 0"):
            call(ROWS, combine="vote", verbose=0)
    assert len(regressor) == MEMBERS
    assert regressor.predict(ROWS, verbose=0).shape == (len(ROWS), 2)


def test_a_vote_where_one_of_the_outputs_is_a_value(tmp_path):
    ens = ensemble_of(named_outputs(list), tmp_path, 2)
    with pytest.raises(ValueError, match="output 1 of the model is a regression"):
        ens.predict(ROWS, combine="vote", verbose=0)
    assert len(ens) == 2


def test_weighted_without_weights(classifier):
    for call in calls(classifier):
        with pytest.raises(ValueError, match="`combine='weighted'` needs weights"):
            call(combine="weighted")
    assert len(classifier) == MEMBERS


def test_weighted_where_the_chosen_members_have_none(classifier):
    classifier.weights = [1, 0, 0, 0]
    for call in calls(classifier):
        with pytest.raises(ValueError, match="The chosen members all have weight 0"):
            call(combine="weighted", members=2)
    assert len(classifier) == MEMBERS


@pytest.mark.parametrize(
    ("members", "error", "message"),
    [
        (0, ValueError, "`members` must be at least 1. Received: members=0"),
        (-2, ValueError, "`members` must be at least 1. Received: members=-2"),
        (
            5,
            ValueError,
            "The ensemble has 4 members, so `members` can be at most 4. Received: members=5",
        ),
        ([4], ValueError, "`members` must be indices from 0 to 3. Received: members=[4]"),
        (
            [],
            ValueError,
            "`members` must name at least one member, and none twice. Received: members=[]",
        ),
        (
            [0, -4],
            ValueError,
            "`members` must name at least one member, and none twice. Received: members=[0, -4]",
        ),
        (True, TypeError, "`members` must be a whole number. Received: members=True"),
        ("all", TypeError, "`members` must be a whole number. Received: members='all'"),
    ],
)
def test_bad_members(members, error, message, classifier):
    for call in [*calls(classifier), lambda **a: classifier.predict_members(ROWS, **a)]:
        with pytest.raises(error) as caught:
            call(members=members)
        assert str(caught.value) == message
    assert len(classifier) == MEMBERS


def test_unknown_arguments_are_refused(classifier):
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        classifier.predict(ROWS, y=LABELS)
    with pytest.raises(ValueError, match="foo"):
        classifier.evaluate(ROWS, LABELS, foo=1)
    assert len(classifier) == MEMBERS


def test_generators_are_not_mistaken_for_members(classifier):
    with pytest.raises(TypeError, match="`members` must be a whole number"):
        classifier.predict(ROWS, members=(index for index in (0, 1)))
