"""Damages a saved ensemble in many ways, and counts the faults that are handled safely.

    python tests/benchmarks/faults.py

Each file is altered in each way (a bit flipped at many positions, truncated, emptied, lengthened,
removed, filled with noise, replaced by another file of the directory), or replaced by something
that is not a file of its kind (a pipe, a device, ..., data that are far larger when they are
read). The values of the manifest and of the state of training are also replaced, with the old
hash or with a matching one.

A fault counts as survived if loading raises a `SnapshotError` that names the file, or if every
member's predictions are unchanged. A state is read by resuming: that must go well, or raise an
error before the model, its optimizer or a random generator has changed. Files of other programs
in the directory must be as they were after it has been overwritten, resumed, added to and saved
over. For runs that are killed, see `kills.py`.
"""

import argparse
import hashlib
import io
import itertools
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import tempfile
import zipfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import h5py
import keras
import numpy as np

from snapshot_ensemble import SnapshotEnsemble, SnapshotError

MANIFEST = "ensemble.json"
# Names of files that other programs, or their users, may put into the directory.
FOREIGN = (
    "notes.txt",
    "writing-notes.txt",
    "writing-1-model.keras",
    "state-0009.npz",
    "model-0001.keras",
    "model-0042.keras",
    "snapshot-0001.weights.h5",
    "snapshot-0042.weights.h5",
    "history-0001.json",
    "snapshot-0042-0123456789ab.weights.h5",
    "ensemble.json.bak",
    "folder/model-0001.keras",
)
X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
Y = np.arange(8) % 3


class Remembering(keras.callbacks.Callback):
    """A user's callback with a state."""

    def __init__(self):
        super().__init__()
        self.state = {"rates": (0.5, float("nan")), "table": np.arange(3), 1: b"one"}

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state


def make_model():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    return model


def fit(directory, model, **arguments):
    ens = SnapshotEnsemble(model, cycles=3, lr_init=0.5, directory=directory)
    stopping = keras.callbacks.EarlyStopping("loss", patience=9, restore_best_weights=True)
    callbacks = [stopping, Remembering()]
    ens.fit(X, Y, epochs=3, verbose=0, callbacks=callbacks, **arguments)
    return ens


def make_ensemble(directory):
    keras.utils.set_random_seed(0)
    return predictions(fit(directory, make_model()))


def predictions(ens):
    # In NumPy, which is faster than tracing a graph for each fault.
    weights = [member.get_weights() for member in ens]
    return [X @ kernel + bias for kernel, bias in weights]


