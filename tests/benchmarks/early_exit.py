"""Early exit: its error, likelihood, members run a row, and time, beside one model and all members.

    python tests/benchmarks/early_exit.py

Five snapshots are trained. `calibrate` and `fit_early_exit` learn on one half of the rows that
training has not seen, and the figures are of the other half, with the standard error of the paired
difference to all members. Times are medians of ratios to one model's `predict`, of the same rows
at the same batch size, measured alternately.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

from snapshot_ensemble import SnapshotEnsemble

try:
    from benchmarks.tasks import TASKS
    from benchmarks.timing import ratios
except ImportError:
    from tasks import TASKS
    from timing import ratios

MEMBERS = 5


def losses(p, y):
    """Each row's error and negative log-likelihood."""
    likely = np.maximum(p[np.arange(len(y)), y].astype("float64"), 1e-30)
    return np.stack([p.argmax(-1) != y, -np.log(likely)]).astype("float64")


def halves(x, y):
    """Every other row, and the rest."""
    return (x[::2], y[::2]), (x[1::2], y[1::2])


def one_task(name, arguments):
    """Trains, learns, and returns rows of (name, error, NLL, their standard errors, members)."""
    task = TASKS[name]
    keras.utils.set_random_seed(arguments.seed)
    train, *others = task.parts(arguments.root)
    held, test = halves(*(np.concatenate(parts) for parts in zip(*others, strict=True)))
    ens = SnapshotEnsemble(task.model(), cycles=MEMBERS, shrink=arguments.shrink)
    ens.fit(*train, epochs=arguments.epochs or task.epochs, batch_size=task.batch, verbose=0)
    ens.members = None
    ens.calibrate(*held, verbose=0)
    ens.fit_early_exit(*held, verbose=0)
    x, y = test
    early, counts = ens.predict(x, early_exit=True, return_counts=True, verbose=0)
    last = ens.predict(x, members=1, verbose=0)
    every = losses(ens.predict(x, verbose=0), y)
    rows = []
    for what, p, members in [("one", last, 1.0), ("early", early, counts.mean()), ("all", None, 5)]:
        own = every if p is None else losses(p, y)
        spread = (own - every).std(axis=1, ddof=1) / np.sqrt(len(y))
        rows.append((what, *own.mean(axis=1), *spread, float(members)))
    return ens, x, rows


def times(ens, x, batch_size, rounds):
    """The time of early exit and of all members, relative to one model's `predict`."""

    def predict(**arguments):
        return lambda: ens.predict(x, batch_size=batch_size, verbose=0, **arguments)

    candidates = {
        "one": lambda: ens.model.predict(x, batch_size=batch_size, verbose=0),
        "early": predict(early_exit=True),
        "all": predict(),
    }
    _, ratio = ratios(candidates, rounds)
    return {name: ratio(name, "one") for name in candidates}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="*", default=["digits_conv", "fashion"], choices=TASKS)
    parser.add_argument("--root", default="/", help="the folder of Debian's packages")
    parser.add_argument("--epochs", type=int, help="the budget; by default that of the task")
    parser.add_argument("--shrink", type=float, default=0.5)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(arguments)
    print(f"{'task':24}{'members':>8}{'run':>6}{'error %':>16}{'NLL':>18}{'time':>7}")
    results = {}
    for name in arguments.tasks:
        ens, x, rows = one_task(name, arguments)
        time = times(ens, x, arguments.batch_size, arguments.rounds)
        for what, error, nll, of_error, of_nll, members in rows:
            errors = f"{100 * error:.2f} ± {100 * of_error:.2f}"
            nlls = f"{nll:.4f} ± {of_nll:.4f}"
            print(f"{name:24}{what:>8}{members:6.2f}{errors:>16}{nlls:>18}{time[what]:7.2f}")
        results[name] = rows, time
    return results


if __name__ == "__main__":
    main()
