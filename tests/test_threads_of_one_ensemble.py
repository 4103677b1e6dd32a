"""One ensemble in several threads: reading leaves training alone and gets its own right numbers."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import classifier
from threads_cases import (
    MODELS,
    OPTIMIZERS,
    Looking,
    Paced,
    Seen,
    X,
    Y,
    ensemble,
    fit,
    looking,
    member_weights,
    probabilities,
    same,
)

from snapshot_ensemble import SnapshotEnsemble

pytestmark = [
    # The model without a config cannot be saved, only its snapshots.
    pytest.mark.filterwarnings("ignore:The model cannot be saved:UserWarning"),
    # Its layers add losses.
    pytest.mark.filterwarnings("ignore:The scores are the compiled loss:UserWarning"),
]

# Each pair of values is among them: model, optimizer, whether in a directory, and whether eager.
CASES = [
    (kind, optimizer, bool((i + j) % 2), bool((i + j // 2) % 2))
    for i, kind in enumerate(MODELS)
    for j, optimizer in enumerate(OPTIMIZERS)
]


def place(tmp_path, name, on_disk):
    return tmp_path / name if on_disk else None


def small(**arguments):
    """An ensemble of a model that is trained in no time."""
    keras.utils.set_random_seed(1)
    return SnapshotEnsemble(classifier("adam"), cycles=3, **arguments)


@pytest.fixture(params=CASES, ids=str)
def undisturbed(request, tmp_path):
    """What `fit` gives if nobody looks, and how to make the same ensemble again."""
    kind, optimizer, on_disk, eager = request.param

    def make(name):
        return ensemble(kind, optimizer, place(tmp_path, name, on_disk), eager=eager)

    return kind, make, fit(make("alone"))


def assert_undisturbed(actual, expected):
    for name, value in expected.items():
        assert same(actual[name], value), name


@pytest.mark.slow
def test_another_thread_that_looks_changes_nothing(undisturbed, tmp_path):
    kind, make, expected = undisturbed
    ens = make("looked at")
    seen = Seen(ens, kind, tmp_path / "copy")
    with looking(seen):
        actual = fit(ens, callbacks=[Paced(seen, 3)])
    assert_undisturbed(actual, expected)
    seen.check(actual["members"])
    assert not seen.wrong
    assert seen.looks >= 8


@pytest.mark.slow
def test_a_callback_that_looks_changes_nothing(undisturbed, tmp_path):
    kind, make, expected = undisturbed
    ens = make("looked at")
    seen = Seen(ens, kind, tmp_path / "copy")
    actual = fit(ens, callbacks=[Looking(seen)])
    assert_undisturbed(actual, expected)
    seen.check(actual["members"])
    assert not seen.wrong
    assert seen.looks == 9


@pytest.mark.slow
def test_restarts_that_draw_weights_draw_the_same(tmp_path):
    expected = fit(ensemble(shrink=0.5, eager=True))
    ens = ensemble(shrink=0.5, eager=True)
    seen = Seen(ens, "functional", tmp_path / "copy")
    assert_undisturbed(fit(ens, callbacks=[Looking(seen)]), expected)
    assert not seen.wrong


def test_snapshots_are_dropped_while_another_thread_reads_them(tmp_path):
    ens = small(directory=tmp_path / "run", max_snapshots=1)
    pools = []

    class Hold(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            pools.append(ens._pool.now())

    fit(ens, callbacks=[Hold()])
    names = {path.name for path in (tmp_path / "run").glob("snapshot-*")}
    first, *_, last = [pool.weights(range(len(pool)))[-1] for pool in pools]
    assert not same(first, last)
    assert same(last, member_weights(ens)[-1])
    assert len(names) > 1
    pools.clear()
    assert len(list((tmp_path / "run").glob("snapshot-*"))) == 1


# Training twice at once


class Calling(keras.callbacks.Callback):
    """Calls a function at the end of the first epoch, and keeps its error."""

    def __init__(self, call, in_thread):
        super().__init__()
        self.call, self.in_thread, self.errors = call, in_thread, []

    def on_epoch_end(self, epoch, logs=None):
        if epoch:
            return
        thread = threading.Thread(target=self.run)
        if not self.in_thread:
            self.run()
            return
        thread.start()
        thread.join()

    def run(self):
        try:
            self.call()
        except Exception as error:
            self.errors.append(error)


@pytest.mark.slow
@pytest.mark.parametrize("in_thread", [True, False], ids=["another thread", "a callback"])
@pytest.mark.parametrize("method", ["fit", "find_lr", "fit of another ensemble"])
def test_a_second_training_of_the_same_model_is_refused(method, in_thread):
    expected, ens = fit(small()), small()
    calls = {
        "fit": lambda: ens.fit(X, Y, epochs=3, verbose=0),
        "find_lr": lambda: ens.find_lr(X, Y),
        "fit of another ensemble": lambda: SnapshotEnsemble(ens.model).fit(X, Y, verbose=0),
    }
    callback = Calling(calls[method], in_thread)
    assert_undisturbed(fit(ens, callbacks=[callback]), expected)
    (error,) = callback.errors
    assert isinstance(error, RuntimeError)
    assert "already being trained" in str(error)
    assert f"Received: model={ens.model.name!r}" in str(error)
    fit(ens)  # Afterwards it may be trained again.
    assert len(ens) == 6


def test_the_plan_does_not_depend_on_the_present_rate():
    ens, plans = small(), []
    before = ens.plan(6)
    fit(ens, callbacks=[Calling(lambda: plans.append(ens.plan(6)), True)])
    assert [cycle.lr_max for cycle in plans[0]] == [cycle.lr_max for cycle in before]


def test_saving_to_its_own_directory_while_it_trains(tmp_path):
    ens = small(directory=tmp_path / "run")

    def save():
        ens.save(tmp_path / "run")
        assert len(SnapshotEnsemble.load(tmp_path / "run")) == 1

    callback = Calling(save, in_thread=True)
    assert_undisturbed(fit(ens, callbacks=[callback]), fit(small()))
    assert not callback.errors


# Predicting at once


def at_once(*calls):
    """The results of calls in one thread each, which begin at the same time."""
    begin, results = threading.Barrier(len(calls)), [None] * len(calls)

    def run(number):
        begin.wait()
        results[number] = calls[number]()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("memory_limit", [2**28, 0])
def test_threads_that_predict_for_the_first_time_at_once(kind, memory_limit):
    ens = ensemble(kind, eager=True)
    fit(ens)
    ens.memory_limit = memory_limit
    ens.model.compile("sgd", ens.model.loss, metrics=["accuracy"])  # Not eager: graphs are built.
    p = np.stack([probabilities(kind, member) for member in member_weights(ens)])
    mean, member, uncertain, first, scores, others = at_once(
        lambda: ens.predict(X, verbose=0),
        lambda: ens.predict_members(X, verbose=0),
        lambda: ens.predict_uncertainty(X, verbose=0)["mean"],
        lambda: ens[0].predict(X, verbose=0),
        lambda: ens.evaluate(X, Y, verbose=0),
        lambda: ens.evaluate(X[:7], Y[:7], verbose=0),
    )
    for actual, expected in [(mean, p.mean(0)), (member, p), (uncertain, p.mean(0)), (first, p[0])]:
        np.testing.assert_allclose(actual, expected, atol=1e-5)
    right = p.mean(0).argmax(-1) == Y
    assert scores[1] == pytest.approx(right.mean())
    assert others[1] == pytest.approx(right[:7].mean())


def test_threads_share_what_was_built():
    ens = small()
    fit(ens)
    pool = ens._pool
    first, *others = at_once(*[lambda: pool.members_model(pool.combiner("mean", None))] * 4)
    assert all(model is first for model in others)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_learned_is_forgotten_if_the_members_have_changed(on_disk, tmp_path):
    ens = small(directory=place(tmp_path, "run", on_disk))
    fit(ens)
    before = ens._pool.now()
    before.learn(temperature=1.5)
    assert ens.temperature == 1.5
    fit(ens)
    before.learn(weights=[0.5, 0.25, 0.25])
    assert ens.weights is None
    if on_disk:
        assert SnapshotEnsemble.load(tmp_path / "run").weights is None


def test_the_names_of_layers_and_eager_execution_stay_as_they_were():
    ens = small()
    fit(ens)
    keras.backend.clear_session()
    at_once(lambda: ens.predict(X, verbose=0), lambda: ens[0])
    assert keras.layers.Dense(1).name == "dense"
    assert not tf.config.functions_run_eagerly()
