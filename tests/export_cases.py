"""Exports in every format, made once, and copies of them among files of a user."""

import shutil

from snapshot_ensemble.export.replacing import replaced

FILES = {
    "tf_saved_model": ["served"],
    "onnx": ["served.onnx"],
    "litert": ["served.tflite"],
    "openvino": ["served.xml", "served.bin"],
}


def earlier(exports, file_format, folder):
    """Writes a copy of an export into a new folder with a file of a user, and returns its path."""
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    write(exports, file_format, folder)
    return folder / FILES[file_format][0]


def write(exports, file_format, folder, more=b""):
    """Writes a copy of an export, with more bytes at the end of each of its files."""
    for name in FILES[file_format]:
        if file_format == "tf_saved_model":
            shutil.copytree(exports / name, folder / name)
        else:
            shutil.copy(exports / name, folder / name)
        for path in (folder / name, *(folder / name).rglob("*")):
            if path.is_file():
                path.write_bytes(path.read_bytes() + more)


def replace_by(action, path, file_format, overwrite=True):
    """Lets an action write an export, and puts that in the place of what is there."""
    with replaced(path, FILES[file_format], file_format, overwrite=overwrite) as new:
        action(new)


def replace(exports, file_format, path):
    replace_by(lambda new: write(exports, file_format, new.parent, b"new"), path, file_format)


def contents(folder):
    """All that is in a folder: the bytes of files, the targets of links, and None for folders."""
    return {
        str(path.relative_to(folder)): path.readlink()
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }
