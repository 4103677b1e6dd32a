"""Compares one run, the student of `distill`, and the ensemble that it learned from.

    python tests/benchmarks/distill.py --tasks digits_conv dna --seeds 3

Each cell is the error in percent and the negative log-likelihood in nats on the test data, as mean
and standard error over the seeds. `kept`: which share of the ensemble's gain over one run the
student keeps, in error and in likelihood, from the means; without a gain there is nothing to keep.
`passes`: how often the training data are run forward and backward. One run and the ensemble have
the task's own budget; the student needs the ensemble first, whose members then predict the training
data once. Runs are saved in `--directory` and not run again.
"""

import argparse
import os
import pathlib
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

try:
    from benchmarks.tasks import TASKS
except ImportError:
    from tasks import TASKS

from snapshot_ensemble import SnapshotEnsemble


def scores(probabilities, y):
    likely = np.maximum(probabilities[np.arange(len(y)), y], 1e-12)
    return 100 * np.mean(probabilities.argmax(-1) != y), -np.mean(np.log(likely))


def saved(path, run):
    """The predictions that an earlier call has saved, or new ones."""
    if not path.exists():
        start, predicted = time.perf_counter(), run()
        draft = path.with_suffix(".writing")
        with draft.open("wb") as file:
            np.savez(file, p=predicted)
        draft.rename(path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)
    with np.load(path) as found:
        return found["p"]


def row_of(args, name, seed):
    """The scores of one run, the student and the ensemble, and the passes of the student."""
    task = TASKS[name]
    (x, y), validation, (x_test, y_test) = task.parts(args.root)
    epochs = args.epochs or task.epochs
    own = {"batch_size": task.batch, "verbose": 0}
    given = {**own, "validation_data": validation, "epochs": epochs}
    home = pathlib.Path(args.directory, f"{name}-{epochs}-{seed}")
    home.parent.mkdir(parents=True, exist_ok=True)

    def one():
        keras.utils.set_random_seed(seed)
        ens = SnapshotEnsemble(task.model(), cycles=1, lr_init=task.peak)
        ens.fit(x, y, **given)
        return ens.predict(x_test, verbose=0)

    def ensemble():
        keras.utils.set_random_seed(seed)
        ens = SnapshotEnsemble(task.model(), cycles=5, lr_init=task.peak, directory=home)
        ens.fit(x, y, overwrite=True, save_every=None, **given)
        return ens.predict(x_test, verbose=0)

    def student():
        keras.utils.set_random_seed(seed)
        ens = SnapshotEnsemble.load(home)
        small = ens.distill(x, y, alpha=args.alpha, temperature=args.temperature, **own)
        return small.predict(x_test, verbose=0)

    def path(method):
        return home.with_name(f"{home.name}-{method}.npz")

    of_student = f"student-{args.alpha:g}-{args.temperature:g}"
    rows = [saved(path("one"), one), saved(path("ensemble"), ensemble)]
    rows.insert(1, saved(path(of_student), student))
    return [scores(probabilities, y_test) for probabilities in rows], epochs, round(2 * epochs / 5)


def spread(values):
    count = len(values)
    error = values.std(0, ddof=1) / np.sqrt(count) if count > 1 else np.full(2, np.nan)
    return "{:.2f} ± {:.2f}, {:.3f} ± {:.3f}".format(
        *(number for pair in zip(values.mean(0), error, strict=True) for number in pair)
    )


def kept(values):
    """The share of the gain that the student keeps; None where the ensemble gains nothing."""
    one, student, ensemble = values.mean(0)
    gain = one - ensemble
    return [
        float(own / of) if of > 0 else None for own, of in zip(one - student, gain, strict=True)
    ]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["digits_conv", "dna"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="the budget (default: each task's own)")
    parser.add_argument("--alpha", type=float, default=0.0)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--root", default="/", help="folder with unpacked Debian packages")
    parser.add_argument("--directory", default="distill", help="where runs are saved")
    args = parser.parse_args(argv)
    result = {}
    print("| | seeds | one run | student | ensemble | kept | passes |", "|---" * 7 + "|", sep="\n")
    for name in args.tasks:
        found = [row_of(args, name, seed) for seed in range(args.seeds)]
        values = np.asarray([row for row, *_ in found])
        _, epochs, more = found[0]
        share = ["none" if one is None else f"{one:.0%}" for one in kept(values)]
        cells = [name, args.seeds, *(spread(values[:, i]) for i in range(3)), ", ".join(share)]
        print("| " + " | ".join(map(str, [*cells, f"{epochs} + {more}"])) + " |", flush=True)
        result[name] = {"scores": values, "kept": kept(values), "passes": (epochs, more)}
    return result


if __name__ == "__main__":
    main()
