"""Failing writes and killed processes: finished members are never lost."""

import contextlib
import copy
import hashlib
import itertools
import os
import shutil

import keras
import numpy as np
import pytest
from models import assert_same, member_weights, same
from storage_cases import MANIFEST, X, contents, ensemble, fit, manifest_of

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.storage import weight_files


def assert_no_temporaries(directory):
    assert not [name for name in contents(directory) if name.startswith("writing-")]


@contextlib.contextmanager
def failing(owner, name, first, *, lasting=False):
    """Makes call number `first` of a function fail as on a full disk, and all later ones."""
    function, calls = getattr(owner, name), itertools.count(1)

    def fail(*args, **kwargs):
        number = next(calls)
        if number == first or (lasting and number > first):
            raise OSError(28, "No space left on device")
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, fail)
        yield


class Reference:
    """Identifies the members of a directory by those of uninterrupted runs."""

    def __init__(self, **runs):
        self.members = {
            f"{name}{i}": weights for name, run in runs.items() for i, weights in enumerate(run)
        }

    def state(self, directory):
        """The names of the members that a directory loads, None if its manifest names none."""
        if not (directory / MANIFEST).exists() or not manifest_of(directory)["snapshots"]:
            return None
        loaded = SnapshotEnsemble.load(directory)
        assert len(loaded.history.get("cycle", ())) >= len(loaded)
        return [
            next((name for name, known in self.members.items() if same(known, weights)), "?")
            for weights in member_weights(loaded)
        ]


def new_run(directory, **arguments):
    """An ensemble whose training is reproducible."""
    keras.utils.set_random_seed(1)
    return ensemble(directory, **arguments)


@pytest.fixture(scope="session")
def reference(made_once):
    ens = new_run(None)
    fit(ens)
    return Reference(old=made_once.weights, new=member_weights(ens))


LASTING = pytest.mark.parametrize("lasting", [False, True], ids=["once", "permanently"])


@pytest.mark.slow
@LASTING
def test_a_failing_write_keeps_finished_members(tmp_path, reference, lasting):
    # Writing a file calls `fsync` twice, for the file and its directory. The empty manifest, the
    # model, the first snapshot and its manifest take eight calls, every later cycle four.
    for k in (1, 2, 3, 5, 7, 8, 9, 12):
        directory = tmp_path / str(k)
        directory.mkdir()
        ens = new_run(directory)
        with failing(os, "fsync", k, lasting=lasting), pytest.raises(OSError, match="No space"):
            fit(ens)
        assert_no_temporaries(directory)
        state = reference.state(directory) or []
        assert state == [f"new{i}" for i in range(len(state))], k
        synchronised, in_place = max(0, (k - 5) // 4), max(0, (k - 4) // 4)
        # A write that fails only once may be repeated.
        assert synchronised <= len(state) <= in_place + (not lasting), k


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_snapshot_that_cannot_be_written_is_no_member(tmp_path, reference, k):
    ens = new_run(tmp_path / "ensemble")
    with failing(weight_files, "weights_file", k), pytest.raises(OSError, match="No space left"):
        fit(ens)
    assert len(ens) == k - 1
    assert reference.state(ens.directory) in ([f"new{i}" for i in range(k - 1)], None)
    assert_no_temporaries(ens.directory)


def test_training_can_continue_after_a_full_disk(tmp_path):
    ens = new_run(tmp_path / "ensemble")
    with failing(weight_files, "weights_file", 2), pytest.raises(OSError, match="No space left"):
        fit(ens)
    fit(ens)
    loaded = SnapshotEnsemble.load(ens.directory)
    assert len(loaded) == len(ens) == 4
    assert_same(member_weights(loaded), member_weights(ens))
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), ens.predict(X, verbose=0))


def test_a_model_file_that_cannot_be_written_is_an_error(tmp_path):
    ens = ensemble(tmp_path / "ensemble")
    with failing(keras.Model, "save", 1), pytest.raises(OSError, match="No space left"):
        fit(ens)
    assert len(ens) == 0


@pytest.mark.sampled(2)
@LASTING
@pytest.mark.parametrize("owner", ["another object", "the same object"])
def test_a_failing_overwrite_leaves_the_old_ensemble(made, tmp_path, reference, owner, lasting):
    for k in (1, 3, 5):  # The model, the first snapshot, the manifest: see above.
        directory = tmp_path / str(k)
        shutil.copytree(made.directory, directory)
        ens = new_run(directory)
        if owner == "the same object":
            first = ens.model.get_weights()
            ens = SnapshotEnsemble.load(directory)
            ens.model.set_weights(first)
        with failing(os, "fsync", k, lasting=lasting), pytest.raises(OSError, match="No space"):
            fit(ens, overwrite=True)
        assert_no_temporaries(directory)
        state = reference.state(directory)
        # A write of the manifest that fails only once may be repeated.
        was_repeated = k == 5 and not lasting and state == ["new0"]
        assert state == ["old0", "old1", "old2"] or was_repeated, k


