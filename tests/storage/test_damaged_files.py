"""Files that are damaged, swapped or missing are refused by name."""

import pathlib
import re
import shutil

import keras
import numpy as np
import pytest
from models import assert_same, classifier, member_weights
from storage_cases import ensemble, file_entries, fit, load_and_use, manifest_of, weight_files

from snapshot_ensemble import SnapshotEnsemble, SnapshotError


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


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "damage", [truncate, empty, alter, lengthen, pathlib.Path.unlink, replace_by_a_directory]
)
def test_a_damaged_file_is_refused_by_name(made, tmp_path, damage):
    for entry in file_entries(manifest_of(made.directory)):
        directory = tmp_path / f"damaged-{entry['name']}"
        shutil.copytree(made.directory, directory)
        damage(directory / entry["name"])
        use = load_and_use
        if entry["name"].startswith("state-"):
            # Predictions do not depend on the state.
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


def test_with_skip_damaged_the_other_members_are_loaded(made):
    damaged = weight_files(made.directory)[0]
    alter(damaged)
    match = rf"{re.escape(str(damaged))}.*The other 2 of 3 snapshots.*`skip_damaged=True`"
    with pytest.raises(SnapshotError, match=match):
        SnapshotEnsemble.load(made.directory)
    with pytest.warns(
        UserWarning, match=rf"without damaged snapshots: .*{re.escape(damaged.name)}"
    ):
        loaded = SnapshotEnsemble.load(made.directory, skip_damaged=True)
    assert_same(member_weights(loaded), made.weights[1:])
    assert [(s.index, s.cycle) for s in loaded.snapshots] == [(0, 1), (1, 2)]
    loaded.weights = [0.5, 0.5]  # Writes the manifest.
    assert damaged.exists()
    assert_same(member_weights(SnapshotEnsemble.load(made.directory)), made.weights[1:])


def test_if_all_members_are_damaged_nothing_is_loaded(made):
    for path in weight_files(made.directory):
        alter(path)
    with pytest.raises(SnapshotError, match="snapshot-") as caught:
        SnapshotEnsemble.load(made.directory, skip_damaged=True)
    assert "skip_damaged" not in str(caught.value)


def test_files_that_no_manifest_names_are_not_read(made):
    shutil.copy(weight_files(made.directory)[0], made.directory / "snapshot-9999.weights.h5")
    np.testing.assert_array_equal(load_and_use(made.directory), made.predictions)


def test_another_models_snapshots_are_refused_by_name(made):
    other = classifier(inside=[keras.layers.Dense(5, "relu")])
    with pytest.raises(SnapshotError, match=r"snapshot-0001-\w+\.weights\.h5"):
        load_and_use(made.directory, model=other)
