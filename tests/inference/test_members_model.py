"""Members as functions of their weights, of every kind of model, and the model left alone."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.inference.cloning import blank_member, build_member
from snapshot_ensemble.inference.members_model import MembersModel, member_outputs

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(10, 4)).astype("float32")
STEPS = RNG.normal(size=(6, 5, 3)).astype("float32")
IMAGES = RNG.normal(size=(4, 8, 8, 3)).astype("float32")
TOKENS = np.array([[1, 2, 3, 0, 0], [4, 5, 0, 0, 0], [6, 6, 6, 6, 1], [2, 0, 0, 0, 0]])


@pytest.fixture(autouse=True)
def _seeded():
    # Clearing the session takes longer than most of these tests.
    keras.utils.set_random_seed(0)


def random_weights(model, seed):
    rng = np.random.default_rng(seed)
    return [
        array
        if variable.dtype in ("int32", "int64")
        else rng.uniform(0.5, 1.5, array.shape).astype(array.dtype)
        if "variance" in variable.name
        else rng.normal(0, 0.5, array.shape).astype(array.dtype)
        for variable, array in zip(model.weights, model.get_weights(), strict=True)
    ]


def ensemble_of(model, directory, members=2, **arguments):
    """An ensemble of random members, and their weights. The model has its own weights again."""
    own, paths = model.get_weights(), []
    weights = [random_weights(model, seed) for seed in range(1, members + 1)]
    for index, arrays in enumerate(weights):
        model.set_weights(arrays)
        paths.append(directory / f"{index}.weights.h5")
        model.save_weights(paths[-1])
    model.set_weights(own)
    return SnapshotEnsemble.from_weights(model, paths, **arguments), weights


def outputs_with(model, weights, x):
    """What the model itself predicts if it has these weights, the members on a new first axis."""
    own, outputs = model.get_weights(), []
    for arrays in weights:
        model.set_weights(arrays)
        outputs.append(model.predict(x, verbose=0))
    model.set_weights(own)
    return keras.tree.map_structure(lambda *members: np.stack(members), *outputs)


def assert_close(actual, expected, tolerance=1e-5):
    keras.tree.assert_same_structure(actual, expected)
    for a, e in zip(keras.tree.flatten(actual), keras.tree.flatten(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance)


def compiled(model, loss="mse"):
    model.compile("sgd", loss)
    return model


# Kinds of models. Each function returns a compiled, built model and inputs for it.


def sequential():
    return compiled(
        keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(8, "relu"),
                layers.BatchNormalization(),
                layers.Dropout(0.5),
                layers.GaussianNoise(1.0),
                layers.Dense(3),
            ]
        )
    ), ROWS


def nested_with_shared_layers():
    inner = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4, "tanh"), layers.LayerNormalization()]
    )
    shared = layers.Dense(4)
    inputs = keras.Input((4,))
    hidden = shared(inner(shared(inputs)))
    outputs = [layers.Dense(2)(hidden), layers.add([inner(hidden), inputs])]
    return compiled(keras.Model(inputs, outputs)), ROWS


def dicts_in_and_out():
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    hidden = layers.Concatenate()([layers.Dense(3)(a), layers.Dense(2)(b)])
    outputs = {"z": layers.Dense(2)(hidden), "y": [layers.Dense(1)(hidden), layers.Dense(1)(a)]}
    return compiled(keras.Model({"a": a, "b": b}, outputs)), {"a": ROWS, "b": ROWS[::-1]}


@keras.saving.register_keras_serializable("test_merging")
class WithConfig(keras.Model):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.hidden = layers.Dense(units, "relu")
        self.norm = layers.BatchNormalization()
        self.head = layers.Dense(2)

    def call(self, inputs, training=False):
        return self.head(self.norm(self.hidden(inputs), training=training))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def subclassed_with_config():
    model = compiled(WithConfig(5))
    model.predict(ROWS, verbose=0)
    return model, ROWS


class WithoutConfig(keras.Model):
    """Gets what no config can hold."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.hidden = layers.Dense(4)
        self.head = layers.Dense(2)

    def call(self, inputs):
        return self.head(self.function(self.hidden(inputs)))


