"""One model out of the mean of the members' weights, against NumPy and Keras."""

import math
import re
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from models import Batches, assert_all_close, assert_close, assert_same, dense, dense_outputs, ensemble_of, ensemble_with, member_weights, sliced
from scipy import special
from sklearn.datasets import load_diabetes, load_digits
from sklearn.linear_model import LogisticRegression

from snapshot_ensemble import Snapshot, SnapshotEnsemble

RNG = np.random.default_rng(0)
ROWS = RNG.normal(3, 2, size=(23, 4)).astype("float32")
LABELS = RNG.integers(0, 3, len(ROWS))
IMAGES = RNG.normal(1, 2, size=(10, 6, 6, 2)).astype("float32")
TOKENS = np.array([[1, 2, 3, 4, 5], [6, 5, 4, 3, 2], [1, 0, 0, 0, 0], [6, 2, 0, 0, 0]])




def compiled(model, loss="sparse_categorical_crossentropy", **arguments):
    model.compile("sgd", loss, **arguments)
    return model






def mean_by_hand(members):
    return [np.mean(arrays, axis=0, dtype="float64") for arrays in zip(*members, strict=True)]








def normalization(model):
    """The only layer of batch normalisation."""
    (found,) = [x for x in model._flatten_layers() if isinstance(x, layers.BatchNormalization)]
    return found


def statistics(model):
    layer = normalization(model)
    return layer.moving_mean.numpy(), layer.moving_variance.numpy()


# The mean


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("float32", [1e8, 1.0, -1e8]),  # 1e8 + 1 is 1e8.
        ("float16", [6e4, 6e4, 3e4]),  # 65504 is the largest.
        ("bfloat16", [256.0, 1.0, 1.0]),  # 256 + 1 is 256.
    ],
)
def test_the_mean_is_taken_in_float64(dtype, values):
    model = keras.Sequential([keras.Input((2,)), layers.Dense(3, dtype=dtype)])
    compiled(model, "mse")
    own = model.get_weights()
    ens = ensemble_with(model, *([np.full_like(array, value) for array in own] for value in values))
    found = ens.average_weights().get_weights()
    expected = np.float64(np.mean(values))
    for array, before in zip(found, own, strict=True):
        assert array.dtype == before.dtype
        np.testing.assert_array_equal(array, np.full_like(before, expected))


@keras.saving.register_keras_serializable("averaging")
class Counted(layers.Layer):
    """Has a weight that is a whole number, and one that is a yes or no."""

    def build(self, shape):
        self.factor = self.add_weight(name="factor", shape=(2,))
        state = {"shape": (2,), "trainable": False, "initializer": "zeros"}
        self.count = self.add_weight(name="count", dtype="int32", **state)
        self.seen = self.add_weight(name="seen", dtype="bool", **state)

    def call(self, inputs):
        return inputs * self.factor


@pytest.mark.parametrize(("members", "last"), [(None, 2), ([2, 0], 0), (2, 2)])
def test_whole_numbers_are_those_of_the_last_member(members, last):
    model = compiled(keras.Sequential([keras.Input((2,)), Counted()]), "mse")
    rows = [[[i, 2 * i], [7 * i + 1, 5], [i == 1, i == 2]] for i in range(3)]
    dtypes = ("float32", "int32", "bool")
    given = [[np.array(a, d) for a, d in zip(row, dtypes, strict=True)] for row in rows]
    averaged = ensemble_with(model, *given).average_weights(members)
    assert [array.dtype for array in averaged.get_weights()] == ["float32", "int32", "bool"]
    assert_same(averaged.get_weights()[1:], given[last][1:])


@pytest.fixture(scope="module")
def random():
    return ensemble_of(dense())


@pytest.mark.parametrize(
    ("members", "chosen"), [(None, [0, 1, 2]), (2, [1, 2]), ([0, 2], [0, 2]), ([-1, 0], [0, 2])]
)
def test_the_mean_of_chosen_members(members, chosen, random):
    averaged = random.average_weights(members)
    expected = mean_by_hand([member_weights(random)[i] for i in chosen])
    assert_same(averaged.get_weights(), [array.astype("float32") for array in expected])


