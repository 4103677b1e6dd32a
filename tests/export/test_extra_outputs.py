"""Uncertainty, sets and intervals as outputs of exported files, in the runtimes that serve them."""

import keras
import numpy as np
import pytest
from keras import layers
from models import dense, eager, ensemble_of, one_batch

from snapshot_ensemble.export.runtimes import RUNTIMES
from snapshot_ensemble.losses import GaussianNLL

pytestmark = pytest.mark.filterwarnings(
    # Warnings of TensorFlow and its converters.
    "ignore:In the future `np.object`:FutureWarning",
    "ignore:.*:DeprecationWarning:google.protobuf",
)
RNG = np.random.default_rng(9)
X = RNG.normal(size=(40, 4)).astype("float32")
FILES = {
    "tf_saved_model": "served",
    "openvino": "served.xml",
    "onnx": "served.onnx",
    "litert": "served.tflite",
}
EACH_FORMAT = [
    pytest.param(name, marks=() if name == "tf_saved_model" else pytest.mark.slow) for name in FILES
]
RUN = {"verbose": 0}


def three_heads():
    inputs = keras.Input((4,), name="x")
    hidden = layers.Dense(6, "tanh")(inputs)
    outputs = [
        layers.Dense(3, "softmax", name="kind")(hidden),
        layers.Dense(2, name="size")(hidden),
        layers.Dense(4, name="noisy")(hidden),
    ]
    loss = ["sparse_categorical_crossentropy", "mse", GaussianNLL()]
    return eager(keras.Model(inputs, outputs), loss)


TARGETS = [RNG.integers(0, 3, 40), RNG.normal(size=(40, 2)), RNG.normal(size=(40, 2))]


def served(ens, tmp_path, format, x=X, **arguments):
    path = tmp_path / FILES[format]
    ens.export(path, format, x=x, **arguments)
    found = RUNTIMES[format](path, lambda names: dict.fromkeys(names, x))
    return {name: np.asarray(value) for name, value in found.items()}


@pytest.mark.parametrize("format", EACH_FORMAT)
def test_a_file_gives_what_the_ensemble_gives(format, tmp_path):
    ens = ensemble_of(three_heads(), 3)
    data = one_batch(X)
    ens.temperature = 1.5
    methods = ["raps", "epistemic", None]
    ens.conformalize(X, TARGETS, confidence_level=[0.7, 0.9], method=methods, **RUN)
    names = ("prediction", "total", "aleatoric", "epistemic", "std", "set", "interval")
    actual = served(ens, tmp_path, format, outputs=names)
    expected = dict(zip(("kind", "size", "noisy"), ens.predict(data, **RUN), strict=True))
    for name, parts in zip(list(expected), ens.predict_uncertainty(data, **RUN), strict=True):
        expected |= {f"{name}_{part}": value for part, value in parts.items() if part != "mean"}
    expected["kind_set"] = ens.predict_set(data, **RUN)[0]
    lower, upper = ens.predict_interval(data, **RUN)
    for i, name in ((1, "size"), (2, "noisy")):
        expected |= {f"{name}_lower": lower[i], f"{name}_upper": upper[i]}
    assert actual.keys() >= expected.keys()  # OpenVINO knows some by other names, too.
    assert actual["kind_set"].dtype == bool
    for name, value in expected.items():
        assert actual[name].shape == value.shape
        np.testing.assert_allclose(actual[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("structure", ["one", "dict"])
def test_other_structures_and_without_the_prediction(structure, tmp_path):
    model = dense(keras.losses.SparseCategoricalCrossentropy(from_logits=True), 3, None)
    if structure == "dict":
        inputs = keras.Input((4,), name="x")
        model = keras.Model(inputs, {"answer": layers.Dense(3, "softmax")(inputs)})
        model.compile("sgd", {"answer": "sparse_categorical_crossentropy"})
    ens = ensemble_of(model, 3)
    actual = served(ens, tmp_path, "tf_saved_model", outputs=["epistemic"], members=2)
    assert list(actual) == ["answer_epistemic"]
    found = ens.predict_uncertainty(X, members=2, **RUN)
    found = found["answer"] if structure == "dict" else found
    np.testing.assert_allclose(actual["answer_epistemic"], found["epistemic"], atol=1e-5)


def test_pixels_and_labels(tmp_path):
    images = RNG.normal(size=(30, 3, 2, 2)).astype("float32")
    y = RNG.integers(0, 2, (30, 3, 2, 3))
    inputs = keras.Input((3, 2, 2), name="x")
    model = keras.Model(inputs, layers.Conv2D(3, 1, activation="sigmoid", name="mask")(inputs))
    ens = ensemble_of(eager(model, "binary_crossentropy"), 2)
    ens.conformalize(one_batch(images, y), confidence_level=0.8, method="aps", **RUN)
    actual = served(ens, tmp_path, "tf_saved_model", images, outputs=("set", "total"))
    sets = ens.predict_set(one_batch(images), **RUN)
    assert sets.shape == (30, 3, 2, 3, 2)
    np.testing.assert_array_equal(actual["mask_set"], sets)


@pytest.mark.slow
def test_float16_weights_may_change_a_few_sets(tmp_path):
    ens = ensemble_of(dense(), 3)
    ens.conformalize(X, TARGETS[0], **RUN)
    arguments = {"outputs": ("prediction", "set"), "weights": "float16", "verbose": False}
    actual = served(ens, tmp_path, "tf_saved_model", **arguments)
    assert actual["answer_set"].shape == (40, 3)


# Refusals


def check_refused(message, ens, tmp_path, **arguments):
    with pytest.raises(ValueError) as caught:
        ens.export(tmp_path / "served", **arguments)
    assert message in str(caught.value)
    assert not (tmp_path / "served").exists()


def test_refusals(tmp_path):
    ens = ensemble_of(dense(), 3)
    for outputs in ((), "sets", ("total", "total"), ("prediction", "mean")):
        check_refused("`outputs` must be some of ('prediction',", ens, tmp_path, outputs=outputs)
    check_refused("`predict_set` needs quantiles", ens, tmp_path, outputs="set")
    check_refused("No output of the model has 'std'", ens, tmp_path, outputs="std")
    ens.conformalize(X, TARGETS[0], members=2, **RUN)
    check_refused("`predict_interval` is for values", ens, tmp_path, outputs="interval")
    message = (
        "Received: combine='mean' of members [0, 1, 2], where that was 'mean' of members [1, 2]"
    )
    check_refused(message, ens, tmp_path, outputs="set")
    ens.fit_early_exit(X, TARGETS[0], tolerance=3.0, **RUN)
    message = "their disagreement is not known. Received: outputs=('total',)"
    check_refused(message, ens, tmp_path, outputs="total", early_exit=True)


def test_names_must_differ(tmp_path):
    inputs = keras.Input((4,))
    outputs = [layers.Dense(3, "softmax", name=name)(inputs) for name in ("kind", "kind_total")]
    model = keras.Model(inputs, outputs)
    model.compile("sgd", ["sparse_categorical_crossentropy"] * 2)
    ens = ensemble_of(model, 2)
    check_refused("Two outputs would have the name 'kind_total'", ens, tmp_path, outputs="total")
