"""The meaning of an output, inferred from the loss, the last activation and the shape."""

import functools

import keras
import pytest
from keras import ops
from keras.layers import (
    Activation,
    Conv2D,
    Dense,
    Dropout,
    Flatten,
    Identity,
    Permute,
    Reshape,
    Softmax,
    TimeDistributed,
)
from models import MULTICLASS, MULTICLASS_LOGITS
from output_cases import custom_loss, ending_in, meaning

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.inference.task_words import Output

CATEGORICAL = [
    "categorical_crossentropy",
    "sparse_categorical_crossentropy",
    "categorical_focal_crossentropy",
]
BINARY = ["binary_crossentropy", "binary_focal_crossentropy"]
REGRESSION = [
    "mean_squared_error",
    "mean_absolute_error",
    "mean_absolute_percentage_error",
    "mean_squared_logarithmic_error",
    "huber",
    "log_cosh",
    "poisson",
    "cosine_similarity",
]
CLASS_NAMES = {name: name.title().replace("_", "") for name in CATEGORICAL + BINARY + REGRESSION}


def loss_in_form(name, form):
    """A Keras loss in one of the forms that `compile` accepts."""
    function, kind = getattr(keras.losses, name), getattr(keras.losses, CLASS_NAMES[name])
    forms = {
        "string": name,
        "class name": CLASS_NAMES[name],
        "function": function,
        "class": kind,
        "object": kind(),
        "partial": functools.partial(function),
    }
    return forms[form]


FORMS = ["string", "class name", "function", "class", "object", "partial"]


# The loss


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CATEGORICAL)
def test_categorical_losses_are_multiclass(name, form):
    assert meaning(Dense(3), loss_in_form(name, form)) == MULTICLASS


@pytest.mark.parametrize("units", [1, 3])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BINARY)
def test_binary_losses_are_binary_or_multilabel_by_units(name, form, units):
    task = "binary" if units == 1 else "multilabel"
    assert meaning(Dense(units), loss_in_form(name, form)) == Output(task)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", REGRESSION)
def test_distance_losses_are_regression(name, form):
    assert meaning(Dense(2), loss_in_form(name, form)) == Output("regression")


@pytest.mark.parametrize(
    ("loss", "task"),
    [
        ("mse", "regression"),
        ("MSE", "regression"),
        ("mae", "regression"),
        ("mape", "regression"),
        ("msle", "regression"),
        ("bce", "binary"),
    ],
)
def test_short_names_of_losses(loss, task):
    assert meaning(Dense(1), loss).task == task


@pytest.mark.parametrize("form", ["object", "partial"])
@pytest.mark.parametrize("name", CATEGORICAL + BINARY)
def test_losses_from_logits(name, form):
    if form == "object":
        loss = getattr(keras.losses, CLASS_NAMES[name])(from_logits=True)
    else:
        loss = functools.partial(getattr(keras.losses, name), from_logits=True)
    actual = meaning(Dense(3), loss)
    assert actual.task == ("multilabel" if name in BINARY else "multiclass")
    assert actual.logits is True


@pytest.mark.parametrize("from_logits", [False, True])
def test_the_outer_partial_takes_precedence(from_logits):
    inner = functools.partial(
        keras.losses.sparse_categorical_crossentropy, from_logits=not from_logits
    )
    outer = functools.partial(inner, from_logits=from_logits)
    assert meaning(Dense(3), outer) == Output("multiclass", from_logits)


@pytest.mark.parametrize("from_logits", [False, True])
def test_a_subclass_of_a_loss_is_recognised(from_logits):
    class Smoothed(keras.losses.SparseCategoricalCrossentropy):
        pass

    loss = Smoothed(from_logits=from_logits)
    assert meaning(Dense(3), loss) == Output("multiclass", from_logits)


def test_other_arguments_of_a_loss_do_not_matter():
    loss = keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=0.1, reduction="sum")
    assert meaning(Dense(1), loss) == Output("binary", logits=True)


# The last activation, with a custom loss, which implies no task


def softmax_layer(x):
    return Softmax()(Dense(3)(x))


SOFTMAXES = {
    "Dense by name": Dense(3, "softmax"),
    "Dense by function": Dense(3, keras.activations.softmax),
    "Activation by name": lambda x: Activation("softmax")(Dense(3)(x)),
    "Activation by function": lambda x: Activation(keras.activations.softmax)(Dense(3)(x)),
    "float32 Activation": lambda x: Activation("softmax", dtype="float32")(Dense(3)(x)),
    "Softmax layer": softmax_layer,
    "keras.ops": lambda x: ops.softmax(Dense(3)(x)),
    "Reshape": lambda x: Reshape((1, 3))(softmax_layer(x)),
    "Flatten": lambda x: Flatten()(Dense(3, "softmax")(x)),
    "Permute": lambda x: Permute((2, 1))(Dense(3, "softmax")(Reshape((4, 1))(x))),
    "Dropout": lambda x: Dropout(0.5)(Dense(3, "softmax")(x)),
    "Identity": lambda x: Identity()(Dense(3, "softmax")(x)),
    "many in a row": lambda x: Identity()(Flatten()(Reshape((1, 3))(ops.softmax(Dense(3)(x))))),
    "nested Sequential": keras.Sequential([keras.Input((4,)), Dense(3, "softmax")]),
    "Sequential with layers behind": keras.Sequential(
        [keras.Input((4,)), Dense(3), Softmax(), Reshape((3, 1)), Flatten()]
    ),
    "nested twice": keras.Sequential(
        [keras.Input((4,)), keras.Sequential([keras.Input((4,)), Dense(3), Softmax()])]
    ),
    "layers behind a nested model": lambda x: Reshape((1, 3))(
        keras.Sequential([keras.Input((4,)), Dense(3, "softmax")])(x)
    ),
}


