"""Weight averaging, against NumPy and Keras."""

import re
import warnings

import keras
import numpy as np
import pytest
from averaging_cases import (
    IMAGES,
    LABELS,
    ROWS,
    mean_by_hand,
    normalized_input,
    statistics,
    teacher,
    turned,
)
from keras import layers
from models import (
    Batches,
    assert_all_close,
    assert_close,
    assert_same,
    compiled,
    dense,
    dense_outputs,
    ensemble_of,
    ensemble_with,
    member_weights,
    sliced,
)
from scipy import special

from snapshot_ensemble import SnapshotEnsemble

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
    actual = ens.average_weights().get_weights()
    expected = np.float64(np.mean(values))
    for array, before in zip(actual, own, strict=True):
        assert array.dtype == before.dtype
        np.testing.assert_array_equal(array, np.full_like(before, expected))


@keras.saving.register_keras_serializable("averaging")
class Counted(layers.Layer):
    """Has an integer weight and a boolean one."""

    def build(self, shape):
        self.factor = self.add_weight(name="factor", shape=(2,))
        state = {"shape": (2,), "trainable": False, "initializer": "zeros"}
        self.count = self.add_weight(name="count", dtype="int32", **state)
        self.seen = self.add_weight(name="seen", dtype="bool", **state)

    def call(self, inputs):
        return inputs * self.factor


@pytest.mark.parametrize(("members", "last"), [(None, 2), ([2, 0], 0), (2, 2)])
def test_integers_and_booleans_are_those_of_the_last_member(members, last):
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
def test_the_average_of_one_member_is_that_member(members, random):
    assert_same(random.average_weights(members).get_weights(), member_weights(random)[2])


# The user's model is unchanged


def state(model):
    """Everything that averaging might change."""
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


def test_the_users_model_is_unchanged(convolutional_ensemble):
    model = convolutional_ensemble.model
    before = state(model)
    averaged = convolutional_ensemble.average_weights(x=IMAGES)
    assert_unchanged(model, before)
    assert not {id(v) for v in averaged.weights} & {id(v) for v in model.weights}
    assert averaged.optimizer is not model.optimizer


@pytest.mark.parametrize(
    ("x", "message"), [(ROWS[:, :3], "incompatible with the layer"), (Broken(ROWS), "disk is gone")]
)
def test_the_users_model_is_unchanged_if_the_pass_fails(x, message, normalized_ensemble):
    before = state(normalized_ensemble.model)
    with pytest.raises(Exception, match=message):
        normalized_ensemble.average_weights(x=x)
    assert_unchanged(normalized_ensemble.model, before)


def test_the_users_layers_still_update_their_moving_statistics(normalized_ensemble):
    normalized_ensemble.average_weights(x=ROWS)
    model = normalized_ensemble.model
    own = model.get_weights()
    mean, variance = statistics(model)
    model(ROWS, training=True)
    new_mean, new_variance = statistics(model)
    model.set_weights(own)
    assert_close(new_mean, 0.99 * mean + 0.01 * ROWS.mean(axis=0))
    assert_close(new_variance, 0.99 * variance + 0.01 * ROWS.var(axis=0))


# The averaged model


@pytest.fixture(scope="module")
def averaged_model(normalized_ensemble):
    return normalized_ensemble.average_weights(x=ROWS)


def test_it_is_a_model_of_the_original_size(normalized_ensemble, averaged_model):
    assert isinstance(averaged_model, keras.Model)
    assert averaged_model is not normalized_ensemble.model
    assert averaged_model.count_params() == normalized_ensemble.model.count_params()
    assert [v.shape for v in averaged_model.weights] == [
        v.shape for v in normalized_ensemble.model.weights
    ]


