"""`fit_chains` in one process: seeds, data, failures, going on, and what is refused."""

import random
import sys
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from models import Batches, classifier, three_classes
from storage_cases import contents

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.keras_compat.random_seed import seeded
from snapshot_ensemble.ray import _connected, fit_chains

X, Y = three_classes(24)
ARGUMENTS = {"cycles": 2, "lr_init": 0.5, "epochs": 2, "verbose": 0}


def chains(make_model=classifier, x=X, y=Y, **arguments):
    return fit_chains(make_model, x, y, engine="local", **{"chains": 2, **ARGUMENTS, **arguments})


def weights_of(ens):
    return [array for member in ens for array in member.get_weights()]


def assert_same_members(one, other):
    assert one.snapshots == other.snapshots
    for left, right in zip(weights_of(one), weights_of(other), strict=True):
        np.testing.assert_array_equal(left, right, strict=True)


@pytest.fixture(scope="module")
def pair():
    return chains()


@pytest.mark.slow
def test_each_chain_is_a_run_from_its_own_seed(pair):
    assert [(s.chain, s.cycle) for s in pair.snapshots] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    for number, child in enumerate(np.random.SeedSequence(0).spawn(2)):
        keras.utils.set_random_seed(int(child.generate_state(1)[0]))
        alone = SnapshotEnsemble(classifier(), cycles=2, lr_init=0.5)
        alone.fit(X, Y, epochs=2, verbose=0)
        for cycle in range(2):
            member = pair[2 * cycle + number]
            for one, other in zip(member.get_weights(), alone[cycle].get_weights(), strict=True):
                np.testing.assert_array_equal(one, other)


def test_it_is_repeatable_and_leaves_the_random_generators_alone(pair):
    keras.utils.set_random_seed(5)
    expected = random.random(), keras.random.normal((2,)).numpy().tolist()
    keras.utils.set_random_seed(5)
    again = chains()
    assert (random.random(), keras.random.normal((2,)).numpy().tolist()) == expected
    assert_same_members(again, pair)


@pytest.mark.slow
def test_more_chains_leave_the_first_ones_as_they_are(pair):
    three = chains(chains=3)
    for one, other in zip(pair[1].get_weights(), three[1].get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(
        chains(chains=1, seed=1)[0].get_weights()[0], pair[0].get_weights()[0]
    )


def as_dataset():
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "x",
    [lambda: (X, Y), as_dataset],
    ids=["arrays", "tf.data"],
)
def test_data_may_be_made_by_a_function(unshuffled, x):
    made = chains(x=x, y=None, shuffle=False)
    assert_same_members(made, unshuffled)


@pytest.fixture(scope="module")
def unshuffled():
    return chains(shuffle=False)


@pytest.mark.slow
def test_sample_weights_of_a_function_are_used():
    weights = np.linspace(0, 2, 24)
    made = chains(x=lambda: (X, Y, weights), y=None)
    assert_same_members(made, chains(sample_weight=weights))


@pytest.mark.slow
def test_validation_data_choose_members_anew(pair):
    by_arrays = chains(validation_data=(X, Y))
    count = by_arrays.members
    fresh = SnapshotEnsemble.merge([by_arrays])
    fresh.choose_members(X, Y, verbose=0)
    assert fresh.members == count


@pytest.mark.slow
def test_validation_data_of_a_function_choose_nothing():
    made = chains(validation_data=lambda: (X, Y))
    assert made.history == chains(validation_data=(X, Y)).history
    assert made.members is None


@pytest.mark.slow
def test_if_members_cannot_be_chosen_all_predict():
    with pytest.warns(UserWarning, match="Members could not be chosen by the validation data"):
        made = chains(
            validation_data=(X, np.where(np.arange(24) == 0, np.nan, Y)), validation_freq=9
        )
    assert made.members is None


