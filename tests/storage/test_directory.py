"""Ensembles in directories: what is written, when, and what is refused when it is read."""

import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import h5py
import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshot_ensemble import CosineAnnealing, SnapshotEnsemble, SnapshotError

MANIFEST, LOCK = "ensemble.json", "ensemble.lock"
X = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
Y = np.argmax(X[:, :3], axis=1)


class BreakOffError(Exception):
    pass


def break_off(*_):
    raise BreakOffError


def compiled(optimizer="sgd", layers=(), **arguments):
    layers = [keras.Input((4,)), *layers, keras.layers.Dense(3, "softmax")]
    model = keras.Sequential(layers)
    # Eager: a few steps of a small model are done before a graph would be traced.
    arguments = {
        "loss": "sparse_categorical_crossentropy",
        "metrics": ["accuracy"],
        "run_eagerly": True,
        **arguments,
    }
    model.compile(optimizer, **arguments)
    return model


def in_memory(directory):
    """An ensemble of the members in a directory, without one itself."""
    return SnapshotEnsemble.from_weights(compiled(), weight_files(directory), lr_init=0.5)


def ensemble(directory=None, model=None, **arguments):
    arguments = {"cycles": 3, "lr_init": 0.5, **arguments}
    return SnapshotEnsemble(model or compiled(), directory=directory, **arguments)


def fit(ens, epochs=3, **arguments):
    return ens.fit(X, arguments.pop("y", Y), epochs=epochs, verbose=0, **arguments)


def fitted(directory=None, **arguments):
    ens = ensemble(directory, **arguments)
    fit(ens)
    return ens


def each_epoch(function):
    """A callback for when everything of an epoch is done."""
    return keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: function(epoch))


def member_weights(ens):
    return [model.get_weights() for model in ens]


def same(left, right):
    """Whether two nested lists of arrays are equal to the bit."""
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return np.array_equal(left, right)


def contents(directory):
    """All files below a directory with what is in them."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != LOCK
    }


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def manifest_of(directory):
    return strict_json((directory / MANIFEST).read_text("utf-8"))


def write_manifest(directory, manifest):
    """Writes a manifest as a forger would, with the right hash."""
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    signed = {**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (directory / MANIFEST).write_text(json.dumps(signed))


def file_entries(node):
    """Whatever in a manifest describes a file, wherever it stands."""
    if isinstance(node, dict):
        if "name" in node:
            return [node]
        node = list(node.values())
    return [entry for item in node for entry in file_entries(item)] if type(node) is list else []


def weight_files(directory):
    """The weight files, oldest first, by the manifest."""
    names = [entry["name"] for entry in file_entries(manifest_of(directory)["snapshots"])]
    return [directory / name for name in names]


def numbers_in(node):
    """How many numbers an HDF5 file or group holds."""
    return node.size if isinstance(node, h5py.Dataset) else sum(map(numbers_in, node.values()))


@dataclasses.dataclass
class Made:
    directory: pathlib.Path
    weights: list
    predictions: np.ndarray


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    keras.utils.set_random_seed(0)
    directory = tmp_path_factory.mktemp("made") / "ensemble"
    ens = fitted(directory)
    return Made(directory, member_weights(ens), ens.predict(X, verbose=0))


@pytest.fixture
def made(made_once, tmp_path):
    """A directory of three members that `fit` wrote, and what it held then."""
    directory = tmp_path / "ensemble"
    shutil.copytree(made_once.directory, directory)
    return dataclasses.replace(made_once, directory=directory)


# What `fit` writes


def test_the_manifest_names_every_file_with_its_size_and_hash(made):
    found = {
        name: (len(content), hashlib.sha256(content).hexdigest())
        for name, content in contents(made.directory).items()
        if name != MANIFEST
    }
    named = {
        entry["name"]: (entry["size"], entry["sha256"])
        for entry in file_entries(manifest_of(made.directory))
    }
    assert named == found
    assert len(found) == 5  # The model, three snapshots and the state of training.


def test_the_manifest_says_what_it_is(made):
    manifest = manifest_of(made.directory)
    assert manifest["format"] == "snapshot_ensemble"
    assert manifest["version"] == 1


@pytest.mark.parametrize("as_type", [str, pathlib.Path])
def test_the_directory_is_made_with_its_parents(tmp_path, as_type):
    directory = tmp_path / "some" / "where"
    ens = fitted(as_type(directory))
    assert ens.directory == directory
    assert len(SnapshotEnsemble.load(as_type(directory))) == 3


def test_nothing_is_written_before_the_first_snapshot(tmp_path):
    directory = tmp_path / "ensemble"
    ens = ensemble(directory)
    ens.plan(6)
    assert not directory.exists()


def test_weight_files_hold_weights_and_nothing_else(tmp_path):
    ens = fitted(tmp_path / "ensemble", model=compiled("adam"))
    for path in weight_files(ens.directory):
        with h5py.File(path) as file:
            assert "optimizer" not in file
            assert numbers_in(file) == ens.model.count_params()


def test_the_model_file_holds_no_optimizer_slots(tmp_path):
    ens = fitted(tmp_path / "ensemble", model=compiled("adam"))
    (entry,) = file_entries(manifest_of(ens.directory)["model"])
    with zipfile.ZipFile(ens.directory / entry["name"]) as archive:
        with archive.open("model.weights.h5") as inner, h5py.File(inner) as file:
            assert "optimizer" not in file


def test_keras_alone_reads_the_files(made):
    (entry,) = file_entries(manifest_of(made.directory)["model"])
    model = keras.models.load_model(made.directory / entry["name"], compile=False)
    for path, weights in zip(weight_files(made.directory), made.weights, strict=True):
        model.load_weights(path)
        assert same(model.get_weights(), weights)


def test_members_are_there_as_soon_as_their_cycle_has_ended(tmp_path):
    directory, seen = tmp_path / "ensemble", []

    def look(epoch):
        try:
            loaded = SnapshotEnsemble.load(directory)
        except SnapshotError:
            seen.append([])
        else:
            assert len(loaded.history["loss"]) == 2 * len(loaded)
            seen.append(member_weights(loaded))

    ens = ensemble(directory)
    fit(ens, epochs=6, callbacks=[each_epoch(look)])
    assert [len(members) for members in seen] == [0, 1, 1, 2, 2, 3]
    final = member_weights(ens)
    assert all(same(members, final[: len(members)]) for members in seen)


def test_max_snapshots_removes_the_files_of_the_others(tmp_path):
    directory, counts = tmp_path / "ensemble", []

    def look(epoch):
        ens._store.settle()  # What is kept is written behind training's back.
        assert {path.name for path in directory.iterdir()} == {
            LOCK,
            MANIFEST,
            *(entry["name"] for entry in file_entries(manifest_of(directory))),
        }
        counts.append(len(list(directory.glob("*.weights.h5"))))

    ens = ensemble(directory, cycles=4, max_snapshots=2)
    fit(ens, epochs=4, callbacks=[each_epoch(look)])
    assert counts == [1, 2, 2, 2]
    loaded = SnapshotEnsemble.load(directory)
    assert [snapshot.cycle for snapshot in loaded.snapshots] == [2, 3]
    assert [snapshot.index for snapshot in loaded.snapshots] == [0, 1]
    assert same(member_weights(loaded), member_weights(ens))


def test_disk_equals_memory(tmp_path):
    found = []
    for directory in (None, tmp_path / "ensemble"):
        keras.utils.set_random_seed(1)
        layers = [keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)]
        ens = ensemble(directory, model=compiled("adam", layers), cycles=2)
        fit(ens, epochs=2)
        found.append(ens.predict(X, verbose=0))
        fit(ens, epochs=2)  # Nor does it matter to training that there was a prediction.
        found.append(ens.predict(X, verbose=0))
        found.append(member_weights(ens))
    assert same(found[:3], found[3:])


# What `load` gives back


def test_an_ensemble_is_the_same_to_the_bit_after_loading(made):
    loaded = SnapshotEnsemble.load(made.directory)
    assert same(member_weights(loaded), made.weights)
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), made.predictions)


def test_an_ensemble_in_memory_is_the_same_to_the_bit_after_saving_and_loading(tmp_path):
    ens = fitted()
    ens.weights = [0.5, 0.25, 0.25]
    own = ens.model.get_weights()
    ens.save(tmp_path / "ensemble")
    loaded = SnapshotEnsemble.load(tmp_path / "ensemble")
    assert same(member_weights(loaded), member_weights(ens))
    assert same(ens.model.get_weights(), own)
    for combine in ("mean", "vote", "weighted"):
        np.testing.assert_array_equal(
            loaded.predict(X, combine=combine, verbose=0),
            ens.predict(X, combine=combine, verbose=0),
        )
    assert loaded.history == ens.history
    assert loaded.snapshots == ens.snapshots
    np.testing.assert_array_equal(loaded.weights, ens.weights)


FRESH_PROCESS = """
import sys
import numpy as np
from snapshot_ensemble import SnapshotEnsemble

