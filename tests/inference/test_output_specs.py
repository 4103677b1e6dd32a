"""What an output means, read off the loss and the last activation."""

import functools

import keras
import numpy as np
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

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.inference.output_specs import TASKS, Output, check_task, read_outputs

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

MULTICLASS = Output("multiclass")
MULTICLASS_LOGITS = Output("multiclass", logits=True)


@pytest.fixture(autouse=True)
def _seeded():
    """Nothing is trained here, and no name of a layer matters."""


def custom_loss(y_true, y_pred):
    return ops.mean(ops.square(y_true - y_pred))


def of_form(name, form):
    """A loss of Keras's in each of the forms that `compile` takes."""
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


def ending_in(last, loss, shape=(4,)):
    """A compiled model whose output is `last` of its input."""
    inputs = keras.Input(shape)
    model = keras.Model(inputs, last(inputs))
    model.compile("sgd", loss)
    return model


def meanings(model, task=None):
    return read_outputs(model, task, model(np.zeros((2, *model.input_shape[1:]), "float32")))


def meaning(last, loss, task=None, shape=(4,)):
    [found] = meanings(ending_in(last, loss, shape), task)
    return found


# The loss


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CATEGORICAL)
def test_categorical_losses_are_multiclass(name, form):
    assert meaning(Dense(3), of_form(name, form)) == MULTICLASS


@pytest.mark.parametrize("units", [1, 3])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BINARY)
def test_binary_losses_are_binary_or_multilabel_by_units(name, form, units):
    task = "binary" if units == 1 else "multilabel"
    assert meaning(Dense(units), of_form(name, form)) == Output(task)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", REGRESSION)
def test_distances_are_regression(name, form):
    assert meaning(Dense(2), of_form(name, form)) == Output("regression")


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
    found = meaning(Dense(3), loss)
    assert found.task == ("multilabel" if name in BINARY else "multiclass")
    assert found.logits is True


@pytest.mark.parametrize("from_logits", [False, True])
def test_the_outer_partial_decides(from_logits):
    inner = functools.partial(
        keras.losses.sparse_categorical_crossentropy, from_logits=not from_logits
    )
    outer = functools.partial(inner, from_logits=from_logits)
    assert meaning(Dense(3), outer) == Output("multiclass", from_logits)


@pytest.mark.parametrize("from_logits", [False, True])
def test_a_subclass_of_a_loss_is_of_its_family(from_logits):
    class Smoothed(keras.losses.SparseCategoricalCrossentropy):
        pass

    loss = Smoothed(from_logits=from_logits)
    assert meaning(Dense(3), loss) == Output("multiclass", from_logits)


def test_arguments_of_a_loss_do_not_matter():
    loss = keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=0.1, reduction="sum")
    assert meaning(Dense(1), loss) == Output("binary", logits=True)


# The last activation. The loss is one that says nothing.


def softmax_of_two_steps(x):
    return Softmax()(Dense(3)(x))


SOFTMAXES = {
    "Dense by name": Dense(3, "softmax"),
    "Dense by function": Dense(3, keras.activations.softmax),
    "Activation by name": lambda x: Activation("softmax")(Dense(3)(x)),
    "Activation by function": lambda x: Activation(keras.activations.softmax)(Dense(3)(x)),
    "float32 Activation": lambda x: Activation("softmax", dtype="float32")(Dense(3)(x)),
    "Softmax layer": softmax_of_two_steps,
    "keras.ops": lambda x: ops.softmax(Dense(3)(x)),
    "Reshape": lambda x: Reshape((1, 3))(softmax_of_two_steps(x)),
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
def test_softmax_beats_from_logits(last):
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
def test_sigmoid_beats_from_logits(last):
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    assert meaning(last(1), loss) == Output("binary")


def test_a_nested_functional_model_is_looked_into_at_the_right_output():
    inputs = keras.Input((4,))
    nested = keras.Model(inputs, [Dense(2)(inputs), Dense(3, "softmax")(inputs)])
    assert meaning(lambda x: nested(x)[1], custom_loss) == MULTICLASS
    with pytest.raises(ValueError, match="last activation 'linear'"):
        meaning(lambda x: nested(x)[0], custom_loss)


def test_a_shared_layer_is_looked_through_at_the_right_call():
    shared = Flatten()
    other = keras.Input((2, 2))
    shared(other)
    assert meaning(lambda x: shared(Dense(3, "softmax")(x)), custom_loss) == MULTICLASS


def test_only_the_last_activation_counts():
    found = meaning(lambda x: Dense(1)(Dense(3, "softmax")(x)), "mse")
    assert found == Output("regression")
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
def test_a_task_and_an_activation_tell_logits_whatever_the_loss(activation):
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


def test_one_number_a_row_without_an_axis_is_binary():
    assert meaning(lambda x: Dense(1, "sigmoid")(x)[:, 0], "binary_crossentropy") == Output(
        "binary"
    )


def test_classes_on_another_axis_are_refused():
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, axis=1)
    with pytest.raises(ValueError, match="axis"):
        SnapshotEnsemble(ending_in(Dense(2), loss, shape=(3, 4)))


