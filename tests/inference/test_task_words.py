"""The words for what an output means, and models whose loss does not say it."""

import json

import keras
import numpy as np
import pytest
from inference_cases import mean_logits
from keras import layers, ops
from models import assert_close, ensemble_of, member_weights
from output_cases import custom_loss, ending_in, meaning, meanings, two_outputs

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.inference.task_words import WORDS, Output

ROWS = np.random.default_rng(0).normal(size=(7, 4)).astype("float32")
EXPLICIT = [word for word, (_, logits) in WORDS.items() if logits is not None]
UNITS = 4  # An even number, for means and log-variances.


@pytest.mark.parametrize("word", EXPLICIT)
def test_an_explicit_word_overrides_everything(word):
    task, logits = WORDS[word]
    halved = lambda x: layers.Dense(UNITS)(x) / 2  # noqa: E731
    for last in (layers.Dense(UNITS), layers.Dense(UNITS, "softmax"), halved):
        assert meaning(last, custom_loss, word) == Output(task, logits)


@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel"])
def test_logits_of_a_loss_of_ones_own_are_combined_as_such(task):
    # A distiller: the last layer's activation is unknown, and the loss has no `from_logits`.
    model = ending_in(lambda x: layers.Dense(3)(x) * 2, custom_loss)
    with pytest.raises(ValueError, match=f"Pass task='{task}_probabilities' or task='{task}_logi"):
        SnapshotEnsemble(model, task=task)
    ens = ensemble_of(model, 3, task=f"{task}_logits")
    own = ens.predict_members(ROWS, verbose=0)
    assert_close(ens.predict(ROWS, verbose=0), mean_logits(own, task))
    ens = ensemble_of(model, 3, task=f"{task}_probabilities")
    assert_close(ens.predict(ROWS, verbose=0), own.mean(axis=0))


@pytest.mark.parametrize("from_logits", [False, True])
def test_from_logits_of_a_loss_of_ones_own_is_read(from_logits):
    class Own(keras.losses.Loss):
        def __init__(self):
            super().__init__()
            self.from_logits = from_logits

        def call(self, y_true, y_pred):
            return ops.mean(y_pred, axis=-1)

    last = lambda x: layers.Dense(3)(x) * 2  # noqa: E731
    assert meaning(last, Own(), "multiclass") == Output("multiclass", from_logits)


def test_floats_are_passed_through_if_the_word_says_so():
    ens = ensemble_of(two_outputs(["mse", "mse"], dict), 2, task={"kind": None, "amount": None})
    model = ens.model
    weights = member_weights(ens)
    task = {"kind": "multiclass", "amount": "passthrough"}
    differing = ensemble_of(model, 2, task=task)
    with pytest.raises(ValueError, match="Output 'amount' differs between members"):
        differing.predict(ROWS, verbose=0)
    shared = ensemble_of(model, 2, shared=lambda v: "amount" in v.path, task=task)
    outputs = shared.predict(ROWS, verbose=0)
    np.testing.assert_array_equal(
        outputs["amount"], shared[0].predict(ROWS, verbose=0)["amount"], strict=True
    )
    assert len(weights) == 2


def test_an_output_without_a_loss_is_read_off_its_activation():
    model = two_outputs(["sparse_categorical_crossentropy", None], activations=(None, "sigmoid"))
    assert meanings(model) == [Output("multiclass"), Output("binary")]
    model = two_outputs({"kind": "sparse_categorical_crossentropy", "amount": None}, dict)
    with pytest.raises(
        ValueError, match=r"task of output 0 .* Received: loss=None with last activ"
    ):
        SnapshotEnsemble(model)
    words = {"amount": "regression", "kind": None}
    assert meanings(model, words) == [Output("regression"), Output("multiclass")]


def test_a_word_for_integers_must_be_passthrough():
    inputs = keras.Input((4,), dtype="int32")
    share = layers.Dense(1)(ops.cast(inputs, "float32"))
    model = keras.Model(inputs, {"id": inputs + 1, "share": share})
    model.compile("sgd", {"share": "mse", "id": None})
    expected = [Output("passthrough"), Output("regression")]
    for task in (None, "regression", {"id": "passthrough", "share": "regression"}):
        SnapshotEnsemble(model, task=task)
        assert meanings(model, task) == expected
    with pytest.raises(ValueError) as caught:
        SnapshotEnsemble(model, task={"id": "regression", "share": "regression"})
    assert str(caught.value) == (
        "Output 'id' cannot be combined: integers, bools and strings are neither probabilities nor "
        "values to average. Received: task='regression' for an output of dtype int32. Pass "
        "'passthrough', or cast it to floats in the model."
    )


