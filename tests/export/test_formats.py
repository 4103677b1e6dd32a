"""Exports: names, any batch size, inference mode, agreement with `predict`, and failures."""

import importlib.util
import logging
import pathlib
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import COMBINATIONS, TASKS, dense, ensemble_of, with_backbone

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.export import formats as exporting
from snapshot_ensemble.export.runtimes import RUNTIMES

layers = keras.layers
pytestmark = pytest.mark.filterwarnings(
    # Warnings of TensorFlow and its converters.
    "ignore:In the future `np.object`:FutureWarning",
    "ignore:.*:DeprecationWarning:google.protobuf",
)
FORMATS = {
    "tf_saved_model": ("served", 1e-5),
    "onnx": ("served.onnx", 1e-4),
    "litert": ("served.tflite", 1e-4),
    "openvino": ("served.xml", 1e-4),
}


# Not slow: the most common format, and the one that converts fastest.
FAST_FORMATS = ("tf_saved_model", "openvino")


@pytest.fixture(
    params=[
        pytest.param(name, marks=() if name in FAST_FORMATS else pytest.mark.slow)
        for name in FORMATS
    ]
)
def format(request, tmp_path):
    """A format, a path for it, and the tolerance of its outputs."""
    name, tolerance = FORMATS[request.param]
    return request.param, tmp_path / name, tolerance


def run(format, path, inputs):
    """Outputs by name, from the runtime that serves the format."""
    path = str(path)
    if format == "tf_saved_model":
        signature = tf.saved_model.load(path).signatures["serving_default"]
        return {k: v.numpy() for k, v in signature(**inputs).items()}
    if format == "onnx":
        ort = pytest.importorskip("onnxruntime")
        session = ort.InferenceSession(path)
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(None, inputs), strict=True))
    if format == "litert":
        litert = pytest.importorskip("ai_edge_litert.interpreter")
        return litert.Interpreter(model_path=path).get_signature_runner("serving_default")(**inputs)
    ov = pytest.importorskip("openvino")
    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled(inputs)
    return {name: results[output] for output in compiled.outputs for name in output.names}


# Conversions take seconds each. What is converted is the same graph for all formats, so that each
# task and combination meets one of them, each format several tasks, and the fastest one all tasks.
CASES = {
    *((list(FORMATS)[i % len(FORMATS)], *case) for i, case in enumerate(COMBINATIONS)),
    *(("tf_saved_model", task, "mean") for task in TASKS),
    *((format, "softmax", "vote") for format in FORMATS),
}


@pytest.mark.sampled(7, 2)
@pytest.mark.parametrize(("name", "task", "combine"), sorted(CASES))
def test_every_task_combination_and_format_agrees_with_predict(name, task, combine, tmp_path):
    path, tolerance = tmp_path / FORMATS[name][0], FORMATS[name][1]
    loss, units, activation = TASKS[task]
    ens = ensemble_of(dense(loss, units, activation), 4)
    ens.weights = [0.1, 0.2, 0.3, 0.4]
    ens.export(path, name, combine=combine)
    x = np.random.default_rng(2).normal(size=(9, 4)).astype("float32")
    actual = run(name, path, {"features": x})
    expected = ens.predict(x, combine=combine, verbose=0)
    np.testing.assert_allclose(actual["answer"], expected, atol=tolerance, rtol=tolerance)


@pytest.mark.slow
def test_any_batch_size_in_inference_mode_with_a_shared_backbone(format):
    name, path, tolerance = format
    source, in_backbone = with_backbone(nested=True)
    ens = ensemble_of(source, 3, shared=in_backbone)
    ens.export(path, name)
    for rows in (1, 5, 5):  # Dropout would differ from call to call.
        x = np.random.default_rng(2).normal(size=(rows, 6, 6, 3)).astype("float32")
        actual = run(name, path, {"image": x})
        np.testing.assert_allclose(actual["head"], ens.predict(x, verbose=0), atol=tolerance)


