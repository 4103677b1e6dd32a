"""Calls that members share are told apart by everything that they are given."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import assert_close, compiled, ensemble_of

from snapshot_ensemble.inference.members_model import identity

layers = keras.layers
WIDTH = 2000
RNG = np.random.default_rng(0)


def in_the_middle(dtype):
    """Two arrays that look alike when they are printed."""
    first = np.zeros((1, WIDTH), dtype)
    second = first.copy()
    second[0, WIDTH // 2 : WIDTH // 2 + 9] = 9
    return first, second


@keras.saving.register_keras_serializable("test_shared_calls")
class Line(layers.Layer):
    def call(self, x, slope=1.0, shift=0.0, table=None):
        return x * slope + shift + (0 if table is None else keras.ops.cast(table, x.dtype))


def added(x, convert):
    add = layers.Add()
    return [add([x, convert(constant)]) for constant in in_the_middle("float32")]


def in_keywords(x, convert):
    line = Line()
    return [line(x, table=convert(constant)) for constant in in_the_middle("int32")]


def of_two_shapes(x, convert):
    line = Line()
    numbers = np.arange(WIDTH, dtype="float32") / WIDTH
    halves = numbers.reshape(2, 1, WIDTH // 2)
    short = x[:, : WIDTH // 2]
    outputs = [line(short, table=convert(half)) for half in halves]
    return [layers.Concatenate()(outputs), line(x, table=convert(numbers))]


def by_another_name(x, convert):
    line = Line()
    return [line(x, slope=2.0), line(x, shift=2.0)]


CONVERT = {"numpy": lambda array: array, "tensorflow": tf.constant}


@pytest.mark.sampled(6, 2)
@pytest.mark.parametrize("kind", CONVERT)
@pytest.mark.parametrize(
    "calls", [added, in_keywords, of_two_shapes, by_another_name], ids=lambda calls: calls.__name__
)
def test_two_calls_of_one_layer_with_other_constants(calls, kind):
    inputs = keras.Input((WIDTH,))
    # What comes of shared weights is computed once for all members.
    shared = layers.BatchNormalization(name="shared")(inputs)
    both = layers.Concatenate()(calls(shared, CONVERT[kind]))
    model = compiled(keras.Model(inputs, layers.Dense(3, "softmax")(both)))
    ens = ensemble_of(model, shared=lambda variable: "shared" in variable.path)
    x = RNG.normal(size=(5, WIDTH)).astype("float32")
    outputs = []
    for member in ens:
        model.set_weights(member.get_weights())
        outputs.append(model.predict(x, verbose=0))
    expected = np.mean(np.asarray(outputs, "float64"), axis=0)
    assert_close(ens.predict(x, verbose=0), expected)
    assert_close(ens.to_keras().predict(x, verbose=0), expected)


FIRST, SECOND = in_the_middle("float32")
VARIABLES = [keras.Variable(array, name="table") for array in (FIRST, SECOND)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (FIRST, SECOND),
        (FIRST, FIRST.astype("int32")),
        (FIRST, FIRST.reshape(-1, 1)),
        (np.float32(0.1), np.float64(0.1)),
        (np.float32(0.0), np.float32(-0.0)),
        tuple(VARIABLES),
        (tf.constant(FIRST), tf.constant(SECOND)),
        (tf.ragged.constant([[1]]), tf.ragged.constant([[2]])),
        (True, 1),
        (1, 1.0),
        (0.0, -0.0),
        ("1", 1),
        (None, "None"),
        ((1, [2]), (1, 2)),
        ([1], (1,)),
        ([], ()),
        ({"slope": []}, {}),
        (FIRST, np.ma.masked_array(FIRST)),
        ({"slope": 2.0}, {"shift": 2.0}),
    ],
)
def test_different_arguments_have_different_identities(one, other):
    assert identity((one,)) != identity((other,))


def test_equal_arguments_have_the_same_identity():
    for argument in (FIRST, np.float32(0.1), 0.1, True, None, "a", {"a": [1, FIRST]}):
        again = keras.tree.map_structure(
            lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, argument
        )
        assert identity((argument,)) == identity((again,))
