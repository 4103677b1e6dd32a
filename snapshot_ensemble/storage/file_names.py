"""Names that nobody else gives to files, by which a directory's own files are known.

A directory may also hold files of other programs. A file is removed or replaced only if the
manifest names it, or if its name shows that this package wrote it for this directory.
"""

import os
import pathlib
import re
import uuid
from typing import Any

MANIFEST = "ensemble.json"
LOCK = "ensemble.lock"

_TAG = "[0-9a-f]{12}"
_NUMBERED = (
    rf"(?:snapshot|model|state|history)-(?P<number>\d{{4,18}})-(?P<tag>{_TAG})"
    r"\.(?:weights\.h5|keras|npz|json)"
)
# Names without a tag were given by earlier versions.
_NAMED = rf"(?:{_NUMBERED}|(?:snapshot|model|state)-\d{{4,18}}\.(?:weights\.h5|keras|npz))"


def new_tag() -> str:
    """A random tag, which is part of the names of all files of a directory."""
    return uuid.uuid4().hex[:12]


def checked_tag(tag: str, field: str) -> str:
    """The tag, or `ValueError` if it is none."""
    if not re.fullmatch(_TAG, tag):
        raise ValueError(f"`{field}` must be 12 hexadecimal digits. Received: {field}={tag!r}")
    return tag


def numbered(kind: str, number: int, tag: str, suffix: str) -> str:
    """The name of a file that the manifest will name."""
    return f"{kind}-{number:04}-{tag}.{suffix}"


def temporary(name: str) -> str:
    """The name of a file while it is being written; Keras chooses the format by its suffix."""
    return f"writing-{uuid.uuid4().hex}-{name}"


def checked_name(name: str, field: str) -> str:
    """The name that a manifest gives, or `ValueError` if no manifest gives such a name."""
    if len(name) > 200 or not re.fullmatch(_NAMED, name):
        raise ValueError(f"`{field}` must be a file of this directory. Received: {field}={name!r}")
    return name


def is_left_over(name: str, tag: str, written: int) -> bool:
    """Whether a file is temporary, or of this directory and numbered above its `written`."""
    if re.match(r"writing-[0-9a-f]{32}-", name):
        return True
    own = re.fullmatch(_NUMBERED, name)
    return own is not None and own["tag"] == tag and int(own["number"]) > written


def directory_path(directory: Any) -> pathlib.Path:
    """The absolute path of a directory, since the working directory may change.

    Raises:
        TypeError: If it is no path.
        ValueError: If it is empty, or remote.
    """
    try:
        text = os.fsdecode(directory)
    except TypeError:
        raise TypeError(f"`directory` must be a path. Received: directory={directory!r}") from None
    if not text or "\0" in text:
        raise ValueError(
            f"`directory` must be a path. Received: directory={directory!r}. Pass '.' for the "
            "working directory."
        )
    check_is_local(text, "directory")
    return pathlib.Path(text).absolute()


def check_is_local(path: Any, argument: str) -> None:
    """Raises `ValueError` for an address such as `gs://bucket/run`.

    As a path, it would silently be a local folder `gs:`.
    """
    text = os.fsdecode(path)
    if scheme := re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/+", text):
        raise ValueError(
            f"`{argument}` must be on a local file system, or one that is mounted, since files are "
            f"renamed, locked and flushed there. Received: {argument}={text!r}. Use a local path, "
            f"and copy the finished files to {scheme.group()} with the tools of that storage."
        )