@pytest.mark.parametrize("members", [1, [2]])
def test_one_member_gives_itself(members, random):
    assert_same(random.average_weights(members).get_weights(), member_weights(random)[2])


# Statistics of batch normalisation


def normalized_input(**arguments):
    model = keras.Sequential(
        [keras.Input((4,)), layers.BatchNormalization(**arguments), layers.Dense(3, "softmax")]
    )
    return compiled(model, metrics=["accuracy"])


@pytest.fixture(scope="module")
def on_input():
    return ensemble_of(normalized_input())


@pytest.mark.parametrize(("batch_size", "momentum"), [(5, 0.99), (22, 0.5), (None, 0.0)])
def test_statistics_are_those_of_all_rows(batch_size, momentum):
    ens = ensemble_of(normalized_input(momentum=momentum))
    averaged = ens.average_weights(x=ROWS, batch_size=batch_size)
    mean, variance = statistics(averaged)
    assert_close(mean, ROWS.mean(axis=0, dtype="float64"))
    assert_close(variance, ROWS.var(axis=0, dtype="float64"))
    assert normalization(averaged).momentum == momentum
    # All else is the mean of the members.
    others = [0, 1, 4, 5]
    expected = mean_by_hand(member_weights(ens))
    assert_all_close([averaged.get_weights()[i] for i in others], [expected[i] for i in others], 1e-7)






@pytest.mark.parametrize(
    "x",
    [
        sliced(ROWS),
        sliced(ROWS, LABELS, np.ones(len(ROWS))).filter(lambda *_: True),
        Batches(ROWS),
        Batches(ROWS, LABELS),
    ],
    ids=["tf.data", "with targets and weights", "PyDataset", "with targets"],
)
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_statistics_from_all_kinds_of_data(x, on_input):
    # Of one member too, though there is no mean to take.
    mean, variance = statistics(on_input.average_weights([0], x=x))
    assert_close(mean, ROWS.mean(axis=0))
    assert_close(variance, ROWS.var(axis=0))


def test_statistics_from_a_dict_of_inputs():
    inputs = {"a": keras.Input((4,), name="a"), "b": keras.Input((2,), name="b")}
    hidden = layers.Concatenate()([layers.BatchNormalization()(inputs["a"]), inputs["b"]])
    model = compiled(keras.Model(inputs, layers.Dense(3, "softmax")(hidden)))
    averaged = ensemble_of(model).average_weights(x={"b": ROWS[:, :2], "a": ROWS}, batch_size=5)
    mean, variance = statistics(averaged)
    assert_close(mean, ROWS.mean(axis=0))
    assert_close(variance, ROWS.var(axis=0))


@pytest.fixture(scope="module")
def convolutional():
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(3, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.Dropout(0.5),
            layers.Conv2D(2, 3),
            layers.BatchNormalization(momentum=0.5),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, "softmax"),
        ]
    )
    return ensemble_of(compiled(model))


def reaching(weights, x, batch_size):
    """What reaches each of the two normalisations of the convolutional net, batch by batch."""
    kernel, bias, gamma, beta, _, _, next_kernel, next_bias = weights[:8]
    first, second = [], []
    for start in range(0, len(x), batch_size):
        batch = x[start : start + batch_size].astype("float64")
        hidden = np.maximum(np.asarray(ops.conv(batch, kernel)) + bias, 0)
        first.append(hidden)
        axes = (0, 1, 2)
        normal = (hidden - hidden.mean(axes)) / np.sqrt(hidden.var(axes) + 1e-3) * gamma + beta
        second.append(np.asarray(ops.conv(normal, next_kernel)) + next_bias)
    return np.concatenate(first), np.concatenate(second)