def test_it_is_compiled_like_the_model_and_trains(normalized_ensemble, averaged_model):
    actual = averaged_model.evaluate(ROWS, LABELS, return_dict=True, verbose=0)
    probabilities = averaged_model(ROWS).numpy()
    assert actual.keys() == {"loss", "accuracy"}
    assert_close(actual["loss"], -np.log(probabilities[np.arange(len(ROWS)), LABELS]).mean())
    assert_close(actual["accuracy"], np.mean(probabilities.argmax(axis=1) == LABELS))
    before = state(normalized_ensemble.model)
    history = averaged_model.fit(ROWS, LABELS, epochs=3, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    assert_unchanged(normalized_ensemble.model, before)


def test_it_is_saved_and_loaded_by_keras(averaged_model, tmp_path):
    averaged_model.save(tmp_path / "one.keras")
    again = keras.models.load_model(tmp_path / "one.keras")
    assert_same(again.get_weights(), averaged_model.get_weights())
    np.testing.assert_array_equal(again(ROWS).numpy(), averaged_model(ROWS).numpy())
    assert again.loss == "sparse_categorical_crossentropy"


# Warnings


def cross_entropy(logits, y):
    return -special.log_softmax(logits, axis=1)[np.arange(len(y)), y].mean()


def test_a_warning_if_the_average_is_worse_than_the_worst_member():
    weights, y = teacher()
    worse = [weights[0], weights[1], 0.5 * weights[2], weights[3]]
    ens = ensemble_with(dense(), weights, turned(worse))
    with pytest.warns(UserWarning, match="worse than the worst member") as caught:
        averaged = ens.average_weights(x=ROWS, y=y)
    (warning,) = caught
    assert warning.filename == __file__
    message = str(warning.message)
    actual, worst = map(float, re.findall(r"(?:is|member's) (\d+\.\d+)", message))
    assert_close(actual, averaged.evaluate(ROWS, y, verbose=0), 1e-3)
    assert_close(actual, cross_entropy(dense_outputs(averaged.get_weights(), ROWS), y), 1e-3)
    assert cross_entropy(dense_outputs(weights, ROWS), y) < cross_entropy(
        dense_outputs(worse, ROWS), y
    )
    assert_close(worst, cross_entropy(dense_outputs(worse, ROWS), y), 1e-3)
    assert "Use `members='greedy'`, fewer members, or the ensemble." in message


def test_no_warning_if_the_average_is_no_worse():
    weights, y = teacher()
    rng = np.random.default_rng(1)
    off = [rng.normal(0, 0.3, array.shape).astype("float32") for array in weights]
    around = [[w + s * o for w, o in zip(weights, off, strict=True)] for s in (1, -1)]
    ens = ensemble_with(dense(), *around)
    averaged = ens.average_weights(x=ROWS, y=y)
    assert_all_close(averaged.get_weights(), weights, 1e-6)
    # One member alone is as good as itself.
    ens.average_weights([0], x=ROWS, y=y)


def test_a_warning_if_statistics_are_averaged(normalized_ensemble, convolutional_ensemble):
    for ens, count in ((normalized_ensemble, 1), (convolutional_ensemble, 2)):
        with pytest.warns(UserWarning, match="Received: x=None") as caught:
            averaged = ens.average_weights()
        (warning,) = caught
        assert warning.filename == __file__
        assert str(warning.message).startswith(f"The model has {count} batch-normalisation lay")
        assert_all_close(averaged.get_weights(), mean_by_hand(member_weights(ens)), 1e-6)


def test_no_warning_if_no_statistics_are_averaged(normalized_ensemble, random):
    frozen = normalized_input()
    frozen.layers[0].trainable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        normalized_ensemble.average_weights([1])
        random.average_weights()
        ensemble_of(frozen).average_weights()


# Arguments that are refused


@pytest.mark.parametrize(
    ("arguments", "received"),
    [
        ({}, "x=NoneType, y=NoneType"),
        ({"x": ROWS}, "x=ndarray, y=NoneType"),
        ({"x": Batches(ROWS)}, "x=Batches, y=NoneType"),
    ],
)
def test_a_soup_without_targets_is_refused(arguments, received, random):
    with pytest.raises(ValueError) as caught:
        random.average_weights("greedy", **arguments)
    assert str(caught.value) == (
        "`members='greedy'` selects members by their loss on held-out data. Received: "
        f"{received}. Pass `x` and `y`."
    )


@pytest.mark.parametrize("members", [None, "greedy"])
def test_targets_without_data_are_refused(members, random):
    with pytest.raises(ValueError) as caught:
        random.average_weights(members, y=LABELS)
    assert str(caught.value) == ("`y` cannot be used without `x`. Received: x=None. Pass `x`.")


@pytest.mark.parametrize(
    "x", [iter([ROWS]), (batch for batch in [ROWS]), iter(sliced(ROWS, LABELS))]
)
def test_iterators_are_refused(x, random):
    with pytest.raises(ValueError) as caught:
        random.average_weights(x=x)
    assert str(caught.value) == (
        f"`x` is read more than once. Received: x={type(x).__name__}, an iterator. "
        "Pass arrays, a `tf.data.Dataset` or a `PyDataset`."
    )


def test_targets_are_refused_if_the_data_yield_them(random):
    with pytest.raises(
        ValueError, match="`y` must not be passed if `x` already yields the targets"
    ):
        random.average_weights(x=sliced(ROWS, LABELS), y=LABELS)


@pytest.mark.parametrize("members", ["all", "Greedy", ""])
def test_unknown_names_of_members_are_refused(members, random):
    with pytest.raises(TypeError) as caught:
        random.average_weights(members, x=ROWS, y=LABELS)
    assert str(caught.value) == f"`members` must be a whole number. Received: members={members!r}"


@pytest.mark.parametrize("members", [0, 4, [3], []])
def test_members_that_do_not_exist_are_refused(members, random):
    with pytest.raises(ValueError, match=re.escape(f"Received: members={members!r}")):
        random.average_weights(members)


@pytest.mark.parametrize("members", [None, "greedy"])
def test_averaging_without_members_is_refused(members):
    with pytest.raises(ValueError, match=re.escape("The ensemble has no members yet.")):
        SnapshotEnsemble(dense()).average_weights(members, ROWS, LABELS)
