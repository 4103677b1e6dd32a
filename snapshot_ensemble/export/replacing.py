"""Puts a finished export in its place. What it replaces is lost only when it is there."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence

from snapshot_ensemble.export.recognition import foreign_part
from snapshot_ensemble.storage.atomic_file import flush, sync_directory


@dataclasses.dataclass(frozen=True)
class _Move:
    """A file or folder of an export: its place, and where the new and the old one are meanwhile."""

    place: pathlib.Path
    new: pathlib.Path
    old: pathlib.Path

    def set_aside(self) -> None:
        if os.path.lexists(self.place):
            self.place.rename(self.old)

    def undo(self) -> None:
        """Does what is left to do: it may have been interrupted, or nothing may have been moved."""
        if not os.path.lexists(self.new):
            self.place.rename(self.new)
        if os.path.lexists(self.old):
            self.old.rename(self.place)


@contextlib.contextmanager
def replaced(
    filepath: pathlib.Path, files: Sequence[str], format: str, *, overwrite: bool
) -> Iterator[pathlib.Path]:
    """Yields a path to export to; afterwards the export is moved from there to its place.

    Both are on the same file system, so that moving is atomic. After an exception or an interrupt,
    in the block or later, everything is as it was before.

    Args:
        filepath: The path of the export. A link is followed, and stays a link.
        files: The names of all its files or folders, which are beside each other.
        format: A Keras export format.
        overwrite: Whether another export in this format may be replaced.

    Raises:
        ValueError: If there is something that may not be replaced, or a link leads nowhere.
    """
    places = _places([filepath.with_name(name) for name in files])
    folder = places[0].parent / f"writing-{uuid.uuid4().hex}"
    missing = [parent for parent in folder.parents if not parent.exists()]
    moves = [
        _Move(place, folder / name, folder / f"replaced-{name}")
        for place, name in zip(places, files, strict=True)
    ]
    _check_free(places, places, format, overwrite)
    is_written = is_done = False
    try:
        folder.mkdir(parents=True)
        yield folder / filepath.name
        _flush(folder)
        is_written = True
        for move in moves:
            move.set_aside()
        # Again: somebody may have written to the place during the export.
        _check_free(places, [move.old for move in moves], format, overwrite)
        for move in moves:
            move.new.rename(move.place)
        sync_directory(folder.parent)
        is_done = True
    finally:
        if is_written and not is_done:
            _to_the_end(lambda: _undo(moves))
        # Not reached if the old export could not be moved back: it is still in there.
        _to_the_end(lambda: shutil.rmtree(folder) if folder.exists() else None)
        for parent in () if is_done else missing:
            with contextlib.suppress(OSError):  # It may not have been created, or not be empty.
                parent.rmdir()


def _places(paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """Where the files of an export really are, or would be: a link is followed."""
    for path in paths:
        if path.is_symlink() and not path.exists():
            raise ValueError(
                f"The path is a link that leads nowhere. Received: filepath='{path}', a link to "
                f"'{path.readlink()}'. Remove the link, or choose another path."
            )
    places = [pathlib.Path(os.path.realpath(path)) for path in paths]
    if len({place.parent for place in places}) > 1:
        raise ValueError(
            "The files of an export must be in the same folder. Received: links to "
            f"{' and '.join(map(str, places))}. Remove the links, or choose another path."
        )
    return places


def _check_free(
    places: Sequence[pathlib.Path],
    held: Sequence[pathlib.Path],
    format: str,
    overwrite: bool,
) -> None:
    """Raises `ValueError` for what may not be replaced.

    Args:
        places: The places of the export.
        held: Where what was found there is now.
        format: A Keras export format.
        overwrite: Whether another export in this format may be replaced.
    """
    existing = {
        path: place for path, place in zip(held, places, strict=True) if os.path.lexists(path)
    }
    if not existing:
        return
    received = f"Received: filepath='{next(iter(existing.values()))}'"
    if not overwrite:
        raise ValueError(
            f"The path already exists. {received}. Choose another path, or pass `overwrite=True` "
            "to replace an earlier export."
        )
    foreign = foreign_part(format, list(existing))
    if foreign is not None:
        (found,) = (path for path in existing if foreign.is_relative_to(path))
        raise ValueError(
            f"`overwrite=True` replaces only an earlier export of format {format!r}, and "
            f"'{existing[found] / foreign.relative_to(found)}' is not part of one. {received}. "
            "Move that file away, or choose another path."
        )


def _undo(moves: Sequence[_Move]) -> None:
    for move in moves:
        move.undo()


def _to_the_end(action: Callable[[], object]) -> None:
    """Runs an action that continues where it was stopped; an interrupt is raised only after it."""
    try:
        action()
    except BaseException:
        action()
        raise


def _flush(folder: pathlib.Path) -> None:
    """Makes sure that a folder is on disk with all that is in it."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            sync_directory(path)
        else:
            with path.open("r+b") as file:  # Windows flushes only files open for writing.
                flush(file.fileno())