def two_headed():
    inputs = [keras.Input((4,), name="left"), keras.Input((3,), name="right")]
    joined = layers.Concatenate()(inputs)
    outputs = [
        layers.Dense(3, "softmax", name="kind")(joined),
        layers.Dense(1, name="size")(joined),
    ]
    model = keras.Model(inputs, outputs)
    model.compile("sgd", {"kind": "sparse_categorical_crossentropy", "size": "mse"})
    return model


def with_dicts():
    inputs = {"left": keras.Input((4,), name="left"), "right": keras.Input((3,), name="right")}
    joined = layers.Concatenate()([inputs["left"], inputs["right"]])
    outputs = {"kind": layers.Dense(3, "softmax")(joined), "size": layers.Dense(1)(joined)}
    model = keras.Model(inputs, outputs)
    model.compile("sgd", {"kind": "sparse_categorical_crossentropy", "size": "mse"})
    return model


@pytest.mark.sampled(4)
@pytest.mark.parametrize("build", [two_headed, with_dicts])
def test_the_signature_has_the_models_own_names(build, format):
    name, path, tolerance = format
    ens = ensemble_of(build())
    ens.export(path, name)
    rng = np.random.default_rng(2)
    batch = {
        "left": rng.normal(size=(5, 4)).astype("float32"),
        "right": rng.normal(size=(5, 3)).astype("float32"),
    }
    expected = ens.predict(batch if build is with_dicts else list(batch.values()), verbose=0)
    if build is two_headed:
        expected = dict(zip(["kind", "size"], expected, strict=True))
    actual = run(name, path, batch)
    for output in ("kind", "size"):
        np.testing.assert_allclose(actual[output], expected[output], atol=tolerance, rtol=tolerance)


def sequence_model(layer):
    inputs = keras.Input((5, 4), name="series")
    hidden = layer(inputs)
    model = keras.Model(inputs, layers.Dense(3, "softmax", name="answer")(hidden))
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


@pytest.mark.parametrize(
    "layer",
    [
        layers.GRU(4),
        layers.LSTM(4, return_sequences=True),
        lambda x: layers.MultiHeadAttention(2, 3)(x, x),
        layers.Conv1D(4, 3, padding="same", activation="relu"),
    ],
    ids=["gru", "lstm", "attention", "convolution"],
)
@pytest.mark.slow
@pytest.mark.sampled(1, 3)
@pytest.mark.parametrize("format_name", ["tf_saved_model", "onnx", "openvino"])
def test_recurrent_attention_and_convolutional_layers(layer, format_name, tmp_path):
    path, tolerance = tmp_path / FORMATS[format_name][0], FORMATS[format_name][1]
    ens = ensemble_of(sequence_model(layer))
    ens.export(path, format_name)
    x = np.random.default_rng(2).normal(size=(3, 5, 4)).astype("float32")
    actual = run(format_name, path, {"series": x})["answer"]
    np.testing.assert_allclose(actual, ens.predict(x, verbose=0), atol=tolerance)


@pytest.mark.parametrize(
    "layer",
    [
        layers.GRU(4, unroll=True),
        lambda x: layers.MultiHeadAttention(2, 3)(x, x),
        layers.Conv1D(4, 3, padding="same", activation="relu"),
    ],
    ids=["unrolled gru", "attention", "convolution"],
)
@pytest.mark.slow
def test_layers_that_litert_supports(layer, tmp_path):
    ens = ensemble_of(sequence_model(layer))
    ens.export(tmp_path / "served.tflite", "litert")
    x = np.random.default_rng(2).normal(size=(3, 5, 4)).astype("float32")
    actual = run("litert", tmp_path / "served.tflite", {"series": x})["answer"]
    np.testing.assert_allclose(actual, ens.predict(x, verbose=0), atol=1e-4)


