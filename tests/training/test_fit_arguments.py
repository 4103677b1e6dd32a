"""Arguments of `fit`, which work as in Keras, and callbacks that are refused."""

import keras
import numpy as np
import pytest
from training_cases import (
    OWN,
    Recorder,
    X,
    arrays,
    classifier,
    cosine,
    descend,
    ensemble,
    fitted,
    members,
    one_weight,
    weight,
)

from snapshot_ensemble import SnapshotEnsemble

# Arguments of Keras's `fit`


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "arguments",
    [
        {"validation_data": (np.ones((8, 4)), np.arange(8) % 3), "validation_batch_size": 3},
        {"validation_split": 0.25, "validation_freq": 2},
        {"class_weight": {0: 1.0, 1: 5.0, 2: 0.1}},
        {"sample_weight": np.linspace(0, 2, 64)},
    ],
    ids=", ".join,
)
def test_arguments_of_fit_work_as_in_keras(data, arguments):
    # If the peak equals the floor, the rate is constant, as in plain Keras.
    x, y = data
    plain = classifier()
    common = {"batch_size": 16, "epochs": 4, "shuffle": False, "verbose": 0, **arguments}
    expected = plain.fit(x, y, **common).history
    model = classifier()
    ens = SnapshotEnsemble(model, cycles=2, lr_init=OWN, lr_min=OWN)
    history = ens.fit(x, y, **common).history
    for ours, theirs in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert history.pop("cycle") == [0, 0, 1, 1]
    assert history.pop("learning_rate") == [np.float32(OWN)] * 4
    assert history == expected


@pytest.mark.parametrize(("validation_freq", "validated"), [(2, [1]), ([1, 3], [0, 2])])
def test_history_has_none_for_epochs_without_validation(validation_freq, validated):
    ens = ensemble(one_weight(), cycles=1)
    ens.fit(
        **arrays(),
        epochs=3,
        verbose=0,
        validation_data=(X, X),
        validation_freq=validation_freq,
    )
    assert {len(values) for values in ens.history.values()} == {3}
    known = [epoch for epoch, value in enumerate(ens.history["val_loss"]) if value is not None]
    assert known == validated


def test_history_has_none_for_a_fit_without_validation():
    ens = ensemble(one_weight(), cycles=1)
    ens.fit(**arrays(), epochs=2, verbose=0, validation_data=(X, X))
    ens.fit(**arrays(), epochs=2, verbose=0)
    assert {len(values) for values in ens.history.values()} == {4}
    known = [value is not None for value in ens.history["val_loss"]]
    assert known == [True, True, False, False]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda callback: callback,
        lambda callback: [(callback,), []],
        lambda callback: keras.callbacks.CallbackList(
            [callback], add_history=True, steps=8, epochs=4, verbose=0
        ),
        lambda callback: [keras.callbacks.CallbackList([callback])],
    ],
    ids=["one", "nested", "CallbackList", "list of CallbackList"],
)
def test_callbacks_are_accepted_in_every_form_that_keras_accepts(wrap):
    model, recorder = one_weight(), Recorder()
    callbacks = wrap(recorder)
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks.set_model(model)  # Keras requires this of the caller.
    ens = fitted(model, callbacks=callbacks)
    last = cosine(16).astype("float32")[[7, 15]].tolist()
    assert [logs["learning_rate"] for logs in recorder.logs] == last * 2
    assert [recorder.weights[1], recorder.weights[3]] == members(ens)


def callback_list(model, *callbacks, **params):
    return keras.callbacks.CallbackList(list(callbacks), add_history=True, model=model, **params)


def test_callback_list_is_unchanged_afterwards():
    model = one_weight()
    callbacks = callback_list(model, Recorder(), epochs=4, steps=8, verbose=0)
    before = list(callbacks.callbacks)
    fitted(model, callbacks=callbacks)
    assert callbacks.callbacks == before


@pytest.mark.parametrize("params", [{}, {"steps": 99}], ids=["none", "wrong"])
def test_rate_does_not_depend_on_the_parameters_of_a_callback_list(params):
    model = one_weight()
    ens = fitted(model, callbacks=callback_list(model, **params))
    assert members(ens) == descend(cosine(16), cosine(16))


def test_callback_list_without_parameters_is_quiet_with_verbose_0(capsys):
    model = one_weight()
    fitted(model, callbacks=callback_list(model))
    assert capsys.readouterr().out == ""


def test_a_history_callback_used_twice_is_extended():
    ens, history = ensemble(one_weight()), keras.callbacks.History()
    for _ in range(2):
        ens.fit(**arrays(), epochs=2, verbose=0, callbacks=[history])
    assert history.history["cycle"] == [0, 1, 2, 3]
    assert {len(values) for values in history.history.values()} == {4}


def test_a_metric_of_several_values_is_kept(tmp_path, data):
    x, y = data
    model = classifier()
    model.compile("sgd", "categorical_crossentropy", metrics=[keras.metrics.F1Score(average=None)])
    ens = SnapshotEnsemble(model, cycles=2, lr_init=OWN, directory=tmp_path / "kept")
    ens.fit(x, np.eye(3)[y], epochs=2, verbose=0)
    assert np.shape(ens.history["f1_score"]) == (2, 3)
    loaded = SnapshotEnsemble.load(tmp_path / "kept")
    np.testing.assert_array_equal(loaded.history["f1_score"], ens.history["f1_score"])


def test_snapshot_has_the_metrics_of_its_epoch():
    recorder = Recorder()
    ens = fitted(validation_data=(X, X), callbacks=[recorder])
    for snapshot, logs in zip(ens.snapshots, recorder.logs[1::2], strict=True):
        del logs["learning_rate"], logs["cycle"]
        assert snapshot.metrics == logs
        assert set(logs) == {"loss", "val_loss"}


# Callbacks that set the learning rate


@pytest.mark.parametrize(
    "wrap",
    [
        lambda callback: callback,
        lambda callback: [Recorder(), callback],
        lambda callback: [Recorder(), [callback]],
        lambda callback: keras.callbacks.CallbackList([callback]),
        lambda callback: [keras.callbacks.CallbackList([callback])],
    ],
    ids=["one", "list", "nested", "CallbackList", "list of CallbackList"],
)
@pytest.mark.parametrize("name", ["LearningRateScheduler", "ReduceLROnPlateau"])
def test_callback_that_sets_the_rate_is_refused_before_training(name, wrap):
    callback = {
        "LearningRateScheduler": lambda: keras.callbacks.LearningRateScheduler(lambda e: 1.0),
        "ReduceLROnPlateau": lambda: keras.callbacks.ReduceLROnPlateau("loss"),
    }[name]()
    model = one_weight()
    ens = ensemble(model)
    message = f"set by the ensemble's schedule.* Received: callbacks with {name}"
    with pytest.raises(ValueError, match=message):
        ens.fit(**arrays(), epochs=4, verbose=0, callbacks=wrap(callback))
    assert len(ens) == 0
    assert weight(model) == 0