@pytest.mark.parametrize("batch_size", [10, 4])
def test_later_layers_see_what_earlier_ones_normalise_by_the_batch(batch_size, convolutional):
    # Written out without dropout, which must not be at work.
    averaged = convolutional.average_weights(x=IMAGES, batch_size=batch_size)
    weights = mean_by_hand(member_weights(convolutional))
    for layer, values in zip(
        (averaged.layers[1], averaged.layers[4]), reaching(weights, IMAGES, batch_size), strict=True
    ):
        assert_close(layer.moving_mean.numpy(), values.mean(axis=(0, 1, 2)))
        assert_close(layer.moving_variance.numpy(), values.var(axis=(0, 1, 2)))


def test_nested_layers_are_found_and_frozen_ones_left_alone():
    inner = keras.Input((4,))
    nested = keras.Model(inner, layers.BatchNormalization(name="nested")(inner))
    inputs = keras.Input((4,))
    frozen = layers.BatchNormalization(name="frozen")
    frozen.trainable = False
    outputs = layers.Dense(3, "softmax")(layers.Add()([frozen(inputs), nested(inputs)]))
    ens = ensemble_of(compiled(keras.Model(inputs, outputs)))
    averaged = ens.average_weights(x=ROWS)
    found = {layer.name: layer for layer in averaged._flatten_layers()}
    assert_close(found["nested"].moving_mean.numpy(), ROWS.mean(axis=0))
    assert_close(found["nested"].moving_variance.numpy(), ROWS.var(axis=0))
    means = mean_by_hand(member_weights(ens))
    place = [variable.path for variable in ens.model.weights].index
    for name in ("moving_mean", "moving_variance"):
        expected = means[place(f"frozen/{name}")]
        assert_close(getattr(found["frozen"], name).numpy(), expected, 1e-7)
    assert not found["frozen"].trainable


class WithoutConfig(keras.Model):
    """Cannot be made anew; its backbone is kept in inference, as for fine-tuning."""

    def __init__(self):
        super().__init__()
        self.backbone = keras.Sequential([keras.Input((4,)), layers.BatchNormalization()])
        self.norm, self.drop = layers.BatchNormalization(), layers.Dropout(0.5)
        self.head = layers.Dense(3, "softmax")

    def call(self, inputs, training=None):
        kept = self.backbone(inputs, training=False)
        hidden = self.drop(self.norm(inputs, training=training), training=training)
        return self.head(kept + hidden)

    def get_config(self):
        raise NotImplementedError


@pytest.fixture(scope="module")
def subclassed():
    model = compiled(WithoutConfig())
    model.predict(ROWS, verbose=0)
    ens = ensemble_of(model, shared=lambda v: "sequential" in v.path and "moving" in v.name)
    return ens, ens.average_weights(x=ROWS)


def test_a_subclass_that_cannot_be_made_anew(subclassed):
    ens, averaged = subclassed
    assert isinstance(averaged, keras.Model)
    assert averaged.count_params() == ens.model.count_params()
    place = [id(variable) for variable in ens.model.weights].index
    found = averaged.get_weights()
    assert_close(found[place(id(ens.model.norm.moving_mean))], ROWS.mean(axis=0))
    assert_close(found[place(id(ens.model.norm.moving_variance))], ROWS.var(axis=0))


def test_layers_that_always_work_in_inference_keep_their_statistics(subclassed):
    ens, averaged = subclassed
    place = [id(variable) for variable in ens.model.weights].index
    layer = normalization(ens.model.backbone)
    for variable in (layer.moving_mean, layer.moving_variance):
        np.testing.assert_array_equal(averaged.get_weights()[place(id(variable))], variable.numpy())


def test_a_layer_that_is_called_twice_sees_both_its_inputs():
    shared = layers.BatchNormalization()
    inputs = [keras.Input((4,)), keras.Input((4,))]
    hidden = layers.Concatenate()([shared(tensor) for tensor in inputs])
    model = compiled(keras.Model(inputs, layers.Dense(3, "softmax")(hidden)))
    averaged = ensemble_of(model).average_weights(x=[ROWS, 3 * ROWS + 1], batch_size=5)
    both = np.concatenate([ROWS, 3 * ROWS + 1])
    mean, variance = statistics(averaged)
    assert_close(mean, both.mean(axis=0))
    assert_close(variance, both.var(axis=0))


