"""The manifest: its contents, and that invalid contents are refused."""

import contextlib
import copy
import hashlib
import math
import re
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import classifier
from storage_cases import (
    MANIFEST,
    X,
    contents,
    file_entries,
    load_and_use,
    manifest_of,
    write_manifest,
)

from snapshot_ensemble import SnapshotEnsemble, SnapshotError

# The contents of a manifest


def test_the_manifest_names_every_file_with_its_size_and_hash(made):
    actual = {
        name: (len(content), hashlib.sha256(content).hexdigest())
        for name, content in contents(made.directory).items()
        if name != MANIFEST
    }
    named = {
        entry["name"]: (entry["size"], entry["sha256"])
        for entry in file_entries(manifest_of(made.directory))
    }
    assert named == actual
    assert len(actual) == 5  # The model, three snapshots and the state of training.


def test_the_manifest_has_its_format_and_version(made):
    manifest = manifest_of(made.directory)
    assert manifest["format"] == "snapshot_ensemble"
    assert manifest["version"] == 1


# Content that is refused


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"torn", id="garbage"),
        pytest.param(b"\xff\xfe\x00", id="no text"),
        pytest.param(b"[" * 100_000, id="nested without end"),
        pytest.param(b"null", id="null"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"3", id="number"),
        pytest.param(b"{}", id="nothing in it"),
        pytest.param(b'{"format": "something else", "version": 1}', id="of something else"),
        pytest.param(b'{"format": "snapshot_ensemble", "version": 1}', id="of nothing"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused_by_name(made, content):
    (made.directory / MANIFEST).write_bytes(content)
    with pytest.raises(SnapshotError, match=re.escape(str(made.directory / MANIFEST))):
        load_and_use(made.directory)


def test_a_torn_manifest_is_refused_by_name(made):
    content = (made.directory / MANIFEST).read_bytes()
    for length in np.linspace(1, len(content) - 1, 20, dtype=int):
        (made.directory / MANIFEST).write_bytes(content[:length])
        with pytest.raises(SnapshotError, match=MANIFEST):
            load_and_use(made.directory)


@pytest.mark.parametrize("path", ["", "missing", "notes.txt"])
def test_a_path_without_an_ensemble_is_refused_by_name(tmp_path, path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SnapshotError, match=re.escape(str(tmp_path / path / MANIFEST))):
        SnapshotEnsemble.load(tmp_path / path)


@pytest.mark.parametrize("version", [3, 99, "2", None, 0])
def test_another_version_is_refused_by_name(made, version):
    manifest = manifest_of(made.directory)
    manifest["version"] = version
    write_manifest(made.directory, manifest)
    match = rf"{MANIFEST}.*version {version!r}.*Update snapshot-ensemble"
    with pytest.raises(SnapshotError, match=match):
        load_and_use(made.directory)


@pytest.mark.parametrize(
    "name", ["../secret", "{outside}/secret", "..", ".", "", "sub/secret", "sec\0ret", "sec\ud800"]
)
@pytest.mark.parametrize("section", ["model", "snapshots"])
def test_a_file_name_that_leads_outside_is_refused(made, tmp_path, name, section):
    manifest = manifest_of(made.directory)
    entry = file_entries(manifest[section])[0]
    # The file at that path is valid, so only its name can be refused.
    (made.directory / "sub").mkdir()
    for target in (tmp_path / "secret", made.directory / "sub" / "secret"):
        shutil.copy(made.directory / entry["name"], target)
    entry["name"] = name.format(outside=tmp_path)
    write_manifest(made.directory, manifest)
    with pytest.raises(SnapshotError, match=MANIFEST):
        load_and_use(made.directory)


def with_node(node, path, value):
    """A copy of a JSON value with another value at a path."""
    if not path:
        return value
    node = copy.copy(node)
    node[path[0]] = with_node(node[path[0]], path[1:], value)
    return node


def paths_of(node, path=()):
    """The paths of all nodes of a JSON value."""
    yield path
    if isinstance(node, list):
        node = dict(enumerate(node))
    if isinstance(node, dict):
        for key, child in node.items():
            yield from paths_of(child, (*path, key))


ANYTHING = [None, True, -1, 1.5, math.inf, "x", [], {}, [1], ["x"], {"x": 1}]
WRONG = {
    ("snapshots",): [None, True, -1, "x", {}, [1], {"x": 1}],
    ("snapshots", 0): [None, True, -1, "x", [], {}, [1], {"x": 1}],
    ("snapshots", 0, "file"): ANYTHING,
    ("snapshots", 0, "file", "size"): [None, math.inf, math.nan, "x", [], {}],
    ("snapshots", 0, "file", "name"): [None, True, -1, [], {}],
    ("snapshots", 0, "epoch"): ["x", [], {}, 1.5],
    ("snapshots", 0, "metrics"): [None, True, 1, "x", [], [1], {"loss": None}, {"loss": "x"}],
    ("model",): [True, -1, "x", "", [], {}, [1], {"x": 1}],
    ("written",): [None, -1, "x", [], {}, math.inf],
    ("replacing",): [None, 0, "x", [], {}],
    ("state",): [True, -1, "x", "", [], {}, [1], {"x": 1}],
    ("ensemble", "temperature"): [None, True, 0, -1, math.inf, "x", [], {}],
    ("ensemble",): [None, True, -1, "x", [], {}, [1], {"x": 1}],
    ("ensemble", "settings"): [None, True, -1, "x", [], {}, [1], {"x": 1}],
    ("ensemble", "settings", "cycles"): [None, True, 0, -1, 1.5, "x", [], {}],
    ("ensemble", "settings", "lr_init"): [True, -1, "x", [], {}, math.inf],
    ("ensemble", "settings", "schedule"): [True, 1, "x", [1], {"x": 1}, {"cycle_length": 0}],
    ("ensemble", "settings", "max_snapshots"): [True, 0, 1.5, "x", [], {}],
    ("ensemble", "settings", "task"): [1, "x", ["x"], ["regression"] * 3],
    ("ensemble", "weights"): [True, 1, "x", [], {}, [1], [0.5, 0.5, 0.5], [-1, 1, 1], ["x"] * 3],
    ("ensemble", "history"): [None, True, 1, "x", [], [1]],
    ("ensemble", "history", "loss"): [None, True, 1, "x", {}, ["x"], [{}]],
    ("ensemble", "done"): [None, True, 1, "x", [], {}, {"x": 1}],
    ("ensemble", "done", "epochs"): [None, -1, 1.5, "x", [], {}],
}


@pytest.mark.parametrize("path", WRONG, ids=lambda path: ".".join(map(str, path)))
def test_a_wrong_value_in_a_manifest_is_refused_by_name(made, path):
    model, manifest, wrong = classifier(), manifest_of(made.directory), []
    for value in WRONG[path]:
        write_manifest(made.directory, with_node(manifest, path, value))
        try:
            SnapshotEnsemble.load(made.directory, model=model)
        except SnapshotError as error:
            if MANIFEST not in str(error):
                wrong.append((value, str(error)))
        except Exception as error:
            wrong.append((value, repr(error)))
        else:
            wrong.append((value, "loaded"))
    assert wrong == []


def test_no_manifest_gives_any_other_error(made):
    model, manifest = classifier(), manifest_of(made.directory)
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    values = st.recursive(
        scalars,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        ),
        max_leaves=5,
    )

    @settings(deadline=None, database=None, max_examples=60)
    @given(path=st.sampled_from(list(paths_of(manifest))[1:]), value=values)
    def check(path, value):
        write_manifest(made.directory, with_node(manifest, path, value))
        with contextlib.suppress(SnapshotError):
            SnapshotEnsemble.load(made.directory, model=model)

    check()


def test_a_manifest_that_was_altered_is_refused_or_means_the_same(made):
    path = made.directory / MANIFEST
    text, model = path.read_bytes(), classifier()

    @settings(deadline=None, database=None, max_examples=60)
    @given(at=st.integers(0, len(text) - 1), value=st.integers(0, 255), cut=st.booleans())
    def check(at, value, cut):
        path.write_bytes(text[:at] + (b"" if cut else bytes([value])) + text[at + 1 :])
        with contextlib.suppress(SnapshotError):
            loaded = SnapshotEnsemble.load(made.directory, model=model)
            np.testing.assert_array_equal(loaded.predict(X, verbose=0), made.predictions)

    check()
