"""All members merged into one Keras model: its outputs, structure and shared layers."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from models import COMBINATIONS, TASKS, dense, ensemble_of, with_backbone

layers = keras.layers


def batch_for(model, rows=7):
    """Random inputs in the model's structure."""
    rng = np.random.default_rng(1)
    return keras.tree.map_structure(
        lambda tensor: (
            rng.normal(size=(rows, *tensor.shape[1:])).astype("float32")
            if "int" not in tensor.dtype
            else rng.integers(0, 5, (rows, *tensor.shape[1:]))
        ),
        model._inputs_struct if hasattr(model, "_inputs_struct") else model.inputs[0],
    )


def assert_alike(actual, expected, atol=1e-6):
    keras.tree.map_structure(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=atol), actual, expected
    )


@pytest.mark.sampled(8, 3)
@pytest.mark.parametrize(("task", "combine"), COMBINATIONS)
def test_every_task_and_combination_agrees_with_predict(task, combine):
    loss, units, activation = TASKS[task]
    ens = ensemble_of(dense(loss, units, activation), 4)
    ens.weights = [0.1, 0.2, 0.3, 0.4]
    model = ens.to_keras(combine)
    x = batch_for(model, 64)
    assert_alike(model.predict(x, verbose=0), ens.predict(x, combine=combine, verbose=0))


def sequential():
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(5, "relu"), layers.Dense(3, "softmax")]
    )


def twice_the_same_layer():
    first, second = keras.Input((4,), name="first"), keras.Input((4,), name="second")
    shared = layers.Dense(5, "relu")
    joined = layers.Concatenate()([shared(first), shared(second)])
    return keras.Model([first, second], layers.Dense(3, "softmax")(joined))


def dicts():
    inputs = {"a": keras.Input((4,), name="a"), "b": keras.Input((3,), name="b")}
    joined = layers.Concatenate()(list(inputs.values()))
    outputs = {"kind": layers.Dense(3, "softmax")(joined), "size": layers.Dense(2)(joined)}
    return keras.Model(inputs, outputs)


def nested_twice():
    block = keras.Sequential([layers.Dense(4, "relu"), layers.BatchNormalization()])
    outer = keras.Sequential([keras.Input((4,)), block, layers.Dense(4)])
    inputs = keras.Input((4,))
    return keras.Model(inputs, layers.Dense(3, "softmax")(block(outer(inputs))))


def recurrent():
    inputs = keras.Input((6,), dtype="int32")
    embedded = layers.Embedding(5, 4, mask_zero=True)(inputs)
    hidden = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(embedded)
    return keras.Model(inputs, layers.Dense(3, "softmax")(layers.GRU(4)(hidden)))


def attention():
    inputs = keras.Input((5, 4))
    attended = layers.MultiHeadAttention(2, 3)(inputs, inputs, use_causal_mask=True)
    mixed = layers.LayerNormalization()(inputs + attended)
    return keras.Model(inputs, layers.Dense(3, "softmax")(mixed))


def segmentation():
    inputs = keras.Input((8, 8, 2))
    down = layers.Conv2D(4, 3, strides=2, padding="same", activation="relu")(inputs)
    up = layers.UpSampling2D()(layers.BatchNormalization()(down))
    return keras.Model(inputs, layers.Conv2D(3, 1, activation="softmax")(up))


def with_a_lambda():
    inputs = keras.Input((4,))
    return keras.Model(
        inputs, layers.Dense(3, "softmax")(layers.Lambda(lambda x: x * 2 - 1)(inputs))
    )


def half_precision():
    inputs = keras.Input((4,))
    hidden = layers.Dense(6, "relu", dtype="mixed_bfloat16")(inputs)
    return keras.Model(inputs, layers.Dense(3, "softmax", dtype="float32")(hidden))


ARCHITECTURES = [
    sequential,
    twice_the_same_layer,
    dicts,
    nested_twice,
    recurrent,
    attention,
    segmentation,
    with_a_lambda,
    half_precision,
]


@pytest.mark.sampled(3, 2)
@pytest.mark.parametrize("build", ARCHITECTURES)
def test_every_architecture_agrees_with_predict(build):
    source = build()
    losses = {"kind": "sparse_categorical_crossentropy", "size": "mse"}
    source.compile("sgd", losses if build is dicts else "sparse_categorical_crossentropy")
    ens = ensemble_of(source)
    model = ens.to_keras()
    x = batch_for(source)
    assert_alike(model.predict(x, verbose=0), ens.predict(x, verbose=0), 1e-5)


