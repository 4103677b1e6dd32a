"""States of training that anyone may have written: refused by name before anything has changed."""

import json
import pathlib
import random
import re
import shutil

import keras
import numpy as np
import pytest
from benchmarks.faults import everything, mutated, sign
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SimulatedCrashError
from resume_cases import arrays, crash_in_epoch, dense, run

from snapshot_ensemble import SnapshotEnsemble, SnapshotError
from snapshot_ensemble.training.state import TrainingState


class Counting(keras.callbacks.Callback):
    """A user's callback with a state that it checks."""

    count = 0

    def on_epoch_end(self, epoch, logs=None):
        self.count += 1

    def get_state(self):
        return {"count": self.count}

    def set_state(self, state):
        self.count = state["count"] + 0


def stopping():
    return keras.callbacks.EarlyStopping("loss", patience=9, restore_best_weights=True)


@pytest.fixture(scope="module")
def run_once(tmp_path_factory):
    directory = tmp_path_factory.mktemp("forged") / "run"
    with pytest.raises(SimulatedCrashError):
        run(directory, callbacks=[stopping(), Counting(), crash_in_epoch(3)])
    return directory


@pytest.fixture
def state(run_once, tmp_path):
    """The path of the state of an interrupted run with two callbacks."""
    (path,) = shutil.copytree(run_once, tmp_path / "run").glob("state-*")
    return path


def read(path):
    with np.load(path) as file:
        held = {name: file[name] for name in file.files}
    return held, json.loads(held["facts"].tobytes())


def forge(path, held, facts):
    """Replaces the state, with a valid manifest."""
    text = np.frombuffer(json.dumps(facts).encode(), "uint8")
    np.savez(path, **{**held, "facts": text})
    sign(path.parent, path.name)


def resume(path, model, callbacks):
    ens = SnapshotEnsemble(model, directory=path.parent, cycles=3, lr_init=0.1)
    ens.fit(**arrays(), epochs=6, verbose=0, resume=True, callbacks=callbacks)


def is_as_before(model, before):
    """Whether nothing has changed, but that the optimizer may have new slots."""
    values, *generators = everything(model)
    known = len(before[0])
    slots = (np.frombuffer(value, "uint8") for value in values[known:])
    return (values[:known], *generators) == before and not any(map(np.any, slots))


def assert_refused(path, message=""):
    """Resuming raises an error that names the file, and nothing has changed."""
    model, callbacks = dense(), [stopping(), Counting()]
    before, own = everything(model), [dict(vars(callback)) for callback in callbacks]
    with pytest.raises(SnapshotError, match=re.escape(path.name)) as refused:
        resume(path, model, callbacks)
    assert re.search(message, str(refused.value))
    assert everything(model) == before
    assert [dict(vars(callback)) for callback in callbacks] == own


def done(**changes):
    return lambda held, facts: facts["done"].update(changes)


def fact(*path, value):
    def change(held, facts):
        for key in path[:-1]:
            facts = facts[key]
        facts[path[-1]] = value

    return change


def array(name, value):
    return lambda held, facts: held.update({name: value})