def test_an_overwrite_without_a_first_snapshot_changes_nothing(made):
    ens = SnapshotEnsemble.load(made.directory)
    history = copy.deepcopy(ens.history)
    with failing(weight_files, "weights_file", 1), pytest.raises(OSError, match="No space left"):
        fit(ens, overwrite=True)
    assert len(ens) == 3
    assert ens.history == history
    np.testing.assert_array_equal(ens.predict(X, verbose=0), made.predictions)
    assert_same(member_weights(SnapshotEnsemble.load(made.directory)), made.weights)


@pytest.mark.slow
def test_a_failing_save_leaves_the_old_ensemble(made, tmp_path, reference):
    states, ens = [], new_run(None)
    fit(ens)
    own = ens.model.get_weights()
    for k in itertools.count(1):
        directory = tmp_path / str(k)
        shutil.copytree(made.directory, directory)
        with failing(os, "fsync", k):
            try:
                ens.save(directory, overwrite=True)
            except OSError:
                assert_no_temporaries(directory)
                assert_same(ens.model.get_weights(), own)
            else:
                break
        states.append(reference.state(directory))
    old, new = ["old0", "old1", "old2"], ["new0", "new1", "new2"]
    assert states[0] == old
    assert all(state in (old, new) for state in states)


@contextlib.contextmanager
def copied_at_every_step(directory, copies):
    """Copies a directory before and after each step, as the process could leave it if killed."""
    with pytest.MonkeyPatch.context() as patch:
        for function in (os.fsync, os.replace, os.rename, os.unlink, os.remove):

            def step(*args, function=function, **kwargs):
                for part in (lambda: None, lambda: function(*args, **kwargs)):
                    part()
                    if directory.exists():
                        shutil.copytree(directory, copies / f"{len(list(copies.iterdir())):03}")

            patch.setattr(os, function.__name__, step)
        yield


def distinct(states):
    """A list without consecutive duplicates."""
    return [state for state, _ in itertools.groupby(states)]


def states_in_copies(reference, copies):
    seen, states = {}, []
    for path in sorted(copies.iterdir()):
        key = hashlib.sha256(repr(contents(path)).encode()).hexdigest()
        if key not in seen:
            seen[key] = reference.state(path)
        states.append(seen[key])
    return distinct(states)


def test_a_killed_run_keeps_finished_members(tmp_path, reference):
    copies = tmp_path / "copies"
    copies.mkdir()
    ens = new_run(tmp_path / "ensemble", max_snapshots=2)
    with copied_at_every_step(ens.directory, copies):
        fit(ens)
    states = states_in_copies(reference, copies)
    order = [None, ["new0"], ["new0", "new1"], ["new0", "new1", "new2"], ["new1", "new2"]]
    assert states[-1] == order[-1]
    assert states == [state for state in order if state in states]


def script(directory):
    """A script with two runs that can be started again."""
    ens = new_run(directory)
    for _ in range(2):
        fit(ens, resume=True)
    return ens


@pytest.mark.slow
def test_a_script_can_be_resumed_wherever_it_was_killed(tmp_path):
    copies = tmp_path / "copies"
    copies.mkdir()
    with copied_at_every_step(tmp_path / "ensemble", copies):
        expected = member_weights(script(tmp_path / "ensemble"))
    states = {}
    for path in sorted(copies.iterdir()):
        actual = {name: what for name, what in contents(path).items() if "writing-" not in name}
        states[repr(actual)] = path
    assert len(states) > 20
    for path in states.values():
        assert_same(member_weights(script(path)), expected)


def test_files_without_a_manifest_are_not_treated_as_left_over(made):
    (made.directory / MANIFEST).unlink()
    before = contents(made.directory)
    with pytest.raises(ValueError, match="is not empty"):
        fit(new_run(made.directory), resume=True)
    assert contents(made.directory) == before


@pytest.mark.slow
def test_an_overwrite_that_is_killed_leaves_the_old_or_the_new(made, tmp_path, reference):
    copies = tmp_path / "copies"
    copies.mkdir()
    ens = new_run(made.directory)
    with copied_at_every_step(made.directory, copies):
        fit(ens, overwrite=True)
    states = states_in_copies(reference, copies)
    new = ["new0", "new1", "new2"]
    assert states == [["old0", "old1", "old2"], new[:1], new[:2], new]


@pytest.mark.slow
def test_a_save_that_is_killed_leaves_the_old_or_the_new(made, tmp_path, reference):
    copies = tmp_path / "copies"
    copies.mkdir()
    ens = new_run(None)
    fit(ens)
    with copied_at_every_step(made.directory, copies):
        ens.save(made.directory, overwrite=True)
    states = states_in_copies(reference, copies)
    assert states == [["old0", "old1", "old2"], ["new0", "new1", "new2"]]
