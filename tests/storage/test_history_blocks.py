"""A long history: the same cost at each epoch, and the same values when read."""

import json

import keras
import numpy as np
import pytest
from storage_cases import MANIFEST, contents, manifest_of

from snapshot_ensemble import SnapshotEnsemble, SnapshotError
from snapshot_ensemble.storage import history_blocks
from snapshot_ensemble.storage.directory import DirectoryStore
from snapshot_ensemble.storage.manifest import Manifest

X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
Y = np.arange(8) % 3


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(history_blocks, "EPOCHS", 4)


def ensemble(directory, cycles=2, **arguments):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    return SnapshotEnsemble(model, cycles=cycles, lr_init=0.1, directory=directory, **arguments)


def fit(ens, epochs=10, **arguments):
    return ens.fit(X, Y, epochs=epochs, batch_size=8, verbose=0, **arguments)


class Stop(keras.callbacks.Callback):
    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_loaded_history_is_the_same(tmp_path):
    ens = ensemble(tmp_path / "run")
    fit(ens)
    fit(ens)
    assert len(list((tmp_path / "run").glob("history-*.json"))) == 5
    manifest = manifest_of(tmp_path / "run")
    assert manifest["version"] == 2
    assert len(manifest["history"]) == 5
    assert not any(map(len, manifest["ensemble"]["history"].values()))
    loaded = SnapshotEnsemble.load(tmp_path / "run")
    assert loaded.history == ens.history
    loaded.save(tmp_path / "copy")
    assert SnapshotEnsemble.load(tmp_path / "copy").history == ens.history
    fit(ens, overwrite=True, epochs=2)
    assert not list((tmp_path / "run").glob("history-*.json"))
    assert manifest_of(tmp_path / "run")["version"] == 1


@pytest.mark.sampled(6, 2)
@pytest.mark.parametrize(("stop", "every"), [(3, 1), (4, 1), (5, 1), (8, 1), (5, 3), (9, 3)])
def test_a_resumed_history_is_that_of_an_uninterrupted_run(tmp_path, stop, every):
    expected = ensemble(None)
    fit(expected)
    with pytest.raises(KeyboardInterrupt):
        fit(ensemble(tmp_path / "run"), callbacks=[Stop(stop)], save_every=every)
    ens = ensemble(tmp_path / "run")
    history = fit(ens, resume=True, save_every=every)
    assert ens.history == expected.history
    assert len(history.history["loss"]) == 10
    loaded = SnapshotEnsemble.load(tmp_path / "run")
    assert loaded.history == expected.history


@pytest.mark.slow
def test_a_new_column_is_in_all_blocks(tmp_path):
    ens = ensemble(tmp_path / "run")
    fit(ens)
    fit(ens, validation_data=(X, Y))
    assert ens.history["val_loss"][:10] == [None] * 10
    assert SnapshotEnsemble.load(tmp_path / "run").history == ens.history
    files = list((tmp_path / "run").glob("history-*.json"))
    assert len(files) == 5  # Those without the column are gone.
    assert all("val_loss" in json.loads(file.read_text("utf-8")) for file in files)


def test_a_damaged_block_is_named(tmp_path):
    fit(ensemble(tmp_path / "run"))
    block = min((tmp_path / "run").glob("history-*.json"))
    block.write_bytes(block.read_bytes()[:-1])
    with pytest.raises(SnapshotError, match=block.name):
        SnapshotEnsemble.load(tmp_path / "run")


def test_inspect_lists_blocks(tmp_path):
    fit(ensemble(tmp_path / "run"))
    names = [entry["name"] for entry in DirectoryStore.open(tmp_path / "run").inspect()["files"]]
    assert sum(name.startswith("history-") for name in names) == 2
    assert sorted(names) == sorted(name for name in contents(tmp_path / "run") if name != MANIFEST)


@pytest.mark.slow
def test_what_an_epoch_writes_does_not_grow(tmp_path, monkeypatch):
    """Counted in bytes of the manifests: a time would be noise."""
    monkeypatch.setattr(history_blocks, "EPOCHS", 5)
    sizes, write = [], Manifest.to_json

    def measured(manifest):
        text = write(manifest)
        sizes.append(len(text))
        return text

    monkeypatch.setattr(Manifest, "to_json", measured)
    fit(ensemble(tmp_path / "run", cycles=1), epochs=40)
    assert len(sizes) > 40
    blocks = 8
    assert max(sizes[30:]) < max(sizes[:10]) + blocks * 250  # An entry for each block.
