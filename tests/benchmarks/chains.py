"""Compares independent chains with one long chain and with full runs, at one total budget.

    python tests/benchmarks/chains.py --tasks digits digits_conv --seeds 3
    python tests/benchmarks/chains.py --tasks digits_conv --seeds 0 --time --plan 1000

Each chain has the task's own budget. `chains`: that many chains of `--cycles` cycles each;
`kept`: the same, weighted by `fit_weights(method="greedy")` on the validation data, with the number
of members that got a weight; `one chain`: one run of as many epochs and cycles as all chains have
together; `full runs`: as many runs of one cycle. Cells are the error in percent and the negative
log-likelihood in nats on the test data, as mean and standard error over the seeds, and the number
of members. Runs are saved in `--directory` and not run again.

With `--time`, chains on one and on two workers of Ray, in seconds from the call to the merged
ensemble; workers are started before. With `--plan N`, what N chains would need: by the sizes and
times of a few, and by arithmetic beyond.
"""

import argparse
import os
import pathlib
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

try:
    from benchmarks.distill import scores
    from benchmarks.tasks import TASKS
except ImportError:
    from distill import scores
    from tasks import TASKS

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.inference.member_pool import MEMORY_LIMIT
from snapshot_ensemble.ray import fit_chains
from snapshot_ensemble.storage.packing import files_in

METHODS = ("chains", "kept", "one chain", "full runs")


def train(args, name, seed, method):
    """The test predictions of each method's ensemble, and how many members it combines."""
    task = TASKS[name]
    (x, y), validation, (x_test, _) = task.parts(args.root)
    epochs = args.epochs or task.epochs
    given = {"batch_size": task.batch, "verbose": 0, "validation_data": validation}
    if method == "one chain":
        keras.utils.set_random_seed(seed)
        cycles = args.chains * args.cycles
        ens = SnapshotEnsemble(task.model(), cycles=cycles, lr_init=task.peak)
        ens.fit(x, y, epochs=args.chains * epochs, **given)
    else:
        cycles = 1 if method == "full runs" else args.cycles
        chains = {"chains": args.chains, "cycles": cycles, "lr_init": task.peak, "seed": seed}
        where = pathlib.Path(args.directory, f"{name}-{epochs}-{cycles}-{args.chains}-{seed}")
        chains |= {"directory": where, "engine": args.engine}
        ens = fit_chains(task.model, x, y, epochs=epochs, **chains, **given)
    if method != "kept":
        members = ens.members or len(ens)
        return ens.predict(x_test, verbose=0), members
    weights = ens.fit_weights(*validation, method="greedy", verbose=0)
    return ens.predict(x_test, combine="weighted", verbose=0), np.count_nonzero(weights)


def saved(args, name, seed, method):
    """What an earlier call has saved, or new results."""
    kind = f"{name}-{args.epochs or TASKS[name].epochs}-{args.cycles}-{args.chains}-{seed}"
    path = pathlib.Path(args.directory, f"{kind}-{method.replace(' ', '-')}.npz")
    if not path.exists():
        start = time.perf_counter()
        predicted, members = train(args, name, seed, method)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".writing")
        with draft.open("wb") as file:
            np.savez(file, p=predicted, members=members)
        draft.rename(path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)
    with np.load(path) as found:
        return found["p"], int(found["members"])


def cell(rows):
    """The mean and its standard error, and the number of members."""
    values = np.asarray([row[:2] for row in rows])
    error = values.std(0, ddof=1) / np.sqrt(len(rows)) if len(rows) > 1 else np.full(2, np.nan)
    mean, members = values.mean(0), np.mean([row[2] for row in rows])
    return f"{mean[0]:.2f} ± {error[0]:.2f}, {mean[1]:.3f} ± {error[1]:.3f} ({members:.3g})"