# Several outputs


def two_outputs(losses, structure=list, activations=("softmax", None)):
    """Three classes named `kind` and one value named `amount`."""
    inputs = keras.Input((4,))
    kind = Dense(3, activations[0], name="kind")(inputs)
    amount = Dense(1, activations[1], name="amount")(inputs)
    outputs = {"kind": kind, "amount": amount} if structure is dict else [kind, amount]
    model = keras.Model(inputs, outputs if structure is dict else structure(outputs))
    model.compile("sgd", losses)
    return model


IN_LISTS = [MULTICLASS, Output("regression")]
IN_DICTS = IN_LISTS[::-1]  # `keras.tree.flatten` goes by sorted keys.


@pytest.mark.parametrize(
    "losses",
    [
        ["sparse_categorical_crossentropy", "mse"],
        ("sparse_categorical_crossentropy", "mse"),
        {"kind": "sparse_categorical_crossentropy", "amount": "mse"},
        {"amount": "mse", "kind": "sparse_categorical_crossentropy"},
    ],
    ids=["list", "tuple", "dict", "dict backwards"],
)
@pytest.mark.parametrize("structure", [list, tuple])
def test_losses_of_a_list_of_outputs(structure, losses):
    assert meanings(two_outputs(losses, structure)) == IN_LISTS


@pytest.mark.parametrize(
    "losses",
    [
        {"kind": "sparse_categorical_crossentropy", "amount": "mse"},
        {"amount": "mse", "kind": "sparse_categorical_crossentropy"},
        ["mse", "sparse_categorical_crossentropy"],
    ],
    ids=["dict", "dict backwards", "list by sorted keys"],
)
def test_losses_of_a_dict_of_outputs(losses):
    assert meanings(two_outputs(losses, dict)) == IN_DICTS


def test_keys_of_a_dict_of_outputs_beat_names_of_layers():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, {"b": Dense(3, name="a")(inputs), "a": Dense(1, name="b")(inputs)})
    model.compile("sgd", {"a": "mse", "b": "sparse_categorical_crossentropy"})
    assert meanings(model) == [Output("regression"), MULTICLASS]


def test_outputs_nested_in_one_another():
    inputs = keras.Input((4,))
    model = keras.Model(
        inputs,
        {"a": [Dense(3)(inputs), Dense(1)(inputs)], "b": Dense(1)(inputs)},
    )
    categorical = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", {"a": [categorical, "mse"], "b": "binary_crossentropy"})
    assert meanings(model) == [MULTICLASS_LOGITS, Output("regression"), Output("binary")]


def test_one_loss_for_all_outputs():
    found = meanings(two_outputs("mse", activations=("relu", None)))
    assert found == [Output("regression"), Output("regression")]


def test_each_output_has_its_own_activation():
    found = meanings(two_outputs(custom_loss, activations=("softmax", "sigmoid")))
    assert found == [MULTICLASS, Output("binary")]


def test_each_output_has_its_own_from_logits():
    losses = [
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        keras.losses.BinaryCrossentropy(),
    ]
    found = meanings(two_outputs(losses, activations=(None, None)))
    assert found == [MULTICLASS_LOGITS, Output("binary")]


def test_a_loss_in_a_list_of_one():
    assert meaning(Dense(3), ["sparse_categorical_crossentropy"]) == MULTICLASS


