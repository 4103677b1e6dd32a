"""Measures what saving one more epoch costs after a short and after a long history.

    python tests/benchmarks/history_cost.py

For each length: milliseconds in the training thread and in all for an epoch (medians), the bytes
of the manifest, and, for scale, the milliseconds of writing the whole history as JSON.
"""

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from snapshot_ensemble.storage.directory import DirectoryStore
from snapshot_ensemble.storage.typed_json import encode
from snapshot_ensemble.tables import text_table

METRICS = ("loss", "accuracy", "val_loss", "val_accuracy", "learning_rate")


def cost(directory, epochs, rounds):
    """The figures after a history of this many epochs."""
    store, rng = DirectoryStore(directory), np.random.default_rng(0)
    waiting, total = [], []
    with store.transaction():
        progress = store.record.progress
        for epoch in range(epochs):
            progress.record_epoch({"cycle": epoch, **dict.fromkeys(METRICS, rng.random())})
        progress.done.epochs = epochs
        store.commit()
        store.settle()
        for _ in range(rounds):
            progress.record_epoch({"cycle": epochs, **dict.fromkeys(METRICS, rng.random())})
            progress.done.epochs += 1
            start = time.perf_counter()
            store.commit()
            waiting.append(time.perf_counter() - start)
            store.settle()
            total.append(time.perf_counter() - start)
    start = time.perf_counter()
    json.dumps(encode(progress.history))
    whole = time.perf_counter() - start
    seconds = (statistics.median(waiting), statistics.median(total), whole)
    return [1e3 * value for value in seconds], (directory / "ensemble.json").stat().st_size


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, nargs="+", default=[100, 10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args(arguments)
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for epochs in arguments.epochs:
            results[epochs] = cost(pathlib.Path(scratch, str(epochs)), epochs, arguments.rounds)
    rows = [("epochs", "training thread, ms", "in all, ms", "manifest, bytes", "all as JSON, ms")]
    for epochs, ((waiting, total, whole), size) in results.items():
        rows.append((str(epochs), f"{waiting:.2f}", f"{total:.1f}", str(size), f"{whole:.1f}"))
    print(text_table(rows))
    return results


if __name__ == "__main__":
    main()