@pytest.mark.slow
def test_a_recurrent_layer_that_litert_does_not_support_is_an_error_with_advice(tmp_path):
    pytest.importorskip("ai_edge_litert")
    with pytest.raises(ValueError, match="make it with `unroll=True`, or export a SavedModel"):
        ensemble_of(sequence_model(layers.GRU(4))).export(tmp_path / "served.tflite", "litert")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.sampled(2)
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy, tmp_path):
    inputs = keras.Input((4,), name="features")
    hidden = layers.Dense(6, "tanh", dtype=policy)(inputs)
    model = keras.Model(inputs, layers.Dense(3, "softmax", dtype="float32", name="answer")(hidden))
    model.compile("sgd", "sparse_categorical_crossentropy")
    ens = ensemble_of(model)
    ens.export(tmp_path / "served")
    x = np.random.default_rng(2).normal(size=(3, 4)).astype("float32")
    actual = run("tf_saved_model", tmp_path / "served", {"features": x})["answer"]
    np.testing.assert_allclose(actual, ens.predict(x, verbose=0), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lookup", "vectorization"])
def test_string_inputs(kind, tmp_path):
    words = np.array([["red green"], ["blue never"], ["green green"]], dtype=object)
    inputs = keras.Input((1,), dtype="string", name="words")
    if kind == "lookup":
        preprocess = layers.StringLookup()
        preprocess.adapt(words[:2])
        ids = preprocess(inputs)
    else:
        preprocess = layers.TextVectorization(output_sequence_length=3)
        preprocess.adapt(words[:2])
        ids = preprocess(inputs)
    embedded = layers.Flatten()(layers.Embedding(9, 3)(ids))
    model = keras.Model(inputs, layers.Dense(3, "softmax", name="answer")(embedded))
    model.compile("sgd", "sparse_categorical_crossentropy")
    ens = ensemble_of(model)
    ens.export(tmp_path / "served")
    batch = tf.constant(words)
    actual = run("tf_saved_model", tmp_path / "served", {"words": batch})["answer"]
    np.testing.assert_allclose(actual, ens.predict(batch, verbose=0), atol=1e-5)


class Subclassed(keras.Model):
    def __init__(self, size):
        super().__init__()
        self.norm = layers.BatchNormalization()
        self.head = layers.Dense(3, "softmax")
        self.drop = layers.Dropout(0.5)

    def call(self, inputs):
        return self.head(self.drop(self.norm(inputs)))


@pytest.mark.slow
@pytest.mark.parametrize("combine", ["mean", "vote"])
def test_a_subclass_that_cannot_be_cloned_exports_too(combine, tmp_path):
    model = Subclassed(object())  # An argument that no config can store.
    model(np.zeros((1, 4), "float32"))
    model.compile("sgd", "sparse_categorical_crossentropy")
    ens = ensemble_of(model)
    ens.export(tmp_path / "served", combine=combine)
    x = np.random.default_rng(2).normal(size=(3, 4)).astype("float32")
    (actual,) = run("tf_saved_model", tmp_path / "served", {"inputs": x}).values()
    np.testing.assert_allclose(actual, ens.predict(x, combine=combine, verbose=0), atol=1e-5)


def exact_gelu():
    inputs = keras.Input((4,), name="features")
    hidden = keras.ops.gelu(inputs, approximate=False)
    model = keras.Model(inputs, layers.Dense(3, "softmax")(hidden))
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


@pytest.mark.parametrize("runtime", ["installed", "not installed"])
def test_an_operator_that_onnx_does_not_have_is_an_error_with_advice(
    runtime, tmp_path, monkeypatch
):
    if runtime == "not installed":  # Then only the checker of `onnx` is used.
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda n: None if n == "onnxruntime" else find_spec(n)
        )
    logging.getLogger("tf2onnx").setLevel(logging.CRITICAL)  # It logs the unknown operator.
    with pytest.raises(ValueError, match="approximate=True"):
        ensemble_of(exact_gelu()).export(tmp_path / "served.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_other_outputs_is_an_error(tmp_path, monkeypatch):
    def wrong(path, inputs):
        return {"answer": np.full((2, 3), 1 / 3, "float32")}

    monkeypatch.setitem(RUNTIMES, "tf_saved_model", wrong)
    with pytest.raises(
        ValueError, match="The exported file and the ensemble disagree on output 'an"
    ):
        ensemble_of(dense()).export(tmp_path / "served")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verbose", [False, True])
def test_tensorflow_logs_where_it_writes_only_if_verbose(verbose, tmp_path, monkeypatch):
    logger, messages = tf.get_logger(), []
    monkeypatch.setattr(logger, "handlers", [logging.Handler()])
    monkeypatch.setattr(
        logger.handlers[0], "emit", lambda record: messages.append(record.getMessage())
    )
    monkeypatch.setattr(logger, "level", logging.INFO)
    ensemble_of(dense()).export(tmp_path / "served", verbose=verbose)
    assert any("Assets written" in message for message in messages) is verbose
    assert logger.level == logging.INFO


@pytest.mark.slow
def test_only_an_earlier_export_is_replaced_and_only_with_overwrite(format):
    name, path, _ = format
    path.write_text("somebody's")
    ens = ensemble_of(dense())
    with pytest.raises(ValueError, match="The path already exists. Received: filepa"):
        ens.export(path, name)
    with pytest.raises(ValueError, match="`overwrite=True` replaces only an earlier export"):
        ens.export(path, name, overwrite=True)
    assert path.read_text() == "somebody's"
    path.unlink()
    ens.export(path, name)
    with pytest.raises(ValueError, match="The path already exists. Received: filepa"):
        ens.export(path, name)
    other = ensemble_of(dense(units=4))
    other.export(path, name, overwrite=True)
    x = np.zeros((1, 4), "float32")
    actual = run(name, path, {"features": x})["answer"]
    np.testing.assert_allclose(actual, other.predict(x, verbose=0), atol=1e-4)
    remaining = {path.name} | ({"served.bin"} if name == "openvino" else set())
    assert {entry.name for entry in path.parent.iterdir()} == remaining


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("no space left"), "cannot be exported as 'tf_saved_model': no space left"),
        (KeyboardInterrupt(), None),
    ],
)
def test_a_failed_export_keeps_existing_files(error, message, tmp_path, monkeypatch):
    ens = ensemble_of(dense())
    ens.export(tmp_path / "served")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def broken(model, path, **arguments):
        pathlib.Path(path).write_text("half of an export")
        raise error

    monkeypatch.setattr(keras.Model, "export", broken)
    with pytest.raises((ValueError, KeyboardInterrupt), match=message):
        ens.export(tmp_path / "served", overwrite=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("name", "format_name", "message"),
    [
        ("served", "pickle", "`format` must be one of ('tf_saved_model', 'onnx', 'litert', 'open"),
        ("served", "onnx", "A file of format 'onnx' must end with '.onnx'. Received: filepath="),
        ("served.bin", "litert", "A file of format 'litert' must end with '.tflite'. Received: "),
    ],
)
def test_formats_and_endings_are_checked_first(name, format_name, message, tmp_path):
    with pytest.raises(ValueError) as caught:
        ensemble_of(dense()).export(tmp_path / name, format_name)
    assert message in str(caught.value)


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    find_spec = exporting.importlib.util.find_spec
    monkeypatch.setattr(
        exporting.importlib.util, "find_spec", lambda n: None if n == "tf2onnx" else find_spec(n)
    )
    with pytest.raises(ImportError, match="needs the package tf2onnx. Received: format='onnx'"):
        ensemble_of(dense()).export(tmp_path / "served.onnx", "onnx")


def test_without_members_there_is_nothing_to_export(model, tmp_path):
    with pytest.raises(ValueError, match="The ensemble has no members yet"):
        SnapshotEnsemble(model).export(tmp_path / "served")
    assert list(tmp_path.iterdir()) == []