def test_a_loss_in_a_dict_of_one():
    model = ending_in(Dense(3, name="kind"), {"kind": "sparse_categorical_crossentropy"})
    assert meanings(model) == [MULTICLASS]


def test_an_output_without_a_loss_needs_a_task():
    model = two_outputs(["sparse_categorical_crossentropy", None])
    with pytest.raises(ValueError, match="The task of output 1 of the model cannot be read off"):
        SnapshotEnsemble(model)
    assert meanings(model, ["multiclass", "regression"]) == IN_LISTS
    SnapshotEnsemble(model, task=[None, "regression"])


# A given task


@pytest.mark.parametrize("task", TASKS)
def test_a_given_task_beats_loss_and_activation(task):
    assert meaning(Dense(3, "softmax"), "mse", task) == Output(task)


def test_a_task_for_a_sigmoid_trained_on_squares():
    assert meaning(Dense(1, "sigmoid"), "mse", "binary") == Output("binary")


def test_one_task_for_all_outputs():
    model = two_outputs(custom_loss, activations=("sigmoid", "sigmoid"))
    assert meanings(model, "multilabel") == [Output("multilabel"), Output("multilabel")]


@pytest.mark.parametrize("structure", [list, tuple])
def test_tasks_in_the_structure_of_the_outputs(structure):
    model = two_outputs(custom_loss, structure)
    assert meanings(model, structure(["multiclass", "regression"])) == IN_LISTS


@pytest.mark.parametrize(
    "task",
    [
        {"kind": "multiclass", "amount": "regression"},
        {"amount": "regression", "kind": "multiclass"},
    ],
)
def test_tasks_in_a_dict_like_the_outputs(task):
    assert meanings(two_outputs(custom_loss, dict), task) == IN_DICTS


def test_a_task_of_none_among_others_is_read_off():
    model = two_outputs(["sparse_categorical_crossentropy", custom_loss])
    assert meanings(model, [None, "regression"]) == IN_LISTS


def test_tasks_by_name_are_not_given_to_outputs_by_place():
    # In the order of their sorted names they would be exchanged.
    model = two_outputs(custom_loss, activations=(None, None))
    with pytest.raises(ValueError, match="Received: task="):
        SnapshotEnsemble(model, task={"kind": "multiclass", "amount": "regression"})


# Subclassed models


class Subclassed(keras.Model):
    def __init__(self, *activations):
        super().__init__()
        self.heads = [Dense(units, a) for units, a in zip((3, 1), activations, strict=False)]

    def call(self, inputs):
        outputs = [head(inputs) for head in self.heads]
        return outputs if len(outputs) > 1 else outputs[0]


def read_subclassed(loss, *activations, task=None):
    model = Subclassed(*activations)
    model.compile("sgd", loss)
    check_task(model, task)
    return read_outputs(model, task, model(np.zeros((2, 4), "float32")))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("sparse_categorical_crossentropy", MULTICLASS),
        (keras.losses.CategoricalCrossentropy(from_logits=True), MULTICLASS_LOGITS),
        ("binary_crossentropy", Output("multilabel")),
        (keras.losses.BinaryCrossentropy(from_logits=True), Output("multilabel", logits=True)),
        ("mae", Output("regression")),
    ],
)
def test_a_subclassed_model_is_read_off_its_loss(loss, expected):
    assert read_subclassed(loss, None) == [expected]


@pytest.mark.parametrize(
    "losses",
    [["sparse_categorical_crossentropy", "mse"], ("sparse_categorical_crossentropy", "mse")],
)
def test_a_subclassed_model_with_several_outputs(losses):
    assert read_subclassed(losses, "softmax", None) == IN_LISTS


def test_a_subclassed_model_with_a_dict_of_outputs():
    class Named(keras.Model):
        def __init__(self):
            super().__init__()
            self.kind, self.amount = Dense(3), Dense(1)

        def call(self, inputs):
            return {"kind": self.kind(inputs), "amount": self.amount(inputs)}

    model = Named()
    model.compile("sgd", {"kind": "sparse_categorical_crossentropy", "amount": "mse"})
    check_task(model, None)
    assert read_outputs(model, None, model(np.zeros((2, 4), "float32"))) == IN_DICTS


