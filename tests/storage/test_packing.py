"""Directories as bytes."""

import pytest

from snapshot_ensemble.storage.packing import files_in, write_files


def test_files_come_back_as_they_were(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "inner").mkdir(parents=True)
    target.mkdir()
    contents = {"a.json": b"{}", "inner/b.bin": bytes(range(256))}
    for name, content in contents.items():
        (source / name).write_bytes(content)
    packed = files_in(source)
    assert packed == contents
    write_files(packed, target)
    assert files_in(target) == contents


@pytest.mark.parametrize("name", ["../outside", "inner/../../outside", "/outside"])
def test_a_name_outside_the_directory_is_refused(name, tmp_path):
    (tmp_path / "target").mkdir()
    message = rf"must lie inside the directory\. Received: name='{name}'\."
    with pytest.raises(ValueError, match=message):
        write_files({name: b""}, tmp_path / "target")
    assert list(tmp_path.rglob("outside")) == []
