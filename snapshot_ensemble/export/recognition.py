"""Recognises exports by their content, since nothing else may be replaced by a new one."""

import pathlib
import re
from collections.abc import Callable, Sequence
from xml.etree import ElementTree

from snapshot_ensemble.keras_compat.saved_model import assets_of

# The files of every SavedModel, besides its own assets.
_PARTS = re.compile(
    r"saved_model\.pb|fingerprint\.pb|variables/variables\.(index|data-\d{5}-of-\d{5})"
)


def foreign_part(format: str, paths: Sequence[pathlib.Path]) -> pathlib.Path | None:
    """The first file or folder that no export in this format has written; None if all are exports.

    Args:
        format: A Keras export format.
        paths: The files or the folder at the places of an export, as far as they exist.
    """
    if format == "openvino":
        return _foreign_of_pair(paths)
    if format == "tf_saved_model":
        return next(filter(None, map(_foreign_in_folder, paths)), None)
    is_export = _FILES[format]
    return next((path for path in paths if not (path.is_file() and is_export(path))), None)


def _foreign_in_folder(folder: pathlib.Path) -> pathlib.Path | None:
    """What in a folder is no part of a SavedModel; an empty folder holds nothing to lose."""
    if not folder.is_dir():
        return folder
    description = folder / "saved_model.pb"
    entries = sorted(folder.rglob("*"))
    assets = assets_of(description) if description.is_file() else None
    if assets is None:
        return description if description in entries else next(iter(entries), None)
    known = {f"assets/{name}" for name in assets}
    return next((entry for entry in entries if not _is_part(entry, folder, known)), None)


def _is_part(entry: pathlib.Path, folder: pathlib.Path, assets: set[str]) -> bool:
    name = entry.relative_to(folder).as_posix()
    if entry.is_symlink():  # An export writes none.
        return False
    if entry.is_dir():
        return name in ("assets", "variables")
    return name in assets or _PARTS.fullmatch(name) is not None


def _is_onnx(path: pathlib.Path) -> bool:
    import onnx  # noqa: PLC0415  An optional dependency, which an export to ONNX needs anyway.
    from google.protobuf.message import DecodeError  # noqa: PLC0415

    content = onnx.ModelProto()
    try:
        content.ParseFromString(path.read_bytes())
    except DecodeError:
        return False
    return content.ir_version > 0 and len(content.opset_import) > 0 and content.HasField("graph")


def _is_litert(path: pathlib.Path) -> bool:
    with path.open("rb") as file:
        return file.read(8)[4:] == b"TFL3"  # The identifier in the FlatBuffers header.


_FILES: dict[str, Callable[[pathlib.Path], bool]] = {"onnx": _is_onnx, "litert": _is_litert}


def _foreign_of_pair(paths: Sequence[pathlib.Path]) -> pathlib.Path | None:
    """The `.xml` describes a graph, and all of the `.bin` beside it is constants of the graph."""
    size = None
    for path in paths:  # The `.xml` comes first.
        if path.suffix == ".xml":
            size = _bytes_of_constants(path) if path.is_file() else None
            if size is None:
                return path
        elif not path.is_file() or path.stat().st_size != size:
            return path
    return None


def _bytes_of_constants(path: pathlib.Path) -> int | None:
    """How long an OpenVINO graph's `.bin` is; None if the file is no such graph."""
    try:
        graph = ElementTree.parse(path).getroot()
        ends = [int(d.get("offset", 0)) + int(d.get("size", 0)) for d in graph.iter("data")]
    except (ElementTree.ParseError, ValueError):
        return None
    is_graph = graph.tag == "net" and "version" in graph.attrib and graph.find("layers") is not None
    return max(ends, default=0) if is_graph else None