def timed(args, name):
    """The seconds that chains take on one and on two workers."""
    import ray

    task = TASKS[name]
    (x, y), _, _ = task.parts(args.root)
    given = {"cycles": args.cycles, "lr_init": task.peak, "batch_size": task.batch, "verbose": 0}
    seconds = {}
    for workers in (1, 2):
        ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False)
        try:
            # Each worker imports TensorFlow in its first task.
            fit_chains(task.model, x, y, chains=workers, epochs=args.cycles, **given)
            start = time.perf_counter()
            epochs = args.epochs or task.epochs
            fit_chains(task.model, x, y, chains=args.chains, epochs=epochs, **given)
            seconds[workers] = time.perf_counter() - start
        finally:
            ray.shutdown()
    return seconds


def plan(args, name, count):
    """What many chains need, from three of them."""
    task = TASKS[name]
    (x, y), _, _ = task.parts(args.root)
    few = {"chains": 3, "epochs": args.cycles, "cycles": args.cycles, "lr_init": task.peak}
    with tempfile.TemporaryDirectory() as home:
        where = pathlib.Path(home, "run")
        arguments = {**few, "directory": where, "engine": "local", "verbose": 0}
        fit_chains(task.model, x, y, batch_size=task.batch, **arguments)
        folders = sorted(where.glob("chain-*"))
        returned = np.mean([sum(map(len, files_in(folder).values())) for folder in folders])
        start = time.perf_counter()
        merged = SnapshotEnsemble.merge(folders, pathlib.Path(home, "again"))
        seconds = (time.perf_counter() - start) / len(folders)
    weights = sum(array.nbytes for array in merged.model.get_weights())
    members = count * args.cycles
    megabytes = {
        "data, once a machine": x.nbytes + y.nbytes,
        "one member": weights,
        "files that a chain returns": returned,
        "files of all chains": returned * count,
        "all members in memory": weights * members,
    }
    rows = [(what, f"{size / 2**20:.2f} MiB") for what, size in megabytes.items()]
    rows += [
        ("members that one graph holds within memory_limit", f"{MEMORY_LIMIT // weights}"),
        ("members in all", f"{members}"),
        ("time to merge all chains", f"{seconds * count:.0f} s"),
    ]
    return rows


def parsed(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["digits_conv"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--chains", type=int, default=3)
    parser.add_argument("--cycles", type=int, default=3, help="of each chain (default: 3)")
    parser.add_argument("--epochs", type=int, help="of each chain (default: each task's own)")
    parser.add_argument("--engine", choices=("ray", "local"), default="local")
    parser.add_argument("--time", action="store_true", help="also time one and two workers")
    parser.add_argument("--plan", type=int, default=0, help="what that many chains would need")
    parser.add_argument("--root", default="/", help="folder with unpacked Debian packages")
    parser.add_argument("--directory", default="chains", help="where runs are saved")
    return parser.parse_args(argv)


def main(argv=None):
    args = parsed(argv)
    result = {}
    for name in args.tasks:
        y = TASKS[name].parts(args.root)[2][1]
        rows = {method: [] for method in METHODS}
        for seed in range(args.seeds):
            for method in METHODS:
                predicted, members = saved(args, name, seed, method)
                rows[method].append((*scores(predicted, y), members))
        result[name] = rows
        if args.seeds:
            cells = [name, *map(cell, rows.values())]
            print("| | " + " | ".join(METHODS) + " |", "|---" * len(cells) + "|", sep="\n")
            print("| " + " | ".join(cells) + " |", flush=True)
        if args.time:
            seconds = result[name, "time"] = timed(args, name)
            print(f"{name}: {seconds[1]:.0f} s on one worker, {seconds[2]:.0f} s on two")
        if args.plan:
            table = result[name, "plan"] = plan(args, name, args.plan)
            print(f"{name}, {args.plan} chains:", *(f"{a}: {b}" for a, b in table), sep="\n  ")
    return result


if __name__ == "__main__":
    main()
