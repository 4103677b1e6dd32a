"""`evaluate`: the loss and metrics of the combined output."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from inference_cases import KINDS, LABELS, MEMBERS, ROWS, named_outputs, to_probabilities
from keras import layers, ops
from models import Batches, assert_close, dense, ensemble_of, sliced


def test_loss_and_metrics_are_those_of_the_combined_output(ensemble):
    stack = np.stack([member.predict(ROWS, verbose=0) for member in ensemble])
    mean = stack.mean(axis=0)
    expected = [
        -np.log(mean[np.arange(len(ROWS)), LABELS]).mean(),
        np.mean(mean.argmax(axis=-1) == LABELS),
    ]
    actual = ensemble.evaluate(ROWS, LABELS, verbose=0)
    assert isinstance(actual, list)
    assert_close(actual, expected)
    named = ensemble.evaluate(ROWS, LABELS, return_dict=True, verbose=0)
    assert list(named) == list(ensemble.model.evaluate(ROWS, LABELS, return_dict=True, verbose=0))
    assert_close([named["loss"], named["accuracy"]], expected)


def test_loss_and_metrics_of_votes(ensemble):
    shares = ensemble.predict(ROWS, combine="vote", verbose=0)
    picked = np.maximum(shares[np.arange(len(ROWS)), LABELS], keras.config.epsilon())
    expected = [-np.log(picked).mean(), np.mean(shares.argmax(axis=-1) == LABELS)]
    assert_close(ensemble.evaluate(ROWS, LABELS, combine="vote", verbose=0), expected, 1e-4)


def test_loss_and_metrics_of_chosen_weighted_members(ensemble):
    ensemble.weights = [0.4, 0.3, 0.2, 0.1]
    stack = np.stack([member.predict(ROWS, verbose=0) for member in ensemble])
    combined = (0.2 * stack[2] + 0.1 * stack[3]) / 0.3
    expected = [
        -np.log(combined[np.arange(len(ROWS)), LABELS]).mean(),
        np.mean(combined.argmax(axis=-1) == LABELS),
    ]
    actual = ensemble.evaluate(ROWS, LABELS, combine="weighted", members=2, verbose=0)
    assert_close(actual, expected)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["softmax logits", "log-odds", "log-odds of labels"])
def test_the_loss_of_logits_is_that_of_the_mean_probability(name, cases):
    ens, stack = cases(name)
    task, logits, _, units, _ = KINDS[name]
    mean = to_probabilities(stack, task, logits).mean(axis=0)
    if task == "multiclass":
        y = LABELS
        expected = -np.log(mean[np.arange(len(ROWS)), y]).mean()
    else:
        y = np.random.default_rng(3).integers(0, 2, (len(ROWS), units)).astype("float32")
        expected = -np.mean(y * np.log(mean) + (1 - y) * np.log(1 - mean))
    assert_close(ens.evaluate(ROWS, y, verbose=0), expected)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("batch_size", [5, 32])
def test_sample_weights(batch_size):
    model = dense("mse", 2, None, metrics=["mae"], weighted_metrics=["mse"])
    ens = ensemble_of(model, MEMBERS)
    y = np.ones((len(ROWS), 2))
    weights = np.random.default_rng(3).random(len(ROWS))
    error = np.mean([member.predict(ROWS, verbose=0) for member in ens], axis=0) - y
    actual = ens.evaluate(
        ROWS, y, sample_weight=weights, batch_size=batch_size, return_dict=True, verbose=0
    )
    squares = (error**2).mean(axis=1)
    assert_close(actual["loss"], (weights * squares).mean())
    assert_close(actual["mae"], np.abs(error).mean())
    assert_close(actual["mse"], (weights * squares).sum() / weights.sum())


def test_sample_weights_in_the_data():
    model = dense("mse", 2, None)
    ens = ensemble_of(model, MEMBERS)
    y, weights = np.ones((len(ROWS), 2)), np.random.default_rng(3).random(len(ROWS))
    expected = ens.evaluate(ROWS, y, sample_weight=weights, verbose=0)
    assert_close(ens.evaluate(sliced(ROWS, y, weights), verbose=0), expected)
    assert_close(ens.evaluate(Batches(ROWS, y, weights), verbose=0), expected)


@pytest.mark.parametrize("structure", [list, dict])
def test_losses_and_metrics_of_several_outputs(structure):
    model = named_outputs(structure)
    ens = ensemble_of(model, MEMBERS)
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
    actual = ens.evaluate(ROWS, y, return_dict=True, verbose=0)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(actual[name], value)


def test_scores_of_one_member_equal_those_of_its_model():
    # The same names, order and values.
    model = named_outputs(list)
    ens = ensemble_of(model, 2)
    y = [LABELS, np.ones((len(ROWS), 2))]
    assert_close(ens.evaluate(ROWS, y, members=1, verbose=0), ens[1].evaluate(ROWS, y, verbose=0))


def test_regularization_penalties_are_not_in_the_loss():
    inputs = keras.Input((4,))
    dense_layer = layers.Dense(
        2, kernel_regularizer=keras.regularizers.L2(0.5), activity_regularizer="l1"
    )
    model = keras.Model(inputs, dense_layer(inputs))
    model.compile("sgd", "mse")
    ens = ensemble_of(model, MEMBERS)
    y = np.ones((len(ROWS), 2))
    error = np.mean([member.predict(ROWS, verbose=0) for member in ens], axis=0) - y
    with pytest.warns(UserWarning, match="leave out .* regularizers"):
        assert_close(ens.evaluate(ROWS, y, verbose=0), (error**2).mean())
    assert (
        model.evaluate(ROWS, y, verbose=0)
        > 1.1 * ((model.predict(ROWS, verbose=0) - y) ** 2).mean()
    )


@pytest.mark.slow
def test_masked_steps_are_not_scored():
    tokens = np.array([[1, 2, 3, 0, 0], [4, 5, 0, 0, 0], [1, 1, 1, 1, 0]])
    tags = np.random.default_rng(3).integers(0, 2, tokens.shape)
    inputs = keras.Input((5,), dtype="int32")
    hidden = layers.Embedding(7, 4, mask_zero=True)(inputs)
    model = keras.Model(inputs, layers.Dense(2, "softmax")(hidden))
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    ens = ensemble_of(model, MEMBERS)
    mean = np.mean([member.predict(tokens, verbose=0) for member in ens], axis=0)
    picked = np.take_along_axis(mean, tags[..., None], axis=-1)[..., 0]
    real = tokens != 0
    expected = [-np.log(picked[real]).mean(), (mean.argmax(axis=-1) == tags)[real].mean()]
    actual = ens.evaluate(tokens, tags, verbose=0)
    assert_close(actual, expected)
    assert_close(
        ens.evaluate(tokens, tags, members=[0], verbose=0), ens[0].evaluate(tokens, tags, verbose=0)
    )


def test_scores_are_reset_each_time(ensemble):
    first = ensemble.evaluate(ROWS, LABELS, verbose=0)
    ensemble.evaluate(ROWS[::-1], LABELS, verbose=0)
    assert ensemble.evaluate(ROWS, LABELS, verbose=0) == first


def test_scores_follow_a_new_compile(ensemble):
    ensemble.evaluate(ROWS, LABELS, verbose=0)
    ensemble.model.compile("sgd", "sparse_categorical_crossentropy", metrics=[always_seven])
    actual = ensemble.evaluate(ROWS, LABELS, return_dict=True, verbose=0)
    assert actual.keys() == {"loss", "always_seven"}
    assert actual["always_seven"] == 7


def always_seven(y_true, y_pred):
    return ops.zeros_like(y_pred[:, 0]) + 7


@pytest.mark.slow
@pytest.mark.parametrize("memory_limit", [2**28, 0])
def test_scores_of_graphs_that_xla_compiles(memory_limit):
    """XLA refuses metrics whose variables depend on the batch at which they are made."""
    ens = ensemble_of(dense(metrics=["accuracy"], jit_compile=True), MEMBERS)
    ens.memory_limit = memory_limit
    mean = np.mean([member.predict(ROWS, verbose=0) for member in ens], axis=0)
    picked = mean[np.arange(len(ROWS)), LABELS]
    expected = [-np.log(picked).mean(), np.mean(mean.argmax(axis=-1) == LABELS)]
    assert_close(ens.evaluate(ROWS, LABELS, batch_size=8, verbose=0), expected)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_data_of_unknown_length_count_each_batch_once():
    """The last call of Keras's compiled function finds no batch."""
    inputs = keras.Input((4,))
    outputs = {"a": layers.Dense(3, "softmax")(inputs), "b": layers.Dense(1)(inputs)}
    model = keras.Model(inputs, outputs)
    model.compile("sgd", {"a": "sparse_categorical_crossentropy", "b": "mse"})
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(24, 4)).astype("float32"), {"a": np.arange(24) % 3, "b": np.ones(24)}
    ens = ensemble_of(model, 2)
    expected = ens.evaluate(x, y, batch_size=8, return_dict=True, verbose=0)
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(8).filter(lambda x, y: True)
    actual = ens.evaluate(batches, return_dict=True, verbose=0)
    assert_close([actual[name] for name in expected], list(expected.values()))
