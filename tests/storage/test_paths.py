"""Paths of directories: relative ones, links, bytes, places that move or cannot be written."""

import errno
import os
import pathlib
import re

import numpy as np
import pytest
from models import assert_same, classifier, ensemble_of, member_weights
from storage_cases import X, Y, ensemble, fit

from snapshot_ensemble import SnapshotEnsemble, SnapshotError
from snapshot_ensemble.storage.lock import DirectoryLock


def test_the_working_directory_may_change_at_any_time(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    ens = ensemble("run")
    monkeypatch.chdir(tmp_path / "b")
    fit(ens)
    assert ens.directory == tmp_path / "a" / "run"
    assert not list((tmp_path / "b").iterdir())
    ens.save("run")  # Another directory of the same relative name.
    assert len(SnapshotEnsemble.load(tmp_path / "b" / "run")) == 3
    loaded = SnapshotEnsemble.load("run")
    monkeypatch.chdir(tmp_path)
    assert_same(member_weights(loaded), member_weights(ens))
    loaded.weights = [0.5, 0.25, 0.25]
    assert SnapshotEnsemble.load("b/run").weights.tolist() == [0.5, 0.25, 0.25]


@pytest.mark.parametrize("make", [ensemble, SnapshotEnsemble.load])
@pytest.mark.parametrize("directory", ["", b"", "a\0b"])
def test_what_is_no_path_is_refused(make, directory):
    message = rf"`directory` must be a path. Received: directory={re.escape(repr(directory))}"
    with pytest.raises(ValueError, match=message):
        make(directory)


@pytest.mark.parametrize(
    "directory",
    ["gs://bucket/run", b"s3://bucket/run", pathlib.Path("hdfs://run"), "abfss://a@b/run"],
)
def test_remote_directories_are_refused_at_once(directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scheme = os.fsdecode(directory).split("/")[0]
    message = (
        f"`directory` must be on a local file system.*Received: directory='{scheme}/.*Use a local "
        f"path, and copy the finished files to {scheme}/"
    )
    ens = ensemble_of(classifier(), 1)
    uses = (ensemble, SnapshotEnsemble.load, ens.save, lambda d: SnapshotEnsemble.merge([ens], d))
    for use in uses:
        with pytest.raises(ValueError, match=message):
            use(directory)
    with pytest.raises(ValueError, match=message.replace("directory", "filepath")):
        ens.export(os.fsdecode(directory))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("directory", [3, True, ["run"]])
def test_other_types_are_refused(directory):
    with pytest.raises(TypeError, match="`directory` must be a path. Received: directory="):
        ensemble(directory)


def test_saving_nowhere_is_refused():
    ens = ensemble()
    fit(ens)
    with pytest.raises(ValueError, match="`directory` must be a path. Received: directory=''"):
        ens.save("")


def test_a_path_of_bytes(tmp_path):
    ens = ensemble(os.fsencode(tmp_path / "run"))
    fit(ens)
    assert len(SnapshotEnsemble.load(os.fsencode(tmp_path / "run"))) == 3


def test_a_link_to_a_directory(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    fit(ensemble(tmp_path / "link"))
    assert len(SnapshotEnsemble.load(tmp_path / "real")) == 3
    assert (tmp_path / "link").is_symlink()


def test_a_dangling_link_is_refused(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    ens = ensemble(tmp_path / "link")
    message = "`directory` is a link to a place that does not exist. Received: .*'nowhere'"
    for arguments in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(ValueError, match=message):
            fit(ens, **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
    (tmp_path / "nowhere").mkdir()
    fit(ens)
    assert len(ens) == 3


def test_a_directory_that_was_moved(tmp_path):
    ens = ensemble(tmp_path / "run")
    fit(ens)
    weights = member_weights(ens)
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(SnapshotError, match=r"snapshot-.*cannot be read: .*No such file"):
        ens[0]
    with pytest.raises(SnapshotError, match="run' no longer exists. Load the ensemble from where"):
        ens.weights = [1, 0, 0]
    assert not (tmp_path / "run").exists()
    assert_same(member_weights(SnapshotEnsemble.load(tmp_path / "moved")), weights)
    (tmp_path / "moved").rename(tmp_path / "run")
    ens.weights = [1, 0, 0]
    assert_same(member_weights(ens), weights)


def test_a_reader_whose_writer_goes_on_is_told_to_load_again(tmp_path):
    fit(ensemble(tmp_path / "run"))
    reader = SnapshotEnsemble.load(tmp_path / "run")
    expected = reader.predict(X, verbose=0)
    fit(ensemble(tmp_path / "run"), overwrite=True)
    np.testing.assert_array_equal(reader.predict(X, verbose=0), expected)  # It has them.
    with pytest.raises(
        SnapshotError, match="changed by another process .* Load the ensemble again"
    ):
        reader[0]
    with pytest.raises(SnapshotError, match="Load the ensemble again"):
        reader.calibrate(X, Y)
    assert reader.temperature == 1


@pytest.mark.sampled(3)
@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_in_a_directory_that_may_only_be_read(tmp_path, monkeypatch, number):
    fit(ensemble(tmp_path / "run"))
    ens = SnapshotEnsemble.load(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}

    def refuse(lock):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(DirectoryLock, "acquire", refuse)
        with pytest.warns(UserWarning, match="weights will not be saved: .*cannot be written to"):
            ens.weights = [0.5, 0.25, 0.25]
        with pytest.warns(UserWarning, match="temperature will not be saved"):
            ens.calibrate(X, Y)
        with pytest.warns(UserWarning, match="weights will not be saved"):
            ens.fit_weights(X, Y)
        with pytest.warns(UserWarning, match="members will not be saved"):
            ens.members = 2
        with pytest.raises(OSError, match="cannot be written to"):
            fit(ens)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert ens.weights is not None
    assert ens.members == 2
    ens.save(tmp_path / "copy")
    copy = SnapshotEnsemble.load(tmp_path / "copy")
    np.testing.assert_array_equal(copy.weights, ens.weights)
    assert copy.members == 2
    assert copy.temperature == ens.temperature
    ens.members = 3  # It may be written again.
    assert SnapshotEnsemble.load(tmp_path / "run").temperature == ens.temperature