@pytest.mark.parametrize("last", SOFTMAXES.values(), ids=SOFTMAXES.keys())
def test_softmax_is_multiclass(last):
    assert meaning(last, custom_loss) == MULTICLASS


@pytest.mark.parametrize("last", SOFTMAXES.values(), ids=SOFTMAXES.keys())
def test_softmax_overrides_from_logits(last):
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    assert meaning(last, loss) == MULTICLASS


SIGMOIDS = {
    "Dense by name": lambda units: Dense(units, "sigmoid"),
    "Dense by function": lambda units: Dense(units, keras.activations.sigmoid),
    "Activation layer": lambda units: lambda x: Activation("sigmoid")(Dense(units)(x)),
    "keras.ops": lambda units: lambda x: ops.sigmoid(Dense(units)(x)),
    "Reshape": lambda units: lambda x: Reshape((1, units))(Dense(units, "sigmoid")(x)),
    "nested": lambda units: keras.Sequential([keras.Input((4,)), Dense(units, "sigmoid")]),
}


@pytest.mark.parametrize("units", [1, 3])
@pytest.mark.parametrize("last", SIGMOIDS.values(), ids=SIGMOIDS.keys())
def test_sigmoid_is_binary_or_multilabel_by_units(last, units):
    task = "binary" if units == 1 else "multilabel"
    assert meaning(last(units), custom_loss) == Output(task)


@pytest.mark.parametrize("last", SIGMOIDS.values(), ids=SIGMOIDS.keys())
def test_sigmoid_overrides_from_logits(last):
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    assert meaning(last(1), loss) == Output("binary")


def test_the_right_output_of_a_nested_functional_model_is_used():
    inputs = keras.Input((4,))
    nested = keras.Model(inputs, [Dense(2)(inputs), Dense(3, "softmax")(inputs)])
    assert meaning(lambda x: nested(x)[1], custom_loss) == MULTICLASS
    with pytest.raises(ValueError, match="last activation 'linear'"):
        meaning(lambda x: nested(x)[0], custom_loss)


def test_the_right_call_of_a_shared_layer_is_used():
    shared = Flatten()
    other = keras.Input((2, 2))
    shared(other)
    assert meaning(lambda x: shared(Dense(3, "softmax")(x)), custom_loss) == MULTICLASS


def test_only_the_last_activation_counts():
    actual = meaning(lambda x: Dense(1)(Dense(3, "softmax")(x)), "mse")
    assert actual == Output("regression")
    with pytest.raises(ValueError, match="last activation 'linear'"):
        meaning(lambda x: Dense(1)(Dense(3, "softmax")(x)), custom_loss)


@pytest.mark.parametrize(
    ("activation", "loss", "expected"),
    [
        ("softmax", "binary_crossentropy", MULTICLASS),
        ("softmax", "mse", MULTICLASS),
        ("softmax", "kl_divergence", MULTICLASS),
        ("sigmoid", "categorical_crossentropy", MULTICLASS),
        ("sigmoid", "mse", Output("regression")),
        ("sigmoid", "hinge", Output("multilabel")),
        ("relu", "mse", Output("regression")),
        ("exponential", "poisson", Output("regression")),
        ("tanh", "cosine_similarity", Output("regression")),
    ],
)
def test_loss_and_activation_together(activation, loss, expected):
    assert meaning(Dense(3, activation), loss) == expected


@pytest.mark.parametrize(
    "last",
    [
        Dense(3, "log_softmax"),
        lambda x: Activation("log_softmax")(Dense(3)(x)),
        lambda x: ops.log_softmax(Dense(3)(x)),
    ],
)
def test_log_probabilities_are_logits(last):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    assert meaning(last, loss) == MULTICLASS_LOGITS


@pytest.mark.parametrize("activation", ["linear", "log_softmax"])
def test_logits_are_inferred_from_the_activation_for_an_explicit_task(activation):
    assert meaning(Dense(3, activation), custom_loss, "multiclass") == MULTICLASS_LOGITS


# Shapes


@pytest.mark.parametrize(
    ("units", "activation", "loss", "expected"),
    [
        (3, "softmax", "sparse_categorical_crossentropy", MULTICLASS),
        (3, "softmax", custom_loss, MULTICLASS),
        (1, "sigmoid", "binary_crossentropy", Output("binary")),
        (3, "sigmoid", "binary_crossentropy", Output("multilabel")),
        (1, None, "mse", Output("regression")),
    ],
)
def test_sequences_and_images_have_classes_on_the_last_axis(units, activation, loss, expected):
    assert meaning(Dense(units, activation), loss, shape=(5, 2)) == expected
    convolution = Conv2D(units, 3, padding="same", activation=activation)
    assert meaning(convolution, loss, shape=(8, 8, 1)) == expected


def test_time_distributed_outputs_follow_the_loss():
    layer = TimeDistributed(Dense(3, "softmax"))
    assert meaning(layer, "sparse_categorical_crossentropy", shape=(5, 2)) == MULTICLASS


def test_one_number_per_row_without_an_axis_is_binary():
    assert meaning(lambda x: Dense(1, "sigmoid")(x)[:, 0], "binary_crossentropy") == Output(
        "binary"
    )


def test_classes_on_another_axis_are_refused():
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, axis=1)
    with pytest.raises(ValueError, match="axis"):
        SnapshotEnsemble(ending_in(Dense(2), loss, shape=(3, 4)))