@pytest.mark.parametrize("word", EXPLICIT)
def test_words_are_saved(word, tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(UNITS)])
    model.compile("sgd", "mse")
    ens = ensemble_of(model, 1, task=word)
    ens.save(tmp_path / "run")
    assert SnapshotEnsemble.load(tmp_path / "run").task == word
    assert word in json.dumps(ens.task)


# Steps of the user's own


class Plain(keras.Model):
    def predict_step(self, data):
        return super().predict_step(data)


class Prepared(keras.Model):
    def predict_step(self, data):
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        return self(x * 2.0, training=False)


class Applied(keras.Model):
    def predict_step(self, data):
        return ops.softmax(super().predict_step(data))


class Squared(keras.Model):
    def train_step(self, data):
        return super().train_step(data)


class Compared(keras.Model):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return ops.mean(y_pred)


class Opaque(keras.Model):
    def predict_step(self, data):
        return ops.softmax(super().predict_step(data))

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    def call(self, inputs):
        return self.dense(inputs)


def with_steps(kind, activation=None, loss=None):
    inputs = keras.Input((4,))
    model = kind(inputs, layers.Dense(3, activation)(inputs))
    model.compile("sgd", loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


@pytest.mark.parametrize("kind", [Plain, Prepared])
def test_a_step_that_returns_what_the_model_does_is_read_off_the_model(kind):
    ens = ensemble_of(with_steps(kind), 2)
    own = [member.predict(ROWS, verbose=0) for member in ens]
    assert_close(ens.predict(ROWS, verbose=0), mean_logits(own, "multiclass"))


def test_a_step_that_changes_the_outputs_needs_a_word():
    with pytest.raises(ValueError, match="in a model with its own `predict_step`. Pass `task=`"):
        SnapshotEnsemble(with_steps(Applied))
    with pytest.raises(ValueError, match="Pass task='multiclass_probabilities' or"):
        SnapshotEnsemble(with_steps(Applied), task="multiclass")
    ens = ensemble_of(with_steps(Applied), 2, task="multiclass_probabilities")
    own = np.stack([member.predict(ROWS, verbose=0) for member in ens])
    assert_close(own.sum(axis=-1), 1)
    assert_close(ens.predict(ROWS, verbose=0), own.mean(axis=0))


def test_a_subclass_with_a_step_of_its_own_needs_a_word():
    model = Opaque()
    model.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match="own `predict_step`"):
        SnapshotEnsemble(model)
    SnapshotEnsemble(model, task="multiclass_probabilities")


@pytest.mark.parametrize("kind", [Squared, Compared])
def test_a_loss_that_may_not_be_applied_to_the_output_says_nothing(kind):
    # Metric learning: the loss compares similarities of the embeddings that the model returns.
    name = "train_step" if kind is Squared else "compute_loss"
    with pytest.raises(ValueError, match=f"model with its own `{name}`. Pass `task=` with one of"):
        SnapshotEnsemble(with_steps(kind))
    assert meanings(with_steps(kind), "regression") == [Output("regression")]
    assert meanings(with_steps(kind, "softmax")) == [Output("multiclass")]


def test_a_predict_of_its_own_is_refused_before_training():
    class Own(keras.Model):
        def predict(self, x, **arguments):
            return super().predict(x * 2, **arguments)

    with pytest.raises(ValueError) as caught:
        SnapshotEnsemble(with_steps(Own))
    assert str(caught.value).startswith("The model's own `predict` would not be called")
    assert str(caught.value).endswith("Move what it does into `call` or `predict_step`.")
    model = with_steps(keras.Model)
    model.predict = lambda x: x
    with pytest.raises(ValueError, match="own `predict` would not be called"):
        SnapshotEnsemble(model)


def test_a_fit_of_its_own_is_used_and_must_record_its_epochs():
    class Own(keras.Model):
        def fit(self, x, y, **arguments):
            if self.drops:
                arguments.pop("callbacks")
            super().fit(x * 2, y, **arguments)

    model = with_steps(Own)
    labels, model.drops = np.arange(7) % 3, False
    ens = SnapshotEnsemble(model, cycles=2)
    history = ens.fit(ROWS, labels, epochs=2, verbose=0)
    assert len(history.history["learning_rate"]) == len(ens) == 2
    model.drops = True
    with pytest.raises(ValueError, match="No epoch was recorded: the model's own `fit` has not"):
        ens.fit(ROWS, labels, epochs=2, verbose=0)
    assert len(ens) == 2
