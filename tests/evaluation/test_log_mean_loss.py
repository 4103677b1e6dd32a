"""The ensemble's loss comes from the logarithm of its mean, as a model's comes from its logits.

With inputs of 200, a model's loss was 75.6 and its one-member ensemble's 9.6: probabilities that
are rounded to 0 were clipped to Keras's epsilon.
"""

import keras
import numpy as np
import pytest
from inference_cases import mean_logits
from keras import layers
from models import assert_close, compiled, ensemble_of
from scipy import special

RNG = np.random.default_rng(0)
ROWS = (RNG.normal(size=(9, 4)) * 200).astype("float32")
LABELS = np.arange(9) % 3
YES = RNG.integers(0, 2, (9, 3))


def functional(*last, shape=(4,)):
    inputs = keras.Input(shape)
    outputs = inputs
    for layer in last:
        outputs = layer(outputs)
    return keras.Model(inputs, outputs)


def tokens():
    model = functional(layers.Dense(3, "softmax"), shape=(2, 4))
    return compiled(model), np.stack([ROWS, -ROWS], axis=1), np.stack([LABELS, LABELS], axis=1)


def nested():
    inner = functional(layers.Dense(5), layers.Dense(3, "softmax"))
    return compiled(functional(layers.Dense(4), inner)), ROWS, LABELS


def half():
    layer = layers.Dense(3, "softmax", dtype="mixed_float16")
    return compiled(functional(layer)), ROWS / 50, LABELS


def softmax(loss="sparse_categorical_crossentropy", y=LABELS, **arguments):
    return compiled(functional(layers.Dense(3, "softmax")), loss, **arguments), ROWS, y


class Raw(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    def call(self, inputs):
        return keras.ops.softmax(self.dense(inputs))


def subclassed():
    model = compiled(Raw())
    model(ROWS)
    return model, ROWS, LABELS


def sigmoid(units, loss="binary_crossentropy"):
    model = functional(layers.Dense(units, "sigmoid"))
    return compiled(model, loss), ROWS, YES[:, :units].astype("float32")


KINDS = {
    "Dense": softmax,
    "one-hot targets": lambda: softmax("categorical_crossentropy", np.eye(3)[LABELS]),
    "Activation": lambda: (
        compiled(functional(layers.Dense(3), layers.Activation("softmax"))),
        ROWS,
        LABELS,
    ),
    "Softmax layer": lambda: (
        compiled(functional(layers.Dense(3), layers.Softmax())),
        ROWS,
        LABELS,
    ),
    "sigmoid": lambda: sigmoid(1),
    "labels": lambda: sigmoid(3),
    "sequence": tokens,
    "nested": nested,
    "subclass": subclassed,
    "layers behind it, which lose the logits": lambda: (
        compiled(functional(layers.Dense(3, "softmax"), layers.Reshape((3,)))),
        ROWS,
        LABELS,
    ),
    "mixed precision": half,
    "mixed precision with a float32 softmax": lambda: (
        compiled(
            functional(
                layers.Dense(3, dtype="mixed_float16"),
                layers.Activation("softmax", dtype="float32"),
            )
        ),
        ROWS / 50,
        LABELS,
    ),
    "a softmax with binary targets": lambda: softmax("binary_crossentropy", YES.astype("float32")),
    "a sigmoid with classes": lambda: sigmoid(3, "categorical_crossentropy"),
    "metrics": lambda: softmax(metrics=["accuracy", "sparse_categorical_crossentropy"]),
    "eager": lambda: softmax(run_eagerly=True),
}


@pytest.mark.sampled(8, 3)
@pytest.mark.parametrize("kind", KINDS)
def test_one_members_scores_are_those_of_its_model(kind):
    model, x, y = KINDS[kind]()
    ens = ensemble_of(model, 2)
    expected = ens[1].evaluate(x, y, verbose=0)
    assert np.ravel(expected)[0] > 1
    for combine in ("mean", "geometric", "weighted"):
        ens.weights = [0, 1]
        actual = ens.evaluate(x, y, combine=combine, members=[1], verbose=0)
        assert_close(actual, expected, 1e-4)
    if kind in ("a softmax with binary targets", "a sigmoid with classes"):
        return  # Their targets are no probabilities of classes, which a report needs.
    report = ens.report(x, y, verbose=0)
    assert report.rows["member 1"]["loss"] == pytest.approx(np.ravel(expected)[0], rel=1e-4)


def written_out(own, combine, weights, temperature, task):
    """The combined logits in float64, from the members' logits."""
    if combine == "geometric":
        logs = special.log_softmax(own, axis=-1) if task == "multiclass" else own
        return logs.mean(axis=0) / temperature
    return mean_logits(own, task, weights) / temperature


@pytest.mark.sampled(6, 2)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("combine", ["mean", "geometric", "weighted"])
@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_the_loss_is_that_of_the_written_out_combination(task, combine, temperature):
    model, x, y = softmax() if task == "multiclass" else sigmoid(3)
    x = x * 1000  # Clipped, the loss would be at most 16.1.
    ens = ensemble_of(model, 3)
    ens.weights, ens.temperature = [0.2, 0.3, 0.5], temperature
    kernels = [member.get_weights() for member in ens]
    own = np.stack([x.astype("float64") @ kernel + bias for kernel, bias in kernels])
    weights = ens.weights if combine == "weighted" else None
    logits = written_out(own, combine, weights, temperature, task)
    if task == "multiclass":
        expected = -special.log_softmax(logits, axis=-1)[np.arange(9), LABELS].mean()
    else:
        expected = -np.where(YES, special.log_expit(logits), special.log_expit(-logits)).mean()
    assert expected > 20
    assert ens.evaluate(x, y, combine=combine, verbose=0) == pytest.approx(expected, rel=1e-4)
    report = ens.report(x, y, verbose=0)
    assert report.rows[combine]["loss"] == pytest.approx(expected, rel=1e-4)


def test_votes_have_no_logits():
    model, x, y = softmax()
    ens = ensemble_of(model, 1)
    share = np.maximum(ens.predict(x, combine="vote", verbose=0)[np.arange(9), y], 1e-7)
    loss = -np.log(share).mean()
    assert ens.evaluate(x, y, combine="vote", verbose=0) == pytest.approx(loss, rel=1e-4)
    assert ens.report(x, y, verbose=0).rows["vote"]["loss"] == pytest.approx(loss, rel=1e-4)