def subclassed_without_config():
    model = compiled(WithoutConfig(lambda x: ops.sin(3 * x)))
    model.predict(ROWS, verbose=0)
    return model, ROWS


class Pair(keras.Model):
    def __init__(self):
        super().__init__()
        self.left, self.right = layers.Dense(2), layers.Dense(3)

    def call(self, inputs):
        return {"left": self.left(inputs["x"]), "both": self.right(inputs["x"] * inputs["z"])}


def subclassed_with_dicts():
    model, x = compiled(Pair()), {"x": ROWS, "z": ROWS[::-1]}
    model.predict(x, verbose=0)
    return model, x


class Tuned(keras.Model):
    """Something is set after it was made, which its config does not know."""

    def __init__(self):
        super().__init__()
        self.gain = 1.0
        self.head = layers.Dense(2)

    def call(self, inputs):
        return self.gain * self.head(inputs)


def subclassed_and_tuned():
    model = compiled(Tuned())
    model.gain = 5.0
    model.predict(ROWS, verbose=0)
    return model, ROWS


class Unregistered(layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 3))

    def call(self, inputs):
        return ops.tanh(inputs @ self.kernel)


def layer_of_ones_own():
    inputs = keras.Input((4,))
    return compiled(keras.Model(inputs, layers.Dense(2)(Unregistered()(inputs)))), ROWS


def with_lambda():
    inputs = keras.Input((4,))
    hidden = layers.Lambda(lambda x: x**2)(layers.Dense(3)(inputs))
    return compiled(keras.Model(inputs, layers.Dense(2)(hidden))), ROWS


def with_operations():
    inputs = keras.Input((4,))
    hidden = ops.tanh(layers.Dense(4)(inputs)) * 2 + inputs[:, ::-1]
    return compiled(keras.Model(inputs, layers.Dense(2)(hidden))), ROWS


def convolutions():
    return compiled(
        keras.Sequential(
            [
                keras.Input((8, 8, 3)),
                layers.Conv2D(4, 3, padding="same"),
                layers.BatchNormalization(),
                layers.ReLU(),
                layers.DepthwiseConv2D(3, padding="same"),
                layers.GroupNormalization(2),
                layers.Conv2DTranspose(2, 2, strides=2),
            ]
        )
    ), IMAGES


def recurrent():
    inputs = keras.Input((5, 3))
    hidden = layers.LSTM(4, return_sequences=True, dropout=0.3)(inputs)
    hidden = layers.Bidirectional(layers.GRU(3, return_sequences=True))(hidden)
    return compiled(keras.Model(inputs, layers.TimeDistributed(layers.Dense(2))(hidden))), STEPS


def attention():
    inputs = keras.Input((5, 3))
    hidden = layers.MultiHeadAttention(2, 2, dropout=0.3)(inputs, inputs, use_causal_mask=True)
    return compiled(keras.Model(inputs, layers.Dense(2)(layers.add([hidden, inputs])))), STEPS


def masked_tokens():
    inputs = keras.Input((5,), dtype="int32")
    hidden = layers.Embedding(7, 4, mask_zero=True)(inputs)
    return compiled(keras.Model(inputs, layers.Dense(2)(layers.LSTM(3)(hidden)))), TOKENS


class Postprocessed(keras.Model):
    def predict_step(self, data):
        outputs = super().predict_step(data)
        return {"value": outputs, "square": outputs**2}


def own_predict_step():
    inputs = keras.Input((4,))
    return compiled(Postprocessed(inputs, layers.Dense(2)(inputs))), ROWS


