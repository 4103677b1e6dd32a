"""The check of an exported file: its batch, names, formats, and models that draw random numbers."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import dense, ensemble_of, pool_of

from snapshot_ensemble.export.runtimes import RUNTIMES

layers = keras.layers


def run(path, inputs):
    return RUNTIMES["tf_saved_model"](path, lambda names: inputs)


def compiled(inputs, outputs):
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


def lookup():
    """FeatureSpace, wide and deep, MovieLens: vocabularies without an index for other words."""
    inputs = keras.Input((1,), dtype="string", name="words")
    ids = layers.StringLookup(vocabulary=["red", "green"], num_oov_indices=0)(inputs)
    return compiled(
        inputs, layers.Dense(3, "softmax")(layers.Flatten()(layers.Embedding(3, 2)(ids)))
    )


def strided():
    """Speech: a convolution that open dimensions of 16 are too short for."""
    inputs = keras.Input((None, 1), name="sound")
    hidden = layers.Conv1D(2, 80, strides=16)(inputs)
    return compiled(inputs, layers.Dense(3, "softmax")(layers.GlobalMaxPooling1D()(hidden)))


BATCHES = {
    lookup: tf.constant([["red"], ["green"]]),
    strided: np.random.default_rng(1).normal(size=(2, 200, 1)).astype("float32"),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("build", BATCHES)
@pytest.mark.parametrize("source", ["none", "fit", "x"])
def test_the_batch_is_given_or_seen_and_without_one_that_can_run_the_file_stays(
    build, source, tmp_path
):
    ens, batch = ensemble_of(build(), 2), BATCHES[build]
    if source == "none":
        with pytest.warns(UserWarning, match="was not compared with the ensemble, since the ensem"):
            ens.export(tmp_path / "served")
    else:
        pool_of(ens).sample = batch if source == "fit" else None
        ens.export(tmp_path / "served", x=batch if source == "x" else None)
    (name,) = [tensor.name for tensor in ens.model.inputs]
    (actual,) = run(tmp_path / "served", {name: batch}).values()
    np.testing.assert_allclose(actual, ens.predict(batch, verbose=0), atol=1e-5)


@pytest.mark.parametrize("source", ["fit", "x"])
def test_the_batch_is_what_the_file_runs_on(source, tmp_path, monkeypatch):
    seen = []

    def spying(path, named, original=RUNTIMES["tf_saved_model"]):
        seen.append(named(["features"])["features"])
        return original(path, named)

    monkeypatch.setitem(RUNTIMES, "tf_saved_model", spying)
    ens, batch = ensemble_of(dense(), 2), np.arange(12.0).reshape(3, 4)
    pool_of(ens).sample = batch if source == "fit" else batch * 2
    ens.export(tmp_path / "served", x=batch if source == "x" else None)
    np.testing.assert_array_equal(seen, [batch])


def test_a_batch_that_the_ensemble_cannot_predict_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"Received: x of shape \(3, 7\). Pass inputs as for"):
        ensemble_of(dense(), 2).export(tmp_path / "served", x=np.zeros((3, 7)))
    assert list(tmp_path.iterdir()) == []


def test_names_that_the_file_writes_otherwise(tmp_path):
    """Columns of a table: `a-b.c` is `a_b_c` in a signature."""
    inputs = [keras.Input((2,), name=name) for name in ("a-b.c", "b.c")]
    answer = layers.Dense(3, "softmax", name="out-put")(layers.Concatenate()(inputs))
    ens = ensemble_of(compiled(inputs, answer), 2)
    ens.export(tmp_path / "served")
    x = np.random.default_rng(1).normal(size=(2, 5, 2)).astype("float32")
    batch = {"a_b_c": tf.constant(x[0]), "b_c": tf.constant(x[1])}
    (actual,) = run(tmp_path / "served", batch).values()
    np.testing.assert_allclose(actual, ens.predict(list(x), verbose=0), atol=1e-5)


@pytest.mark.parametrize("name", [None, "mine"])
def test_a_given_signature_is_what_the_file_has(name, tmp_path):
    inputs = keras.Input((None, 2), name="series")
    hidden = layers.GlobalAveragePooling1D()(inputs)
    ens = ensemble_of(compiled(inputs, layers.Dense(3, "softmax")(hidden)), 2)
    signature = [keras.layers.InputSpec("float32", (4, 7, 2), name=name)]
    ens.export(tmp_path / "served", input_signature=signature)
    loaded = tf.saved_model.load(str(tmp_path / "served"))
    ((given, spec),) = loaded.signatures["serving_default"].structured_input_signature[1].items()
    assert given == (name or "series")
    assert spec.shape == (4, 7, 2)


def test_advice_for_a_saved_model_is_not_a_saved_model(tmp_path, monkeypatch):
    monkeypatch.setitem(
        RUNTIMES, "tf_saved_model", lambda path, named: {"answer": np.zeros((2, 3), "float32")}
    )
    with pytest.raises(ValueError, match="disagree on output 'answer'. Received: f") as caught:
        ensemble_of(dense(), 2).export(tmp_path / "served")
    assert "SavedModel" not in str(caught.value)
    assert "compare `model.export` of a member" in str(caught.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:google.protobuf")
@pytest.mark.parametrize(
    "arguments",
    [
        {"optimizations": [tf.lite.Optimize.DEFAULT]},
        {
            "optimizations": [tf.lite.Optimize.DEFAULT],
            "target_spec": {"supported_types": [tf.float16]},
        },
    ],
    ids=["8 bits", "16 bits"],
)
def test_quantized_files(arguments, tmp_path):
    pytest.importorskip("ai_edge_litert")
    inputs = keras.Input((64,), name="features")
    hidden = layers.Dense(64, "relu")(inputs)
    ens = ensemble_of(compiled(inputs, layers.Dense(3, "softmax")(hidden)), 2)
    ens.export(tmp_path / "m.tflite", "litert", **arguments)
    assert (tmp_path / "m.tflite").stat().st_size < 30_000 * 2


def flip():
    """Keras's examples of image classification: augmentation inside the model."""
    return layers.RandomFlip()


