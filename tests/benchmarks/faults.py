"""Damages a saved ensemble in many ways, and counts the faults that are handled safely.

    python tests/benchmarks/faults.py

Each file is altered in each way (a bit flipped at many positions, truncated, emptied, lengthened,
removed, filled with noise, replaced by another file of the directory). The manifest's values are
also replaced, with its old hash or with a matching one. A fault counts as survived if loading
raises a `SnapshotError` that names the file, or if every member's predictions are unchanged. For
runs that are killed, see `kills.py`.
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import shutil
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from snapshot_ensemble import SnapshotEnsemble, SnapshotError

MANIFEST = "ensemble.json"
X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")


def make_ensemble(directory):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    ens = SnapshotEnsemble(model, cycles=3, lr_init=0.5, directory=directory)
    ens.fit(X, np.arange(8) % 3, epochs=3, verbose=0)
    return predictions(ens)


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


def survived(directory, expected, name, model, forged=False):
    try:
        actual = predictions(SnapshotEnsemble.load(directory, model=model))
    except SnapshotError as error:
        return name is None or name in str(error)
    if forged:  # A manifest with a matching hash may leave members out, but not alter them.
        return all(any(np.array_equal(one, other) for other in expected) for one in actual)
    return len(actual) == len(expected) and np.array_equal(actual, expected)


def try_all(flips, mutations, seed):
    """The numbers of faults tried and survived, by kind."""
    rng, counts = random.Random(seed), {}

    def count(kind, is_safe):
        tried, good = counts.get(kind, (0, 0))
        counts[kind] = (tried + 1, good + is_safe)

    with tempfile.TemporaryDirectory() as scratch:
        directory, spare = pathlib.Path(scratch, "ensemble"), pathlib.Path(scratch, "spare")
        expected = make_ensemble(directory)
        shutil.copytree(directory, spare)
        given = SnapshotEnsemble.load(directory).model
        names = sorted(path.name for path in directory.iterdir() if path.name != "ensemble.lock")
        for name in names:
            for kind, alter in alterations(directory, name, rng, flips):
                alter(directory / name)
                # Read the model from its file only if that file is altered.
                model = None if name.endswith(".keras") else given
                count(f"{kind}", survived(directory, expected, name, model))
                shutil.copyfile(spare / name, directory / name)
        manifest = json.loads((spare / MANIFEST).read_text("utf-8"))
        for _ in range(mutations):
            other = mutated(manifest, rng)
            for kind in ("manifest altered", "manifest forged"):
                if kind == "manifest forged":
                    if not isinstance(other, dict):
                        continue
                    other = forged(other)
                (directory / MANIFEST).write_text(json.dumps(other))
                forgery = kind == "manifest forged"
                count(kind, survived(directory, expected, None, given, forgery))
        (directory / MANIFEST).write_bytes((spare / MANIFEST).read_bytes())
        assert survived(directory, expected, None, None)
    return counts


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=200, help="bits flipped in each file")
    parser.add_argument(
        "--mutations", type=int, default=1000, help="replaced values of the manifest"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(arguments)
    counts = try_all(arguments.flips, arguments.mutations, arguments.seed)
    print(f"{'fault':24}{'tried':>8}{'survived':>10}")
    for kind, (tried, good) in counts.items():
        print(f"{kind:24}{tried:8}{good:10}")
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    print(f"{'all':24}{total[0]:8}{total[1]:10}")
    return counts


if __name__ == "__main__":
    main()