def adapted_normalization():
    normalization = layers.Normalization()
    normalization.adapt(ROWS * 5 + 3)
    return compiled(keras.Sequential([keras.Input((4,)), normalization, layers.Dense(2)])), ROWS


def adapted_vocabulary():
    lookup = layers.StringLookup(output_mode="one_hot")
    lookup.adapt(["a", "b", "b", "c"])
    inputs = keras.Input((1,), dtype="string")
    model = keras.Model(inputs, layers.Dense(2)(lookup(inputs)))
    return compiled(model), tf.constant([["a"], ["b"], ["c"], ["d"]])


def half_precision():
    inputs = keras.Input((4,))
    hidden = layers.Dense(8, "relu", dtype="mixed_float16")(inputs)
    return compiled(keras.Model(inputs, layers.Dense(2, dtype="float32")(hidden))), ROWS


def double_precision():
    inputs = keras.Input((4,), dtype="float64")
    return compiled(keras.Model(inputs, layers.Dense(2, dtype="float64")(inputs))), ROWS


def frozen_layers():
    model, x = sequential()
    model.layers[0].trainable = False
    model.compile("sgd", "mse")
    return model, x


KINDS = [
    sequential,
    nested_with_shared_layers,
    dicts_in_and_out,
    subclassed_with_config,
    subclassed_without_config,
    subclassed_with_dicts,
    subclassed_and_tuned,
    layer_of_ones_own,
    with_lambda,
    with_operations,
    convolutions,
    recurrent,
    attention,
    masked_tokens,
    own_predict_step,
    adapted_normalization,
    adapted_vocabulary,
    half_precision,
    double_precision,
    frozen_layers,
]


class Case:
    def __init__(self, kind, directory):
        self.model, self.x = kind()
        self.own = self.model.get_weights()
        if kind is adapted_normalization:
            # Its statistics are data, not trained.
            paths, self.weights = [], []
            for seed in range(2):
                self.model.layers[-1].set_weights(random_weights(self.model.layers[-1], seed))
                self.weights.append(self.model.get_weights())
                paths.append(directory / f"{seed}.weights.h5")
                self.model.save_weights(paths[-1])
            self.model.set_weights(self.own)
            self.ens = SnapshotEnsemble.from_weights(self.model, paths)
        else:
            self.ens, self.weights = ensemble_of(self.model, directory, task="regression")
        self.expected = outputs_with(self.model, self.weights, self.x)
        for first, second in keras.tree.flatten(self.expected):
            assert np.abs(first - second).max() > 1e-3
        self.tolerance = 5e-3 if kind is half_precision else 1e-5

    def expected_of(self, index):
        return keras.tree.map_structure(lambda array: array[index], self.expected)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def case(request, tmp_path_factory):
    keras.utils.set_random_seed(0)
    return Case(request.param, tmp_path_factory.mktemp("members"))


def test_all_members_in_one_pass(case):
    found = case.ens.predict_members(case.x, verbose=0)
    assert_close(found, case.expected, case.tolerance)


def test_a_member_as_a_model(case):
    member = case.ens[1]
    assert isinstance(member, keras.Model)
    assert_close(member.predict(case.x, verbose=0), case.expected_of(1), case.tolerance)


