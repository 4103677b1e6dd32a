"""`SnapshotEnsemble` itself: what it takes, what it refuses, and how it says so."""

import doctest
import json
import os
import re
import subprocess
import sys
from math import inf, nan

import keras
import numpy as np
import pytest
from snapshot_ensemble.keeping import Keeper
from snapshot_ensemble.learning import Learner
from snapshot_ensemble.prediction import Predictor

import snapshot_ensemble
from snapshot_ensemble import (
    CosineAnnealing,
    Cycle,
    GenerateSnapshotCallbacks,
    Snapshot,
    SnapshotEnsemble,
    SnapshotEnsembleCallback,
    SnapshotError,
    VisualizeLR,
    plots,
)

X = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
Y = np.argmax(X[:, :3], axis=1)
RATE = 0.03125  # Exact in float32.


def built():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax")])


def compiled(optimizer=None):
    model = built()
    # Eager: a few steps of a small model are done before a graph would be traced.
    model.compile(
        optimizer or keras.optimizers.SGD(RATE), "sparse_categorical_crossentropy", run_eagerly=True
    )
    return model


def fit(ens, **arguments):
    return ens.fit(**{"x": X, "y": Y, "verbose": 0, **arguments})


def member_weights(ens):
    return [model.get_weights() for model in ens]


def assert_same(left, right):
    """Two lists of lists of arrays are equal to the bit."""
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        for array, expected in zip(one, other, strict=True):
            np.testing.assert_array_equal(array, expected)


def shown(value):
    """The id of a case: its arguments, short."""
    if not isinstance(value, dict):
        return ""
    plain = (bool, int, float, str, type(None))
    return ", ".join(f"{k}={v}" if isinstance(v, plain) else k for k, v in value.items())


