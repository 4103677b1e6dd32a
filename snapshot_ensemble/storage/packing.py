"""The files of a directory as bytes, and back."""

import os
import pathlib


def files_in(directory: str | os.PathLike[str]) -> dict[str, bytes]:
    """The contents of all files in a directory, by their names.

    Args:
        directory: Path of the directory. What is in folders inside it is named by its path there.
    """
    top = pathlib.Path(directory)
    found = sorted(path for path in top.rglob("*") if path.is_file())
    return {path.relative_to(top).as_posix(): path.read_bytes() for path in found}


def write_files(files: dict[str, bytes], directory: str | os.PathLike[str]) -> None:
    """Writes what `files_in` returned.

    Args:
        files: The contents by name.
        directory: Path of an existing directory.

    Raises:
        ValueError: If a name leads out of the directory.
    """
    top = pathlib.Path(directory).resolve()
    for name, content in files.items():
        path = (top / name).resolve()
        if not path.is_relative_to(top):
            raise ValueError(
                f"A file must lie inside the directory. Received: name={name!r}. The saved object "
                "has been changed."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
