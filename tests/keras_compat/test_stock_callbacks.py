"""The attributes that training changes in Keras's own callbacks."""

import inspect

import keras
import numpy as np
import pytest

from snapshot_ensemble.keras_compat.stock_callbacks import _CHANGED, changed_by_training

CALLBACKS = {
    name: kind
    for name, kind in vars(keras.callbacks).items()
    if inspect.isclass(kind) and issubclass(kind, keras.callbacks.Callback)
}
ARGUMENTS = {
    "CSVLogger": ("log.csv",),
    "ModelCheckpoint": ("model.keras",),
}


@pytest.mark.parametrize("name", sorted(set(_CHANGED) - {"OrbaxCheckpoint", "TensorBoard"}))
def test_the_attributes_exist_and_hold_values_of_their_types(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callback = CALLBACKS[name](*ARGUMENTS.get(name, ()))
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(use_ema=True), "mse", run_eagerly=True)
    data = np.ones((4, 2)), np.ones(4)
    model.fit(*data, validation_data=data, epochs=2, verbose=0, callbacks=[callback])
    kinds = changed_by_training(callback)
    assert {"best"} <= set(kinds) or name in ("CSVLogger", "SwapEMAWeights")
    for attribute in kinds:
        assert hasattr(callback, attribute)


def test_no_argument_of_a_constructor_is_among_them():
    for name in set(_CHANGED) & set(CALLBACKS):
        arguments = inspect.signature(CALLBACKS[name]).parameters
        assert not set(arguments) & set(_CHANGED[name])


def test_a_users_class_has_none():
    class Own(keras.callbacks.EarlyStopping):
        pass

    assert changed_by_training(Own()) is None
    assert changed_by_training(keras.callbacks.History()) == {}
