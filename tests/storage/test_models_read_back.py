"""The saved copy of a model is loaded again when it was saved, and believed only if it is right."""

import random

import keras
import numpy as np
import pytest
from models import classifier, member_weights
from storage_cases import X, ensemble, fit, fitted, load_and_use

from snapshot_ensemble import SnapshotEnsemble, SnapshotError


class Masked(keras.layers.Layer):
    """Draws a constant in its constructor, as Keras's example of neural decision trees does."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.mask = np.random.uniform(0, 2, size=4).astype("float32")  # noqa: NPY002

    def call(self, inputs):
        return inputs * self.mask


class Local(keras.layers.Layer):
    """A class that is not registered, whose config says all there is."""

    def __init__(self, factor=2.0, **arguments):
        super().__init__(**arguments)
        self.factor = factor

    def call(self, inputs):
        return self.factor * inputs

    def get_config(self):
        return {**super().get_config(), "factor": self.factor}


class Unreadable(Local):
    """Its config can be written, but nothing can be made of it."""

    @classmethod
    def from_config(cls, config):
        raise LookupError("no such factor")


needs_model = pytest.warns(UserWarning, match="saved copy of the model cannot be used.*`model=`")
CASES = {
    "a constant": (Masked, "did not give the model's outputs, because something"),
    "unreadable": (Unreadable, "could not be loaded again: "),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", ["fit", "save"])
def test_a_copy_that_is_not_right_is_not_loaded(way, case, tmp_path):
    layer, why = CASES[case]
    directory = tmp_path / "ensemble"
    with needs_model:
        if way == "fit":
            ens = fitted(directory, model=classifier(inside=[layer()]))
        else:
            ens = fitted(model=classifier(inside=[layer()]))
            ens.save(directory)
    objects = {"Masked": Masked, "Unreadable": Unreadable}
    for arguments in ({}, {"custom_objects": objects}):
        with pytest.raises(
            SnapshotError,
            match=f"^Build and compile the same model, and pass it as `model=`: .*{why}",
        ):
            SnapshotEnsemble.load(directory, **arguments)
    np.testing.assert_array_equal(
        load_and_use(directory, model=ens.model), ens.predict(X, verbose=0)
    )


def test_a_class_that_is_not_registered_is_found_in_the_model(tmp_path):
    ens = fitted(tmp_path / "ensemble", model=classifier(inside=[Local(3.0)]))
    loaded = load_and_use(tmp_path / "ensemble", custom_objects={"Local": Local})
    np.testing.assert_array_equal(loaded, ens.predict(X, verbose=0))


def test_it_is_loaded_once_a_run(tmp_path, monkeypatch):
    made = []

    class Counted(Local):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            made.append(self)

    ens = ensemble(tmp_path / "ensemble", model=classifier(inside=[Counted()]))
    fit(ens)
    fit(ens)
    assert (len(ens), len(made)) == (6, 2)


def test_it_changes_neither_generators_nor_the_run(tmp_path):
    def trained(directory):
        keras.utils.set_random_seed(4)
        model = classifier(inside=[Local(), keras.layers.Dropout(0.5)])
        ens = fitted(directory, model=model)
        return member_weights(ens), random.random(), np.random.uniform()  # noqa: NPY002

    np.testing.assert_equal(trained(tmp_path / "ensemble"), trained(None))


# Configs that cannot be had


class Failing(keras.layers.Layer):
    def __init__(self, result, **arguments):
        super().__init__(**arguments)
        self.result = result

    def call(self, inputs):
        return inputs

    def get_config(self):
        if isinstance(self.result, Exception):
            raise self.result
        return {**super().get_config(), "result": self.result}


class OwnError(Exception):
    pass


RESULTS = {e.__name__: e("no config") for e in (KeyError, AttributeError, RuntimeError, OwnError)}


@pytest.mark.sampled(3, 2)
@pytest.mark.parametrize("way", ["fit", "save"])
@pytest.mark.parametrize("result", RESULTS)
def test_a_config_that_fails_costs_only_the_copy_of_the_model(result, way, tmp_path):
    directory = tmp_path / "ensemble"
    model = classifier(inside=[Failing(RESULTS[result])])
    if way == "save":
        ens = fitted(model=model)
        with pytest.warns(UserWarning, match="(?s)`model=`"):
            ens.save(directory)
    else:
        with pytest.warns(UserWarning, match="(?s)`model=`"):
            fitted(directory, model=model)
    with pytest.raises(SnapshotError, match="pass it as `model=`"):
        SnapshotEnsemble.load(directory)
    assert len(SnapshotEnsemble.load(directory, model=model)) == 3


class OwnLoss(keras.losses.Loss):
    def call(self, y, output):
        return keras.losses.sparse_categorical_crossentropy(y, output)

    def get_config(self):
        raise OwnError


def test_so_does_one_of_a_loss(tmp_path):
    model = classifier(loss=OwnLoss())
    with pytest.warns(UserWarning, match="(?s)`model=`"):
        fitted(tmp_path / "ensemble", model=model, task="multiclass")
    assert len(SnapshotEnsemble.load(tmp_path / "ensemble", model=model)) == 3


# What a model's class overrides


def refuse(self, *arguments, one_of_its_own):
    raise AssertionError


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "name", ["save", "save_weights", "load_weights", "get_weights", "set_weights"]
)
def test_methods_that_a_class_overrides_are_not_called(name, tmp_path):
    kind = type("Overriding", (keras.Sequential,), {name: refuse})
    model = kind([keras.Input((4,)), keras.layers.Dense(3, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    ens = fitted(tmp_path / "run", model=model)
    fitted(model=model).save(tmp_path / "saved")
    loaded = SnapshotEnsemble.load(tmp_path / "run", model=model)
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), ens.predict(X, verbose=0))
    assert len(ens[0].weights) == 2