def test_padding_does_not_count():
    inputs = keras.Input((5,), dtype="int32")
    hidden = layers.Embedding(7, 3, mask_zero=True, name="embed")(inputs)
    hidden = layers.GlobalAveragePooling1D()(layers.BatchNormalization()(hidden))
    model = compiled(keras.Model(inputs, layers.Dense(3, "softmax")(hidden)))
    # The batches differ in their share of padding.
    averaged = ensemble_of(model).average_weights(x=TOKENS, batch_size=2)
    real = averaged.get_layer("embed").embeddings.numpy()[TOKENS[TOKENS != 0]]
    mean, variance = statistics(averaged)
    assert_close(mean, real.mean(axis=0))
    assert_close(variance, real.var(axis=0))


# What is left as it was


def state(model):
    """All that averaging might leave behind."""
    own = [(vars(x).get("call"), x.trainable, getattr(x, "momentum", None)) for x in flat(model)]
    slots = [variable.numpy() for variable in model.optimizer.variables]
    return own, [*model.get_weights(), *slots, model.optimizer.learning_rate.numpy()]


def flat(model):
    return list(model._flatten_layers())


def assert_unchanged(model, before):
    own, arrays = before
    now, arrays_now = state(model)
    assert now == own
    assert_same(arrays_now, arrays)


class Broken(Batches):
    def __getitem__(self, index):
        if index == 2:
            raise RuntimeError("the disk is gone")
        return super().__getitem__(index)


def test_the_users_model_is_as_before(convolutional):
    model = convolutional.model
    before = state(model)
    averaged = convolutional.average_weights(x=IMAGES)
    assert_unchanged(model, before)
    assert not {id(v) for v in averaged.weights} & {id(v) for v in model.weights}
    assert averaged.optimizer is not model.optimizer


@pytest.mark.parametrize(
    ("x", "message"), [(ROWS[:, :3], "incompatible with the layer"), (Broken(ROWS), "disk is gone")]
)
def test_the_users_model_is_as_before_when_the_pass_fails(x, message, on_input):
    before = state(on_input.model)
    with pytest.raises(Exception, match=message):
        on_input.average_weights(x=x)
    assert_unchanged(on_input.model, before)


def test_the_users_layers_normalise_and_forget_as_before(on_input):
    on_input.average_weights(x=ROWS)
    model = on_input.model
    own = model.get_weights()
    mean, variance = statistics(model)
    model(ROWS, training=True)
    new_mean, new_variance = statistics(model)
    model.set_weights(own)
    assert_close(new_mean, 0.99 * mean + 0.01 * ROWS.mean(axis=0))
    assert_close(new_variance, 0.99 * variance + 0.01 * ROWS.var(axis=0))


# The model that comes of it


@pytest.fixture(scope="module")
def averaged_on_input(on_input):
    return on_input.average_weights(x=ROWS)


def test_it_is_a_model_of_the_original_size(on_input, averaged_on_input):
    assert isinstance(averaged_on_input, keras.Model)
    assert averaged_on_input is not on_input.model
    assert averaged_on_input.count_params() == on_input.model.count_params()
    assert [v.shape for v in averaged_on_input.weights] == [v.shape for v in on_input.model.weights]


