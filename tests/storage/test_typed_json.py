"""Dataclasses to JSON and back: values are preserved, and wrong types are refused."""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshot_ensemble.storage.record import Counts, Learned, Progress, Record
from snapshot_ensemble.storage.snapshot import Snapshot
from snapshot_ensemble.storage.typed_json import Count, Number, decode, encode

counts = st.integers(0, 10**12)
numbers = st.one_of(st.none(), st.floats(allow_nan=True), st.integers(-(10**9), 10**9))
progresses = st.builds(
    Progress,
    history=st.dictionaries(st.text(max_size=9), st.lists(numbers, max_size=4), max_size=4),
    done=st.builds(Counts, counts, counts, counts, counts),
    run_epochs=st.lists(counts, max_size=4),
    saves_state=st.booleans(),
    pretrained=st.none() | st.lists(counts, max_size=4),
)


def same(one, other):
    """Whether two values are equal, with NaN equal to itself."""
    if isinstance(one, float) and math.isnan(one):
        return isinstance(other, float) and math.isnan(other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@given(progresses)
def test_progress_is_preserved(progress):
    text = json.dumps(encode(progress), allow_nan=False)
    again = decode(Progress, json.loads(text), "progress")
    assert same(dataclasses.asdict(again), dataclasses.asdict(progress))


@given(progresses)
def test_a_copy_is_independent(progress):
    before = json.dumps(encode(progress))
    copy = progress.copy()
    copy.record_epoch({"cycle": 0, "loss": 1.0})
    copy.done.epochs += 1
    copy.run_epochs.append(1)
    assert json.dumps(encode(progress)) == before


@dataclasses.dataclass
class Kind:
    count: Count
    share: float
    either: Count | list[Count] | None = None
    column: list[Number] = dataclasses.field(default_factory=list)
    by_name: dict[str, float] = dataclasses.field(default_factory=dict)
    anything: Any = None
    other_name: bool = dataclasses.field(default=False, metadata={"json": "otherName"})


def test_names_and_defaults():
    read = decode(Kind, {"count": 2, "share": 0.5, "otherName": True, "unknown": 1}, "kind")
    assert read == Kind(2, 0.5, other_name=True)
    assert encode(read)["otherName"] is True
    assert "other_name" not in encode(read)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"share": 0.5}, "`count` is missing"),
        ({"count": -1, "share": 0.5}, "`count` must be at least 0. Received: count=-1"),
        ({"count": True, "share": 0.5}, "`count` has the wrong type. Received: count=True"),
        ({"count": 1.0, "share": 0.5}, "`count` has the wrong type. Received: count=1.0"),
        ({"count": 1, "share": "half"}, "`share` has the wrong type. Received: share='half'"),
        ({"count": 1, "share": None}, "`share` has the wrong type"),
        ({"count": 1, "share": 1, "either": "all"}, "`either` has the wrong type"),
        ({"count": 1, "share": 1, "either": [-1]}, "`either` must be at least 0"),
        ({"count": 1, "share": 1, "column": {}}, "`column` has the wrong type"),
        ({"count": 1, "share": 1, "column": [[1], ["x"]]}, "`column` has the wrong type"),
        ({"count": 1, "share": 1, "by_name": {"a": [1]}}, "`a` has the wrong type"),
        ([], "`kind` has the wrong type"),
    ],
)
def test_invalid_values_are_refused(content, message):
    with pytest.raises(ValueError, match=message.replace("(", "\\(")):
        decode(Kind, content, "kind")


def test_arrays_tuples_and_numbers_that_json_lacks():
    value = {"a": np.arange(3), "b": (np.float32(0.5), math.nan), 3: -math.inf, "c": None}
    assert encode(value) == {"a": [0, 1, 2], "b": [0.5, "nan"], "3": "-inf", "c": None}
    json.dumps(encode(value), allow_nan=False)
    encoded = encode(Snapshot(1, metrics={"loss": math.inf}))
    assert encoded["metrics"] == {"loss": "inf"}


@pytest.mark.parametrize(
    ("learned", "message"),
    [
        ({"weights": [0.5, 0.5, 0.0]}, "`weights` are not valid for 2 members"),
        ({"weights": [0.5, 0.6]}, "`weights` are not"),
        ({"weights": [1.5, -0.5]}, "`weights` are not"),
        ({"weights": [math.nan, 1.0]}, "`weights` are not"),
        ({"members": 0}, "`members` are not valid for 2"),
        ({"members": 3}, "`members` are not valid for 2"),
        ({"members": [0, 2]}, "`members` are not valid for 2"),
    ],
)
def test_what_was_learned_must_fit_the_number_of_members(learned, message):
    with pytest.raises(ValueError, match=message):
        Learned(**learned).check_for(2)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_must_be_above_zero(temperature):
    with pytest.raises(ValueError, match="`temperature` must be above 0"):
        Learned(temperature=temperature)


def test_what_was_learned_about_two_members_is_accepted():
    for learned in (Learned(), Learned([0.25, 0.75], 2.0, 1), Learned(members=[1, 0])):
        learned.check_for(2)
    assert Record().learned == Learned()