NO_SUM = "the position of the run does not add up. Received: RunPosition"
OTHER = "belongs to another model or optimizer. Received: "
LATER = "is from later in training than the directory. Received: done="
INVALID = "is not a valid state of training: "
FORGERIES = {
    "epochs": (fact("epochs", value=99), NO_SUM),
    "huge epochs": (fact("epochs", value=10**30), INVALID),
    "next epoch": (fact("next_epoch", value=1), NO_SUM),
    "no steps": (fact("steps", value=0), NO_SUM),
    "earlier runs": (fact("earlier", value=[1]), NO_SUM),
    "cycles before": (fact("cycles_before", value=9), NO_SUM),
    "done": (done(epochs=10**15), LATER),
    "done steps": (done(steps=10**15), LATER),
    "run": (fact("run", value=7), LATER),
    "deep": (fact("callbacks", 1, 1, value=json.loads("[" * 500 + "]" * 500)), INVALID),
    "a variable of another shape": (array("variable_0", np.zeros(3, "float32")), OTHER),
    "a variable of another dtype": (array("variable_0", np.zeros((4, 5), "int64")), OTHER),
    "one more variable": (array("variable_999", np.zeros(3)), OTHER),
    "a missing slot": (lambda held, facts: held.pop("variable_15"), OTHER),
    "a slot of another shape": (array("variable_15", np.zeros((9, 9), "float32")), OTHER),
    "text as a variable": (array("variable_0", np.asarray("x")), OTHER),
    "optimizer indices": (
        fact("optimizers", 0, 0, value=999),
        "an optimizer was built for the variables",
    ),
    "optimizer indices twice": (
        fact("optimizers", 0, value=[0, 0]),
        "an optimizer was built for the variables",
    ),
    "too many optimizers": (fact("optimizers", value=[[0], [1]]), INVALID),
    "shared weights without a base": (fact("shared", value={"0": 99}), "ensemble.json|" + INVALID),
    "a seed of another shape": (
        array("keras_seed", np.zeros(9, "int64")),
        "Received: a seed of shape",
    ),
    "Python's words": (fact("random", "python", 1, value=[1, 2]), INVALID),
    "Python's gauss": (fact("random", "python", 2, value="x"), "Received: position=.*gauss='x'"),
    "NumPy's keys": (fact("random", "numpy", 1, 0, value=-1), INVALID),
    "NumPy's position": (fact("random", "numpy", 2, value=10**6), "Received: position=1000000"),
    "no generators": (fact("random", value={}), INVALID),
    "a callback's type": (fact("callbacks", 0, 1, "dict", "wait", value="x"), INVALID),
    "a callback's array": (fact("callbacks", 0, 1, value={"array": "none"}), INVALID),
    "an unknown kind": (fact("callbacks", 1, 1, value={"object": "os.system"}), INVALID),
    "an operation that is none": (
        fact("callbacks", 1, 1, value={"operation": "__builtins__"}),
        "`__builtins__` is not an operation of Keras",
    ),
    "callbacks that are none": (fact("callbacks", value=[1]), INVALID),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", FORGERIES)
def test_a_forged_state_is_refused_by_name_before_anything_changes(state, case):
    change, message = FORGERIES[case]
    held, facts = read(state)
    change(held, facts)
    forge(state, held, facts)
    assert_refused(state, message)


def test_a_callbacks_own_error_names_the_file_and_the_class(state):
    held, facts = read(state)
    facts["callbacks"][1][1] = {"dict": {"count": "x"}}
    forge(state, held, facts)
    message = rf"{state.name}' has a state that Counting\.set_state\(\) refuses: TypeError"
    model = dense()
    before = everything(model)
    with pytest.raises(SnapshotError, match=message):
        resume(state, model, [stopping(), Counting()])
    assert is_as_before(model, before)


def test_another_models_state_is_refused_before_anything_changes(state):
    model = dense(keras.optimizers.SGD(momentum=0.9))
    held, facts = read(state)
    facts["fingerprint"]["optimizer"] = "SGD"
    forge(state, held, facts)
    before = everything(model)
    with pytest.raises(SnapshotError, match=OTHER):
        resume(state, model, [])
    assert everything(model) == before


@pytest.mark.slow
def test_no_forged_state_gives_any_other_error(state):
    held, facts = read(state)

    @settings(deadline=None, database=None, max_examples=15)
    @given(seed=st.integers(0, 2**32))
    def check(seed):
        forge(state, held, mutated(facts, random.Random(seed)))
        model = dense()
        before = everything(model)
        # A state that is accepted, which is most often equal, is not trained from here.
        callbacks = [stopping(), Counting(), crash_in_epoch(2), crash_in_epoch(3)]
        try:
            resume(state, model, callbacks)
        except (SnapshotError, ValueError) as error:
            is_refused = type(error) is SnapshotError or "only be resumed with" in str(error)
            assert is_refused
            assert is_as_before(model, before)
        except SimulatedCrashError:
            pass

    check()


def test_a_state_of_the_first_version_is_read():
    (path,) = (pathlib.Path(__file__).parents[1] / "formats" / "1").glob("ensemble/state-*")
    position = TrainingState.read(path).position
    assert (position.finished, position.epochs, position.done.cycles) == (True, 2, 2)