@pytest.mark.parametrize("build", [twice_the_same_layer, dicts])
def test_inputs_and_outputs_keep_structure_and_names(build):
    source = build()
    losses = {"kind": "sparse_categorical_crossentropy", "size": "mse"}
    source.compile("sgd", losses if build is dicts else "sparse_categorical_crossentropy")
    model = ensemble_of(source).to_keras()
    assert [t.name for t in model.inputs] == [t.name for t in source.inputs]
    assert model.output_names == source.output_names
    keras.tree.assert_same_structure(model._inputs_struct, source._inputs_struct)
    keras.tree.assert_same_structure(model._outputs_struct, source._outputs_struct)
    assert [t.shape for t in model.outputs] == [t.shape for t in source.outputs]


def test_an_adapted_vocabulary_is_copied():
    lookup = layers.StringLookup()
    lookup.adapt(["red", "green", "blue", "green"])
    inputs = keras.Input((2,), dtype="string", name="words")
    embedded = layers.Flatten()(layers.Embedding(4, 3)(lookup(inputs)))
    source = keras.Model(inputs, layers.Dense(3, "softmax")(embedded))
    source.compile("sgd", "sparse_categorical_crossentropy")
    ens = ensemble_of(source)
    model = ens.to_keras()
    x = keras.ops.convert_to_tensor([["red", "green"], ["blue", "never seen"]])
    assert_alike(model.predict(x, verbose=0), ens.predict(x, verbose=0))
    assert sum(isinstance(layer, layers.StringLookup) for layer in model.layers) == 1


def test_members_may_normalise_differently():
    inputs = keras.Input((4,))
    hidden = layers.Normalization()(inputs)
    source = keras.Model(inputs, layers.Dense(3, "softmax")(hidden))
    source.compile("sgd", "sparse_categorical_crossentropy")
    ens = ensemble_of(source, 3)
    x = batch_for(source)
    expected = np.zeros((7, 3))
    for member in ens:
        mean, variance, kernel, bias = (w for w in member.get_weights() if w.ndim)
        logits = ((x - mean) / np.sqrt(variance) @ kernel + bias).astype("float64")
        expected += np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) / 3
    np.testing.assert_allclose(ens.to_keras().predict(x, verbose=0), expected, atol=1e-5)
    np.testing.assert_allclose(ens.predict(x, verbose=0), expected, atol=1e-5)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_a_frozen_backbone_is_stored_once(nested, count):
    source, in_backbone = with_backbone(nested)
    ens = ensemble_of(source, count, shared=in_backbone)
    model = ens.to_keras()
    head = 4 * 4 + 4
    backbone = source.count_params() - head
    assert model.count_params() == backbone + count * head
    x = batch_for(source)
    assert_alike(model.predict(x, verbose=0), ens.predict(x, verbose=0))


def test_a_frozen_backbone_is_computed_once():
    calls = []

    class Counting(layers.Dense):
        def call(self, inputs):
            calls.append(self.name)
            return super().call(inputs)

    inputs = keras.Input((4,))
    frozen = Counting(5, name="frozen", trainable=False)
    source = keras.Model(inputs, Counting(3, "softmax", name="head")(frozen(inputs)))
    source.compile("sgd", "sparse_categorical_crossentropy")
    ens = ensemble_of(source, 3, shared=lambda v: "frozen" in v.path)
    model = ens.to_keras()
    calls.clear()
    model(np.zeros((1, 4)))
    assert sorted(calls) == ["frozen", "member_0_head", "member_1_head", "member_2_head"]


def test_an_equal_layer_after_one_that_differs_is_stored_once_and_run_for_each_member():
    inputs = keras.Input((4,))
    hidden = layers.Dense(5, name="differs")(inputs)
    source = keras.Model(inputs, layers.Dense(3, "softmax", name="equal")(hidden))
    source.compile("sgd", "sparse_categorical_crossentropy")
    ens = ensemble_of(source, 3, shared=lambda v: "equal" in v.path)
    model = ens.to_keras()
    assert model.count_params() == 3 * (4 * 5 + 5) + (5 * 3 + 3)
    x = batch_for(source)
    assert_alike(model.predict(x, verbose=0), ens.predict(x, verbose=0))


