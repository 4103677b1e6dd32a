"""What `fit` writes to a directory, and when."""

import pathlib
import zipfile

import h5py
import keras
import numpy as np
import pytest
from models import SimulatedCrashError, assert_same, classifier, member_weights, same
from storage_cases import (
    LOCK,
    MANIFEST,
    X,
    Y,
    crash,
    each_epoch,
    ensemble,
    file_entries,
    fit,
    fitted,
    manifest_of,
    weight_files,
)

from snapshot_ensemble import SnapshotEnsemble, SnapshotError


def numbers_in(node):
    """The number of values in an HDF5 file or group."""
    return node.size if isinstance(node, h5py.Dataset) else sum(map(numbers_in, node.values()))


# What `fit` writes


@pytest.mark.parametrize("as_type", [str, pathlib.Path])
def test_the_directory_is_created_with_its_parents(tmp_path, as_type):
    directory = tmp_path / "some" / "where"
    ens = fitted(as_type(directory))
    assert ens.directory == directory
    assert len(SnapshotEnsemble.load(as_type(directory))) == 3


def test_nothing_is_written_before_the_first_snapshot(tmp_path):
    directory = tmp_path / "ensemble"
    ens = ensemble(directory)
    ens.plan(6)
    assert not directory.exists()


def test_weight_files_hold_only_weights(tmp_path):
    ens = fitted(tmp_path / "ensemble", model=classifier("adam"))
    for path in weight_files(ens.directory):
        with h5py.File(path) as file:
            assert "optimizer" not in file
            assert numbers_in(file) == ens.model.count_params()


def test_the_model_file_holds_no_optimizer_slots(tmp_path):
    ens = fitted(tmp_path / "ensemble", model=classifier("adam"))
    (entry,) = file_entries(manifest_of(ens.directory)["model"])
    with zipfile.ZipFile(ens.directory / entry["name"]) as archive:
        with archive.open("model.weights.h5") as inner, h5py.File(inner) as file:
            assert "optimizer" not in file


def test_keras_alone_reads_the_files(made):
    (entry,) = file_entries(manifest_of(made.directory)["model"])
    model = keras.models.load_model(made.directory / entry["name"], compile=False)
    for path, weights in zip(weight_files(made.directory), made.weights, strict=True):
        model.load_weights(path)
        assert_same(model.get_weights(), weights)


def test_members_can_be_loaded_as_soon_as_their_cycle_has_ended(tmp_path):
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
        SnapshotEnsemble.load(directory)  # Waits for what is being written in the background.
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
    assert_same(member_weights(loaded), member_weights(ens))


@pytest.mark.slow
def test_disk_equals_memory(tmp_path):
    actual = []
    for directory in (None, tmp_path / "ensemble"):
        keras.utils.set_random_seed(1)
        layers = [keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)]
        ens = ensemble(directory, model=classifier("adam", layers), cycles=2)
        fit(ens, epochs=2)
        actual.append(ens.predict(X, verbose=0))
        fit(ens, epochs=2)  # Predicting in between must not affect training either.
        actual.append(ens.predict(X, verbose=0))
        actual.append(member_weights(ens))
    assert_same(actual[:3], actual[3:])


# A second `fit`


def test_a_fit_after_loading_adds_in_place(made):
    loaded = SnapshotEnsemble.load(made.directory)
    fit(loaded, epochs=6)
    again = SnapshotEnsemble.load(made.directory)
    assert len(loaded) == len(again) == 6
    assert_same(member_weights(again)[:3], made.weights)
    assert_same(member_weights(again), member_weights(loaded))
    assert [snapshot.cycle for snapshot in again.snapshots] == list(range(6))
    assert [snapshot.epoch for snapshot in again.snapshots] == [0, 1, 2, 4, 6, 8]
    assert [snapshot.step for snapshot in again.snapshots] == [1, 2, 3, 5, 7, 9]
    assert again.history["cycle"] == [0, 1, 2, 3, 3, 4, 4, 5, 5]


def test_a_fit_after_loading_continues_from_the_last_snapshot(made):
    loaded = SnapshotEnsemble.load(made.directory)
    expected = classifier("sgd")
    expected.set_weights(made.weights[-1])
    expected.optimizer.learning_rate = 0.5
    expected.fit(X, Y, epochs=1, verbose=0)
    fit(loaded)
    for one, other in zip(loaded[3].get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def test_member_weights_on_disk_are_reset_when_the_members_change(made):
    ens, counts = SnapshotEnsemble.load(made.directory), []
    ens.weights = [0.125, 0.375, 0.5]

    def look(epoch):
        counts.append(len(SnapshotEnsemble.load(made.directory)))

    fit(ens, callbacks=[each_epoch(look)])
    assert counts == [4, 5, 6]
    assert SnapshotEnsemble.load(made.directory).weights is None


def test_an_interrupted_fit_keeps_its_finished_members(made):
    ens = SnapshotEnsemble.load(made.directory)
    with pytest.raises(SimulatedCrashError):
        fit(ens, epochs=6, callbacks=[each_epoch(lambda e: crash() if e == 2 else None)])
    assert len(ens) == 4
    again = SnapshotEnsemble.load(made.directory)
    assert_same(member_weights(again), member_weights(ens))
    assert again.snapshots == ens.snapshots


def test_the_history_on_disk_has_the_epochs_of_an_interrupted_fit(made):
    ens = SnapshotEnsemble.load(made.directory)
    with pytest.raises(SimulatedCrashError):
        fit(ens, epochs=6, callbacks=[each_epoch(lambda e: crash() if e == 2 else None)])
    assert len(ens.history["loss"]) == 6
    assert SnapshotEnsemble.load(made.directory).history == ens.history
