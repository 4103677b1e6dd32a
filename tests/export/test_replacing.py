"""A new export replaces an old one, and nothing is lost if that fails at any step."""

import contextlib
import os
import pathlib
import shutil

import pytest
from export_cases import FILES, contents, earlier, replace, replace_by, write


class Fault:
    """Raises an error before or after the call of the given number that changes the disk."""

    STEPS = (
        (pathlib.Path, "mkdir"),
        (pathlib.Path, "rename"),
        (pathlib.Path, "replace"),
        (pathlib.Path, "rmdir"),
        (pathlib.Path, "unlink"),
        (os, "fsync"),
        (shutil, "rmtree"),
    )

    def __init__(self, number, error, when):
        self.number, self.error, self.when = number, error, when
        self.calls = []

    @contextlib.contextmanager
    def installed(self):
        with pytest.MonkeyPatch.context() as patch:
            for where, name in self.STEPS:
                patch.setattr(where, name, self._wrapped(name, getattr(where, name)))
            yield

    def _wrapped(self, name, function):
        def wrapped(*args, **kwargs):
            self.calls.append(name)
            fails = len(self.calls) == self.number
            if fails and self.when == "before":
                raise self.error
            result = function(*args, **kwargs)
            if fails:
                raise self.error
            return result

        return wrapped


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_after_a_fault_at_any_step_the_old_export_is_there(
    exports, file_format, error, when, tmp_path
):
    for number in range(1, 100):
        path, fault = (
            earlier(exports, file_format, tmp_path / str(number)),
            Fault(number, error, when),
        )
        before = contents(path.parent)
        with fault.installed(), contextlib.suppress(error):
            replace(exports, file_format, path)
        after = contents(path.parent)
        if len(fault.calls) < number:
            break
        if fault.calls[number - 1] == "rmtree":  # Then the new one is in place.
            assert after.keys() == before.keys()
        else:
            assert after == before
    assert number > 6  # At least a folder, three flushes, two moves and the removal.
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] + b"new" for name in after if is_of_export(name, after))


def is_of_export(name, files):
    return name != "notes.txt" and files[name] is not None


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_after_a_fault_in_a_new_place_nothing_is_there(exports, file_format, error, tmp_path):
    for number in range(1, 100):
        fault = Fault(number, error, "after")
        with fault.installed(), contextlib.suppress(error):
            replace(exports, file_format, tmp_path / "new" / "models" / FILES[file_format][0])
        if "rmtree" in fault.calls[:number]:
            break
        assert contents(tmp_path) == {}
    assert number > 6


def test_an_error_of_the_export_itself_leaves_everything(old, file_format):
    before = contents(old.parent)

    def fail(new):
        new.parent.joinpath("half").write_text("of an export")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        replace_by(fail, old, file_format)
    assert contents(old.parent) == before


def test_if_the_old_export_cannot_be_moved_back_it_is_kept(exports, old, file_format, monkeypatch):
    before, rename = (old.parent / FILES[file_format][-1]), pathlib.Path.rename
    kept = contents(old.parent)

    def only_aside(path, target):
        if "replaced-" not in target.name:
            raise PermissionError(f"not allowed: {path}")
        return rename(path, target)

    monkeypatch.setattr(pathlib.Path, "rename", only_aside)
    with pytest.raises(PermissionError, match="not allowed: .*replaced-"):
        replace(exports, file_format, old)
    (folder,) = old.parent.glob("writing-*")
    for name in FILES[file_format]:
        moved = folder / f"replaced-{name}"
        if moved.is_file():
            assert moved.read_bytes() == kept[name]
        else:
            assert (moved / "saved_model.pb").read_bytes() == kept[f"{name}/saved_model.pb"]
    assert not before.exists()


# Links


@pytest.mark.parametrize("elsewhere", ["real", "elsewhere/real"])
def test_a_link_is_followed_and_stays_a_link(exports, file_format, elsewhere, tmp_path):
    earlier(exports, file_format, tmp_path / "earlier")
    (tmp_path / "elsewhere").mkdir()
    for name in FILES[file_format]:
        real = tmp_path / f"{elsewhere}{pathlib.Path(name).suffix}"
        (tmp_path / "earlier" / name).rename(real)
        (tmp_path / name).symlink_to(real)
    before = contents(tmp_path)
    replace(exports, file_format, tmp_path / FILES[file_format][0])
    after = contents(tmp_path)
    assert after.keys() == before.keys()
    for name, content in before.items():
        is_real = name.startswith(elsewhere) and content is not None
        assert after[name] == (content + b"new" if is_real else content)


def test_what_a_link_leads_to_is_replaced_only_if_it_is_an_export(exports, file_format, tmp_path):
    (tmp_path / "real").write_text("somebody's")
    path = tmp_path / FILES[file_format][0]
    path.symlink_to(tmp_path / "real")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"and '{tmp_path / 'real'}' is not part of one"):
        replace(exports, file_format, path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_that_leads_nowhere_is_refused(exports, file_format, overwrite, tmp_path):
    for name in FILES[file_format]:
        path = tmp_path / name
        path.symlink_to("nowhere")
        message = rf"a link that leads nowhere\. Received: filepath='{path}', a link to 'nowhere'\."
        with pytest.raises(ValueError, match=message + " Remove the link, or choose another path"):
            replace_by(print, tmp_path / FILES[file_format][0], file_format, overwrite=overwrite)
        assert contents(tmp_path) == {name: pathlib.Path("nowhere")}
        path.unlink()


def test_two_files_in_different_folders_are_refused(exports, tmp_path):
    path = earlier(exports, "openvino", tmp_path / "models")
    path.rename(tmp_path / "real.xml")
    path.symlink_to(tmp_path / "real.xml")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"must be in the same folder\. Received: links to .*real"):
        replace(exports, "openvino", path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_written_to_the_place_during_the_export_is_kept(
    exports, file_format, overwrite, tmp_path
):
    path = tmp_path / FILES[file_format][0]
    message = "replaces only an earlier export" if overwrite else "The path already exists"

    def meanwhile(new):
        write(exports, file_format, new.parent)
        path.write_text("somebody's")

    with pytest.raises(ValueError, match=message):
        replace_by(meanwhile, path, file_format, overwrite=overwrite)
    assert contents(tmp_path) == {path.name: b"somebody's"}
