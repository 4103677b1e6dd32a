"""`fit`: which snapshots are taken and when, runs that end early, and what is printed."""

import logging

import keras
import numpy as np
import pytest
from training_cases import (
    DATA,
    OWN,
    AtBatch,
    Recorder,
    X,
    arrays,
    cosine,
    descend,
    ensemble,
    filtered,
    fitted,
    members,
    one_weight,
    raiser,
    ran_out_of_data,
    weight,
)

# Custom training steps


@keras.saving.register_keras_serializable("test_training")
class Doubling(keras.Sequential):
    """Takes two optimizer steps on each batch."""

    def train_step(self, data):
        super().train_step(data)
        return super().train_step(data)


def test_train_step_of_a_subclass_runs():
    model = one_weight(model_type=Doubling)
    ens = fitted(model)
    assert members(ens) == descend(*[np.repeat(cosine(16), 2)] * 2)
    assert model.train_step.__func__ is Doubling.train_step
    assert "train_step" not in vars(model)


def test_train_step_set_on_the_instance_runs():
    model = one_weight()
    plain = model.train_step

    def twice(data):
        plain(data)
        return plain(data)

    model.train_step = twice
    ens = fitted(model)
    assert members(ens) == descend(*[np.repeat(cosine(16), 2)] * 2)
    assert model.train_step is twice


# Interrupted runs


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_run_keeps_finished_cycles_and_epochs(error):
    ens = ensemble(one_weight())
    with pytest.raises(error):
        ens.fit(**arrays(), epochs=4, verbose=0, callbacks=[AtBatch(3, 5, raiser(error))])
    assert members(ens) == descend(cosine(16))
    assert ens.predict(X[:1], verbose=0) == descend(cosine(16))
    assert ens.history["cycle"] == [0, 0, 1]
    assert {len(values) for values in ens.history.values()} == {3}


def test_a_run_interrupted_in_its_first_cycle_has_no_member():
    ens, last_batch = ensemble(one_weight()), AtBatch(1, 7, raiser(RuntimeError))
    with pytest.raises(RuntimeError):
        ens.fit(**arrays(), epochs=4, verbose=0, callbacks=[last_batch])
    assert len(ens) == 0


def test_an_error_in_a_callback_at_the_end_of_a_cycle_keeps_its_snapshot():
    def stop(epoch, logs):
        if epoch == 1:
            raise RuntimeError

    ens = ensemble(one_weight())
    with pytest.raises(RuntimeError):
        ens.fit(
            **arrays(),
            epochs=4,
            verbose=0,
            callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=stop)],
        )
    assert members(ens) == descend(cosine(16))


# Callbacks and optimizers that stop training, or change the weights after it


def early_stopping(patience, **arguments):
    """Stops after epoch `patience`, counted from 0, since the loss always falls."""
    return keras.callbacks.EarlyStopping("loss", mode="max", patience=patience, **arguments)


def test_early_stopping_within_a_cycle_gives_no_member():
    ens = fitted(callbacks=[early_stopping(2)])
    assert members(ens) == descend(cosine(16))
    assert ens.history["cycle"] == [0, 0, 1]


def test_early_stopping_at_the_end_of_a_cycle_gives_its_member():
    ens = fitted(epochs=6, cycles=3, callbacks=[early_stopping(3)])
    assert members(ens) == descend(cosine(16), cosine(16))


@pytest.mark.parametrize("epoch", [0, 1])
def test_stopping_within_an_epoch_gives_no_member(epoch):
    stop = AtBatch(epoch, 3, lambda model: setattr(model, "stop_training", True))
    ens = fitted(callbacks=[stop])
    assert len(ens) == 0


def test_stopping_after_the_last_batch_of_a_cycle_gives_its_member():
    stop = AtBatch(1, 7, lambda model: setattr(model, "stop_training", True))
    ens = fitted(callbacks=[stop])
    assert members(ens) == descend(cosine(16))


def test_restore_best_weights_does_not_change_snapshots():
    model, recorder = one_weight(), Recorder()
    best = early_stopping(2, restore_best_weights=True)
    ens = fitted(model, callbacks=[best, recorder])
    assert weight(model) == recorder.weights[0]
    assert members(ens) == [recorder.weights[1]] == descend(cosine(16))


def test_moving_averages_of_the_optimizer_do_not_change_snapshots():
    recorder = Recorder()
    model = one_weight(keras.optimizers.SGD(OWN, use_ema=True, ema_momentum=0.9))
    ens = fitted(model, callbacks=[recorder])
    assert weight(model) != recorder.weights[-1]
    assert members(ens) == recorder.weights[1::2] == descend(cosine(16), cosine(16))


def test_swap_ema_weights_does_not_change_snapshots():
    model = one_weight(keras.optimizers.SGD(OWN, use_ema=True, ema_momentum=0.9))
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    ens = fitted(model, callbacks=[swap])
    # Keras swaps by adding and subtracting, which loses the last digits.
    assert members(ens) == pytest.approx(descend(cosine(16), cosine(16)), rel=1e-6)


# More than one run


