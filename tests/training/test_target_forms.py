"""The form of the targets, for all ways to name a loss."""

import functools

import keras
import numpy as np
import pytest
from models import dense

from snapshot_ensemble.training.target_forms import encode_classes, one_hot

CODES = np.array([0, 2, 1, 2])
X = np.zeros((4, 4), "float32")
losses = keras.losses


class OwnSparse(losses.SparseCategoricalCrossentropy):
    pass


INTEGERS = [
    "sparse_categorical_crossentropy",
    "SparseCategoricalCrossentropy",
    "crossentropy",
    "CE",
    losses.sparse_categorical_crossentropy,
    losses.SparseCategoricalCrossentropy(),
    OwnSparse(from_logits=True),
    functools.partial(losses.sparse_categorical_crossentropy, ignore_class=-1),
]
ONE_HOT = [
    "categorical_crossentropy",
    "categorical_focal_crossentropy",
    losses.CategoricalCrossentropy(label_smoothing=0.1),
    "kl_divergence",
    lambda y, p: keras.ops.mean(y * p),
]


@pytest.mark.parametrize("loss", INTEGERS)
def test_integers(loss):
    targets = encode_classes(dense(loss), None, X, 3)(CODES)
    assert targets.dtype == "int32"
    assert targets.tolist() == [0, 2, 1, 2]


@pytest.mark.parametrize("loss", ONE_HOT)
def test_one_hot(loss):
    targets = encode_classes(dense(loss), None, X, 3)(CODES)
    np.testing.assert_array_equal(targets, one_hot(CODES, 3), strict=True)
    assert targets.tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("loss", ["binary_crossentropy", "crossentropy", "mse"])
def test_a_column(loss):
    model = dense(loss, 1, "sigmoid")
    targets = encode_classes(model, "binary", X, 2)(np.array([0, 1, 1, 0]))
    np.testing.assert_array_equal(targets, np.float32([[0], [1], [1], [0]]), strict=True)


def test_the_task_decides_where_the_loss_does_not():
    model = dense("hinge", 3, None)
    with pytest.raises(ValueError, match="Pass `task=`"):
        encode_classes(model, None, X, 3)
    assert encode_classes(model, "multiclass_logits", X, 3)(CODES).shape == (4, 3)


def test_one_sigmoid_is_for_two_classes():
    model = dense("binary_crossentropy", 1, "sigmoid")
    with pytest.raises(ValueError, match=r"one sigmoid for two classes. Received: 3 classes"):
        encode_classes(model, None, X, 3)
