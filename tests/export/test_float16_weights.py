"""`export(weights="float16")`: half the size, and the outputs of weights rounded by hand."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import TASKS, dense, ensemble_of, ensemble_with, member_weights, with_backbone

from snapshot_ensemble.export.runtimes import RUNTIMES

layers = keras.layers
pytestmark = pytest.mark.filterwarnings(
    "ignore:In the future `np.object`:FutureWarning",
    "ignore:.*:DeprecationWarning:google.protobuf",
)
FILES = {"tf_saved_model": "served", "litert": "served.tflite", "openvino": "served.xml"}
RUN_BY_DEFAULT = ("tf_saved_model",)


@pytest.fixture(
    params=[
        pytest.param(name, marks=() if name in RUN_BY_DEFAULT else pytest.mark.slow)
        for name in FILES
    ]
)
def format(request):
    return request.param


def run(format, path, batch):
    (output,) = RUNTIMES[format](path, lambda names: {names[0]: batch}).values()
    return output


def size(path):
    """The bytes of a file or folder, and of what lies beside a file under its name."""
    found = path.rglob("*") if path.is_dir() else path.parent.glob(f"{path.stem}.*")
    return sum(file.stat().st_size for file in found if file.is_file())


def rounded(members, least=2):
    """Members whose kernels have been through float16."""
    return [
        [
            array.astype("float16").astype(array.dtype)
            if array.ndim >= least and array.dtype in ("float32", "float64")
            else array
            for array in weights
        ]
        for weights in members
    ]


def wide(dtype="float32", units=300):
    inputs = keras.Input((40,), dtype=dtype)
    hidden = layers.Dense(units, "relu", dtype=dtype)(inputs)
    hidden = layers.Dense(units, "relu", dtype=dtype)(hidden)
    model = keras.Model(inputs, layers.Dense(3, "softmax", dtype=dtype)(hidden))
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


def batch_of(model, rows=16):
    shape = (rows, *model.inputs[0].shape[1:])
    return np.random.default_rng(3).normal(size=shape).astype(model.inputs[0].dtype)


@pytest.mark.slow
def test_the_file_has_half_the_size_and_the_outputs_of_rounded_weights(format, tmp_path):
    ens = ensemble_of(wide(), 2)
    batch = batch_of(ens.model)
    for weights, folder in ((None, "full"), ("float16", "half")):
        (tmp_path / folder).mkdir()
        ens.export(tmp_path / folder / FILES[format], format, weights=weights, x=batch)
    share = size(tmp_path / "half" / FILES[format]) / size(tmp_path / "full" / FILES[format])
    assert 0.45 < share < 0.55
    reference = ensemble_with(wide(), *rounded(member_weights(ens))).predict(batch, verbose=0)
    actual = run(format, tmp_path / "half" / FILES[format], batch)
    # The converters round vectors, too.
    tolerance = 1e-6 if format == "tf_saved_model" else 1e-3
    np.testing.assert_allclose(actual, reference, atol=tolerance)


@pytest.mark.sampled(6, 2)
@pytest.mark.parametrize("task", TASKS)
def test_each_task(task, tmp_path, capsys):
    ens = ensemble_of(dense(*TASKS[task]), 3)
    batch = batch_of(ens.model)
    ens.export(tmp_path / "served", weights="float16", x=batch)
    reference = ensemble_with(dense(*TASKS[task]), *rounded(member_weights(ens)))
    expected = reference.predict(batch, verbose=0)
    actual = run("tf_saved_model", tmp_path / "served", batch)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    own = ens.predict(batch, verbose=0)
    assert not np.array_equal(actual, own)
    printed = capsys.readouterr().out
    largest = float(np.abs(actual - own).max())
    assert f"Weights in float16 change the outputs by at most {largest:.2g}" in printed
    items = {"regression": None, "multilabel": 16 * 3}.get(task, 16)
    assert (f"the class in 0 of {items} predictions" in printed) == (items is not None)


@pytest.mark.sampled(3, 2)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "mixed_bfloat16"])
def test_each_dtype(dtype, tmp_path):
    model = wide(dtype, units=30) if dtype == "float64" else wide_policy(dtype)
    ens = ensemble_of(model, 2)
    batch = batch_of(model)
    ens.export(tmp_path / "served", weights="float16", x=batch, verbose=False)
    variables = tf.saved_model.load(str(tmp_path / "served")).variables
    dtypes = {variable.dtype.name for variable in variables if variable.shape.rank == 2}
    # What has 16 bits already stays.
    assert dtypes == ({"bfloat16"} if dtype == "bfloat16" else {"float16"})
    expected = ensemble_with(model, *rounded(member_weights(ens))).predict(batch, verbose=0)
    actual = run("tf_saved_model", tmp_path / "served", batch)
    assert actual.dtype == expected.dtype
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def wide_policy(policy):
    inputs = keras.Input((40,))
    hidden = layers.Dense(30, "relu", dtype=policy)(inputs)
    model = keras.Model(inputs, layers.Dense(3, "softmax", dtype=policy)(hidden))
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


@pytest.mark.slow
def test_what_members_share_is_stored_once(tmp_path):
    model, in_backbone = with_backbone(nested=True)
    ens = ensemble_of(model, 3, shared=in_backbone)
    ens.export(tmp_path / "served", weights="float16", verbose=False)
    variables = tf.saved_model.load(str(tmp_path / "served")).variables
    backbone = sum(map(in_backbone, model.weights))
    assert len(variables) == backbone + 3 * (len(model.weights) - backbone)


def scaled(*kernel):
    """A linear model of one unit with this kernel."""
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1, use_bias=False)])
    model.compile("sgd", "mse")
    return ensemble_with(model, [np.reshape(kernel, (2, 1))])


def test_values_beyond_the_range_of_float16_stay_as_they_are(tmp_path):
    scaled(1e5, -3.3e5).export(tmp_path / "served", weights="float16")
    actual = run("tf_saved_model", tmp_path / "served", np.eye(2, dtype="float32"))
    np.testing.assert_array_equal(actual, np.float32([[1e5], [-3.3e5]]))


def test_a_file_that_loses_too_much_is_refused(tmp_path):
    ens = scaled(2049, -2048)  # float16 has 2048 and 2050.
    ones = np.ones((1, 2), "float32")
    message = r"by at most 1\. That is more than 1% of the largest output.*weights=None"
    with pytest.raises(ValueError, match=message):
        ens.export(tmp_path / "served", weights="float16", x=ones)
    assert not (tmp_path / "served").exists()
    ens.export(tmp_path / "served", x=ones)


def test_a_changed_class_is_counted(tmp_path, capsys):
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2, "softmax", use_bias=False)])
    model.compile("sgd", "sparse_categorical_crossentropy")
    # In float16 both columns are equal.
    ens = ensemble_with(model, [np.float32([[1, 1.0001], [2, 2]])])
    ens.export(tmp_path / "served", weights="float16", x=np.float32([[1, 0], [0, 1], [-1, 0]]))
    assert "the class in 1 of 3 predictions" in capsys.readouterr().out
    ens.export(tmp_path / "quiet", weights="float16", verbose=False)
    assert "float16" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "format", "arguments", "message"),
    [
        ("served", "tf_saved_model", {"weights": "int8"}, "must be 'float16' or None.*'int8'"),
        ("served.onnx", "onnx", {"weights": "float16"}, "make the computation float16.*'onnx'"),
        (
            "served.tflite",
            "litert",
            {"weights": "float16", "optimizations": [tf.lite.Optimize.DEFAULT]},
            "converter quantizes.*optimizations.*Leave out one",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(name, format, arguments, message, tmp_path):
    ens = ensemble_of(dense(*TASKS["softmax"]), 2)
    with pytest.raises(ValueError, match=message):
        ens.export(tmp_path / name, format, **arguments)
    assert not list(tmp_path.iterdir())