def called_in_training_mode():
    augmentation = keras.Sequential([layers.RandomFlip(), layers.RandomContrast(0.5)])
    return lambda x: augmentation(x, training=True)


def dropout_in_training_mode():
    """`predict` calls it in inference mode, too: a Functional model hands its own mode down."""
    return lambda x: layers.Dropout(0.5)(x, training=True)


@pytest.mark.parametrize("build", [flip, called_in_training_mode, dropout_in_training_mode])
@pytest.mark.parametrize(
    "format", ["tf_saved_model", pytest.param("litert", marks=pytest.mark.slow)]
)
def test_recorded_training_modes_are_as_in_predict(build, format, tmp_path):
    inputs = keras.Input((4, 4, 1), name="image")
    hidden = layers.Flatten()(build()(inputs))
    model = compiled(inputs, layers.Dense(3, "softmax", name="answer")(hidden))
    ens = ensemble_of(model, 2)
    path = tmp_path / ("served.tflite" if format == "litert" else "served")
    ens.export(path, format)
    x = np.random.default_rng(1).normal(size=(6, 4, 4, 1)).astype("float32")
    expected = np.zeros((6, 3))
    for member in ens:
        logits = x.reshape(6, -1) @ member.get_weights()[0] + member.get_weights()[1]
        expected += np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) / 2
    for _ in range(2):
        actual = RUNTIMES[format](path, lambda names: {"image": x})["answer"]
        np.testing.assert_allclose(actual, expected, atol=1e-5)
    np.testing.assert_allclose(ens.to_keras().predict(x, verbose=0), expected, atol=1e-5)


def random_outside_of_keras():
    inputs = keras.Input((4,), name="features")
    noisy = layers.Lambda(lambda x: x + tf.random.normal(tf.shape(x)), output_shape=(4,))(inputs)
    return compiled(inputs, layers.Dense(3, "softmax", name="answer")(noisy))


def test_outputs_that_are_drawn_are_compared_by_shape_and_type(tmp_path, monkeypatch):
    ens = ensemble_of(random_outside_of_keras(), 2)
    ens.export(tmp_path / "served")
    x = {"features": np.ones((2, 4), "float32")}
    loaded = tf.saved_model.load(str(tmp_path / "served")).signatures["serving_default"]
    first, second = (loaded(features=tf.constant(x["features"]))["answer"] for _ in range(2))
    assert np.abs(first - second).max() > 1e-3
    monkeypatch.setitem(
        RUNTIMES,
        "tf_saved_model",
        lambda path, named: {"answer": np.full((2, 3), np.nan, "float32")},
    )
    with pytest.raises(ValueError, match="disagree on output 'answer'"):
        ens.export(tmp_path / "other")