def test_it_is_compiled_alike_and_trains(on_input, averaged_on_input):
    found = averaged_on_input.evaluate(ROWS, LABELS, return_dict=True, verbose=0)
    probabilities = averaged_on_input(ROWS).numpy()
    assert found.keys() == {"loss", "accuracy"}
    assert_close(found["loss"], -np.log(probabilities[np.arange(len(ROWS)), LABELS]).mean())
    assert_close(found["accuracy"], np.mean(probabilities.argmax(axis=1) == LABELS))
    before = state(on_input.model)
    history = averaged_on_input.fit(ROWS, LABELS, epochs=3, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    assert_unchanged(on_input.model, before)


def test_it_is_saved_and_loaded_by_keras(averaged_on_input, tmp_path):
    averaged_on_input.save(tmp_path / "one.keras")
    again = keras.models.load_model(tmp_path / "one.keras")
    assert_same(again.get_weights(), averaged_on_input.get_weights())
    np.testing.assert_array_equal(again(ROWS).numpy(), averaged_on_input(ROWS).numpy())
    assert again.loss == "sparse_categorical_crossentropy"


# What it is worth, on digits


@pytest.fixture(scope="module")
def digits():
    return models.digits(400)


def normal_features(kernel, x, gamma=1.0, beta=0.0):
    hidden = x @ kernel
    spread = np.sqrt(hidden.var(axis=0) + 1e-3)
    return np.maximum((hidden - hidden.mean(axis=0)) / spread * gamma + beta, 0)


def loss_by_hand(weights, x, y, renewed):
    """The loss of the digits' model; `renewed`: with the statistics of `x`, else with its own."""
    kernel, gamma, beta, mean, variance, head, bias = (np.asarray(w, "float64") for w in weights)
    if renewed:
        features = normal_features(kernel, x, gamma, beta)
    else:
        features = np.maximum((x @ kernel - mean) / np.sqrt(variance + 1e-3) * gamma + beta, 0)
    logs = special.log_softmax(features @ head + bias, axis=1)
    return -logs[np.arange(len(y)), y].mean()


def digits_model():
    model = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(20, use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dense(10, "softmax"),
        ]
    )
    return compiled(model)


@pytest.fixture(scope="module")
def good(digits):
    """Weights that do well on the digits: random features, and scikit-learn's head on them."""
    x, y = digits
    kernel = np.random.default_rng(0).normal(0, 0.5, (64, 20)).astype("float32")
    head = LogisticRegression(max_iter=1000).fit(normal_features(kernel, x), y)
    hidden = x @ kernel
    one = np.ones(20)
    weights = [kernel, one, 0 * one, hidden.mean(axis=0), hidden.var(axis=0)]
    weights = [*weights, head.coef_.T, head.intercept_]
    return [array.astype("float32") for array in weights]


def test_members_that_are_one_function_average_to_it_only_with_statistics_of_their_own(
    digits, good
):
    # What comes before a normalisation can be of any scale.
    members = []
    for scale in (1.0, 1.0, 1.0, 9.0):
        kernel, gamma, beta, mean, variance, *head = good
        members.append([scale * kernel, gamma, beta, scale * mean, scale**2 * variance, *head])
    ens = ensemble_with(digits_model(), *members)
    x, y = digits
    expected = loss_by_hand(good, x, y, renewed=False)
    assert expected < 0.5
    renewed = ens.average_weights(x=x, y=y, batch_size=len(x))
    assert_close(renewed.evaluate(x, y, verbose=0), expected, 2e-3)
    with pytest.warns(UserWarning, match="batch normalisation"):
        stale = ens.average_weights()
    assert stale.evaluate(x, y, verbose=0) > expected + 0.1


def test_snapshots_of_one_basin_average_to_a_model_as_good(digits, good):
    model = digits_model()
    model.set_weights(good)
    x, y = digits
    ens = SnapshotEnsemble(model, cycles=3, lr_init=0.02)
    ens.fit(x, y, epochs=3, verbose=0)
    averaged = ens.average_weights(x=x, y=y, batch_size=100)
    members = [loss_by_hand(weights, x, y, renewed=False) for weights in member_weights(ens)]
    loss = averaged.evaluate(x, y, verbose=0)
    assert loss < max(members) + 0.02
    assert_close(loss, loss_by_hand(averaged.get_weights(), x, y, renewed=False), 1e-4)


# Warnings


def teacher(seed=0):
    """Weights of `dense()` and data that they get right."""
    rng = np.random.default_rng(seed)
    shapes = [(4, 6), (6,), (6, 3), (3,)]
    weights = [rng.normal(0, 1, shape).astype("float32") for shape in shapes]
    return weights, dense_outputs(weights, ROWS).argmax(axis=1)




def cross_entropy(logits, y):
    return -special.log_softmax(logits, axis=1)[np.arange(len(y)), y].mean()


def turned(weights):
    """The same function by other weights: tanh is odd."""
    kernel, bias, head, shift = weights
    return [-kernel, -bias, -head, shift]