def test_each_chain_has_callbacks_of_its_own():
    stop = keras.callbacks.EarlyStopping("loss", patience=0, min_delta=10)
    made = chains(callbacks=[stop], epochs=4, chains=3)
    assert len(made) == 3
    assert len(made.history["loss"]) == 6
    assert stop.stopped_epoch == 0


def test_a_directory_has_the_chains_and_the_merged_ensemble(pair, tmp_path):
    made = chains(directory=tmp_path / "run")
    assert made.directory == tmp_path / "run" / "merged"
    assert_same_members(made, pair)
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    first, second = (int(c.generate_state(1)[0]) for c in np.random.SeedSequence(0).spawn(2))
    assert names == [f"chain-0000-{first:08x}", f"chain-0001-{second:08x}", "merged"]
    made.calibrate(X, Y, verbose=0)
    before = contents(tmp_path)
    again = chains(directory=tmp_path / "run")
    assert contents(tmp_path) == before
    assert again.temperature == made.temperature != 1
    more = chains(directory=tmp_path / "run", chains=3)
    assert len(more) == 6
    assert more.temperature == 1
    assert_same_members(more, chains(chains=3))


class FailsOnceError(Exception):
    pass


def failing(numbers, error=FailsOnceError):
    """A callback that fails in the second epoch of chains with these losses."""

    class Fail(keras.callbacks.Callback):
        seen = 0

        def __deepcopy__(self, memo):
            copied = Fail()
            copied.number = Fail.seen
            Fail.seen += 1
            return copied

        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1 and self.number in numbers:
                raise error(f"chain {self.number}")

    return Fail()


@pytest.mark.slow
def test_a_chain_that_fails_is_named_and_the_others_are_merged(tmp_path):
    message = (
        r"1 of 3 chains failed.*chain 1 \(FailsOnceError: chain 1\). Call again with the same "
        "`directory` to train only these"
    )
    with pytest.warns(UserWarning, match=message):
        made = chains(chains=3, callbacks=[failing({1})], directory=tmp_path / "run")
    assert {s.chain for s in made.snapshots} == {0, 1}
    again = chains(chains=3, callbacks=[failing(set())], directory=tmp_path / "run")
    assert_same_members(again, chains(chains=3))


def test_if_all_fail_the_first_error_is_raised():
    with pytest.raises(FailsOnceError, match="chain 0") as raised:
        chains(callbacks=[failing({0, 1})])
    assert (
        "All of 2 chains failed: chain 0 (FailsOnceError: chain 0); chain 1"
        in (raised.value.__notes__[0])
    )


@pytest.mark.slow
def test_ctrl_c_ends_it_and_the_same_call_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        chains(callbacks=[failing({1}, KeyboardInterrupt)], directory=tmp_path / "run")
    assert not (tmp_path / "run" / "merged").exists()
    again = chains(callbacks=[failing(set())], directory=tmp_path / "run")
    assert_same_members(again, chains())


@pytest.mark.slow
def test_progress_of_all_chains_is_shown(capsys):
    chains(verbose=1)
    shown = capsys.readouterr().out
    assert "4/4" in shown
    assert "chains_done: 2.0" in shown
    chains(verbose=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" - loss")[0] for line in lines] == [
        "Chain 0 has ended after 2 epochs",
        "Chain 1 has ended after 2 epochs",
    ]


class Doubled(layers.Layer):
    def call(self, x):
        return 2 * x

    def get_config(self):
        raise NotImplementedError("no config")


def without_config():
    return classifier(inside=[Doubled()])


@pytest.mark.slow
def test_a_model_that_no_file_can_hold_is_spoken_of_once(tmp_path):
    assert len(chains(make_model=without_config, chains=1)) == 2
    with pytest.warns(UserWarning, match="The model cannot be saved, only its snapshots") as told:
        made = chains(make_model=without_config, chains=1, directory=tmp_path)
    assert sum("cannot be saved" in str(warning.message) for warning in told) == 1
    loaded = SnapshotEnsemble.load(tmp_path / "merged", model=without_config())
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), made.predict(X, verbose=0))


