"""Values of a manifest whose hash matches: typed, bounded, and in agreement with each other."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import classifier
from storage_cases import MANIFEST, manifest_of, write_manifest

from snapshot_ensemble import SnapshotEnsemble, SnapshotError
from snapshot_ensemble.storage.manifest import describe, read_record
from snapshot_ensemble.storage.record import Counts, Progress, Record
from snapshot_ensemble.storage.typed_json import DEEPEST, LARGEST, parse

HUGE = 10**30


def deep(levels):
    value = 0
    for _ in range(levels):
        value = [value]
    return value


def with_change(manifest, change):
    change(manifest, manifest["ensemble"])
    return manifest


def name_twice(manifest, ensemble):
    manifest["snapshots"][1]["file"] = manifest["snapshots"][0]["file"]


def name_twice_with_another_hash(manifest, ensemble):
    manifest["base"] = {**manifest["model"], "size": 1}


def name_another_file(manifest, ensemble):
    manifest["model"]["name"] = "thesis.txt"


EXIT = {"order": [0], "temperatures": [], "thresholds": [], "scales": [1.0, 0.0]}
SETS = {"confidence_level": 0.9, "combine": "mean", "members": [0], "rules": []}
CHANGES = {
    "a history of other lengths": (
        lambda m, e: e["history"]["loss"].append(0.5),
        "`history` must have a value for each epoch. Received: 4 values of 'loss' for 3 epochs",
    ),
    "more epochs than in the history": (
        lambda m, e: e["done"].update(epochs=4),
        "`history` must have a value for each epoch. Received: 3 values of 'cycle' for 4 epochs",
    ),
    "no history": (
        lambda m, e: e.update(history={}),
        "`history` must have a value for each epoch. Received: 0 values of 'cycle' for 3 epochs",
    ),
    "epochs of runs that do not add up": (
        lambda m, e: e.update(run_epochs=[2, 2]),
        "`done` does not add up. Received: done=",
    ),
    "more runs than done": (
        lambda m, e: e.update(run_epochs=[0, 0, 0]),
        "`done` does not add up. Received: done=",
    ),
    "more cycles than epochs": (
        lambda m, e: e["done"].update(cycles=4),
        "`done` does not add up. Received: done=",
    ),
    "a share above 1": (
        lambda m, e: e["history"].update(shrink=[1, 2, 1]),
        "`shrink` must be from 0 to 1. Received: shrink=",
    ),
    "a cycle that is not done": (
        lambda m, e: m["snapshots"][0].update(cycle=3),
        "`cycle` of a snapshot must be below 3. Received: cycle=3",
    ),
    "an epoch that is not done": (
        lambda m, e: m["snapshots"][0].update(epoch=3),
        "`epoch` of a snapshot must be below 3. Received: epoch=3",
    ),
    "a step that is not done": (
        lambda m, e: m["snapshots"][0].update(step=LARGEST),
        "`step` of a snapshot must be below",
    ),
    "a file named twice": (name_twice, "it names a file twice. Received: "),
    "a base with another hash": (
        name_twice_with_another_hash,
        "it names a file twice. Received: base='model-",
    ),
    "someone's file": (
        name_another_file,
        "`name` must be a file of this directory. Received: name='thesis.txt'",
    ),
    "a hash that is none": (
        lambda m, e: m["model"].update(sha256="x"),
        "`sha256` must be 64 hexadecimal digits. Received: sha256='x'",
    ),
    "a number above written": (
        lambda m, e: m.update(written=1),
        "`written` must be at least the number of each file. Received: written=1, '",
    ),
    "a huge number": (
        lambda m, e: e["done"].update(epochs=HUGE),
        f"`epochs` must be at most {LARGEST}. Received: epochs={HUGE}",
    ),
    "a huge temperature": (
        lambda m, e: e.update(temperature=10**400),
        "`temperature` must be at most",
    ),
    "no members": (lambda m, e: e.update(members=[]), "`members` are not valid for 3 members"),
    "weights that are not numbers": (
        lambda m, e: e.update(weights=["nan", 1, 0]),
        "`weights` are not valid for 3 members",
    ),
    "a temperature that is not a number": (
        lambda m, e: e.update(temperature="nan"),
        "`temperature` must be above 0",
    ),
    "spreads of two outputs": (
        lambda m, e: e.update(spreads=[None, None]),
        "`spreads` is not for the outputs of this model. Received: 2 outputs instead of 1",
    ),
    "early exit of two outputs": (
        lambda m, e: e.update(early_exit=EXIT),
        "`early_exit` is not for the outputs of this model. Received: 2 outputs instead of 1",
    ),
    "sets of no output": (
        lambda m, e: e.update(conformal=SETS),
        "`conformal` is not for the outputs of this model. Received: 0 outputs instead of 1",
    ),
    "settings of a huge schedule": (
        lambda m, e: e["settings"].update(schedule={"cycle_length": 10**400}),
        "The settings in '",
    ),
    "settings that are no rates": (lambda m, e: e["settings"].update(lr_init="nan"), "settings"),
    "settings that do not exist": (lambda m, e: e["settings"].update(x=1), "settings"),
    "deep settings": (
        lambda m, e: e["settings"].update(task=deep(200)),
        f"it is nested more than {DEEPEST} levels deep",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_forged_manifest_is_refused_by_name(made, case):
    change, message = CHANGES[case]
    write_manifest(made.directory, with_change(manifest_of(made.directory), change))
    with pytest.raises(SnapshotError) as refused:
        SnapshotEnsemble.load(made.directory, model=classifier())
    assert MANIFEST in str(refused.value)
    assert message in str(refused.value)
    assert len(str(refused.value)) < 2000


@pytest.mark.parametrize("text", ["[" * 10**5, '{"x":' * 10**5, "9" * 5000])
def test_json_that_python_does_not_read_is_refused_by_name(made, text):
    (made.directory / MANIFEST).write_text(text)
    with pytest.raises(SnapshotError, match="ensemble.json' is not a readable manifest: "):
        SnapshotEnsemble.load(made.directory)


@settings(deadline=None, database=None, max_examples=40)
@given(levels=st.integers(0, 3000))
def test_json_is_read_up_to_a_depth(levels):
    text = b"[" * levels + b"0" + b"]" * levels
    if levels < DEEPEST:
        assert parse(text) == deep(levels)
    else:
        with pytest.raises(ValueError, match="it is nested (too deeply|more than 100 levels deep)"):
            parse(text)


NUMBERS = [-1, 2**31, 2**63, HUGE, 10**400, 0.5, -0.0, 1e308, math.inf, math.nan, "nan", "inf"]


def test_no_number_in_a_manifest_gives_any_other_error(made):
    manifest, model = manifest_of(made.directory), classifier()
    places = [("ensemble", "done", name) for name in ("cycles", "epochs", "steps", "runs")]
    places += [("ensemble", name) for name in ("temperature", "weights", "members", "run_epochs")]
    places += [("ensemble", "settings", name) for name in ("cycles", "lr_init", "lr_min", "shrink")]
    places += [("snapshots", 0, name) for name in ("cycle", "epoch", "step", "learning_rate")]
    places += [("snapshots", 0, "file", "size"), ("written",), ("ensemble", "history", "loss", 0)]

    @settings(deadline=None, database=None, max_examples=60)
    @given(place=st.sampled_from(places), value=st.sampled_from(NUMBERS), is_list=st.booleans())
    def check(place, value, is_list):
        changed = node = copy_of(manifest)
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = [value] * 3 if is_list else value
        write_manifest(made.directory, changed)
        try:
            loaded = SnapshotEnsemble.load(made.directory, model=model)
        except SnapshotError as error:
            assert MANIFEST in str(error) or "snapshot-" in str(error)  # noqa: PT017
        else:
            assert all(len(column) == 3 for column in loaded.history.values())
            assert 0 < loaded.temperature < math.inf

    check()


def copy_of(node):
    if isinstance(node, dict):
        return {key: copy_of(item) for key, item in node.items()}
    return [copy_of(item) for item in node] if isinstance(node, list) else node


def test_an_epoch_that_is_not_counted_yet_is_not_written():
    """An interrupt may come between recording an epoch and counting it."""
    progress = Progress(history={"cycle": [0, 0], "loss": [0.5]}, done=Counts(0, 1, 3, 0))
    written = describe(Record(progress=progress))
    assert written["history"] == {"cycle": [0], "loss": [0.5]}
    read_record(written).progress.check_for([])