def test_a_mean_that_is_worse_than_the_worst_member_is_told():
    weights, y = teacher()
    worse = [weights[0], weights[1], 0.5 * weights[2], weights[3]]
    ens = ensemble_with(dense(), weights, turned(worse))
    with pytest.warns(UserWarning, match="worse than the worst member") as caught:
        averaged = ens.average_weights(x=ROWS, y=y)
    (warning,) = caught
    assert warning.filename == __file__
    message = str(warning.message)
    found, worst = map(float, re.findall(r"(?:is|member's) (\d+\.\d+)", message))
    assert_close(found, averaged.evaluate(ROWS, y, verbose=0), 1e-3)
    assert_close(found, cross_entropy(dense_outputs(averaged.get_weights(), ROWS), y), 1e-3)
    assert cross_entropy(dense_outputs(weights, ROWS), y) < cross_entropy(dense_outputs(worse, ROWS), y)
    assert_close(worst, cross_entropy(dense_outputs(worse, ROWS), y), 1e-3)
    assert "Use `members='greedy'`, fewer members, or the ensemble." in message


def test_a_mean_that_is_no_worse_is_not_warned_of():
    weights, y = teacher()
    rng = np.random.default_rng(1)
    off = [rng.normal(0, 0.3, array.shape).astype("float32") for array in weights]
    around = [[w + s * o for w, o in zip(weights, off, strict=True)] for s in (1, -1)]
    ens = ensemble_with(dense(), *around)
    averaged = ens.average_weights(x=ROWS, y=y)
    assert_all_close(averaged.get_weights(), weights, 1e-6)
    # One member alone is as good as itself.
    ens.average_weights([0], x=ROWS, y=y)


def test_statistics_that_are_only_a_mean_are_warned_of(on_input, convolutional):
    for ens, count in ((on_input, 1), (convolutional, 2)):
        with pytest.warns(UserWarning, match="Received: x=None") as caught:
            averaged = ens.average_weights()
        (warning,) = caught
        assert warning.filename == __file__
        assert str(warning.message).startswith(f"The model has {count} layers of batch normal")
        assert_all_close(averaged.get_weights(), mean_by_hand(member_weights(ens)), 1e-6)


def test_no_such_warning_without_a_mean_of_statistics(on_input, random):
    frozen = normalized_input()
    frozen.layers[0].trainable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        on_input.average_weights([1])
        random.average_weights()
        ensemble_of(frozen).average_weights()


# The greedy soup


def soup_by_hand(members, loss):
    """Which members a greedy soup is made of; `loss` takes weights and how many they are of."""
    alone = [loss(member, 1) for member in members]
    order = sorted(range(len(members)), key=lambda i: alone[i])
    taken, best = [order[0]], alone[order[0]]
    for number in order[1:]:
        tried = [*taken, number]
        found = loss(mean_by_hand([members[i] for i in tried]), len(tried))
        if found < best:
            taken, best = tried, found
    return taken, best


def disturbed(weights, scales, seed=0):
    rng = np.random.default_rng(seed)
    return [
        [array + (s * rng.normal(0, 1, array.shape)).astype("float32") for array in weights]
        for s in scales
    ]


def test_the_soup_on_digits_is_the_one_written_out(digits, good):
    x, y = digits
    members = disturbed(good, [0.25, 0.2, 0.2, 0.9])
    for member in members:
        member[4] = np.abs(member[4])  # A variance.
    taken, least = soup_by_hand(
        members, lambda weights, count: loss_by_hand(weights, x, y, renewed=count > 1)
    )
    assert 1 < len(taken) < len(members)
    soup = ensemble_with(digits_model(), *members).average_weights("greedy", x, y, batch_size=len(x))
    expected = mean_by_hand([members[i] for i in taken])
    expected[3:5] = (x @ expected[0]).mean(axis=0), (x @ expected[0]).var(axis=0)
    assert_all_close(soup.get_weights(), expected, 1e-4)
    found = soup.evaluate(x, y, verbose=0)
    assert_close(found, least, 1e-4)
    assert found < min(loss_by_hand(member, x, y, renewed=False) for member in members)


