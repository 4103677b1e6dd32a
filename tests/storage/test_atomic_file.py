"""Writing files on Windows and macOS, by emulation: what these systems refuse is refused here."""

import builtins
import os
import pathlib
import types

import pytest
from storage_cases import ensemble, fit

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.storage import atomic_file


@pytest.fixture
def windows(tmp_path, monkeypatch):
    """Emulates Windows: a handle must be writable to be flushed, and directories have none."""
    fsync, open_ = os.fsync, os.open

    def is_writable(handle):
        import fcntl

        return fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY

    def strict_fsync(handle):
        if not is_writable(handle):
            raise OSError(9, "Bad file descriptor")
        fsync(handle)

    def strict_open(path, flags, *args, **kwargs):
        if str(path) == str(tmp_path / "run"):
            raise PermissionError(13, "Permission denied", str(path))
        return open_(path, flags, *args, **kwargs)

    monkeypatch.setattr(atomic_file, "_IS_WINDOWS", True)
    monkeypatch.setattr(atomic_file, "_WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(os, "fsync", strict_fsync)
    monkeypatch.setattr(os, "open", strict_open)


def test_training_and_loading(tmp_path, windows):
    ens = ensemble(tmp_path / "run", max_snapshots=2)
    fit(ens)
    ens.weights = [0.5, 0.5]
    assert len(SnapshotEnsemble.load(tmp_path / "run")) == 2


def test_text_is_not_translated(tmp_path, windows, monkeypatch):
    """In text mode Windows writes other bytes than it was given."""
    open_ = builtins.open

    def strict(file, mode="r", *args, **kwargs):
        newline = kwargs.get("newline", args[3] if len(args) > 3 else None)
        if str(file).startswith(str(tmp_path)) and "b" not in mode and newline is None:
            raise AssertionError(f"{file} is opened in text mode")
        return open_(file, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", strict)
    monkeypatch.setattr(pathlib.Path, "open", strict)
    fit(ensemble(tmp_path / "run"))
    fit(ensemble(tmp_path / "run"), overwrite=True)


def test_a_reader_that_has_the_manifest_open_is_waited_for(tmp_path, windows, monkeypatch):
    replace, refused = pathlib.Path.replace, []

    def busy(path, target):
        if len(refused) < 3:
            refused.append(path.name)
            raise PermissionError(13, "The process cannot access the file")
        return replace(path, target)

    monkeypatch.setattr(pathlib.Path, "replace", busy)
    ens = ensemble(tmp_path / "run")
    fit(ens)
    assert len(refused) == 3
    assert len(SnapshotEnsemble.load(tmp_path / "run")) == 3


def test_a_file_that_stays_open_is_an_error(tmp_path, windows, monkeypatch):
    def refuse(path, target):
        raise PermissionError(13, "The process cannot access the file")

    monkeypatch.setattr(pathlib.Path, "replace", refuse)
    with pytest.raises(PermissionError, match="cannot be written to.*cannot access the file"):
        fit(ensemble(tmp_path / "run"))


def test_files_that_a_reader_has_open_are_removed_later(tmp_path, windows, monkeypatch):
    ens = ensemble(tmp_path / "run", max_snapshots=1)
    unlink = pathlib.Path.unlink

    def busy(path, missing_ok=False):
        if path.name.startswith("snapshot-"):
            raise PermissionError(13, "The process cannot access the file")
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "unlink", busy)
        fit(ens)
    assert len(list((tmp_path / "run").glob("snapshot-*"))) == 3
    ens.weights = [1.0]
    assert len(list((tmp_path / "run").glob("snapshot-*"))) == 1


@pytest.mark.parametrize("supported", [True, False])
def test_on_macos_files_are_flushed_through_the_disks_cache(tmp_path, monkeypatch, supported):
    flushed, fsync, synced = [], os.fsync, []

    def fcntl(handle, command):
        assert command == 51
        if not supported:
            raise OSError(45, "Operation not supported")
        flushed.append(handle)

    monkeypatch.setitem(
        __import__("sys").modules, "fcntl", types.SimpleNamespace(fcntl=fcntl, F_FULLFSYNC=51)
    )
    monkeypatch.setattr(atomic_file, "sys", types.SimpleNamespace(platform="darwin"))
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(handle), fsync(handle)))
    file = atomic_file.Draft(
        tmp_path, "model-0001.keras", lambda path: pathlib.Path(path).write_bytes(b"1")
    ).finish()
    assert file.checked(tmp_path).read_bytes() == b"1"
    assert bool(flushed) == supported
    assert len(synced) == (1 if supported else 2)  # The directory, and without it the file.
