"""Directories that are not empty: refused, or overwritten without early loss of their files."""

import copy
import shutil

import keras
import numpy as np
import pytest
from models import SimulatedCrashError, assert_same, classifier, member_weights, same
from storage_cases import (
    MANIFEST,
    X,
    contents,
    crash,
    each_epoch,
    ensemble,
    file_entries,
    fit,
    fitted,
    manifest_of,
    weight_files,
)

from snapshot_ensemble import SnapshotEnsemble


def in_memory(directory):
    """An ensemble in memory, with the members of a directory."""
    return SnapshotEnsemble.from_weights(classifier(), weight_files(directory), lr_init=0.5)


@pytest.fixture(params=["a folder", "an ensemble"])
def taken(request, tmp_path, made_once):
    """A directory that is not empty."""
    path = tmp_path / "taken"
    if request.param == "a folder":
        path.mkdir()
        (path / "notes.txt").write_text("mine")
    else:
        shutil.copytree(made_once.directory, path)
    return path


def test_fit_refuses_a_directory_that_is_not_empty(taken, tmp_path):
    before = contents(tmp_path)
    ens = ensemble(taken)
    weights = ens.model.get_weights()
    with pytest.raises(ValueError, match=r"is not empty.*taken.*`overwrite=True`"):
        fit(ens)
    assert contents(tmp_path) == before
    assert_same(ens.model.get_weights(), weights)
    assert len(ens) == 0


def test_save_refuses_a_directory_that_is_not_empty(taken, tmp_path, made_once):
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"is not empty.*taken.*`overwrite=True`"):
        in_memory(made_once.directory).save(taken)
    assert contents(tmp_path) == before


def test_an_empty_directory_is_accepted(tmp_path, made_once):
    in_memory(made_once.directory).save(tmp_path)
    assert len(SnapshotEnsemble.load(tmp_path)) == 3


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_as_directory_is_refused(tmp_path, made_once, overwrite):
    path = tmp_path / "taken"
    path.write_text("something")
    ens = ensemble(path)
    with pytest.raises((OSError, ValueError), match="taken"):
        fit(ens, overwrite=overwrite)
    assert ens.history == {}  # Refused before training, not after the first cycle.
    with pytest.raises((OSError, ValueError), match="taken"):
        in_memory(made_once.directory).save(path, overwrite=overwrite)
    assert path.read_text() == "something"


@pytest.mark.slow
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
    assert_same(seen[0], made.weights)
    assert [len(members) for members in seen[1:]] == [1, 1, 2, 2, 3]
    assert_same(seen[-1], member_weights(ens))
    assert not same(seen[1][0], made.weights[0])


@pytest.mark.parametrize("error", [SimulatedCrashError, KeyboardInterrupt])
def test_an_interrupted_overwrite_keeps_the_old_files(made, error):
    def stop(epoch):
        raise error

    old = contents(made.directory)
    ens = ensemble(made.directory)
    with pytest.raises(error):
        fit(ens, epochs=6, overwrite=True, callbacks=[each_epoch(stop)])
    assert contents(made.directory) == old
    assert len(ens) == 0
    assert ens.history == {}
    with pytest.raises(ValueError, match="is not empty"):
        fit(ens)


def test_an_interrupted_overwrite_of_its_own_members_keeps_them(made):
    ens = SnapshotEnsemble.load(made.directory)
    history = copy.deepcopy(ens.history)
    ens.weights = [0.125, 0.375, 0.5]
    old = contents(made.directory)
    with pytest.raises(SimulatedCrashError):
        fit(ens, epochs=6, overwrite=True, callbacks=[each_epoch(crash)])
    assert contents(made.directory) == old
    assert ens.history == history
    np.testing.assert_array_equal(ens.weights, [0.125, 0.375, 0.5])
    np.testing.assert_array_equal(ens.predict(X, verbose=0), made.predictions)
    fit(ens)
    assert [snapshot.cycle for snapshot in ens.snapshots] == list(range(6))


def test_an_interrupted_overwrite_in_memory_keeps_the_members():
    ens = fitted()
    weights, history = member_weights(ens), copy.deepcopy(ens.history)
    with pytest.raises(SimulatedCrashError):
        fit(ens, epochs=6, overwrite=True, callbacks=[each_epoch(crash)])
    assert_same(member_weights(ens), weights)
    assert ens.history == history
    fit(ens)
    assert len(ens) == 6


@pytest.mark.parametrize("how", ["fit", "save"])
def test_overwriting_removes_the_old_files_and_keeps_foreign_ones(made, how):
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
    actual = contents(made.directory)
    named = {entry["name"] for entry in file_entries(manifest_of(made.directory))}
    assert set(actual) == {MANIFEST, *named, *foreign}
    assert {name: actual[name] for name in foreign} == foreign
    loaded = SnapshotEnsemble.load(made.directory)
    assert_same(member_weights(loaded), member_weights(ens))
    assert loaded.history == ens.history


def test_a_damaged_ensemble_can_be_overwritten(made):
    ens = in_memory(made.directory)
    (made.directory / MANIFEST).write_text("torn")
    ens.save(made.directory, overwrite=True)
    assert_same(member_weights(SnapshotEnsemble.load(made.directory)), member_weights(ens))


def test_overwriting_with_another_architecture(made):
    ens = ensemble(made.directory, model=classifier(inside=[keras.layers.Dense(5, "relu")]))
    fit(ens, overwrite=True)
    loaded = SnapshotEnsemble.load(made.directory)
    assert_same(member_weights(loaded), member_weights(ens))
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