def alterations(directory, name, rng, flips):
    """Yields ways to alter a file: a name, and a function of the path."""
    content = (directory / name).read_bytes()
    for _ in range(flips):
        position, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
        flipped = bytearray(content)
        flipped[position] ^= bit
        yield "a bit flipped", lambda path, new=bytes(flipped): path.write_bytes(new)
    for _ in range(max(1, flips // 10)):
        cut = content[: rng.randrange(len(content))]
        yield "cut", lambda path, new=cut: path.write_bytes(new)
    yield "emptied", lambda path: path.write_bytes(b"")
    yield "lengthened", lambda path: path.write_bytes(content + b"\0")
    yield "removed", pathlib.Path.unlink
    noise = rng.randbytes(len(content))
    yield "filled with noise", lambda path: path.write_bytes(noise)
    for other in sorted(path.name for path in directory.iterdir()):
        if other not in (name, "ensemble.lock"):
            swapped = (directory / other).read_bytes()
            yield "swapped", lambda path, new=swapped: path.write_bytes(new)


def oversized(path):
    """Replaces a file by one whose data take 1 GiB when they are read."""
    huge = io.BytesIO()
    with h5py.File(huge, "w") as file:
        file.create_dataset("layers/dense/vars/0", (2**28,), "float32", chunks=True)
    if path.suffix == ".h5":
        path.write_bytes(huge.getvalue())
    elif path.suffix == ".keras":
        with zipfile.ZipFile(path, "a") as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in {**entries, "model.weights.h5": huge.getvalue()}.items():
                archive.writestr(name, content)
    elif path.suffix == ".npz":
        header = io.BytesIO()
        shape = {"descr": "<f4", "fortran_order": False, "shape": (2**28,)}
        np.lib.format.write_array_header_1_0(header, shape)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            with archive.open("variable_0.npy", "w", force_zip64=True) as entry:
                entry.write(header.getvalue())
                for _ in range(64):
                    entry.write(bytes(2**24))
    else:
        path.write_bytes(b"[" * 2**20)


def sparse(path):
    path.touch()
    os.truncate(path, 200 * 2**30)


# What may be in the place of a file.
HOSTILE = {
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a sparse file": sparse,
    "a directory": pathlib.Path.mkdir,
    "a dangling link": lambda path: path.symlink_to(path.parent / "nowhere"),
    "oversized data": oversized,
}


def mutated(node, rng):
    """A JSON value with one value in it replaced by another."""
    values = [None, True, -1, 10**30, 1.5, float("nan"), "x", "../x", [], {}, [[]], {"name": "x"}]
    if isinstance(node, dict) and node and rng.random() < 0.9:
        key = rng.choice(sorted(node))
        return {**node, key: mutated(node[key], rng)}
    if isinstance(node, list) and node and rng.random() < 0.9:
        index = rng.randrange(len(node))
        return [*node[:index], mutated(node[index], rng), *node[index + 1 :]]
    return rng.choice(values)


def forged(manifest):
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return {**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def sign(directory, name):
    """Writes a manifest that matches a file that was altered."""
    manifest = json.loads((directory / MANIFEST).read_text("utf-8"))
    content = (directory / name).read_bytes()
    found = {"name": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for node in (manifest, *manifest["snapshots"]):
        for key in ("model", "state", "base", "file"):
            if (node.get(key) or {}).get("name") == name:
                node[key] = found
    (directory / MANIFEST).write_text(json.dumps(forged(manifest)))


def mutated_state(content, rng):
    """The bytes of a state with a value in it, or an array, replaced by another."""
    with np.load(io.BytesIO(content)) as file:
        arrays = {name: file[name] for name in file.files}
    name = rng.choice(sorted(arrays))
    if rng.random() < 0.6:
        facts = mutated(json.loads(arrays["facts"].tobytes()), rng)
        arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), "uint8")
    elif rng.random() < 0.3:
        del arrays[name]
    else:
        others = [
            np.zeros(3),
            np.zeros((0,)),
            np.float32(1),
            np.asarray("x"),
            np.atleast_1d(arrays[name])[:1],
        ]
        arrays[name] = rng.choice(others)
    changed = io.BytesIO()
    np.savez(changed, **arrays)
    return changed.getvalue()


def everything(model):
    """What a state that is refused must not have changed."""
    values = [v.numpy().tobytes() for v in (*model.variables, *model.optimizer.variables)]
    keys = np.random.get_state()[1]  # noqa: NPY002  The global generator.
    return values, random.getstate(), keys.tolist()


def resumed(directory, name):
    """Whether resuming goes well, or is refused by name before anything has changed."""
    model = make_model()
    before = everything(model)
    try:
        fit(directory, model, resume=True)
    except SnapshotError as error:
        return (name in str(error) or MANIFEST in str(error)) and everything(model) == before
    except ValueError as error:  # Of another plan or model, by its fingerprint.
        return "can only be resumed with the same" in str(error) and everything(model) == before
    return True


def in_bounds(check):
    """Whether a check is true, and within 60 seconds and 500 MB."""

    def stop(signal_number, frame):
        raise TimeoutError

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    try:
        is_safe = check()
    except TimeoutError:
        return False
    finally:
        signal.alarm(0)
    return is_safe and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


def survived(directory, expected, name, model, forged=False):
    try:
        actual = predictions(SnapshotEnsemble.load(directory, model=model))
    except SnapshotError as error:
        return name is None or name in str(error)
    if forged:  # A manifest with a matching hash may leave members out, but not alter them.
        return all(any(np.array_equal(one, other) for other in expected) for one in actual)
    return len(actual) == len(expected) and np.array_equal(actual, expected)


class Faults:
    """Tries faults in a directory, and counts them by kind.

    Args:
        scratch: Path of an empty directory.
        seed: Seeds the choice of faults.
    """

    def __init__(self, scratch, seed):
        self.rng, self.counts = random.Random(seed), {}
        self.directory, self.spare = scratch / "ensemble", scratch / "spare"
        self.expected = make_ensemble(self.directory)
        shutil.copytree(self.directory, self.spare)
        self.given = SnapshotEnsemble.load(self.directory).model
        names = {path.name for path in self.directory.iterdir()}
        self.names = sorted(names - {"ensemble.lock"})
        (self.state,) = (name for name in names if name.startswith("state-"))

    def count(self, kind, is_safe):
        tried, good = self.counts.get(kind, (0, 0))
        self.counts[kind] = (tried + 1, good + bool(is_safe))

    def loaded(self, name, is_forged=False, model=None):
        return survived(self.directory, self.expected, name, model, is_forged)

    def restore(self):
        shutil.rmtree(self.directory)
        shutil.copytree(self.spare, self.directory)

    def alter_files(self, flips):
        for name in self.names:
            for kind, alter in alterations(self.directory, name, self.rng, flips):
                alter(self.directory / name)
                # Read the model from its file only if that file is altered.
                model = None if name.endswith(".keras") else self.given
                self.count(kind, self.loaded(name, model=model))
                shutil.copyfile(self.spare / name, self.directory / name)

    def alter_manifests(self, mutations):
        manifest = json.loads((self.spare / MANIFEST).read_text("utf-8"))
        for _ in range(mutations):
            other = mutated(manifest, self.rng)
            (self.directory / MANIFEST).write_text(json.dumps(other))
            self.count("manifest altered", self.loaded(None, model=self.given))
            if isinstance(other, dict):
                (self.directory / MANIFEST).write_text(json.dumps(forged(other)))
                self.count("manifest forged", self.loaded(None, True, self.given))
        self.restore()

    def alter_states(self, mutations):
        content = (self.spare / self.state).read_bytes()
        for _ in range(mutations):
            (self.directory / self.state).write_bytes(mutated_state(content, self.rng))
            self.count("state altered", resumed(self.directory, self.state))
            sign(self.directory, self.state)
            self.count("state forged", resumed(self.directory, self.state))
            self.restore()

    def replace_files(self):
        for name in self.names:
            for kind, make in HOSTILE.items():
                path = self.directory / name
                if make is not oversized or path.suffix != ".keras":
                    path.unlink()
                make(path)
                if make is oversized and name != MANIFEST:
                    sign(self.directory, name)
                self.count(f"hostile: {kind}", in_bounds(lambda name=name: self.refused(name)))
                self.restore()

    def add_foreign_files(self, every):
        uses = (
            lambda: fit(self.directory, make_model(), overwrite=True),
            lambda: fit(self.directory, make_model(), resume=True),
            lambda: SnapshotEnsemble.load(self.directory).fit(
                X, np.arange(8) % 3, epochs=3, verbose=0
            ),
            lambda: SnapshotEnsemble.load(self.spare).save(self.directory, overwrite=True),
        )
        for name, use in list(itertools.product(FOREIGN, uses))[::every]:
            path = self.directory / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"of another program")
            use()
            is_left = path.read_bytes() == b"of another program"
            self.count("foreign file", is_left and len(SnapshotEnsemble.load(self.directory)))
            self.restore()

    def refused(self, name):
        try:
            if name == self.state:
                fit(self.directory, make_model(), resume=True)
            else:
                list(SnapshotEnsemble.load(self.directory))
        except SnapshotError as error:
            return name in str(error)
        return False


def try_all(flips, mutations, states, every, seed):
    """The numbers of faults tried and survived, by kind."""
    with tempfile.TemporaryDirectory() as scratch:
        faults = Faults(pathlib.Path(scratch), seed)
        faults.alter_files(flips)
        faults.alter_manifests(mutations)
        faults.alter_states(states)
        faults.replace_files()
        faults.add_foreign_files(every)
        assert faults.loaded(None)
    return faults.counts


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=200, help="bits flipped in each file")
    parser.add_argument(
        "--mutations", type=int, default=1000, help="replaced values of the manifest"
    )
    parser.add_argument("--states", type=int, default=800, help="replaced values of the state")
    parser.add_argument(
        "--every", type=int, default=1, help="of foreign files and uses, only every n-th pair"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(arguments)
    given = arguments.flips, arguments.mutations, arguments.states, arguments.every
    counts = try_all(*given, arguments.seed)
    print(f"{'fault':24}{'tried':>8}{'survived':>10}")
    for kind, (tried, good) in counts.items():
        print(f"{kind:24}{tried:8}{good:10}")
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    print(f"{'all':24}{total[0]:8}{total[1]:10}")
    return counts


if __name__ == "__main__":
    main()
