"""Files of one directory in another one: a second name for the same bytes, or a copy."""

import contextlib
import dataclasses
import os
import pathlib
import shutil

from snapshot_ensemble.storage.atomic_file import File
from snapshot_ensemble.storage.snapshot import SnapshotError


def link_or_copy(source: pathlib.Path, expected: File, target: str) -> None:
    """Makes a hard link where that is safe, and otherwise a copy; checks what is there then.

    A file of a directory is never changed, only removed, and the bytes stay as long as they have
    a name. So two directories may share them. A file that belongs to another user is copied: that
    user could change it.

    Args:
        source: The file.
        expected: What it was when it was written.
        target: Where to put it. Nothing is there yet.

    Raises:
        SnapshotError: If the contents are not as expected.
    """
    linked = False
    if _is_own(source):
        # Another file system, or one without links.
        with contextlib.suppress(OSError):
            os.link(source, target)
            linked = True
    if not linked:
        shutil.copyfile(source, target)
    place = pathlib.Path(target)
    try:
        dataclasses.replace(expected, name=place.name).checked(place.parent)
    except SnapshotError:
        expected.checked(source.parent)  # Names the file that is damaged.
        raise


def _is_own(path: pathlib.Path) -> bool:
    """Whether nobody else may change a file, as far as its owner says."""
    if not hasattr(os, "geteuid"):  # Windows.
        return False
    return path.stat().st_uid == os.geteuid() and os.access(path, os.W_OK)
