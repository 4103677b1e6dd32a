"""The constructor of `SnapshotEnsemble`, and access to its members."""

import copy
import json
import pickle
import re
from math import inf, nan

import keras
import numpy as np
import pytest
from ensemble_cases import WEIGHTS, X, fit, shown
from models import assert_same, classifier, ensemble_with, member_weights

from snapshot_ensemble import (
    CosineAnnealing,
    Cycle,
    SnapshotEnsemble,
)

# The constructor


@pytest.mark.parametrize(
    "model",
    [None, "model", keras.Model, 3, keras.layers.Dense(3), [classifier]],
    ids=lambda model: type(model).__name__,
)
def test_a_model_of_another_type_is_refused(model):
    with pytest.raises(TypeError, match=r"`model` must be a `keras.Model`. Received: model="):
        SnapshotEnsemble(model)


def test_a_model_that_is_not_compiled_is_refused():
    with pytest.raises(ValueError, match=r"`model` must be compiled.*Call `model.compile"):
        SnapshotEnsemble(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax")]))


SCHEDULE = CosineAnnealing(2, lr_init=0.5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cycles": 0}, ValueError, "`cycles` must be at least 1. Received: cycles=0"),
        ({"cycles": -1}, ValueError, "`cycles` must be at least 1. Received: cycles=-1"),
        ({"cycles": 1.5}, TypeError, "`cycles` must be a whole number. Received: cycles=1.5"),
        ({"cycles": True}, TypeError, "`cycles` must be a whole number. Received: cycles=True"),
        ({"cycles": "a"}, ValueError, "must be a whole number or 'auto'. Received: cycles='a'"),
        ({"cycles": None}, TypeError, "`cycles` must be a whole number. Received: cycles=None"),
        ({"lr_init": 0}, ValueError, "`lr_init` must be finite and above 0. Received: lr_init=0"),
        ({"lr_init": -0.1}, ValueError, "Received: lr_init=-0.1"),
        ({"lr_init": nan}, ValueError, "`lr_init` must be finite and above 0"),
        ({"lr_init": inf}, ValueError, "`lr_init` must be finite and above 0"),
        ({"lr_init": "x"}, TypeError, "`lr_init` must be a number. Received: lr_init='x'"),
        ({"lr_init": "0.1"}, TypeError, "`lr_init` must be a number. Received: lr_init='0.1'"),
        ({"lr_init": True}, TypeError, "`lr_init` must be a number. Received: lr_init=True"),
        ({"lr_init": [0.1]}, TypeError, "`lr_init` must be a number. Received: lr_init=[0.1]"),
        ({"lr_min": -0.1}, ValueError, "`lr_min` must be finite and at least 0"),
        ({"lr_min": nan}, ValueError, "`lr_min` must be finite and at least 0"),
        ({"lr_min": "x"}, TypeError, "`lr_min` must be a number. Received: lr_min='x'"),
        ({"lr_min": None}, TypeError, "`lr_min` must be a number. Received: lr_min=None"),
        (
            {"lr_init": 0.1, "lr_min": 0.2},
            ValueError,
            "`lr_min`, the floor, must not be above `lr_init`, the peak. "
            "Received: lr_min=0.2, lr_init=0.1",
        ),
        ({"schedule": 5}, TypeError, "`schedule` must be a `CosineAnnealing`"),
        ({"schedule": "cosine"}, TypeError, "Received: schedule='cosine'"),
        (
            {"schedule": keras.optimizers.schedules.CosineDecay(0.1, 10)},
            TypeError,
            "`schedule` must be a `CosineAnnealing`",
        ),
        ({"schedule": CosineAnnealing}, TypeError, "`schedule` must be a `CosineAnnealing`"),
        (
            {"schedule": SCHEDULE, "lr_init": 0.1},
            ValueError,
            "A `schedule` has its own learning rates. Received: schedule=CosineAnnealing(...), "
            "lr_init=0.1, lr_min=0.0. Pass the rates to `CosineAnnealing`.",
        ),
        ({"schedule": SCHEDULE, "lr_min": 0.1}, ValueError, "its own learning rates"),
        ({"max_snapshots": 0}, ValueError, "`max_snapshots` must be at least 1"),
        ({"max_snapshots": -1}, ValueError, "Received: max_snapshots=-1"),
        ({"max_snapshots": 2.0}, TypeError, "`max_snapshots` must be a whole number"),
        ({"max_snapshots": True}, TypeError, "Received: max_snapshots=True"),
        ({"task": "guess"}, ValueError, "`task` must be one of"),
    ],
    ids=shown,
)
def test_invalid_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        SnapshotEnsemble(classifier(), **arguments)


def test_arguments_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        SnapshotEnsemble(classifier(), 5)