def test_the_soup_of_a_regression_is_the_one_written_out():
    x, y = load_diabetes(return_X_y=True)
    x, y = (10 * x).astype("float32"), ((y - y.mean()) / y.std()).astype("float32")
    fitted = np.linalg.lstsq(x, y, rcond=None)[0][:, None].astype("float32")
    members = disturbed([fitted, np.zeros(1, "float32")], [0.5, 0.35, 0.3, 0.4], seed=5)

    def loss(weights, count):
        return np.square(x @ weights[0] + weights[1] - y[:, None]).mean()

    taken, least = soup_by_hand(members, loss)
    assert 1 < len(taken) < len(members)
    # In the order of time it would be another.
    assert taken == [2, 0, 3]
    model = keras.Sequential([keras.Input((10,)), layers.Dense(1)])
    ens = ensemble_with(compiled(model, "mse"), *members)
    soup = ens.average_weights("greedy", x, y, batch_size=len(x))
    assert_all_close(soup.get_weights(), mean_by_hand([members[i] for i in taken]), 1e-6)
    assert_close(loss(soup.get_weights(), 1), least)


def test_the_soup_is_the_best_member_alone_where_mixing_hurts():
    weights, y = teacher()
    worse = [weights[0], weights[1], 0.5 * weights[2], weights[3]]
    ens = ensemble_with(dense(), turned(worse), weights)
    soup = ens.average_weights("greedy", x=sliced(ROWS, y))
    assert_same(soup.get_weights(), weights)


# What makes no sense


@pytest.mark.parametrize(
    ("arguments", "received"),
    [
        ({}, "x=NoneType, y=NoneType"),
        ({"x": ROWS}, "x=ndarray, y=NoneType"),
        ({"x": Batches(ROWS)}, "x=Batches, y=NoneType"),
    ],
)
def test_a_soup_without_targets(arguments, received, random):
    with pytest.raises(ValueError) as caught:
        random.average_weights("greedy", **arguments)
    assert str(caught.value) == (
        "`members='greedy'` chooses by the loss on held-out data. Received: "
        f"{received}. Pass `x` and `y`."
    )


@pytest.mark.parametrize("members", [None, "greedy"])
def test_targets_without_data(members, random):
    with pytest.raises(ValueError) as caught:
        random.average_weights(members, y=LABELS)
    assert str(caught.value) == (
        "`y` needs the data that it belongs to. Received: x=None. Pass `x`."
    )


@pytest.mark.parametrize(
    "x", [iter([ROWS]), (batch for batch in [ROWS]), iter(sliced(ROWS, LABELS))]
)
def test_iterators_are_refused(x, random):
    with pytest.raises(ValueError) as caught:
        random.average_weights(x=x)
    assert str(caught.value) == (
        f"`x` is gone through more than once. Received: x={type(x).__name__}, an iterator. "
        "Pass arrays, a `tf.data.Dataset` or a `PyDataset`."
    )


def test_targets_beside_those_in_the_data(random):
    with pytest.raises(ValueError, match="`y` must not be given where `x` brings the targets"):
        random.average_weights(x=sliced(ROWS, LABELS), y=LABELS)


@pytest.mark.parametrize("members", ["all", "Greedy", ""])
def test_unknown_names_of_members(members, random):
    with pytest.raises(TypeError) as caught:
        random.average_weights(members, x=ROWS, y=LABELS)
    assert str(caught.value) == f"`members` must be a whole number. Received: members={members!r}"


@pytest.mark.parametrize("members", [0, 4, [3], []])
def test_members_that_there_are_not(members, random):
    with pytest.raises(ValueError, match=re.escape(f"Received: members={members!r}")):
        random.average_weights(members)


@pytest.mark.parametrize("members", [None, "greedy"])
def test_averaging_without_members(members):
    with pytest.raises(ValueError, match=re.escape("The ensemble has no members yet.")):
        SnapshotEnsemble(dense()).average_weights(members, ROWS, LABELS)