def test_a_nested_model_that_was_called_in_inference_mode_stays_in_it():
    source, in_backbone = with_backbone(nested=True)
    model = ensemble_of(source, 2, shared=in_backbone).to_keras()
    x = batch_for(source)
    norm = next(layer for layer in model.layers if "back_norm" in layer.name)
    before = norm.get_weights()
    model(x, training=True)
    for old, new in zip(before, norm.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_members_may_be_chosen_and_those_of_weight_0_are_left_out():
    ens = ensemble_of(dense(), 4)
    single = ens.to_keras(members=1)
    x = batch_for(single)
    assert_alike(single.predict(x, verbose=0), ens[3].predict(x, verbose=0))
    ens.weights = [0.5, 0, 0, 0.5]
    weighted = ens.to_keras("weighted")
    assert weighted.count_params() == 2 * ens.model.count_params()
    assert_alike(weighted.predict(x, verbose=0), ens.predict(x, members=[0, 3], verbose=0))


def test_it_is_compiled_with_the_models_loss_and_metrics():
    source, in_backbone = with_backbone(nested=False)
    ens = ensemble_of(source, 3, shared=in_backbone)
    x, y = batch_for(source, 32), np.arange(32) % 4
    actual = ens.to_keras().evaluate(x, y, verbose=0, return_dict=True)
    expected = ens.evaluate(x, y, verbose=0, return_dict=True)
    assert actual.keys() == expected.keys() == {"loss", "accuracy"}
    assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert actual["accuracy"] == pytest.approx(expected["accuracy"])


def test_the_wrapped_model_is_unchanged():
    source, in_backbone = with_backbone(nested=True)
    ens = ensemble_of(source, 2, shared=in_backbone)
    weights = source.get_weights()
    nodes = [len(layer._inbound_nodes) for layer in source._flatten_layers()]
    flags = [layer.trainable for layer in source._flatten_layers()]
    ens.to_keras()
    assert nodes == [len(layer._inbound_nodes) for layer in source._flatten_layers()]
    assert flags == [layer.trainable for layer in source._flatten_layers()]
    for old, new in zip(weights, source.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


LOADS_WITHOUT_THE_PACKAGE = """
import sys
sys.modules["snapshot_ensemble"] = None  # Importing it is an error from here on.
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
import keras, numpy as np
model = keras.models.load_model(sys.argv[1] + "/model.keras", safe_mode=True)
x = dict(np.load(sys.argv[1] + "/x.npz"))["x"]
np.save(sys.argv[1] + "/y.npy", model.predict(x, verbose=0))
"""


@pytest.mark.slow
@pytest.mark.sampled(1, 2)
@pytest.mark.parametrize("combine", ["mean", "vote", "weighted", "geometric"])
def test_its_file_loads_without_the_package(combine, tmp_path):
    source, in_backbone = with_backbone(nested=True)
    ens = ensemble_of(source, 3, shared=in_backbone)
    ens.weights = [0.2, 0.3, 0.5]
    ens.to_keras(combine).save(tmp_path / "model.keras")
    x = batch_for(source)
    np.savez(tmp_path / "x.npz", x=x)
    command = [sys.executable, "-c", LOADS_WITHOUT_THE_PACKAGE, str(tmp_path)]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
    expected = ens.predict(x, combine=combine, verbose=0)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, atol=1e-6)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.head = layers.Dense(3, "softmax")

    def call(self, inputs):
        return self.head(inputs)


def test_a_subclass_is_refused_with_advice():
    source = Subclassed()
    source(np.zeros((1, 4)))
    source.compile("sgd", "sparse_categorical_crossentropy")
    ens = ensemble_of(source)
    with pytest.raises(ValueError, match="Only a Functional or Sequential model") as caught:
        ens.to_keras()
    assert "Received: model='subclassed' of class Subclassed" in str(caught.value)
    assert "`export(filepath)` to a SavedModel works" in str(caught.value)


def test_without_members_there_is_nothing_to_combine(model):
    from snapshot_ensemble import SnapshotEnsemble

    with pytest.raises(ValueError, match="The ensemble has no members yet"):
        SnapshotEnsemble(model).to_keras()


def test_a_combination_for_another_task_is_refused():
    with pytest.raises(ValueError, match="`combine='median'` is for regression") as caught:
        ensemble_of(dense()).to_keras("median")
    assert "Received: combine='median'" in str(caught.value)