def test_numpy_numbers_are_accepted():
    ens = SnapshotEnsemble(
        classifier(), cycles=np.int64(2), lr_init=np.float32(0.5), max_snapshots=np.int32(1)
    )
    assert ens.plan(np.int64(3)) == [Cycle(0, 0, 0, 0.5, 0.0), Cycle(1, 1, 2, 0.5, 0.0)]
    json.dumps([ens.max_snapshots, ens.plan(3)[0].lr_max])  # Plain numbers from then on.


def test_creating_an_ensemble_does_not_change_the_model():
    model = classifier()
    optimizer, weights = model.optimizer, model.get_weights()
    state = [variable.numpy().copy() for variable in optimizer.variables]
    SnapshotEnsemble(model, lr_init=0.5).plan(10)
    assert model.optimizer is optimizer
    assert_same([model.get_weights()], [weights])
    assert_same([[variable.numpy() for variable in optimizer.variables]], [state])


def test_a_new_ensemble_is_empty():
    ens = SnapshotEnsemble(classifier())
    assert (len(ens), ens.snapshots, list(ens), ens.history) == (0, [], [], {})
    assert ens.directory is None
    assert ens.weights is None


@pytest.mark.parametrize("method", ["predict", "predict_members", "evaluate"])
def test_predicting_without_members_is_an_error(method):
    with pytest.raises(ValueError, match="no members yet. Call `fit`"):
        getattr(SnapshotEnsemble(classifier()), method)(X)


def test_other_backends_are_refused(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ValueError, match=r"with TensorFlow.*'jax'.*KERAS_BACKEND=tensorflow"):
        SnapshotEnsemble(classifier())


# Members


def test_members_can_be_indexed_from_both_ends():
    ens = ensemble_with(classifier(), *WEIGHTS)
    actual = [ens[i].get_weights()[0][0, 0] for i in (0, 1, 2, -1, -2, -3, np.int64(1))]
    assert actual == [1, 2, 3, 3, 2, 1, 2]


@pytest.mark.parametrize("index", [3, -4])
def test_an_index_beyond_the_members_is_an_index_error(index):
    with pytest.raises(IndexError):
        ensemble_with(classifier(), *WEIGHTS)[index]


@pytest.mark.parametrize("index", ["0", 1.0, None])
def test_an_index_that_is_no_integer_is_a_type_error(index):
    with pytest.raises(TypeError):
        ensemble_with(classifier(), *WEIGHTS)[index]


def test_the_list_of_snapshots_is_the_callers_own():
    ens = ensemble_with(classifier(), *WEIGHTS)
    ens.snapshots.clear()
    assert len(ens) == len(ens.snapshots) == 3


def test_repr_shows_the_model_and_the_number_of_members(tmp_path):
    ens = ensemble_with(classifier(), *WEIGHTS)
    assert repr(ens) == f"<SnapshotEnsemble of {ens.model.name!r}: 3 members in memory>"
    assert f"0 members in '{tmp_path}'" in repr(SnapshotEnsemble(classifier(), directory=tmp_path))


@pytest.mark.slow
def test_a_callback_can_use_the_members_so_far():
    ens, seen = SnapshotEnsemble(classifier(), cycles=4, lr_init=0.5, max_snapshots=2), []

    def look(epoch, logs):
        seen.append((len(ens), ens.predict(X, verbose=0), member_weights(ens)))

    fit(ens, epochs=4, callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=look)])
    assert [count for count, _, _ in seen] == [1, 2, 2, 2]
    for _, prediction, members in seen:
        outputs = []
        for weights in members:
            plain = classifier()
            plain.set_weights(weights)
            outputs.append(plain.predict(X, verbose=0))
        np.testing.assert_allclose(prediction, np.mean(outputs, axis=0), rtol=1e-5)


def test_member_weights_are_reset_when_the_members_change():
    ens = ensemble_with(classifier(), *WEIGHTS, cycles=1)
    ens.weights = [1, 0, 0]
    np.testing.assert_allclose(
        ens.predict(X, combine="weighted", verbose=0), ens[0].predict(X, verbose=0), rtol=1e-6
    )
    fit(ens, epochs=1)
    assert ens.weights is None
    with pytest.raises(ValueError, match="needs weights"):
        ens.predict(X, combine="weighted", verbose=0)


def test_member_weights_can_be_reset():
    ens = ensemble_with(classifier(), *WEIGHTS)
    ens.weights = [1, 0, 0]
    ens.weights = None
    assert ens.weights is None


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_pickling_and_copying_are_refused_by_what_to_use(way):
    ens = SnapshotEnsemble(classifier())
    with pytest.raises(TypeError, match=r"cannot be pickled or copied.*Use `save\(directory\)`"):
        way(ens)