def test_a_second_fit_adds_cycles():
    ens = fitted()
    history = ens.fit(**arrays(), epochs=5, verbose=0).history
    assert history["cycle"] == [2, 2, 3, 3, 3]
    assert {len(values) for values in history.values()} == {5}
    assert members(ens) == descend(cosine(16), cosine(16), cosine(16), cosine(24))
    assert [s.index for s in ens.snapshots] == [0, 1, 2, 3]
    assert [s.cycle for s in ens.snapshots] == [0, 1, 2, 3]
    assert [s.epoch for s in ens.snapshots] == [1, 3, 5, 8]
    assert [s.step for s in ens.snapshots] == [16, 32, 48, 72]
    assert ens.history["cycle"] == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert {len(values) for values in ens.history.values()} == {9}


def test_a_fit_after_an_interrupted_one_adds_cycles():
    ens, stop = ensemble(one_weight()), AtBatch(2, 5, raiser(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ens.fit(**arrays(), epochs=4, verbose=0, callbacks=[stop])
    ens.model.set_weights([np.float32(0)])
    ens.fit(**arrays(), epochs=2, verbose=0)
    first, *more = members(ens)
    assert [first] == descend(cosine(16))
    assert more == descend(cosine(8), cosine(8))
    assert [s.cycle for s in ens.snapshots] == [0, 1, 2]
    assert [s.epoch for s in ens.snapshots] == [1, 2, 3]


def test_predictions_include_the_members_of_a_second_fit():
    ens = fitted()
    ens.predict(X, verbose=0)
    ens.fit(**arrays(), epochs=2, verbose=0)
    ends = descend(cosine(16), cosine(16), cosine(8), cosine(8))
    assert ens.predict_members(X[:1], verbose=0).ravel().tolist() == ends


def test_max_snapshots_keeps_the_newest():
    ens = ensemble(one_weight(), cycles=3, max_snapshots=2)
    ens.fit(**arrays(), epochs=3, verbose=0)
    assert members(ens) == descend(*[cosine(8)] * 3)[1:]
    ens.fit(**arrays(), epochs=3, verbose=0)
    assert members(ens) == descend(*[cosine(8)] * 6)[4:]
    assert [(s.index, s.cycle) for s in ens.snapshots] == [(0, 4), (1, 5)]
    assert ens.history["cycle"] == [0, 1, 2, 3, 4, 5]


# What is printed


def check_line(line, snapshot):
    """A line describes one snapshot; epochs are counted from 1, as Keras prints them."""
    assert line.startswith(f"Snapshot of cycle {snapshot.cycle} ")
    assert f"epoch {snapshot.epoch + 1}," in line
    assert f"learning rate {snapshot.learning_rate:.3g}" in line
    assert f"- loss: {snapshot.metrics['loss']:.4f}" in line
    assert f"val_loss: {snapshot.metrics['val_loss']:.4f}" in line


@pytest.mark.parametrize("verbose", [1, 2])
def test_each_snapshot_is_reported_in_one_line(capsys, verbose):
    ens = ensemble(one_weight())
    ens.fit(**arrays(), epochs=4, verbose=verbose, validation_data=(X, X))
    out = capsys.readouterr().out.splitlines()
    lines = [line for line in out if "Snapshot" in line]
    assert len(lines) == 2
    for line, snapshot in zip(lines, ens.snapshots, strict=True):
        check_line(line, snapshot)
    if verbose == 2:
        starts = [line.split()[0] for line in out if line]
        assert starts == ["Epoch", "8/8", "Epoch", "8/8", "Snapshot"] * 2


def test_nothing_is_printed_with_verbose_0(capsys, caplog):
    caplog.set_level(logging.DEBUG, logger="snapshot_ensemble")
    fitted()
    assert capsys.readouterr().out == ""
    assert not [record for record in caplog.records if record.name == "snapshot_ensemble"]


@pytest.fixture
def no_interactive_logging():
    keras.config.disable_interactive_logging()
    yield
    keras.config.enable_interactive_logging()


@pytest.mark.slow
@pytest.mark.usefixtures("no_interactive_logging")
def test_without_interactive_logging_lines_go_to_a_logger(capsys, caplog):
    caplog.set_level(logging.INFO, logger="snapshot_ensemble")
    ens = ensemble(one_weight())
    ens.fit(**arrays(), epochs=4, verbose=2, validation_data=(X, X))
    assert "Snapshot" not in capsys.readouterr().out
    records = [record for record in caplog.records if record.name == "snapshot_ensemble"]
    assert len(records) == 2
    for record, snapshot in zip(records, ens.snapshots, strict=True):
        check_line(record.getMessage(), snapshot)


@ran_out_of_data
def test_with_unknown_length_a_first_cycle_of_one_epoch_warns():
    ens = ensemble(one_weight())
    with pytest.warns(UserWarning, match=r"first cycle.* does not anneal\. Pass `steps_per_epoch`"):
        ens.fit(filtered(), epochs=2, verbose=0, shuffle=False)
    first = np.full(16, ens.history["learning_rate"][0])
    assert members(ens) == descend(first, cosine(16))


@pytest.mark.parametrize("kind", ["arrays", "endless tf.data"])
def test_with_known_length_a_first_cycle_of_one_epoch_does_not_warn(kind):
    arguments, steps, _ = DATA[kind]
    ens = fitted(epochs=2, **arguments(), shuffle=False)  # A warning would be an error.
    assert members(ens) == descend(cosine(steps), cosine(steps))