def test_each_member_has_the_weights_of_its_file(case):
    for member, weights in zip(case.ens, case.weights, strict=True):
        for found, expected in zip(member.get_weights(), weights, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_the_model_itself_still_has_its_weights(case):
    for found, expected in zip(case.model.get_weights(), case.own, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_model_itself_predicts_by_whatever_weights_it_has(case):
    # Also after the ensemble traced it.
    assert_close(outputs_with(case.model, case.weights, case.x), case.expected, case.tolerance)


# Where the numbers come from, by hand


def test_batch_normalisation_uses_each_members_statistics(tmp_path):
    model = compiled(keras.Sequential([keras.Input((4,)), layers.BatchNormalization(epsilon=0.01)]))
    ens, weights = ensemble_of(model, tmp_path)
    found = ens.predict_members(ROWS, verbose=0)
    for member, (gamma, beta, mean, variance) in zip(found, weights, strict=True):
        expected = gamma * (ROWS - mean) / np.sqrt(variance + 0.01) + beta
        np.testing.assert_allclose(member, expected, rtol=1e-5, atol=1e-5)


def test_dropout_is_off(tmp_path):
    model = compiled(
        keras.Sequential([keras.Input((4,)), layers.Dropout(0.9), layers.Dense(3, use_bias=False)])
    )
    ens, weights = ensemble_of(model, tmp_path)
    expected = np.stack([ROWS @ kernel for (kernel,) in weights])
    np.testing.assert_allclose(ens.predict_members(ROWS, verbose=0), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ens[1].predict(ROWS, verbose=0), expected[1], rtol=1e-5, atol=1e-5)


def test_masked_steps_do_not_count(tmp_path):
    inputs = keras.Input((None,), dtype="int32")
    hidden = layers.Embedding(7, 4, mask_zero=True)(inputs)
    model = compiled(keras.Model(inputs, layers.GRU(3)(hidden)))
    ens, _ = ensemble_of(model, tmp_path)
    short = ens.predict_members(np.array([[1, 2, 3]]), verbose=0)
    padded = ens.predict_members(np.array([[1, 2, 3, 0, 0]]), verbose=0)
    np.testing.assert_allclose(padded, short, rtol=1e-5, atol=1e-6)


def test_each_member_may_have_its_own_normalization(tmp_path):
    # As where each was trained on another fold of the data.
    def folded(scale):
        normalization = layers.Normalization()
        normalization.adapt(ROWS * scale + scale)
        return compiled(keras.Sequential([keras.Input((4,)), normalization, layers.Dense(2)]))

    expected, paths = [], []
    for scale in (1, 5, 20):
        model = folded(scale)
        expected.append(model.predict(ROWS, verbose=0))
        paths.append(tmp_path / f"{scale}.weights.h5")
        model.save_weights(paths[-1])
    ens = SnapshotEnsemble.from_weights(folded(2), paths)
    assert_close(np.stack([member.predict(ROWS, verbose=0) for member in ens]), np.stack(expected))
    assert_close(ens.predict_members(ROWS, verbose=0), np.stack(expected))


def test_reading_files_leaves_the_models_own_normalization(tmp_path):
    model, x = adapted_normalization()
    model.save_weights(tmp_path / "other.weights.h5")
    model.layers[0].adapt(ROWS * 20 - 7)
    before = np.array(model(x))
    SnapshotEnsemble.from_weights(model, [tmp_path / "other.weights.h5"])
    np.testing.assert_array_equal(np.array(model(x)), before)


# Methods of a model that are TensorFlow functions. Their layers are built first: within a
# function, Keras would build them of constants.


class DecoratedCall(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)
        self.dense.build((None, 4))

    @tf.function
    def call(self, inputs):
        return self.dense(inputs)


class DecoratedMethod(layers.Layer):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)
        self.dense.build((None, 4))

    @tf.function
    def transform(self, inputs):
        return self.dense(inputs)

    def call(self, inputs):
        return self.transform(inputs)


class DecoratedTwice(DecoratedMethod):
    @tf.function
    def call(self, inputs):
        return self.transform(inputs)


class FunctionAsAttribute(DecoratedMethod):
    def __init__(self):
        super().__init__()
        self.function = tf.function(self.dense)

    def call(self, inputs):
        return self.function(inputs)


class WithBranches(DecoratedCall):
    """Decorated so that AutoGraph makes a branch of the graph out of an `if` on a tensor."""

    @tf.function
    def call(self, inputs):
        outputs = self.dense(inputs)
        if outputs[0, 1] <= 0:
            outputs = outputs * 2.0 - 10.0
        return outputs


def around(layer):
    inputs = keras.Input((4,))
    return keras.Model(inputs, layer()(inputs))


def by_hand(weights, branches=False):
    outputs = np.stack([ROWS @ kernel + bias for kernel, bias in weights])
    if branches:
        low = outputs[:, :1, 1:2] <= 0
        assert 0 < low.sum() < len(low)
        outputs = np.where(low, outputs * 2 - 10, outputs)
    return outputs


FUNCTIONS = {
    "call": DecoratedCall,
    "method of a layer": lambda: around(DecoratedMethod),
    "one within another": lambda: around(DecoratedTwice),
    "attribute": lambda: around(FunctionAsAttribute),
}


@pytest.mark.parametrize("traced_before", [False, True])
@pytest.mark.parametrize("make", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_each_member_has_its_own_weights_in_tensorflow_functions(make, traced_before, tmp_path):
    model = compiled(make())
    model.build((None, 4))
    if traced_before:
        model.predict(ROWS, verbose=0)
    ens, weights = ensemble_of(model, tmp_path)
    assert_close(ens.predict_members(ROWS, verbose=0), by_hand(weights))
    assert_close(np.stack([member.predict(ROWS, verbose=0) for member in ens]), by_hand(weights))
    assert_close(outputs_with(model, weights, ROWS), by_hand(weights))


@pytest.mark.parametrize("traced_before", [False, True])
def test_branches_of_tensorflow_functions(traced_before, tmp_path):
    model = compiled(WithBranches())
    model.build((None, 4))
    if traced_before:
        model.predict(ROWS, verbose=0)
    ens, weights = ensemble_of(model, tmp_path, 4)
    assert_close(ens.predict_members(ROWS, verbose=0), by_hand(weights, branches=True))
    assert_close(outputs_with(model, weights, ROWS), by_hand(weights, branches=True))


def test_members_in_tensorflow_functions_of_another_shape(tmp_path):
    model = compiled(around(DecoratedMethod))
    ens, weights = ensemble_of(model, tmp_path)
    for rows in (10, 3, 7):
        assert_close(
            ens.predict_members(ROWS[:rows], batch_size=4, verbose=0), by_hand(weights)[:, :rows]
        )


@pytest.mark.parametrize("eagerly", [False, True])
def test_the_setting_of_tensorflow_functions_is_as_it_was(eagerly, tmp_path):
    ens, _ = ensemble_of(compiled(around(DecoratedMethod)), tmp_path)
    tf.config.run_functions_eagerly(eagerly)
    try:
        member_outputs(ens.model, ens.model.get_weights(), ROWS)
        assert tf.config.functions_run_eagerly() == eagerly
        with pytest.raises(Exception, match="incompatible"):
            member_outputs(ens.model, ens.model.get_weights(), ROWS[:, :2])
        assert tf.config.functions_run_eagerly() == eagerly
    finally:
        tf.config.run_functions_eagerly(False)


# The parts


def test_member_outputs_of_arrays():
    model, x = sequential()
    weights = [random_weights(model, seed) for seed in (1, 2)]
    found = np.stack([np.array(member_outputs(model, arrays, x)) for arrays in weights])
    assert_close(found, outputs_with(model, weights, x))


def test_member_outputs_asks_for_every_weight():
    model, x = sequential()
    with pytest.raises(ValueError, match="zip"):
        member_outputs(model, model.get_weights()[:-1], x)


def test_a_members_model_takes_nothing_from_the_model():
    inputs = keras.Input((4,))
    dense = layers.Dense(3, kernel_regularizer="l2", activity_regularizer="l2", name="answer")
    model = compiled(keras.Model(inputs, dense(inputs), name="mine"))
    weights = [random_weights(model, seed) for seed in (1, 2)]
    members = MembersModel(model, weights, lambda outputs: outputs[0] + outputs[1])
    first, second = (
        x @ kernel + bias for x, (kernel, bias) in zip([ROWS] * 2, weights, strict=True)
    )
    np.testing.assert_allclose(np.array(members(ROWS)), first + second, rtol=1e-5, atol=1e-5)
    assert members.weights == []
    assert members.losses == []
    assert members.layers == []
    assert members.name == "mine"
    assert members.output_names == ["answer"]


@pytest.mark.parametrize("kind", [sequential, subclassed_with_config, with_operations])
def test_a_member_is_of_the_models_class_where_it_can_be(kind):
    model, _ = kind()
    member = build_member(model, random_weights(model, 1))
    assert type(member) is type(model)
    assert member.name == model.name
    assert [v.name for v in member.weights] == [v.name for v in model.weights]


@pytest.mark.parametrize("kind", [sequential, subclassed_without_config, with_lambda])
def test_a_member_has_weights_of_its_own(kind, tmp_path):
    model, x = kind()
    ens, _ = ensemble_of(model, tmp_path)
    before = ens.predict_members(x, verbose=0)
    own = model.predict(x, verbose=0)
    member = ens[0]
    member.set_weights([np.zeros_like(array) for array in member.get_weights()])
    np.testing.assert_array_equal(ens.predict_members(x, verbose=0), before)
    np.testing.assert_array_equal(model.predict(x, verbose=0), own)
    np.testing.assert_allclose(ens[0].predict(x, verbose=0), before[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [sequential, subclassed_without_config])
def test_weights_go_into_a_member_in_the_models_order(kind):
    model, x = kind()
    first, second = random_weights(model, 1), random_weights(model, 2)
    member = build_member(model, first)
    member.set_weights(second)
    assert_close(member.predict(x, verbose=0), outputs_with(model, [second], x)[0])


@pytest.mark.parametrize("kind", [sequential, subclassed_without_config])
def test_a_member_has_the_models_trainable_flags(kind):
    model, _ = kind()
    model.layers[0].trainable = False
    member = build_member(model, random_weights(model, 1))
    names = [v.name for v in model.trainable_variables]
    assert [v.name for v in member.trainable_variables] == names
    assert len(member.non_trainable_variables) == len(model.non_trainable_variables)


def test_a_member_is_saved_and_loaded_by_keras(tmp_path):
    model, x = sequential()
    ens, _ = ensemble_of(model, tmp_path)
    ens[1].save(tmp_path / "member.keras")
    loaded = keras.models.load_model(tmp_path / "member.keras")
    assert_close(loaded.predict(x, verbose=0), ens.predict_members(x, verbose=0)[1])


# Compiled alike


def scaled_mean(factor):
    def mean_output(y_true, y_pred):
        return factor * ops.mean(y_pred)

    return mean_output


def with_a_loss_of_ones_own(model):
    model.compile(
        keras.optimizers.Adam(0.01),
        lambda y_true, y_pred: ops.mean(ops.abs(y_true - y_pred), axis=-1),
        metrics=[scaled_mean(10.0)],
    )
    return model


@pytest.mark.parametrize("kind", [sequential, subclassed_without_config])
def test_losses_that_are_lambdas_and_metrics_that_are_closures(kind, tmp_path):
    model, x = kind()
    with_a_loss_of_ones_own(model)
    ens, _ = ensemble_of(model, tmp_path, task="regression")
    outputs = ens.predict_members(x, verbose=0)
    y = np.ones_like(outputs[0])
    for combined, found in [
        (outputs.mean(axis=0), ens.evaluate(x, y, verbose=0)),
        (outputs[1], ens[1].evaluate(x, y, verbose=0)),
    ]:
        expected = [np.abs(y - combined).mean(), 10 * combined.mean()]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_member_has_an_optimizer_of_its_own():
    model, _ = sequential()
    model.compile(keras.optimizers.Adam(0.02, beta_1=0.5), "mse")
    member = build_member(model, random_weights(model, 1))
    assert member.optimizer is not model.optimizer
    assert isinstance(member.optimizer, keras.optimizers.Adam)
    assert float(member.optimizer.learning_rate) == pytest.approx(0.02)
    assert member.optimizer.beta_1 == 0.5


def test_members_have_metrics_of_their_own(tmp_path):
    model, x = sequential()
    metric = keras.metrics.MeanAbsoluteError()
    model.compile("sgd", "mse", metrics=[metric])
    ens, _ = ensemble_of(model, tmp_path)
    y = np.ones((len(x), 3))
    model.evaluate(x, y, verbose=0)
    before = float(metric.result())
    ens.evaluate(x, y, verbose=0)
    ens[0].evaluate(x, y, verbose=0)
    assert float(metric.result()) == before


class Demanding(keras.metrics.Mean):
    """Cannot be made from its config, which knows nothing of `function`."""

    def __init__(self, function, name="demanding"):
        super().__init__(name=name)
        self.function = function

    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(self.function(y_pred))


def test_a_metric_without_a_config_counts_the_ensemble_alone_and_keeps_its_state(tmp_path):
    model, x = sequential()
    metric = Demanding(ops.max)
    model.compile("sgd", "mse", metrics=[metric])
    ens, _ = ensemble_of(model, tmp_path)
    y = np.ones((len(x), 3))
    model.evaluate(x, y, verbose=0)
    before = float(metric.result())
    found = ens.evaluate(x, y, verbose=0, return_dict=True)["demanding"]
    assert found == pytest.approx(ens.predict(x, verbose=0).max(), rel=1e-5)
    assert float(metric.result()) == before


# The model is left alone


class Breakable(layers.Layer):
    broken = False

    def call(self, inputs):
        if self.broken:
            raise RuntimeError("the layer broke")
        return inputs


def breakable():
    inputs = keras.Input((4,))
    hidden = layers.BatchNormalization()(Breakable()(layers.Dense(4, name="frozen")(inputs)))
    model = keras.Model(inputs, layers.Dense(3)(layers.Dropout(0.5)(hidden)))
    model.get_layer("frozen").trainable = False
    return model


def state_of(model):
    """All that must be as it was: values, and the objects themselves."""
    values = [np.array(v) for v in (*model.variables, *model.optimizer.variables)]
    values += [np.array(v) for metric in model.metrics for v in metric.variables]
    things = [model.optimizer, model.optimizer._learning_rate, model.loss, model.train_function]
    things += [*model.variables, *model.optimizer.variables, *model.metrics, *model.layers]
    flags = [layer.trainable for layer in model._flatten_layers()]
    return values, things, [*flags, model.compiled, model.name, tf.config.functions_run_eagerly()]


def predict(ens, y):
    ens.predict(ROWS, verbose=0)


def predict_weighted(ens, y):
    ens.weights = [0.25, 0.75]
    ens.predict(ROWS, combine="weighted", verbose=0)


def predict_members(ens, y):
    ens.predict_members(ROWS, verbose=0)


def evaluate(ens, y):
    ens.evaluate(ROWS, y, verbose=0)


def index(ens, y):
    ens[1].predict(ROWS, verbose=0)


def train_a_member(ens, y):
    ens[1].fit(ROWS, y, epochs=1, verbose=0)


def iterate(ens, y):
    assert len(list(ens)) == 2


def data_that_breaks(ens, y):
    def batches():
        yield ROWS
        raise RuntimeError("the data broke")

    with pytest.raises(Exception, match="the data broke"):
        ens.predict(batches(), verbose=0)


def layer_that_breaks(ens, y):
    Breakable.broken = True
    try:
        with pytest.raises(RuntimeError, match="the layer broke"):
            ens.predict(ROWS, members=[1, 0], verbose=0)  # Not traced yet.
    finally:
        Breakable.broken = False
    ens.predict(ROWS, members=[1, 0], verbose=0)


def callback_that_breaks(ens, y):
    def end(batch, logs):
        raise KeyboardInterrupt

    callback = keras.callbacks.LambdaCallback()
    callback.on_test_batch_end = end
    with pytest.raises(KeyboardInterrupt):
        ens.evaluate(ROWS, y, callbacks=[callback], verbose=0)


def inputs_of_a_wrong_shape(ens, y):
    with pytest.raises(Exception, match="incompatible"):
        ens.predict(ROWS[:, :2], verbose=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained model, its ensemble, and what the members predict."""
    keras.utils.set_random_seed(0)
    model = breakable()
    rate = keras.optimizers.schedules.CosineDecay(0.1, 10)
    model.compile(keras.optimizers.Adam(rate), "mse", metrics=["mae"])
    model.fit(ROWS, np.ones((10, 3)), epochs=1, verbose=0)
    ens, weights = ensemble_of(model, tmp_path_factory.mktemp("trained"))
    return model, ens, outputs_with(model, weights, ROWS)


@pytest.mark.parametrize(
    "action",
    [
        predict,
        predict_weighted,
        predict_members,
        evaluate,
        index,
        iterate,
        train_a_member,
        data_that_breaks,
        layer_that_breaks,
        callback_that_breaks,
        inputs_of_a_wrong_shape,
    ],
)
def test_the_model_is_as_it_was(action, trained):
    model, ens, expected = trained
    values, things, flags = state_of(model)
    action(ens, np.ones((10, 3)))
    values_after, things_after, flags_after = state_of(model)
    for before, after in zip(values, values_after, strict=True):
        np.testing.assert_array_equal(before, after)
    assert all(before is after for before, after in zip(things, things_after, strict=True))
    assert flags == flags_after
    # And what broke did no harm to the ensemble.
    assert_close(ens.predict_members(ROWS, verbose=0), expected)


def test_the_model_trains_on_after_its_ensemble_predicted(tmp_path):
    y, losses = np.ones((10, 3)), []
    for interrupted in (False, True):
        keras.utils.set_random_seed(3)
        model = breakable()
        model.compile("sgd", "mse")
        model.fit(ROWS, y, epochs=1, shuffle=False, verbose=0)
        if interrupted:
            ens, _ = ensemble_of(model, tmp_path)
            ens.predict(ROWS, verbose=0)
            ens.evaluate(ROWS, y, verbose=0)
        history = model.fit(ROWS, y, epochs=2, shuffle=False, verbose=0)
        losses.append(history.history["loss"])
    assert losses[0] == losses[1]


@keras.saving.register_keras_serializable("tests")
class WithTable(layers.Layer):
    """Holds weights that are drawn, as the default is, and a table that its config knows."""

    def build(self, shape):
        self.drawn = self.add_weight(shape=(shape[-1], 2))
        self.normal = self.add_weight(shape=(2,), initializer="random_normal")
        table = keras.initializers.Constant(np.arange(2.0))
        self.table = self.add_weight(shape=(2,), initializer=table, trainable=False)
        self.ones = self.add_weight(shape=(2,), initializer="ones")

    def call(self, inputs):
        return (inputs @ self.drawn) * self.normal * self.ones + self.table


def test_a_blank_member_draws_no_numbers_that_it_is_given_anyway():
    model = keras.Sequential([keras.Input((3,)), WithTable(), layers.LayerNormalization()])
    model.compile("sgd", "mse")
    member = blank_member(model)
    drawn, normal, ones, table, *normed = member.get_weights()
    assert not drawn.any()
    assert not normal.any()
    np.testing.assert_array_equal(table, [0, 1])
    for found, expected in zip([ones, *normed], [1, 1, 0], strict=True):
        np.testing.assert_array_equal(found, np.full(2, expected))
    # Whoever builds a layer afterwards has its numbers drawn.
    fresh = layers.Dense(4)
    fresh.build((None, 3))
    assert fresh.kernel.numpy().any()
