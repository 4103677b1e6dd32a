"""Every loss that Keras has, in every form and structure that `compile` takes."""

import functools
import inspect

import keras
import numpy as np
import pytest
from keras import layers
from keras.src.losses import ALL_OBJECTS, ALL_OBJECTS_DICT
from models import assert_close, ensemble_of
from output_cases import ending_in

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.inference.losses import per_output

ROWS = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")
_BASES = ("Loss", "LossFunctionWrapper")
OBJECTS = sorted(ALL_OBJECTS, key=lambda found: found.__name__)  # Keras has them in a set.
KINDS = [kind for kind in OBJECTS if inspect.isclass(kind) and kind.__name__ not in _BASES]
FUNCTIONS = [function for function in OBJECTS if not inspect.isclass(function)]
NAMES = sorted(name for name in ALL_OBJECTS_DICT if name not in _BASES)
FORMS = {
    **{name: ALL_OBJECTS_DICT[name] for name in NAMES},
    "ce": "ce",
    "crossentropy": "crossentropy",
    **{f"by name {name}": name for name in NAMES},
    **{f"made {kind.__name__}": kind() for kind in KINDS},
    **{f"partial {f.__name__}": functools.partial(f) for f in FUNCTIONS},
}


@pytest.mark.sampled(3, 4)
@pytest.mark.parametrize("loss", FORMS.values(), ids=FORMS.keys())
def test_each_is_taken_for_probabilities(loss):
    """`meanings` are read without an error, for a model that ends in a softmax."""
    try:
        ens = SnapshotEnsemble(ending_in(layers.Dense(3, "softmax"), loss))
    except ValueError as error:
        pytest.fail(str(error))
    assert ens.task is None


@pytest.mark.sampled(3, 4)
@pytest.mark.parametrize("loss", FORMS.values(), ids=FORMS.keys())
def test_each_is_taken_with_a_word(loss):
    SnapshotEnsemble(ending_in(layers.Dense(3), loss), task="multiclass_logits")


TARGETS = {
    "SparseCategoricalCrossentropy": np.arange(6) % 3,
    "CTC": np.ones((6, 2), "int32"),
    "Circle": np.arange(6) % 3,
}


@pytest.mark.sampled(6, 2)
@pytest.mark.parametrize("kind", KINDS)
def test_one_members_loss_is_its_models(kind):
    shape = (5, 4) if kind is keras.losses.CTC else (4,)
    model = ending_in(layers.Dense(3, "softmax"), kind(), shape=shape)
    ens = ensemble_of(model, 2)
    x = np.random.default_rng(0).normal(size=(6, *shape)).astype("float32") * 30
    y = TARGETS.get(kind.__name__, np.eye(3)[np.arange(6) % 3])
    expected = ens[1].evaluate(x, y, verbose=0)
    assert_close(ens.evaluate(x, y, members=1, verbose=0), expected, 1e-4)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("units", [1, 3])
@pytest.mark.parametrize("loss", ["ce", "crossentropy"])
def test_a_cross_entropy_by_shape(loss, units):
    ens = ensemble_of(ending_in(layers.Dense(units), loss), 2)
    y = np.arange(6)[:, None] % 2 if units == 1 else np.arange(6) % 3
    task = "binary" if units == 1 else "multiclass"
    assert ens.predict_uncertainty(ROWS, verbose=0).keys() >= {"epistemic"}
    assert ens.report(abs(ROWS), y, verbose=0).bins, task


A, B = object(), object()
STRUCTURES = [
    (A, {"a": 0}, None, [[A]]),
    ({"a": [A]}, 0, ["a"], [[A]]),
    ({"a": [A, B]}, 0, ["a"], [[A, B]]),
    ([A], 0, ["a"], [[A]]),
    ([A, B], 0, ["a"], [[A, B]]),
    (A, [0, 0], ["a", "b"], [[A], [A]]),
    ([A, None], [0, 0], ["a", "b"], [[A], []]),
    ([[A, B], [A]], [0, 0], ["a", "b"], [[A, B], [A]]),
    ({"b": A}, [0, 0], ["a", "b"], [[], [A]]),
    ({"b": [A]}, {"a": 0, "b": 0}, ["a", "b"], [[], [A]]),
    ({"b": A, "a": B}, {"b": 0, "a": 0}, None, [[B], [A]]),
    ({"p": {"a": A, "b": B}, "q": [A]}, {"p": {"a": 0, "b": 0}, "q": 0}, None, [[A], [B], [A]]),
    (None, [0, 0], ["a", "b"], [[], []]),
]


@pytest.mark.parametrize(("given", "outputs", "names", "expected"), STRUCTURES)
def test_structures_of_losses(given, outputs, names, expected):
    assert per_output(given, outputs, names) == expected


@pytest.mark.sampled(2)
@pytest.mark.parametrize("loss", [{"a": ["mse"]}, ["mse"], {"a": "mse"}, [["mse"]]])
def test_losses_in_lists_are_those_that_keras_uses(loss):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2, name="a")(inputs))
    model.compile("sgd", loss)
    ens = ensemble_of(model, 2)
    y = np.ones((6, 2))
    expected = ens[1].evaluate(ROWS, y, verbose=0)
    assert_close(ens.evaluate(ROWS, y, members=1, verbose=0), expected)