directory, data, out = sys.argv[1:]
ens = SnapshotEnsemble.load(directory)
combined = {c: ens.predict(np.load(data), combine=c, verbose=0) for c in ("mean", "vote")}
np.savez(out, members=ens.predict_members(np.load(data), verbose=0), **combined)
"""


def test_a_fresh_process_predicts_the_same_to_the_bit(tmp_path, model):
    ens = fitted(tmp_path / "ensemble", model=model)
    np.save(tmp_path / "x.npy", X)
    paths = [str(tmp_path / name) for name in ("ensemble", "x.npy", "out.npz")]
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, *paths], check=True, cwd=tmp_path)
    with np.load(tmp_path / "out.npz") as out:
        np.testing.assert_array_equal(out["mean"], ens.predict(X, verbose=0))
        np.testing.assert_array_equal(out["vote"], ens.predict(X, combine="vote", verbose=0))
        np.testing.assert_array_equal(out["members"], ens.predict_members(X, verbose=0))


def test_loading_and_predicting_change_nothing_on_disk(made):
    before = contents(made.directory)
    for _ in range(2):
        loaded = SnapshotEnsemble.load(made.directory)
        assert len(loaded) == 3
        np.testing.assert_array_equal(loaded.predict(X, verbose=0), made.predictions)
    assert contents(made.directory) == before


def test_the_model_has_the_weights_of_the_last_snapshot(made):
    loaded = SnapshotEnsemble.load(made.directory)
    assert same(loaded.model.get_weights(), made.weights[-1])


@pytest.mark.parametrize(
    "arguments",
    [
        {"cycles": 4, "lr_init": 0.25, "lr_min": 0.125, "max_snapshots": 2},
        {"cycles": 2, "lr_init": None, "task": "multiclass"},
        {"lr_init": None, "schedule": CosineAnnealing(1, 2.0, 0.5, 0.01, 0.9), "cycles": 5},
        {"lr_init": None, "schedule": CosineAnnealing(3, warmup=1), "cycles": 5},
    ],
)
def test_the_settings_come_back(tmp_path, arguments):
    ens = ensemble(tmp_path / "ensemble", **arguments)
    fit(ens, epochs=4)
    loaded = SnapshotEnsemble.load(ens.directory)
    assert loaded.plan(13) == ens.plan(13)
    assert loaded.max_snapshots == ens.max_snapshots
    assert loaded.task == ens.task
    assert type(loaded.schedule) is type(ens.schedule)
    assert loaded.directory == ens.directory


def test_what_is_known_of_snapshots_from_elsewhere_comes_back(made, tmp_path):
    ens = SnapshotEnsemble.from_weights(compiled(), weight_files(made.directory))
    ens.save(tmp_path / "saved")
    loaded = SnapshotEnsemble.load(tmp_path / "saved")
    assert loaded.snapshots == ens.snapshots
    assert same(member_weights(loaded), made.weights)


def not_a_number(y_true, y_pred):
    return keras.ops.mean(y_pred) * float("nan")


def infinite(y_true, y_pred):
    return keras.ops.mean(y_pred) + float("inf")


def minus_infinite(y_true, y_pred):
    return keras.ops.mean(y_pred) - float("inf")


def test_numbers_that_json_has_no_word_for_survive(tmp_path):
    metrics = [not_a_number, infinite, minus_infinite]
    expected = {"not_a_number": np.nan, "infinite": np.inf, "minus_infinite": -np.inf}
    ens = fitted(tmp_path / "ensemble", model=compiled(metrics=metrics))
    strict_json((ens.directory / MANIFEST).read_text("utf-8"))
    loaded = SnapshotEnsemble.load(
        ens.directory, custom_objects={metric.__name__: metric for metric in metrics}
    )
    for name, value in expected.items():
        np.testing.assert_array_equal(loaded.history[name], [value] * 3)
        found = [snapshot.metrics[name] for snapshot in loaded.snapshots]
        np.testing.assert_array_equal(found, [value] * 3)
    assert loaded.history["loss"] == ens.history["loss"]


def test_gaps_in_the_history_survive(tmp_path):
    ens = ensemble(tmp_path / "ensemble", cycles=2)
    fit(ens, epochs=4, validation_data=(X, Y), validation_freq=2)
    values = SnapshotEnsemble.load(ens.directory).history["val_loss"]
    assert [value is None for value in values] == [True, False, True, False]
    assert values == ens.history["val_loss"]


def test_weights_are_written_when_they_are_set(made):
    SnapshotEnsemble.load(made.directory).weights = [0.125, 0.375, 0.5]
    np.testing.assert_array_equal(
        SnapshotEnsemble.load(made.directory).weights, [0.125, 0.375, 0.5]
    )


def exponential_decay():
    return keras.optimizers.schedules.ExponentialDecay(0.3, decay_steps=2, decay_rate=0.5)


OPTIMIZERS = {
    "float": lambda: keras.optimizers.SGD(0.3, name="own"),
    "schedule": lambda: keras.optimizers.Adam(exponential_decay(), name="own"),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.3, name="inner"), name="own"
    ),
    "scaled schedule": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(exponential_decay(), name="inner"), name="own"
    ),
}


@pytest.mark.parametrize("saved", ["by fit", "in a callback"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_loaded_model_has_the_rate_that_it_was_compiled_with(tmp_path, optimizer, saved):
    optimizer = OPTIMIZERS[optimizer]
    found = []
    directory = tmp_path / "ensemble" if saved == "by fit" else None
    ens = ensemble(directory, model=compiled(optimizer()), cycles=2)

    def look(epoch):
        directory = ens.directory or tmp_path / f"saved-{epoch}"
        if ens.directory is None:
            ens.save(directory)
        found.append(SnapshotEnsemble.load(directory))

    fit(ens, epochs=2, callbacks=[each_epoch(look)])
    look(2)
    expected = keras.optimizers.serialize(optimizer())
    for loaded in found:
        assert keras.optimizers.serialize(loaded.model.optimizer) == expected
    assert keras.optimizers.serialize(ens.model.optimizer) == expected


def test_a_save_in_mid_training_changes_nothing_of_it(tmp_path):
    found = []
    for saves in (False, True):
        keras.utils.set_random_seed(1)
        ens = ensemble(model=compiled("adam"))

        def save(epoch, ens=ens, saves=saves):
            if saves:
                ens.save(tmp_path / f"saved-{epoch}")

        history = fit(ens, callbacks=[each_epoch(save)]).history
        found.append([member_weights(ens), history["learning_rate"]])
    assert same(*found)


# A second `fit`


def test_a_fit_after_loading_adds_in_place(made):
    loaded = SnapshotEnsemble.load(made.directory)
    fit(loaded, epochs=6)
    again = SnapshotEnsemble.load(made.directory)
    assert len(loaded) == len(again) == 6
    assert same(member_weights(again)[:3], made.weights)
    assert same(member_weights(again), member_weights(loaded))
    assert [snapshot.cycle for snapshot in again.snapshots] == list(range(6))
    assert [snapshot.epoch for snapshot in again.snapshots] == [0, 1, 2, 4, 6, 8]
    assert [snapshot.step for snapshot in again.snapshots] == [1, 2, 3, 5, 7, 9]
    assert again.history["cycle"] == [0, 1, 2, 3, 3, 4, 4, 5, 5]


def test_a_fit_after_loading_goes_on_from_the_last_snapshot(made):
    loaded = SnapshotEnsemble.load(made.directory)
    expected = compiled("sgd")
    expected.set_weights(made.weights[-1])
    expected.optimizer.learning_rate = 0.5
    expected.fit(X, Y, epochs=1, verbose=0)
    fit(loaded)
    for one, other in zip(loaded[3].get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def test_weights_that_were_set_do_not_outlive_their_members_on_disk(made):
    ens, counts = SnapshotEnsemble.load(made.directory), []
    ens.weights = [0.125, 0.375, 0.5]

    def look(epoch):
        counts.append(len(SnapshotEnsemble.load(made.directory)))

    fit(ens, callbacks=[each_epoch(look)])
    assert counts == [4, 5, 6]
    assert SnapshotEnsemble.load(made.directory).weights is None


def test_a_fit_that_breaks_off_leaves_the_members_that_it_finished(made):
    ens = SnapshotEnsemble.load(made.directory)
    with pytest.raises(BreakOffError):
        fit(ens, epochs=6, callbacks=[each_epoch(lambda e: break_off() if e == 2 else None)])
    assert len(ens) == 4
    again = SnapshotEnsemble.load(made.directory)
    assert same(member_weights(again), member_weights(ens))
    assert again.snapshots == ens.snapshots


def test_the_history_on_disk_has_the_epochs_of_a_fit_that_broke_off(made):
    ens = SnapshotEnsemble.load(made.directory)
    with pytest.raises(BreakOffError):
        fit(ens, epochs=6, callbacks=[each_epoch(lambda e: break_off() if e == 2 else None)])
    assert len(ens.history["loss"]) == 6
    assert SnapshotEnsemble.load(made.directory).history == ens.history


# Directories that hold something


@pytest.fixture(params=["a folder", "an ensemble"])
def taken(request, tmp_path, made_once):
    """A directory that holds something."""
    path = tmp_path / "taken"
    if request.param == "a folder":
        path.mkdir()
        (path / "notes.txt").write_text("mine")
    else:
        shutil.copytree(made_once.directory, path)
    return path


def test_fit_refuses_a_directory_that_holds_something(taken, tmp_path):
    before = contents(tmp_path)
    ens = ensemble(taken)
    weights = ens.model.get_weights()
    with pytest.raises(ValueError, match=r"holds something already.*taken.*`overwrite=True`"):
        fit(ens)
    assert contents(tmp_path) == before
    assert same(ens.model.get_weights(), weights)
    assert len(ens) == 0


def test_save_refuses_a_directory_that_holds_something(taken, tmp_path, made_once):
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"holds something already.*taken.*`overwrite=True`"):
        in_memory(made_once.directory).save(taken)
    assert contents(tmp_path) == before


def test_an_empty_directory_is_free(tmp_path, made_once):
    in_memory(made_once.directory).save(tmp_path)
    assert len(SnapshotEnsemble.load(tmp_path)) == 3


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_no_directory(tmp_path, made_once, overwrite):
    path = tmp_path / "taken"
    path.write_text("something")
    ens = ensemble(path)
    with pytest.raises((OSError, ValueError), match="taken"):
        fit(ens, overwrite=overwrite)
    assert ens.history == {}  # Told before training, not after its first cycle.
    with pytest.raises((OSError, ValueError), match="taken"):
        in_memory(made_once.directory).save(path, overwrite=overwrite)
    assert path.read_text() == "something"


def test_overwriting_waits_for_the_end_of_the_first_epoch(made):
    old, seen = contents(made.directory), []

    def look(epoch):
        seen.append(member_weights(SnapshotEnsemble.load(made.directory)))
        if epoch == 0:
            now = contents(made.directory)
            assert {**now, MANIFEST: None} == {**old, MANIFEST: None}

    keras.utils.set_random_seed(1)
    ens = ensemble(made.directory)
    fit(ens, epochs=6, overwrite=True, callbacks=[each_epoch(look)])
    assert same(seen[0], made.weights)
    assert [len(members) for members in seen[1:]] == [1, 1, 2, 2, 3]
    assert same(seen[-1], member_weights(ens))
    assert not same(seen[1][0], made.weights[0])


@pytest.mark.parametrize("error", [BreakOffError, KeyboardInterrupt])
def test_overwriting_that_breaks_off_leaves_what_was_there(made, error):
    def stop(epoch):
        raise error

    old = contents(made.directory)
    ens = ensemble(made.directory)
    with pytest.raises(error):
        fit(ens, epochs=6, overwrite=True, callbacks=[each_epoch(stop)])
    assert contents(made.directory) == old
    assert len(ens) == 0
    assert ens.history == {}
    with pytest.raises(ValueError, match="holds something already"):
        fit(ens)


def test_overwriting_its_own_members_that_breaks_off_leaves_them(made):
    ens = SnapshotEnsemble.load(made.directory)
    history = copy.deepcopy(ens.history)
    ens.weights = [0.125, 0.375, 0.5]
    old = contents(made.directory)
    with pytest.raises(BreakOffError):
        fit(ens, epochs=6, overwrite=True, callbacks=[each_epoch(break_off)])
    assert contents(made.directory) == old
    assert ens.history == history
    np.testing.assert_array_equal(ens.weights, [0.125, 0.375, 0.5])
    np.testing.assert_array_equal(ens.predict(X, verbose=0), made.predictions)
    fit(ens)
    assert [snapshot.cycle for snapshot in ens.snapshots] == list(range(6))


def test_overwriting_in_memory_that_breaks_off_leaves_the_members():
    ens = fitted()
    weights, history = member_weights(ens), copy.deepcopy(ens.history)
    with pytest.raises(BreakOffError):
        fit(ens, epochs=6, overwrite=True, callbacks=[each_epoch(break_off)])
    assert same(member_weights(ens), weights)
    assert ens.history == history
    fit(ens)
    assert len(ens) == 6


@pytest.mark.parametrize("how", ["fit", "save"])
def test_overwriting_takes_the_old_files_away_and_leaves_foreign_ones(made, how):
    foreign = {"notes.txt": b"mine", "logs/run.csv": b"1,2", "other.weights.h5": b"weights"}
    for name, content in foreign.items():
        (made.directory / name).parent.mkdir(exist_ok=True)
        (made.directory / name).write_bytes(content)
    if how == "fit":
        ens = ensemble(made.directory, cycles=2)
        fit(ens, epochs=2, overwrite=True)
    else:
        ens = ensemble(cycles=2)
        fit(ens, epochs=2)
        ens.save(made.directory, overwrite=True)
    found = contents(made.directory)
    named = {entry["name"] for entry in file_entries(manifest_of(made.directory))}
    assert set(found) == {MANIFEST, *named, *foreign}
    assert {name: found[name] for name in foreign} == foreign
    loaded = SnapshotEnsemble.load(made.directory)
    assert same(member_weights(loaded), member_weights(ens))
    assert loaded.history == ens.history


def test_what_cannot_be_read_can_be_overwritten(made):
    ens = in_memory(made.directory)
    (made.directory / MANIFEST).write_text("torn")
    ens.save(made.directory, overwrite=True)
    assert same(member_weights(SnapshotEnsemble.load(made.directory)), member_weights(ens))


def test_overwriting_with_another_architecture(made):
    ens = ensemble(made.directory, model=compiled(layers=[keras.layers.Dense(5, "relu")]))
    fit(ens, overwrite=True)
    loaded = SnapshotEnsemble.load(made.directory)
    assert same(member_weights(loaded), member_weights(ens))
    assert len(loaded.model.layers) == 2


def test_saving_to_its_own_directory_writes_no_second_copy(made, monkeypatch):
    monkeypatch.chdir(made.directory.parent)
    before = contents(made.directory)
    for path in (made.directory, str(made.directory), "ensemble", "ensemble/../ensemble"):
        SnapshotEnsemble.load(made.directory).save(path)
        assert contents(made.directory) == before
    SnapshotEnsemble.load("ensemble").save(made.directory)
    assert contents(made.directory) == before


def test_saving_to_its_own_directory_writes_what_changed(made):
    ens = SnapshotEnsemble.load(made.directory)
    ens.history["note"] = [1.0, 2.0, 3.0]
    ens.save(made.directory)
    assert SnapshotEnsemble.load(made.directory).history["note"] == [1.0, 2.0, 3.0]


def test_a_saved_copy_is_independent(made, tmp_path):
    ens = SnapshotEnsemble.load(made.directory)
    ens.save(tmp_path / "copy")
    fit(ens, overwrite=True)
    np.testing.assert_array_equal(
        SnapshotEnsemble.load(tmp_path / "copy").predict(X, verbose=0), made.predictions
    )


def test_an_ensemble_without_members_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="no members yet"):
        ensemble().save(tmp_path / "ensemble")
    assert not (tmp_path / "ensemble").exists()


# Writes that fail, and processes that end


def assert_no_temporaries(directory):
    assert not [name for name in contents(directory) if name.startswith("writing-")]


@contextlib.contextmanager
def failing(owner, name, first, *, lasting=False):
    """Lets one call of a function (counted from 1) fail as on a full disk, or all from then on."""
    function, calls = getattr(owner, name), itertools.count(1)

    def fail(*args, **kwargs):
        number = next(calls)
        if number == first or (lasting and number > first):
            raise OSError(28, "No space left on device")
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, fail)
        yield


class Reference:
    """Tells states of a directory apart by the members of undisturbed runs."""

    def __init__(self, **runs):
        self.members = {
            f"{name}{i}": weights for name, run in runs.items() for i, weights in enumerate(run)
        }

    def state(self, directory):
        """The names of the members that a directory loads, None if its manifest names none."""
        if not (directory / MANIFEST).exists() or not manifest_of(directory)["snapshots"]:
            return None
        loaded = SnapshotEnsemble.load(directory)
        assert len(loaded.history.get("cycle", ())) >= len(loaded)
        return [
            next((name for name, known in self.members.items() if same(known, weights)), "?")
            for weights in member_weights(loaded)
        ]


def new_run(directory, **arguments):
    """An ensemble that always trains the same."""
    keras.utils.set_random_seed(1)
    return ensemble(directory, **arguments)


@pytest.fixture(scope="module")
def reference(made_once):
    ens = new_run(None)
    fit(ens)
    return Reference(old=made_once.weights, new=member_weights(ens))


LASTING = pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])


@LASTING
def test_a_failing_write_leaves_what_was_finished(tmp_path, reference, lasting):
    # Each file is synchronised, moved and its directory synchronised: an empty manifest, the model,
    # the first snapshot and the manifest come to eight calls, what follows to four.
    for k in (1, 2, 3, 5, 7, 8, 9, 12):
        directory = tmp_path / str(k)
        directory.mkdir()
        ens = new_run(directory)
        with failing(os, "fsync", k, lasting=lasting), pytest.raises(OSError, match="No space"):
            fit(ens)
        assert_no_temporaries(directory)
        state = reference.state(directory) or []
        assert state == [f"new{i}" for i in range(len(state))], k
        synchronised, in_place = max(0, (k - 5) // 4), max(0, (k - 4) // 4)
        # What failed may have been made good, where it failed once.
        assert synchronised <= len(state) <= in_place + (not lasting), k


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_snapshot_that_cannot_be_written_is_no_member(tmp_path, reference, k):
    ens = new_run(tmp_path / "ensemble")
    with failing(keras.Model, "save_weights", k), pytest.raises(OSError, match="No space left"):
        fit(ens)
    assert len(ens) == k - 1
    assert reference.state(ens.directory) in ([f"new{i}" for i in range(k - 1)], None)
    assert_no_temporaries(ens.directory)


def test_training_goes_on_after_a_full_disk(tmp_path):
    ens = new_run(tmp_path / "ensemble")
    with failing(keras.Model, "save_weights", 2), pytest.raises(OSError, match="No space left"):
        fit(ens)
    fit(ens)
    loaded = SnapshotEnsemble.load(ens.directory)
    assert len(loaded) == len(ens) == 4
    assert same(member_weights(loaded), member_weights(ens))
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), ens.predict(X, verbose=0))


def test_a_model_file_that_cannot_be_written_is_an_error(tmp_path):
    ens = ensemble(tmp_path / "ensemble")
    with failing(keras.Model, "save", 1), pytest.raises(OSError, match="No space left"):
        fit(ens)
    assert len(ens) == 0


@LASTING
@pytest.mark.parametrize("owner", ["another object", "the same object"])
def test_a_failing_overwrite_leaves_the_old_ensemble(made, tmp_path, reference, owner, lasting):
    for k in (1, 3, 5):  # The model, the first snapshot, the manifest: see above.
        directory = tmp_path / str(k)
        shutil.copytree(made.directory, directory)
        ens = new_run(directory)
        if owner == "the same object":
            first = ens.model.get_weights()
            ens = SnapshotEnsemble.load(directory)
            ens.model.set_weights(first)
        with failing(os, "fsync", k, lasting=lasting), pytest.raises(OSError, match="No space"):
            fit(ens, overwrite=True)
        assert_no_temporaries(directory)
        state = reference.state(directory)
        # Of the manifest, what failed once may have been made good.
        made_good = k == 5 and not lasting and state == ["new0"]
        assert state == ["old0", "old1", "old2"] or made_good, k


def test_an_overwrite_without_a_first_snapshot_changes_nothing(made):
    ens = SnapshotEnsemble.load(made.directory)
    history = copy.deepcopy(ens.history)
    with failing(keras.Model, "save_weights", 1), pytest.raises(OSError, match="No space left"):
        fit(ens, overwrite=True)
    assert len(ens) == 3
    assert ens.history == history
    np.testing.assert_array_equal(ens.predict(X, verbose=0), made.predictions)
    assert same(member_weights(SnapshotEnsemble.load(made.directory)), made.weights)


def test_a_failing_save_leaves_the_old_ensemble(made, tmp_path, reference):
    states, ens = [], new_run(None)
    fit(ens)
    own = ens.model.get_weights()
    for k in itertools.count(1):
        directory = tmp_path / str(k)
        shutil.copytree(made.directory, directory)
        with failing(os, "fsync", k):
            try:
                ens.save(directory, overwrite=True)
            except OSError:
                assert_no_temporaries(directory)
                assert same(ens.model.get_weights(), own)
            else:
                break
        states.append(reference.state(directory))
    old, new = ["old0", "old1", "old2"], ["new0", "new1", "new2"]
    assert states[0] == old
    assert all(state in (old, new) for state in states)


@contextlib.contextmanager
def copied_at_every_step(directory, copies):
    """Copies a directory whenever it may be seen by the next process if this one ends."""
    with pytest.MonkeyPatch.context() as patch:
        for function in (os.fsync, os.replace, os.rename, os.unlink, os.remove):

            def step(*args, function=function, **kwargs):
                for part in (lambda: None, lambda: function(*args, **kwargs)):
                    part()
                    if directory.exists():
                        shutil.copytree(directory, copies / f"{len(list(copies.iterdir())):03}")

            patch.setattr(os, function.__name__, step)
        yield


def distinct(states):
    """A list without its repetitions."""
    return [state for state, _ in itertools.groupby(states)]


def states_in_copies(reference, copies):
    seen, states = {}, []
    for path in sorted(copies.iterdir()):
        key = hashlib.sha256(repr(contents(path)).encode()).hexdigest()
        if key not in seen:
            seen[key] = reference.state(path)
        states.append(seen[key])
    return distinct(states)


def test_a_run_that_is_killed_leaves_what_was_finished(tmp_path, reference):
    copies = tmp_path / "copies"
    copies.mkdir()
    ens = new_run(tmp_path / "ensemble", max_snapshots=2)
    with copied_at_every_step(ens.directory, copies):
        fit(ens)
    states = states_in_copies(reference, copies)
    order = [None, ["new0"], ["new0", "new1"], ["new0", "new1", "new2"], ["new1", "new2"]]
    assert states[-1] == order[-1]
    assert states == [state for state in order if state in states]


def script(directory):
    """Two runs, as a script has them that can be started again."""
    ens = new_run(directory)
    for _ in range(2):
        fit(ens, resume=True)
    return ens


def test_a_script_goes_on_from_wherever_it_was_killed(tmp_path):
    copies = tmp_path / "copies"
    copies.mkdir()
    with copied_at_every_step(tmp_path / "ensemble", copies):
        expected = member_weights(script(tmp_path / "ensemble"))
    states = {}
    for path in sorted(copies.iterdir()):
        found = {name: what for name, what in contents(path).items() if "writing-" not in name}
        states[repr(found)] = path
    assert len(states) > 20
    for path in states.values():
        assert same(member_weights(script(path)), expected)


def test_a_file_that_lost_its_manifest_is_not_taken_for_a_killed_writers(made):
    (made.directory / MANIFEST).unlink()
    before = contents(made.directory)
    with pytest.raises(ValueError, match="holds something already"):
        fit(new_run(made.directory), resume=True)
    assert contents(made.directory) == before


def test_an_overwrite_that_is_killed_leaves_the_old_or_the_new(made, tmp_path, reference):
    copies = tmp_path / "copies"
    copies.mkdir()
    ens = new_run(made.directory)
    with copied_at_every_step(made.directory, copies):
        fit(ens, overwrite=True)
    states = states_in_copies(reference, copies)
    new = ["new0", "new1", "new2"]
    assert states == [["old0", "old1", "old2"], new[:1], new[:2], new]


def test_a_save_that_is_killed_leaves_the_old_or_the_new(made, tmp_path, reference):
    copies = tmp_path / "copies"
    copies.mkdir()
    ens = new_run(None)
    fit(ens)
    with copied_at_every_step(made.directory, copies):
        ens.save(made.directory, overwrite=True)
    states = states_in_copies(reference, copies)
    assert states == [["old0", "old1", "old2"], ["new0", "new1", "new2"]]


# Files that are not what was written


def load_and_use(directory, **arguments):
    return SnapshotEnsemble.load(directory, **arguments).predict(X, verbose=0)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def alter(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def replace_by_a_directory(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "harm", [truncate, empty, alter, lengthen, pathlib.Path.unlink, replace_by_a_directory]
)
def test_a_harmed_file_is_refused_by_name(made, tmp_path, harm):
    for entry in file_entries(manifest_of(made.directory)):
        directory = tmp_path / f"harmed-{entry['name']}"
        shutil.copytree(made.directory, directory)
        harm(directory / entry["name"])
        use = load_and_use
        if entry["name"].startswith("state-"):
            # No prediction depends on it.
            np.testing.assert_array_equal(load_and_use(directory), made.predictions)

            def use(directory):
                fit(ensemble(directory), resume=True)

        with pytest.raises(SnapshotError, match=re.escape(str(directory / entry["name"]))):
            use(directory)


def test_swapped_files_are_refused_by_name(made):
    first, second, _ = weight_files(made.directory)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(SnapshotError, match=f"{first.name}|{second.name}"):
        load_and_use(made.directory)


def test_a_harmed_member_does_not_keep_the_others_from_use(made):
    harmed = weight_files(made.directory)[0]
    alter(harmed)
    match = rf"{re.escape(str(harmed))}.*The other 2 of 3 snapshots.*`skip_damaged=True`"
    with pytest.raises(SnapshotError, match=match):
        SnapshotEnsemble.load(made.directory)
    with pytest.warns(UserWarning, match=rf"without what is damaged: .*{re.escape(harmed.name)}"):
        loaded = SnapshotEnsemble.load(made.directory, skip_damaged=True)
    assert same(member_weights(loaded), made.weights[1:])
    assert [(s.index, s.cycle) for s in loaded.snapshots] == [(0, 1), (1, 2)]
    loaded.weights = [0.5, 0.5]  # Which writes the manifest.
    assert harmed.exists()
    assert same(member_weights(SnapshotEnsemble.load(made.directory)), made.weights[1:])


def test_with_every_member_harmed_nothing_is_loaded(made):
    for path in weight_files(made.directory):
        alter(path)
    with pytest.raises(SnapshotError, match="snapshot-") as caught:
        SnapshotEnsemble.load(made.directory, skip_damaged=True)
    assert "skip_damaged" not in str(caught.value)


def test_files_that_no_manifest_names_are_not_read(made):
    shutil.copy(weight_files(made.directory)[0], made.directory / "snapshot-9999.weights.h5")
    np.testing.assert_array_equal(load_and_use(made.directory), made.predictions)


def test_another_models_snapshots_are_refused_by_name(made):
    other = compiled(layers=[keras.layers.Dense(5, "relu")])
    with pytest.raises(SnapshotError, match=r"snapshot-0001\.weights\.h5"):
        load_and_use(made.directory, model=other)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"torn", id="garbage"),
        pytest.param(b"\xff\xfe\x00", id="no text"),
        pytest.param(b"[" * 100_000, id="nested without end"),
        pytest.param(b"null", id="null"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"3", id="number"),
        pytest.param(b"{}", id="nothing in it"),
        pytest.param(b'{"format": "something else", "version": 1}', id="of something else"),
        pytest.param(b'{"format": "snapshot_ensemble", "version": 1}', id="of nothing"),
    ],
)
def test_a_manifest_that_is_none_is_refused_by_name(made, content):
    (made.directory / MANIFEST).write_bytes(content)
    with pytest.raises(SnapshotError, match=re.escape(str(made.directory / MANIFEST))):
        load_and_use(made.directory)


def test_a_torn_manifest_is_refused_by_name(made):
    content = (made.directory / MANIFEST).read_bytes()
    for length in np.linspace(1, len(content) - 1, 20, dtype=int):
        (made.directory / MANIFEST).write_bytes(content[:length])
        with pytest.raises(SnapshotError, match=MANIFEST):
            load_and_use(made.directory)


@pytest.mark.parametrize("path", ["", "missing", "notes.txt"])
def test_a_place_without_an_ensemble_is_refused_by_name(tmp_path, path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SnapshotError, match=re.escape(str(tmp_path / path / MANIFEST))):
        SnapshotEnsemble.load(tmp_path / path)


@pytest.mark.parametrize("version", [2, 99, "2", None, 0])
def test_another_version_is_refused_by_name(made, version):
    manifest = manifest_of(made.directory)
    manifest["version"] = version
    write_manifest(made.directory, manifest)
    match = rf"{MANIFEST}.*version {version!r}.*Update snapshot-ensemble"
    with pytest.raises(SnapshotError, match=match):
        load_and_use(made.directory)


@pytest.mark.parametrize(
    "name", ["../secret", "{outside}/secret", "..", ".", "", "sub/secret", "sec\0ret", "sec\ud800"]
)
@pytest.mark.parametrize("place", ["model", "snapshots"])
def test_a_file_name_that_leads_outside_is_refused(made, tmp_path, name, place):
    manifest = manifest_of(made.directory)
    entry = file_entries(manifest[place])[0]
    # What lies there is the right file, so that only its name can be at fault.
    (made.directory / "sub").mkdir()
    for target in (tmp_path / "secret", made.directory / "sub" / "secret"):
        shutil.copy(made.directory / entry["name"], target)
    entry["name"] = name.format(outside=tmp_path)
    write_manifest(made.directory, manifest)
    with pytest.raises(SnapshotError, match=MANIFEST):
        load_and_use(made.directory)


def with_node(node, path, value):
    """A copy of a JSON value with another value at a path."""
    if not path:
        return value
    node = copy.copy(node)
    node[path[0]] = with_node(node[path[0]], path[1:], value)
    return node


def paths_of(node, path=()):
    """The paths of all nodes of a JSON value."""
    yield path
    if isinstance(node, list):
        node = dict(enumerate(node))
    if isinstance(node, dict):
        for key, child in node.items():
            yield from paths_of(child, (*path, key))


ANYTHING = [None, True, -1, 1.5, math.inf, "x", [], {}, [1], ["x"], {"x": 1}]
WRONG = {
    ("snapshots",): [None, True, -1, "x", {}, [1], {"x": 1}],
    ("snapshots", 0): [None, True, -1, "x", [], {}, [1], {"x": 1}],
    ("snapshots", 0, "file"): ANYTHING,
    ("snapshots", 0, "file", "size"): [None, math.inf, math.nan, "x", [], {}],
    ("snapshots", 0, "file", "name"): [None, True, -1, [], {}],
    ("snapshots", 0, "epoch"): ["x", [], {}, 1.5],
    ("snapshots", 0, "metrics"): [None, True, 1, "x", [], [1], {"loss": None}, {"loss": "x"}],
    ("model",): [True, -1, "x", "", [], {}, [1], {"x": 1}],
    ("written",): [None, -1, "x", [], {}, math.inf],
    ("replacing",): [None, 0, "x", [], {}],
    ("state",): [True, -1, "x", "", [], {}, [1], {"x": 1}],
    ("ensemble", "temperature"): [None, True, 0, -1, math.inf, "x", [], {}],
    ("ensemble",): [None, True, -1, "x", [], {}, [1], {"x": 1}],
    ("ensemble", "settings"): [None, True, -1, "x", [], {}, [1], {"x": 1}],
    ("ensemble", "settings", "cycles"): [None, True, 0, -1, 1.5, "x", [], {}],
    ("ensemble", "settings", "lr_init"): [True, -1, "x", [], {}, math.inf],
    ("ensemble", "settings", "schedule"): [True, 1, "x", [1], {"x": 1}, {"cycle_length": 0}],
    ("ensemble", "settings", "max_snapshots"): [True, 0, 1.5, "x", [], {}],
    ("ensemble", "settings", "task"): [1, "x", ["x"], ["regression"] * 3],
    ("ensemble", "weights"): [True, 1, "x", [], {}, [1], [0.5, 0.5, 0.5], [-1, 1, 1], ["x"] * 3],
    ("ensemble", "history"): [None, True, 1, "x", [], [1]],
    ("ensemble", "history", "loss"): [None, True, 1, "x", {}, ["x"], [{}]],
    ("ensemble", "done"): [None, True, 1, "x", [], {}, {"x": 1}],
    ("ensemble", "done", "epochs"): [None, -1, 1.5, "x", [], {}],
}


@pytest.mark.parametrize("path", WRONG, ids=lambda path: ".".join(map(str, path)))
def test_a_wrong_value_in_a_manifest_is_refused_by_name(made, path):
    model, manifest, wrong = compiled(), manifest_of(made.directory), []
    for value in WRONG[path]:
        write_manifest(made.directory, with_node(manifest, path, value))
        try:
            SnapshotEnsemble.load(made.directory, model=model)
        except SnapshotError as error:
            if MANIFEST not in str(error):
                wrong.append((value, str(error)))
        except Exception as error:
            wrong.append((value, repr(error)))
        else:
            wrong.append((value, "loaded"))
    assert wrong == []


def test_no_manifest_gives_any_other_error(made):
    model, manifest = compiled(), manifest_of(made.directory)
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    values = st.recursive(
        scalars,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        ),
        max_leaves=5,
    )

    @settings(deadline=None, database=None, max_examples=60)
    @given(path=st.sampled_from(list(paths_of(manifest))[1:]), value=values)
    def check(path, value):
        write_manifest(made.directory, with_node(manifest, path, value))
        with contextlib.suppress(SnapshotError):
            SnapshotEnsemble.load(made.directory, model=model)

    check()


def test_a_manifest_that_was_altered_is_refused_or_means_the_same(made):
    path = made.directory / MANIFEST
    text, model = path.read_bytes(), compiled()

    @settings(deadline=None, database=None, max_examples=60)
    @given(at=st.integers(0, len(text) - 1), value=st.integers(0, 255), cut=st.booleans())
    def check(at, value, cut):
        path.write_bytes(text[:at] + (b"" if cut else bytes([value])) + text[at + 1 :])
        with contextlib.suppress(SnapshotError):
            loaded = SnapshotEnsemble.load(made.directory, model=model)
            np.testing.assert_array_equal(loaded.predict(X, verbose=0), made.predictions)

    check()


# Models that are not made of Keras alone


class NoConfig(keras.Model):
    """A subclass that Keras cannot make again from a file."""

    def __init__(self, something):
        super().__init__()
        self.dense = keras.layers.Dense(3, "softmax")
        self.something = something

    def call(self, inputs):
        return self.dense(inputs)


def no_config(optimizer="sgd"):
    model = NoConfig(open)
    model.compile(optimizer, "sparse_categorical_crossentropy", run_eagerly=True)
    model(X[:1])
    return model


@pytest.fixture
def without_model(tmp_path):
    """An ensemble whose directory holds snapshots only."""
    with pytest.warns(UserWarning, match=r"cannot be saved, only its snapshots.*(?s:.)*`model=`"):
        return fitted(tmp_path / "ensemble", model=no_config())


def test_a_model_that_cannot_be_saved_is_needed_for_loading(without_model):
    with pytest.raises(SnapshotError, match=rf"{MANIFEST}.*could not be saved.*`model=`"):
        SnapshotEnsemble.load(without_model.directory)


def test_a_model_that_cannot_be_saved_may_be_given(without_model):
    model = no_config()
    optimizer, own = model.optimizer, model.get_weights()
    loaded = SnapshotEnsemble.load(without_model.directory, model=model)
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), without_model.predict(X, verbose=0))
    assert loaded.model is model
    assert model.optimizer is optimizer
    assert same(model.get_weights(), own)


def test_a_model_that_cannot_be_saved_is_told_of_by_save_too(tmp_path):
    ens = fitted(model=no_config())
    with pytest.warns(UserWarning, match="cannot be saved, only its snapshots"):
        ens.save(tmp_path / "ensemble")
    loaded = SnapshotEnsemble.load(tmp_path / "ensemble", model=no_config())
    assert same(member_weights(loaded), member_weights(ens))


def test_a_given_model_must_be_compiled(made):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax")])
    with pytest.raises(ValueError, match="must be compiled"):
        SnapshotEnsemble.load(made.directory, model=model)


def test_a_given_model_must_be_built(without_model):
    model = NoConfig(open)
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    with pytest.raises((ValueError, SnapshotError), match="built"):
        load_and_use(without_model.directory, model=model)


def test_a_lambda_as_loss_needs_the_model_for_loading(tmp_path):
    def with_lambda():
        return compiled(loss=lambda y, p: keras.ops.sum((keras.ops.one_hot(y, 3) - p) ** 2, -1))

    with pytest.warns(UserWarning, match="lambda"):
        ens = fitted(tmp_path / "ensemble", model=with_lambda())
    with pytest.raises(SnapshotError, match=r"(?s)\.keras'.*cannot be loaded.*`model=`"):
        SnapshotEnsemble.load(ens.directory)
    loaded = SnapshotEnsemble.load(ens.directory, model=with_lambda())
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), ens.predict(X, verbose=0))


class Scale(keras.layers.Layer):
    def build(self, shape):
        self.factor = self.add_weight(shape=shape[1:], initializer="ones")

    def call(self, inputs):
        return self.factor * inputs


def test_a_layer_of_ones_own_is_found_in_custom_objects(tmp_path):
    ens = fitted(tmp_path / "ensemble", model=compiled(layers=[Scale()]))
    with pytest.raises(SnapshotError, match=r"(?s)\.keras'.*Scale.*`custom_objects=`"):
        SnapshotEnsemble.load(ens.directory)
    loaded = SnapshotEnsemble.load(ens.directory, custom_objects={"Scale": Scale})
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), ens.predict(X, verbose=0))


def test_code_in_a_file_is_refused_and_not_run(tmp_path):
    marker = str(tmp_path / "was-run")

    def doubled(t):
        __import__("pathlib").Path(marker).touch()
        return 2 * t

    doubled.__name__ = "<lambda>"  # What Keras goes by when it writes code into a file.
    layer = keras.layers.Lambda(doubled, output_shape=(4,))
    ens = fitted(tmp_path / "ensemble", model=compiled(layers=[layer]))
    (entry,) = file_entries(manifest_of(ens.directory)["model"])
    pathlib.Path(marker).unlink()
    with pytest.raises(SnapshotError, match=r"(?s)\.keras'.*disallowed"):
        SnapshotEnsemble.load(ens.directory)
    assert not pathlib.Path(marker).exists()
    # Whoever trusts the file can run it: there is code in it indeed.
    path = ens.directory / entry["name"]
    keras.models.load_model(path, safe_mode=False, compile=False)(X)
    assert pathlib.Path(marker).exists()