@pytest.mark.parametrize("runs", [True, False])
def test_only_a_ray_that_was_started_here_is_stopped(runs):
    called = []
    ray = types.SimpleNamespace(
        is_initialized=lambda: runs,
        init=lambda: called.append("init"),
        shutdown=lambda: called.append("shutdown"),
    )
    with pytest.raises(KeyboardInterrupt), _connected(ray):
        raise KeyboardInterrupt
    assert called == ([] if runs else ["init", "shutdown"])


# What is refused


def refuse(*_, **__):
    raise AssertionError("It trains.")


@pytest.fixture
def untrained(monkeypatch):
    monkeypatch.setattr(SnapshotEnsemble, "fit", refuse)


def unbuilt():
    model = keras.Sequential([layers.Dense(3, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


def not_compiled():
    return keras.Sequential([keras.Input((4,)), layers.Dense(3)])


class Drawn(layers.Layer):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.drawn = np.asarray([random.random() for _ in range(4)], "float32")

    def call(self, x):
        return x * self.drawn


def of_any_width():
    return classifier(inside=[layers.Dense(random.randint(2, 1000))])


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"engine": "spark"}, ValueError, "`engine` must be 'ray' or 'local'.*engine='spark'"),
        ({"chains": 0}, ValueError, "`chains` must be at least 1. Received: chains=0"),
        ({"seed": -1}, ValueError, "`seed` must be at least 0. Received: seed=-1"),
        ({"retries": 0.5}, TypeError, "`retries` must be a whole number. Received: retries=0.5"),
        ({"make_model": None}, TypeError, "`make_model` must be a function that returns"),
        ({"make_model": lambda: 3}, TypeError, "`model` must be a `keras.Model`. Received"),
        ({"make_model": not_compiled}, ValueError, "`model` must be compiled"),
        ({"make_model": unbuilt}, ValueError, "`model` must be built"),
        ({"make_model": of_any_width}, ValueError, "the same model in each chain.*its weight"),
        (
            {"make_model": lambda: classifier(inside=[Drawn()])},
            ValueError,
            "the same model in each chain.*it gives other outputs with the same weights",
        ),
        ({"cycles": 0}, ValueError, "`cycles` must be at least 1"),
        ({"resume": True}, TypeError, "no argument `resume`: chains resume by themselves"),
        ({"overwrite": True}, TypeError, "no argument `overwrite`: choose another"),
        ({"batches": 3}, TypeError, "`fit` has no argument `batches`"),
        ({"directory": "gs://bucket/run"}, ValueError, "must be on a local file system"),
        ({"x": as_dataset()}, TypeError, "`x` must be arrays, or a function.*BatchDataset"),
        ({"x": iter([X])}, TypeError, "`x` must be arrays, or a function.*Pass the function"),
        ({"x": Batches(X, Y)}, TypeError, "`x` must be arrays, or a function.*Batches"),
        ({"validation_data": as_dataset()}, TypeError, "`validation_data` must be arrays"),
    ],
    ids=lambda value: "",
)
def test_what_is_refused_before_training(arguments, error, message):
    given = {"engine": "local", "chains": 2, "x": X, "y": Y, "make_model": classifier, **ARGUMENTS}
    given |= arguments
    with pytest.raises(error, match=message):
        fit_chains(given.pop("make_model"), given.pop("x"), given.pop("y"), **given)


def test_without_ray_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'snapshot-ensemble\[ray\]', or pass"):
        fit_chains(classifier, X, Y, chains=2, **ARGUMENTS)


def test_generators_are_seeded_like_keras_does():
    with seeded(2**32 - 1):  # The largest seed of a chain.
        drawn = random.random()
    keras.utils.set_random_seed(2**32 - 1)
    assert random.random() == drawn
