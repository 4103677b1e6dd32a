"""`from_weights`: ensembles of existing weight files."""

import keras
import numpy as np
import pytest
from ensemble_cases import WEIGHTS, X, fit
from models import assert_same, classifier, member_weights

from snapshot_ensemble import (
    Snapshot,
    SnapshotEnsemble,
    SnapshotError,
)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Three files of weights."""
    directory, model = tmp_path_factory.mktemp("files"), classifier()
    files = [directory / f"{i}.weights.h5" for i in range(3)]
    for path, weights in zip(files, WEIGHTS, strict=True):
        model.set_weights(weights)
        model.save_weights(path)
    return files


def test_weight_files_become_members(paths):
    model = classifier()
    own, optimizer = model.get_weights(), model.optimizer
    ens = SnapshotEnsemble.from_weights(model, paths)
    assert ens.snapshots == [Snapshot(0), Snapshot(1), Snapshot(2)]
    assert_same(member_weights(ens), WEIGHTS)
    assert_same([model.get_weights()], [own])
    assert model.optimizer is optimizer


def test_weight_files_are_combined_like_snapshots(paths):
    ens = SnapshotEnsemble.from_weights(classifier(), paths)
    outputs = []
    for path in paths:
        plain = classifier()
        plain.load_weights(path)
        outputs.append(plain.predict(X, verbose=0))
    np.testing.assert_allclose(ens.predict(X, verbose=0), np.mean(outputs, axis=0), rtol=1e-5)


@pytest.mark.parametrize("wrap", [list, tuple, iter, lambda paths: map(str, paths)])
def test_weight_files_come_in_any_sequence(paths, wrap):
    assert len(SnapshotEnsemble.from_weights(classifier(), wrap(paths))) == 3


def test_the_same_file_twice_is_two_members(paths):
    assert len(SnapshotEnsemble.from_weights(classifier(), [paths[0], paths[0]])) == 2


def test_members_from_files_are_added_to_by_fit(paths):
    ens = SnapshotEnsemble.from_weights(classifier(), paths, cycles=2, lr_init=0.5)
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
def test_anything_but_a_list_of_weight_files_is_refused(given):
    with pytest.raises(ValueError, match=r"`paths` must be a list of weight files.*paths="):
        SnapshotEnsemble.from_weights(classifier(), given)


def test_a_single_path_is_refused(paths):
    with pytest.raises(ValueError, match=r"`paths` must be a list of weight files.*0\.weights\.h5"):
        SnapshotEnsemble.from_weights(classifier(), paths[0])


def test_weight_files_need_a_model_that_is_built(paths):
    model = keras.Sequential([keras.layers.Dense(3, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match=r"`model` must be built.*Call it on a batch first"):
        SnapshotEnsemble.from_weights(model, paths)


def test_weight_files_need_a_model_with_weights(paths):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Rescaling(2.0)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"`model` must have weights.*model='seq.*has none"):
        SnapshotEnsemble.from_weights(model, paths)


def test_weight_files_need_a_model_that_is_compiled(paths):
    with pytest.raises(ValueError, match="`model` must be compiled"):
        SnapshotEnsemble.from_weights(
            keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax")]), paths
        )


def test_weight_files_are_not_copied_into_a_directory(paths, tmp_path):
    with pytest.raises(ValueError, match=r"holds the weights in memory.*`save\(directory\)`"):
        SnapshotEnsemble.from_weights(classifier(), paths, directory=tmp_path / "ensemble")
    assert not (tmp_path / "ensemble").exists()


def test_a_file_that_is_missing_is_named(paths, tmp_path):
    with pytest.raises(SnapshotError, match=r"missing\.weights\.h5"):
        SnapshotEnsemble.from_weights(classifier(), [*paths, tmp_path / "missing.weights.h5"])
