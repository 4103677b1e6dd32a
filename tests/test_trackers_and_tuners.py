"""Trackers see the learning rate and the cycle of each epoch, and KerasTuner trains ensembles."""

import csv

import keras
import keras_tuner
import numpy as np
import pytest
from models import classifier, three_classes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from snapshot_ensemble import SnapshotEnsemble

X, Y = three_classes(48)
EPOCHS, CYCLES, PEAK = 6, 3, 0.1


def trained(callbacks, **arguments):
    ens = SnapshotEnsemble(classifier(), cycles=CYCLES, lr_init=PEAK)
    arguments = {"validation_data": (X, Y), "batch_size": 24, "verbose": 0, **arguments}
    ens.fit(X, Y, epochs=EPOCHS, callbacks=callbacks, **arguments)
    return ens


def last_rates():
    """The rate of the second of two steps of each epoch: three cycles of two epochs."""
    steps = np.array([1, 3])
    cycle = PEAK / 2 * (1 + np.cos(np.pi * steps / 4))
    return np.tile(cycle, CYCLES)


class Watching(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append((logs["cycle"], logs["learning_rate"]))


def events(directory):
    """The curves in TensorBoard's files: the steps and values by name."""
    # By default, it keeps ten points of a curve.
    accumulator = EventAccumulator(str(directory), {"tensors": 0}).Reload()
    curves = {}
    for tag in accumulator.Tags()["tensors"]:
        read = accumulator.Tensors(tag)
        curves[tag] = [(e.step, make_ndarray(e.tensor_proto).item()) for e in read]
    return curves


@pytest.mark.sampled(2)
@pytest.mark.parametrize("is_first", [True, False])
def test_tensorboard_shows_the_rate_and_the_cycle_of_each_epoch(is_first, tmp_path):
    callbacks = [keras.callbacks.TensorBoard(tmp_path, write_graph=False), Watching()]
    ens = trained(callbacks if is_first else callbacks[::-1])
    curves = events(tmp_path / "train")
    assert [step for step, _ in curves["epoch_cycle"]] == list(range(EPOCHS))
    assert [value for _, value in curves["epoch_cycle"]] == [0, 0, 1, 1, 2, 2]
    rates = [value for _, value in curves["epoch_learning_rate"]]
    np.testing.assert_allclose(rates, last_rates(), rtol=1e-5)
    losses = [value for _, value in curves["epoch_loss"]]
    np.testing.assert_allclose(losses, ens.history["loss"], rtol=1e-6)
    of_validation = [value for _, value in events(tmp_path / "validation")["epoch_loss"]]
    np.testing.assert_allclose(of_validation, ens.history["val_loss"], rtol=1e-6)


def test_a_csv_file_has_the_columns(tmp_path):
    trained([keras.callbacks.CSVLogger(tmp_path / "log.csv")])
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text("utf-8").splitlines()))
    assert [row["cycle"] for row in rows] == list("001122")
    rates = [float(row["learning_rate"]) for row in rows]
    np.testing.assert_allclose(rates, last_rates(), rtol=1e-5)


@pytest.mark.slow
def test_a_checkpoint_can_be_named_after_its_cycle(tmp_path):
    path = str(tmp_path / "cycle{cycle}_epoch{epoch}.weights.h5")
    trained([keras.callbacks.ModelCheckpoint(path, save_weights_only=True)])
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {f"cycle{epoch // 2}_epoch{epoch + 1}.weights.h5" for epoch in range(EPOCHS)}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("wrap", [list, keras.callbacks.CallbackList])
def test_every_callback_sees_them_wherever_it_stands(wrap):
    callbacks = [Watching(), keras.callbacks.History(), Watching()]
    ens = trained(wrap(callbacks))
    expected = list(zip([0, 0, 1, 1, 2, 2], ens.history["learning_rate"], strict=True))
    assert callbacks[0].seen == callbacks[2].seen == expected
    assert callbacks[1].history["cycle"] == ens.history["cycle"] == [0, 0, 1, 1, 2, 2]


class SnapshotHyperModel(keras_tuner.HyperModel):
    """Searches for the number of cycles and the peak rate."""

    def build(self, hp):
        return classifier()

    def fit(self, hp, model, *args, **kwargs):
        ens = SnapshotEnsemble(
            model,
            cycles=hp.Int("cycles", 1, 3),
            lr_init=hp.Float("lr_init", 0.01, 0.3, sampling="log"),
        )
        ens.fit(*args, **kwargs)
        loss, accuracy = ens.evaluate(*kwargs["validation_data"], verbose=0)
        self.ensembles = [*getattr(self, "ensembles", []), (loss, accuracy, ens)]
        return {"val_loss": loss, "val_accuracy": accuracy}


# KerasTuner's own calls, in each trial.
@pytest.mark.slow
@pytest.mark.filterwarnings(r"ignore:(currentThread|getName)\(\) is deprecated:DeprecationWarning")
def test_keras_tuner_searches_for_the_best_ensemble(tmp_path):
    hypermodel = SnapshotHyperModel()
    tuner = keras_tuner.RandomSearch(
        hypermodel, objective="val_loss", max_trials=3, seed=0, directory=tmp_path
    )
    arguments = {"epochs": EPOCHS, "validation_data": (X[32:], Y[32:]), "verbose": 0}
    tuner.search(X[:32], Y[:32], **arguments)
    found = hypermodel.ensembles
    assert len(found) == 3
    [best] = tuner.get_best_hyperparameters(1)
    loss, _, ens = min(found, key=lambda one: one[0])
    assert tuner.oracle.get_best_trials(1)[0].score == loss
    assert len(ens) == best["cycles"]
    assert ens.plan(EPOCHS)[0].lr_max == best["lr_init"]
    held_out = keras.losses.sparse_categorical_crossentropy(Y[32:], ens.predict(X[32:], verbose=0))
    np.testing.assert_allclose(np.mean(held_out), loss, rtol=1e-5)
