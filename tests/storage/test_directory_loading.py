"""`load` returns the same ensemble bit for bit, with its settings and history."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from models import assert_same, classifier, member_weights
from storage_cases import (
    MANIFEST,
    X,
    Y,
    contents,
    each_epoch,
    ensemble,
    fit,
    fitted,
    strict_json,
    weight_files,
)

from snapshot_ensemble import CosineAnnealing, SnapshotEnsemble


def test_an_ensemble_is_equal_bit_for_bit_after_loading(made):
    loaded = SnapshotEnsemble.load(made.directory)
    assert_same(member_weights(loaded), made.weights)
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), made.predictions)


def test_an_ensemble_in_memory_is_equal_bit_for_bit_after_saving_and_loading(tmp_path):
    ens = fitted()
    ens.weights = [0.5, 0.25, 0.25]
    own = ens.model.get_weights()
    ens.save(tmp_path / "ensemble")
    loaded = SnapshotEnsemble.load(tmp_path / "ensemble")
    assert_same(member_weights(loaded), member_weights(ens))
    assert_same(ens.model.get_weights(), own)
    for combine in ("mean", "vote", "weighted"):
        np.testing.assert_array_equal(
            loaded.predict(X, combine=combine, verbose=0),
            ens.predict(X, combine=combine, verbose=0),
        )
    assert loaded.history == ens.history
    assert loaded.snapshots == ens.snapshots
    np.testing.assert_array_equal(loaded.weights, ens.weights)


NEW_PROCESS = """
import sys
import numpy as np
from snapshot_ensemble import SnapshotEnsemble

directory, data, out = sys.argv[1:]
ens = SnapshotEnsemble.load(directory)
combined = {c: ens.predict(np.load(data), combine=c, verbose=0) for c in ("mean", "vote")}
np.savez(out, members=ens.predict_members(np.load(data), verbose=0), **combined)
"""


@pytest.mark.slow
def test_a_new_process_predicts_the_same_bit_for_bit(tmp_path, model):
    ens = fitted(tmp_path / "ensemble", model=model)
    np.save(tmp_path / "x.npy", X)
    paths = [str(tmp_path / name) for name in ("ensemble", "x.npy", "out.npz")]
    subprocess.run([sys.executable, "-c", NEW_PROCESS, *paths], check=True, cwd=tmp_path)
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
    assert_same(loaded.model.get_weights(), made.weights[-1])


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "arguments",
    [
        {"cycles": 4, "lr_init": 0.25, "lr_min": 0.125, "max_snapshots": 2},
        {"cycles": 2, "lr_init": None, "task": "multiclass"},
        {"lr_init": None, "schedule": CosineAnnealing(1, 2.0, 0.5, 0.01, 0.9), "cycles": 5},
        {"lr_init": None, "schedule": CosineAnnealing(3, warmup=1), "cycles": 5},
    ],
)
def test_the_settings_are_loaded(tmp_path, arguments):
    ens = ensemble(tmp_path / "ensemble", **arguments)
    fit(ens, epochs=4)
    loaded = SnapshotEnsemble.load(ens.directory)
    assert loaded.plan(13) == ens.plan(13)
    assert loaded.max_snapshots == ens.max_snapshots
    assert loaded.task == ens.task
    assert type(loaded.schedule) is type(ens.schedule)
    assert loaded.directory == ens.directory


def test_snapshots_from_weight_files_are_saved_and_loaded(made, tmp_path):
    ens = SnapshotEnsemble.from_weights(classifier(), weight_files(made.directory))
    ens.save(tmp_path / "saved")
    loaded = SnapshotEnsemble.load(tmp_path / "saved")
    assert loaded.snapshots == ens.snapshots
    assert_same(member_weights(loaded), made.weights)


def not_a_number(y_true, y_pred):
    return keras.ops.mean(y_pred) * float("nan")


def infinite(y_true, y_pred):
    return keras.ops.mean(y_pred) + float("inf")


def minus_infinite(y_true, y_pred):
    return keras.ops.mean(y_pred) - float("inf")


def test_nan_and_infinity_are_saved_and_loaded(tmp_path):
    metrics = [not_a_number, infinite, minus_infinite]
    expected = {"not_a_number": np.nan, "infinite": np.inf, "minus_infinite": -np.inf}
    ens = fitted(tmp_path / "ensemble", model=classifier(metrics=metrics))
    strict_json((ens.directory / MANIFEST).read_text("utf-8"))
    loaded = SnapshotEnsemble.load(
        ens.directory, custom_objects={metric.__name__: metric for metric in metrics}
    )
    for name, value in expected.items():
        np.testing.assert_array_equal(loaded.history[name], [value] * 3)
        actual = [snapshot.metrics[name] for snapshot in loaded.snapshots]
        np.testing.assert_array_equal(actual, [value] * 3)
    assert loaded.history["loss"] == ens.history["loss"]


def test_gaps_in_the_history_are_saved_and_loaded(tmp_path):
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


@pytest.mark.sampled(3, 2)
@pytest.mark.parametrize("saved", ["by fit", "in a callback"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_loaded_model_has_the_rate_that_it_was_compiled_with(tmp_path, optimizer, saved):
    optimizer = OPTIMIZERS[optimizer]
    actual = []
    directory = tmp_path / "ensemble" if saved == "by fit" else None
    ens = ensemble(directory, model=classifier(optimizer()), cycles=2)

    def load(epoch):
        directory = ens.directory or tmp_path / f"saved-{epoch}"
        if ens.directory is None:
            ens.save(directory)
        actual.append(SnapshotEnsemble.load(directory))

    fit(ens, epochs=2, callbacks=[each_epoch(load)])
    load(2)
    expected = keras.optimizers.serialize(optimizer())
    for loaded in actual:
        assert keras.optimizers.serialize(loaded.model.optimizer) == expected
    assert keras.optimizers.serialize(ens.model.optimizer) == expected


def test_saving_during_training_does_not_affect_training(tmp_path):
    actual = []
    for saves in (False, True):
        keras.utils.set_random_seed(1)
        ens = ensemble(model=classifier("adam"))

        def save(epoch, ens=ens, saves=saves):
            if saves:
                ens.save(tmp_path / f"saved-{epoch}")

        history = fit(ens, callbacks=[each_epoch(save)]).history
        actual.append([member_weights(ens), history["learning_rate"]])
    assert_same(*actual)
