"""Averaged models get batch-normalisation statistics that are recomputed from data."""

import keras
import numpy as np
import pytest
from averaging_cases import (
    IMAGES,
    LABELS,
    ROWS,
    mean_by_hand,
    normalization,
    normalized_input,
    statistics,
)
from keras import layers, ops
from models import (
    Batches,
    assert_all_close,
    assert_close,
    compiled,
    ensemble_of,
    member_weights,
    sliced,
)

TOKENS = np.array([[1, 2, 3, 4, 5], [6, 5, 4, 3, 2], [1, 0, 0, 0, 0], [6, 2, 0, 0, 0]])


@pytest.mark.parametrize(("batch_size", "momentum"), [(5, 0.99), (22, 0.5), (None, 0.0)])
def test_statistics_are_those_of_all_rows(batch_size, momentum):
    ens = ensemble_of(normalized_input(momentum=momentum))
    averaged = ens.average_weights(x=ROWS, batch_size=batch_size)
    mean, variance = statistics(averaged)
    assert_close(mean, ROWS.mean(axis=0, dtype="float64"))
    assert_close(variance, ROWS.var(axis=0, dtype="float64"))
    assert normalization(averaged).momentum == momentum
    # All other weights are the mean of the members'.
    others = [0, 1, 4, 5]
    expected = mean_by_hand(member_weights(ens))
    assert_all_close(
        [averaged.get_weights()[i] for i in others], [expected[i] for i in others], 1e-7
    )


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
def test_statistics_from_all_kinds_of_data(x, normalized_ensemble):
    # Also for a single member, whose weights need no averaging.
    mean, variance = statistics(normalized_ensemble.average_weights([0], x=x))
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


def normalization_inputs(weights, x, batch_size):
    """The inputs of the two normalisation layers of the convolutional model, batch by batch."""
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
def test_later_layers_see_outputs_that_are_normalised_by_the_batch(
    batch_size, convolutional_ensemble
):
    # The reference has no dropout, which must be inactive.
    averaged = convolutional_ensemble.average_weights(x=IMAGES, batch_size=batch_size)
    weights = mean_by_hand(member_weights(convolutional_ensemble))
    for layer, values in zip(
        (averaged.layers[1], averaged.layers[4]),
        normalization_inputs(weights, IMAGES, batch_size),
        strict=True,
    ):
        assert_close(layer.moving_mean.numpy(), values.mean(axis=(0, 1, 2)))
        assert_close(layer.moving_variance.numpy(), values.var(axis=(0, 1, 2)))


def test_nested_layers_are_recomputed_and_frozen_ones_are_not():
    inner = keras.Input((4,))
    nested = keras.Model(inner, layers.BatchNormalization(name="nested")(inner))
    inputs = keras.Input((4,))
    frozen = layers.BatchNormalization(name="frozen")
    frozen.trainable = False
    outputs = layers.Dense(3, "softmax")(layers.Add()([frozen(inputs), nested(inputs)]))
    ens = ensemble_of(compiled(keras.Model(inputs, outputs)))
    averaged = ens.average_weights(x=ROWS)
    actual = {layer.name: layer for layer in averaged._flatten_layers()}
    assert_close(actual["nested"].moving_mean.numpy(), ROWS.mean(axis=0))
    assert_close(actual["nested"].moving_variance.numpy(), ROWS.var(axis=0))
    means = mean_by_hand(member_weights(ens))
    position = [variable.path for variable in ens.model.weights].index
    for name in ("moving_mean", "moving_variance"):
        expected = means[position(f"frozen/{name}")]
        assert_close(getattr(actual["frozen"], name).numpy(), expected, 1e-7)
    assert not actual["frozen"].trainable


class WithoutConfig(keras.Model):
    """Cannot be cloned; its backbone runs in inference mode, as in fine-tuning."""

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


def test_a_subclass_that_cannot_be_cloned(subclassed):
    ens, averaged = subclassed
    assert isinstance(averaged, keras.Model)
    assert averaged.count_params() == ens.model.count_params()
    position = [id(variable) for variable in ens.model.weights].index
    actual = averaged.get_weights()
    assert_close(actual[position(id(ens.model.norm.moving_mean))], ROWS.mean(axis=0))
    assert_close(actual[position(id(ens.model.norm.moving_variance))], ROWS.var(axis=0))


def test_layers_that_always_run_in_inference_mode_keep_their_statistics(subclassed):
    ens, averaged = subclassed
    position = [id(variable) for variable in ens.model.weights].index
    layer = normalization(ens.model.backbone)
    for variable in (layer.moving_mean, layer.moving_variance):
        np.testing.assert_array_equal(
            averaged.get_weights()[position(id(variable))], variable.numpy()
        )


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