# What the files of `paths` hold.
WEIGHTS = [
    [factor * np.linspace(1, 2, 12, dtype="float32").reshape(4, 3), np.full(3, factor, "float32")]
    for factor in (1, 2, 3)
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Three files of weights."""
    directory, model = tmp_path_factory.mktemp("files"), built()
    found = [directory / f"{i}.weights.h5" for i in range(3)]
    for path, weights in zip(found, WEIGHTS, strict=True):
        model.set_weights(weights)
        model.save_weights(path)
    return found


# The constructor


@pytest.mark.parametrize(
    "model",
    [None, "model", keras.Model, 3, keras.layers.Dense(3), [compiled]],
    ids=lambda model: type(model).__name__,
)
def test_what_is_no_model_is_refused(model):
    with pytest.raises(TypeError, match=r"`model` must be a `keras.Model`. Received: model="):
        SnapshotEnsemble(model)


def test_a_model_that_is_not_compiled_is_refused():
    with pytest.raises(ValueError, match=r"`model` must be compiled.*Call `model.compile"):
        SnapshotEnsemble(built())


SCHEDULE = CosineAnnealing(2, lr_init=0.5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cycles": 0}, ValueError, "`cycles` must be at least 1. Received: cycles=0"),
        ({"cycles": -1}, ValueError, "`cycles` must be at least 1. Received: cycles=-1"),
        ({"cycles": 1.5}, TypeError, "`cycles` must be a whole number. Received: cycles=1.5"),
        ({"cycles": True}, TypeError, "`cycles` must be a whole number. Received: cycles=True"),
        ({"cycles": "a"}, TypeError, "`cycles` must be a whole number. Received: cycles='a'"),
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
            "A given `schedule` has its own learning rates. Received: "
            "schedule with lr_init=0.1, lr_min=0.0 beside it. Pass them to `CosineAnnealing`.",
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
def test_wrong_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        SnapshotEnsemble(compiled(), **arguments)


def test_arguments_are_given_by_name():
    with pytest.raises(TypeError, match="positional"):
        SnapshotEnsemble(compiled(), 5)


def test_numbers_of_numpy_are_numbers():
    ens = SnapshotEnsemble(
        compiled(), cycles=np.int64(2), lr_init=np.float32(0.5), max_snapshots=np.int32(1)
    )
    assert ens.plan(np.int64(3)) == [Cycle(0, 0, 0, 0.5, 0.0), Cycle(1, 1, 2, 0.5, 0.0)]
    json.dumps([ens.max_snapshots, ens.plan(3)[0].lr_max])  # Plain numbers from then on.


def test_making_an_ensemble_changes_nothing_of_the_model():
    model = compiled()
    optimizer, weights = model.optimizer, model.get_weights()
    state = [variable.numpy().copy() for variable in optimizer.variables]
    SnapshotEnsemble(model, lr_init=0.5).plan(10)
    assert model.optimizer is optimizer
    assert_same([model.get_weights()], [weights])
    assert_same([[variable.numpy() for variable in optimizer.variables]], [state])


def test_a_new_ensemble_is_empty():
    ens = SnapshotEnsemble(compiled())
    assert (len(ens), ens.snapshots, list(ens), ens.history) == (0, [], [], {})
    assert ens.directory is None
    assert ens.weights is None


@pytest.mark.parametrize("method", ["predict", "predict_members", "evaluate"])
def test_without_members_there_is_nothing_to_predict(method):
    with pytest.raises(ValueError, match="no members yet. Call `fit`"):
        getattr(SnapshotEnsemble(compiled()), method)(X)


def test_only_tensorflow_will_do(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ValueError, match=r"with TensorFlow.*'jax'.*KERAS_BACKEND=tensorflow"):
        SnapshotEnsemble(compiled())


# The plan


@pytest.mark.parametrize("epochs", [3, 8])
def test_a_plan_is_the_same_as_what_runs(epochs):
    ens = SnapshotEnsemble(compiled(), cycles=3, lr_init=0.5, lr_min=0.25)
    plan = ens.plan(epochs)
    history = fit(ens, epochs=epochs).history
    # An epoch is one step here, so that its rate is that of the plan's table.
    rates = np.concatenate([cycle.rates(1) for cycle in plan])
    np.testing.assert_allclose(history["learning_rate"], rates, rtol=1e-6)
    assert history["cycle"] == [
        cycle.index for cycle in plan for _ in range(cycle.first_epoch, cycle.last_epoch + 1)
    ]
    assert [snapshot.epoch for snapshot in ens.snapshots] == [cycle.last_epoch for cycle in plan]
    assert plan[-1].last_epoch == epochs - 1


def test_a_schedule_takes_the_place_of_equal_cycles():
    ens = SnapshotEnsemble(compiled(), schedule=CosineAnnealing(1, 2.0, 0.5, 0.25, 0.5))
    assert ens.plan(8) == [
        Cycle(0, 0, 0, 0.5, 0.25),
        Cycle(1, 1, 2, 0.25, 0.125),
        Cycle(2, 3, 7, 0.125, 0.0625),
    ]


@pytest.mark.parametrize("epochs", [0, -1, 1.5, True, "a", None])
def test_impossible_epochs_are_refused_by_plan(epochs):
    with pytest.raises((TypeError, ValueError), match=f"`epochs` must be.*epochs={epochs!r}"):
        SnapshotEnsemble(compiled()).plan(epochs)


# The peak


DECAY = keras.optimizers.schedules.ExponentialDecay(RATE, decay_steps=1, decay_rate=0.5)
OPTIMIZERS = {
    "float": lambda: keras.optimizers.SGD(RATE),
    "schedule": lambda: keras.optimizers.SGD(DECAY),
    "callable": lambda: keras.optimizers.SGD(lambda: RATE),
    "loss scaling": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(RATE)),
    "loss scaling of a schedule": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(DECAY)
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_peak_is_the_compiled_rate(optimizer):
    model = compiled(OPTIMIZERS[optimizer]())
    model.fit(X, Y, verbose=0)  # A schedule of Keras has moved on.
    ens = SnapshotEnsemble(model, cycles=2)
    assert [cycle.lr_max for cycle in ens.plan(4)] == [RATE, RATE]
    assert fit(ens, epochs=2).history["learning_rate"] == [RATE, RATE]


def test_the_peak_of_a_schedule_without_one_is_the_compiled_rate():
    ens = SnapshotEnsemble(compiled(), schedule=CosineAnnealing(2, lr_multiplier=0.5))
    assert [cycle.lr_max for cycle in ens.plan(4)] == [RATE, RATE / 2]


def test_the_peak_of_an_optimizer_by_name_is_its_default():
    [cycle] = SnapshotEnsemble(compiled("adam"), cycles=1).plan(1)
    assert cycle.lr_max == pytest.approx(keras.optimizers.Adam().get_config()["learning_rate"])


def test_the_peak_follows_the_rate_of_the_model():
    ens = SnapshotEnsemble(compiled(), cycles=1)
    ens.model.optimizer.learning_rate = 0.25
    assert ens.plan(1) == [Cycle(0, 0, 0, 0.25, 0.0)]


def test_a_floor_above_the_compiled_rate_is_refused_before_training():
    ens = SnapshotEnsemble(compiled(), cycles=2, lr_min=2 * RATE)
    weights = ens.model.get_weights()
    for attempt in (lambda: ens.plan(2), lambda: fit(ens, epochs=2)):
        with pytest.raises(ValueError, match=r"`lr_min`, the floor, must not be above"):
            attempt()
    assert_same([ens.model.get_weights()], [weights])


# The budget


def test_the_default_budget_is_ten_epochs_a_cycle():
    ens = SnapshotEnsemble(compiled(), cycles=2)
    assert fit(ens).history["cycle"] == [0] * 10 + [1] * 10
    assert len(ens) == 2


def test_the_default_budget_of_a_schedule_is_five_cycles():
    ens = SnapshotEnsemble(compiled(), schedule=CosineAnnealing(1, 1.5))
    lengths = [1, 2, 2, 3, 5]  # Of 1, 1.5, 2.25, 3.375 and 5.0625, halves to the even side.
    expected = [cycle for cycle, length in enumerate(lengths) for _ in range(length)]
    assert fit(ens).history["cycle"] == expected
    assert len(ens) == 5


def test_the_default_budget_comes_after_the_initial_epoch():
    history = fit(SnapshotEnsemble(compiled(), cycles=1), initial_epoch=3)
    assert history.epoch == list(range(3, 13))


# What `fit` refuses


class Foreign(keras.utils.PyDataset):
    """Data of another model."""

    def __init__(self):
        super().__init__()

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return np.zeros((2, 7)), np.zeros(2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"epochs": 1},
            ValueError,
            "at least one epoch for each cycle. Received: epochs=1, cycles=2. Train for 2 epochs",
        ),
        ({"epochs": 0}, ValueError, "`epochs` must be at least 1. Received: epochs=0"),
        ({"epochs": -2}, ValueError, "`epochs` must be at least 1. Received: epochs=-2"),
        ({"epochs": 2.5}, TypeError, "`epochs` must be a whole number. Received: epochs=2.5"),
        ({"epochs": True}, TypeError, "`epochs` must be a whole number. Received: epochs=True"),
        ({"epochs": "a"}, TypeError, "`epochs` must be a whole number. Received: epochs='a'"),
        ({"epoch": 4}, TypeError, "`fit` has no argument `epoch`. Received: epoch=4"),
        ({"validation": (X, Y)}, TypeError, "validation_data, validation_freq"),
        ({"lr_init": 0.1}, TypeError, "`fit` has no argument `lr_init`"),
        (
            {"epochs": 4, "initial_epoch": 4},
            ValueError,
            "must be above `initial_epoch`. Received: epochs=4, initial_epoch=4",
        ),
        (
            {"epochs": 4, "initial_epoch": 3},
            ValueError,
            "at least one epoch for each cycle",
        ),
        ({"epochs": 4, "initial_epoch": -1}, ValueError, "`initial_epoch` must be at least 0"),
        ({"epochs": 4, "initial_epoch": 0.5}, TypeError, "`initial_epoch` must be a whole number"),
        (
            {"epochs": 4, "callbacks": [keras.callbacks.ReduceLROnPlateau()]},
            ValueError,
            "no callback may set it. Received: callbacks with ReduceLROnPlateau",
        ),
        ({"epochs": 4, "x": Foreign(), "y": None}, ValueError, "shape"),
    ],
    ids=shown,
)
def test_what_fit_refuses_costs_nothing(paths, arguments, error, message):
    model = compiled()
    ens = SnapshotEnsemble.from_weights(model, paths, cycles=2)
    ens.weights = [0.5, 0.25, 0.25]
    own = model.get_weights()
    for overwrite in (False, True):
        with pytest.raises(error, match=re.escape(message)):
            fit(ens, overwrite=overwrite, **arguments)
    assert_same(member_weights(ens), WEIGHTS)
    assert ens.snapshots == [Snapshot(0), Snapshot(1), Snapshot(2)]
    assert ens.history == {}
    np.testing.assert_array_equal(ens.weights, [0.5, 0.25, 0.25])
    assert_same([model.get_weights()], [own])
    assert float(model.optimizer.learning_rate.numpy()) == RATE


# Weight files of something else


def test_weight_files_become_members(paths):
    model = compiled()
    own, optimizer = model.get_weights(), model.optimizer
    ens = SnapshotEnsemble.from_weights(model, paths)
    assert ens.snapshots == [Snapshot(0), Snapshot(1), Snapshot(2)]
    assert_same(member_weights(ens), WEIGHTS)
    assert_same([model.get_weights()], [own])
    assert model.optimizer is optimizer


def test_weight_files_are_combined_like_snapshots(paths):
    ens = SnapshotEnsemble.from_weights(compiled(), paths)
    outputs = []
    for path in paths:
        plain = built()
        plain.load_weights(path)
        outputs.append(plain.predict(X, verbose=0))
    np.testing.assert_allclose(ens.predict(X, verbose=0), np.mean(outputs, axis=0), rtol=1e-5)


@pytest.mark.parametrize("wrap", [list, tuple, iter, lambda paths: map(str, paths)])
def test_weight_files_come_in_any_sequence(paths, wrap):
    assert len(SnapshotEnsemble.from_weights(compiled(), wrap(paths))) == 3


def test_the_same_file_twice_is_two_members(paths):
    assert len(SnapshotEnsemble.from_weights(compiled(), [paths[0], paths[0]])) == 2


def test_members_from_files_are_added_to_by_fit(paths):
    ens = SnapshotEnsemble.from_weights(compiled(), paths, cycles=2, lr_init=0.5)
    assert fit(ens, epochs=2).history["learning_rate"] == [0.5, 0.5]
    assert [(snapshot.index, snapshot.cycle) for snapshot in ens.snapshots] == [
        (0, None),
        (1, None),
        (2, None),
        (3, 0),
        (4, 1),
    ]
    assert_same(member_weights(ens)[:3], WEIGHTS)


@pytest.mark.parametrize("given", ["one.weights.h5", [], (), iter(())])
def test_what_is_no_list_of_weight_files_is_refused(given):
    with pytest.raises(ValueError, match=r"`paths` must be a list of weight files.*paths="):
        SnapshotEnsemble.from_weights(compiled(), given)


def test_one_path_is_no_list_of_weight_files(paths):
    with pytest.raises(ValueError, match=r"`paths` must be a list of weight files.*0\.weights\.h5"):
        SnapshotEnsemble.from_weights(compiled(), paths[0])


def test_weight_files_need_a_model_that_is_built(paths):
    model = keras.Sequential([keras.layers.Dense(3, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match=r"`model` must be built.*Call it on a batch first"):
        SnapshotEnsemble.from_weights(model, paths)


def test_weight_files_need_a_model_that_is_compiled(paths):
    with pytest.raises(ValueError, match="`model` must be compiled"):
        SnapshotEnsemble.from_weights(built(), paths)


def test_weight_files_are_not_copied_into_a_directory(paths, tmp_path):
    with pytest.raises(ValueError, match=r"holds the weights in memory.*`save\(directory\)`"):
        SnapshotEnsemble.from_weights(compiled(), paths, directory=tmp_path / "ensemble")
    assert not (tmp_path / "ensemble").exists()


def test_a_file_that_is_missing_is_named(paths, tmp_path):
    with pytest.raises(SnapshotError, match=r"missing\.weights\.h5"):
        SnapshotEnsemble.from_weights(compiled(), [*paths, tmp_path / "missing.weights.h5"])


# Members


def test_members_are_got_by_index_from_both_ends(paths):
    ens = SnapshotEnsemble.from_weights(compiled(), paths)
    found = [ens[i].get_weights()[0][0, 0] for i in (0, 1, 2, -1, -2, -3, np.int64(1))]
    assert found == [1, 2, 3, 3, 2, 1, 2]


@pytest.mark.parametrize("index", [3, -4])
def test_an_index_beyond_the_members_is_an_index_error(paths, index):
    with pytest.raises(IndexError):
        SnapshotEnsemble.from_weights(compiled(), paths)[index]


@pytest.mark.parametrize("index", ["0", 1.0, None])
def test_an_index_that_is_none_is_a_type_error(paths, index):
    with pytest.raises(TypeError):
        SnapshotEnsemble.from_weights(compiled(), paths)[index]


def test_the_list_of_snapshots_is_the_callers_own(paths):
    ens = SnapshotEnsemble.from_weights(compiled(), paths)
    ens.snapshots.clear()
    assert len(ens) == len(ens.snapshots) == 3


def test_an_ensemble_shows_what_it_is(paths, tmp_path):
    ens = SnapshotEnsemble.from_weights(compiled(), paths)
    assert repr(ens) == f"<SnapshotEnsemble of {ens.model.name!r}: 3 members in memory>"
    assert f"0 members in '{tmp_path}'" in repr(SnapshotEnsemble(compiled(), directory=tmp_path))


def test_a_callback_can_use_the_members_that_there_are():
    ens, seen = SnapshotEnsemble(compiled(), cycles=4, lr_init=0.5, max_snapshots=2), []

    def look(epoch, logs):
        seen.append((len(ens), ens.predict(X, verbose=0), member_weights(ens)))

    fit(ens, epochs=4, callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=look)])
    assert [count for count, _, _ in seen] == [1, 2, 2, 2]
    for _, prediction, members in seen:
        outputs = []
        for weights in members:
            plain = built()
            plain.set_weights(weights)
            outputs.append(plain.predict(X, verbose=0))
        np.testing.assert_allclose(prediction, np.mean(outputs, axis=0), rtol=1e-5)


def test_weights_belong_to_the_members_that_they_were_set_for(paths):
    ens = SnapshotEnsemble.from_weights(compiled(), paths, cycles=1)
    ens.weights = [1, 0, 0]
    np.testing.assert_allclose(
        ens.predict(X, combine="weighted", verbose=0), ens[0].predict(X, verbose=0), rtol=1e-6
    )
    fit(ens, epochs=1)
    assert ens.weights is None
    with pytest.raises(ValueError, match="needs weights"):
        ens.predict(X, combine="weighted", verbose=0)


def test_weights_may_be_taken_back(paths):
    ens = SnapshotEnsemble.from_weights(compiled(), paths)
    ens.weights = [1, 0, 0]
    ens.weights = None
    assert ens.weights is None


# The package


def test_all_public_names_are_there():
    for name in snapshot_ensemble.__all__:
        assert getattr(snapshot_ensemble, name).__doc__


WITHOUT = """
import sys
for name in ("matplotlib", "scipy", "sklearn", "tf2onnx", "openvino"):
    sys.modules[name] = None  # From now on, importing it is an error.
import snapshot_ensemble
assert snapshot_ensemble.SnapshotEnsemble
"""


def test_importing_the_package_asks_for_nothing_that_is_not_always_needed(tmp_path):
    # Blocked rather than looked for afterwards, since Keras imports what it finds of them.
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run([sys.executable, "-c", WITHOUT], check=True, env=environment, cwd=tmp_path)


EXAMPLES = [
    test
    for public in (
        SnapshotEnsemble,
        Predictor,
        Learner,
        Keeper,
        CosineAnnealing,
        SnapshotEnsembleCallback,
        GenerateSnapshotCallbacks,
        VisualizeLR,
        plots.plot_schedule,
    )
    for test in doctest.DocTestFinder().find(public, public.__name__)
    if test.examples
]


def test_the_public_classes_have_examples():
    assert {"SnapshotEnsemble", "CosineAnnealing"} <= {test.name for test in EXAMPLES}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name)
def test_examples_do_what_they_show(example, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ens = SnapshotEnsemble(compiled(), cycles=2)
    fit(ens, epochs=2)
    example.globs.update(
        **{name: getattr(snapshot_ensemble, name) for name in snapshot_ensemble.__all__},
        plot_schedule=plots.plot_schedule,
        keras=keras,
        np=np,
        model=compiled(),
        ens=ens,
        **{"x": X, "y": Y, "x_val": X, "y_val": Y},
    )
    failed, attempted = doctest.DocTestRunner().run(example, clear_globs=False)
    assert attempted > 0
    assert failed == 0, capsys.readouterr().out