def test_a_subclassed_model_with_a_given_task():
    assert read_subclassed(custom_loss, None, task="regression") == [Output("regression")]
    [found] = read_subclassed("binary_crossentropy", None, task="multiclass")
    assert found == MULTICLASS


def test_a_subclassed_model_shows_no_activation():
    with pytest.raises(ValueError, match="last activation None"):
        read_subclassed(custom_loss, "softmax")


def test_a_sequential_model_whose_shape_is_not_known_yet():
    model = keras.Sequential([Dense(3, "softmax")])
    model.compile("sgd", custom_loss)
    check_task(model, None)
    assert read_outputs(model, None, model(np.zeros((2, 4), "float32"))) == [MULTICLASS]


# Messages, as they come when an ensemble is made


@pytest.mark.parametrize("last", [Dense(3), Dense(3, "tanh"), lambda x: Dense(3)(x) * 2])
def test_a_task_that_cannot_be_read_off(last):
    activation = {"linear": "'linear'", "tanh": "'tanh'"}.get(
        getattr(getattr(last, "activation", None), "__name__", None), "None"
    )
    with pytest.raises(ValueError) as caught:
        SnapshotEnsemble(ending_in(last, custom_loss))
    assert str(caught.value) == (
        "The task of the model's output cannot be read off the model. "
        f"Received: loss={custom_loss!r} with last activation {activation}. "
        "Pass `task=` with one of ('multiclass', 'binary', 'multilabel', 'regression')."
    )


@pytest.mark.parametrize("loss", ["hinge", "kl_divergence", lambda y, p: 0.0])
def test_losses_that_name_no_task(loss):
    with pytest.raises(ValueError, match="Pass `task=` with one of"):
        SnapshotEnsemble(ending_in(Dense(3), loss))


def test_a_model_without_a_loss_needs_a_task():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, Dense(1)(inputs))
    model.compile("sgd")
    with pytest.raises(ValueError, match="Received: loss=None with last activation 'linear'"):
        SnapshotEnsemble(model)
    SnapshotEnsemble(model, task="regression")


def test_the_output_that_cannot_be_read_off_is_named():
    with pytest.raises(ValueError, match="The task of output 1 of the model cannot be read off"):
        SnapshotEnsemble(two_outputs(custom_loss))


def test_probabilities_or_logits_that_cannot_be_told_apart():
    with pytest.raises(ValueError) as caught:
        SnapshotEnsemble(ending_in(lambda x: Dense(3)(x) / 2, custom_loss), task="multiclass")
    assert str(caught.value) == (
        "Whether the model's output gives probabilities or logits cannot be read off the model. "
        f"Received: task='multiclass', loss={custom_loss!r}. End the model in a softmax or "
        "sigmoid layer, or compile it with a Keras loss, which says so by `from_logits`."
    )


@pytest.mark.parametrize(
    "task", ["classification", "Multiclass", "", 3, ["multiclass"] * 3 + ["classes"], {"a": "b"}]
)
def test_unknown_tasks(task):
    with pytest.raises(ValueError) as caught:
        SnapshotEnsemble(ending_in(Dense(3, "softmax"), "mse"), task=task)
    assert str(caught.value) == (
        "`task` must be one of ('multiclass', 'binary', 'multilabel', 'regression'). "
        f"Received: task={task!r}"
    )


@pytest.mark.parametrize("task", [["multiclass"] * 3, ["multiclass", "regression", None]])
def test_another_number_of_tasks_than_outputs(task):
    losses = ["sparse_categorical_crossentropy", "mse"]
    with pytest.raises(ValueError) as caught:
        SnapshotEnsemble(two_outputs(losses), task=task)
    assert str(caught.value) == (
        f"`task` must have one entry for each of the model's 2 outputs. Received: task={task!r}"
    )


def test_more_tasks_than_one_for_one_output():
    with pytest.raises(ValueError, match="one entry for each of the model's 1 outputs"):
        SnapshotEnsemble(ending_in(Dense(3), "mse"), task=["regression", "regression"])


@pytest.mark.parametrize("task", TASKS)
def test_is_classes(task):
    assert Output(task).is_classes == (task != "regression")
