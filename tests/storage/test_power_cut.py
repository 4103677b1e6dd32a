"""Power cuts: the system calls of a run, replayed to every state that a disk may be left in.

A file's contents are on the disk once it has been flushed, and names (of files that are created,
renamed or removed) once their directory has been. Of what was not flushed a disk may keep
anything: here every subset of the changes of names, with the contents as they were flushed, half
written, or complete.
"""

import dataclasses
import itertools
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from models import assert_same, member_weights, same
from resume_cases import run
from storage_cases import MANIFEST, manifest_of

from snapshot_ensemble import SnapshotEnsemble

TESTS = pathlib.Path(__file__).parents[1]
CALLS = "openat,write,lseek,ftruncate,rename,unlink,unlinkat,fsync,fdatasync"
SCRIPT = """
import sys
from resume_cases import run
run(sys.argv[1], epochs=2, cycles=2, max_snapshots=1, overwrite=len(sys.argv) > 2)
"""
LINE = re.compile(r"(\d+) +(?:<\.\.\. \w+ resumed>)?(.*)")


def trace(directory, *arguments):
    """The system calls of a script: name, arguments and result."""
    output = directory.parent / "trace.txt"
    command = ["strace", "-f", "-y", "-xx", "-s", "100000000", "-e", f"trace={CALLS}", "-o", output]
    script = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(directory), *arguments]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run(
        [*command, *script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if "PTRACE" in done.stderr or "Operation not permitted" in done.stderr:
        pytest.skip("may not trace")
    assert done.returncode == 0, done.stderr
    unfinished = {}
    for line in output.read_text().splitlines():
        process, rest = LINE.fullmatch(line).groups()
        if rest.endswith("<unfinished ...>"):
            unfinished[process] = rest.removesuffix("<unfinished ...>")
            continue
        call = unfinished.pop(process, "") + rest if "resumed>" in line else rest
        if match := re.fullmatch(r"(\w+)\((.*)\) += (-?\d+).*", call):
            yield match[1], match[2], int(match[3])


def text(quoted):
    return bytes.fromhex(quoted.replace("\\x", ""))


@dataclasses.dataclass
class File:
    written: bytearray = dataclasses.field(default_factory=bytearray)
    flushed: bytes = b""
    position: int = 0


class Disk:
    """A directory as programs see it, and what of it is certainly on the disk."""

    def __init__(self, directory):
        self.directory = directory
        self.names, self.flushed_names, self.changes = {}, {}, []
        if directory.exists():
            for path in directory.iterdir():
                content = path.read_bytes()
                self.names[path.name] = File(bytearray(content), content)
            self.flushed_names = dict(self.names)

    def name_in(self, quoted):
        path = pathlib.Path(os.fsdecode(text(quoted)))
        return path.name if path.parent == self.directory else None

    def change(self, **names):
        """Names and the files that they have from now on; None for none."""
        self.changes.append(names)
        self._apply(self.names, names)

    @staticmethod
    def _apply(names, change):
        for name, file in change.items():
            names.pop(name, None)
            if file is not None:
                names[name] = file

    def states(self):
        """Every state that a power cut may leave: names and contents."""
        for kept in itertools.product([False, True], repeat=len(self.changes)):
            names = dict(self.flushed_names)
            for change in itertools.compress(self.changes, kept):
                self._apply(names, change)
            for part in ("flushed", "half", "written"):
                yield {name: self._content(file, part) for name, file in names.items()}

    @staticmethod
    def _content(file, part):
        if part == "flushed":
            return file.flushed
        if bytes(file.written) == file.flushed:
            return file.flushed
        return bytes(file.written[: len(file.written) // (2 if part == "half" else 1)])

    def replay(self, calls):
        """Yields all states before each flush, and at the end."""
        for name, arguments, result in calls:
            if result < 0:
                continue
            if name in ("fsync", "fdatasync"):
                yield from self.states()
            self._call(name, arguments, result)
        yield from self.states()

    def _call(self, call, arguments, result):
        paths = [self.name_in(quoted) for quoted in re.findall(r'"((?:\\x..)*)"', arguments[:2000])]
        opened = re.match(r"\d+<((?:\\x..)*)>", arguments)
        if call == "openat" and paths and paths[0] and "O_TMPFILE" not in arguments:
            if paths[0] not in self.names and "O_CREAT" in arguments:
                self.change(**{paths[0]: File()})
            if "O_TRUNC" in arguments:
                self.names[paths[0]].written.clear()
            if paths[0] in self.names:
                self.names[paths[0]].position = 0
        elif call == "rename" and paths[0]:
            file = self.names[paths[0]]
            self.change(**{paths[0]: None, paths[1]: file})
        elif call in ("unlink", "unlinkat") and paths and paths[0]:
            self.change(**{paths[0]: None})
        elif opened and call in ("fsync", "fdatasync") and self._is_directory(opened[1]):
            self.flushed_names, self.changes = dict(self.names), []
        elif opened and (name := self.name_in(opened[1])) in self.names:
            self._call_on_file(self.names[name], call, arguments, result)

    def _is_directory(self, quoted):
        return pathlib.Path(os.fsdecode(text(quoted))) == self.directory

    def _call_on_file(self, file, call, arguments, result):
        if call in ("fsync", "fdatasync"):
            file.flushed = bytes(file.written)
        elif call == "lseek":
            file.position = result
        elif call == "ftruncate":
            del file.written[int(arguments.rsplit(",", 1)[1]) :]
        elif call == "write":
            data = text(re.search(r'"((?:\\x..)*)"', arguments)[1])[:result]
            file.written[file.position : file.position + result] = data
            file.position += result


def distinct_states(directory, *arguments):
    disk = Disk(directory)
    states = disk.replay(trace(directory, *arguments))
    # One state for all that differ only in temporary files, which are half written and unnamed.
    found = {
        repr(sorted(item for item in state.items() if not item[0].startswith("writing-"))): state
        for state in states
    }
    # The replay has followed the run: it ends with the directory as it is.
    left = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert {name: bytes(file.written) for name, file in disk.names.items()} == left
    return list(found.values())


def put(state, directory):
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name, content in state.items():
        (directory / name).write_bytes(content)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace"),
]


def test_every_state_can_be_resumed(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    states = distinct_states(directory)
    assert len(states) > 10
    expected = member_weights(SnapshotEnsemble.load(directory))
    for state in states:
        put(state, directory)
        ens, _ = run(directory, epochs=2, cycles=2, max_snapshots=1, resume=True)
        assert_same(member_weights(ens), expected)


def test_every_state_of_an_overwrite_holds_the_old_or_the_new(tmp_path):
    directory = tmp_path / "run"
    ens, _ = run(directory, epochs=3)
    old = member_weights(ens)
    states = distinct_states(directory, "overwrite")
    new, _ = run(None, epochs=2, cycles=2)
    new = member_weights(new)
    allowed = [old, new[:1], new, new[1:]]
    seen = set()
    for state in states:
        put(state, directory)
        assert MANIFEST in state
        if not manifest_of(directory)["snapshots"]:
            seen.add("state only")
            continue
        actual = member_weights(SnapshotEnsemble.load(directory))
        matching = [number for number, weights in enumerate(allowed) if same(weights, actual)]
        assert matching, sorted(state)
        seen.add(matching[0])
    assert {0, 3} <= seen
