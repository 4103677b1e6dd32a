"""Compares ways to calibrate an ensemble on its validation data.

    python tests/benchmarks/calibration.py --tasks digits_conv satellite --seeds 3 --root FOLDER

An ensemble of the default settings is trained for each seed. What is fitted on the validation data,
which have also chosen its members, is scored on the test data:

- `none`: the members' mean as it is
- `temperature`: as `calibrate` fits it; all others are compared with it, within seeds
- `likelihood`: a temperature without the prior of `calibrate`
- `vector`: a factor and a constant for each class, by the likelihood and 1 or 10 times the sum of
  the squares of the constants and of the factors' logarithms, about their mean
- `isotonic`: a monotonic function of the probability of each class, normalized

The last two may change which class is most probable. Errors are in percent, likelihoods in nats,
all on the test data. Predictions are saved in `--directory` and not made again.
"""

import argparse
import functools
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax
from sklearn.isotonic import IsotonicRegression

try:
    from benchmarks.accuracy import calibration_error, nll
    from benchmarks.tasks import TASKS
except ImportError:
    from accuracy import calibration_error, nll
    from tasks import TASKS

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.evaluation.calibration import learn_temperature
from snapshot_ensemble.evaluation.targets import Truth


def temperature(logs, y):
    truth = Truth(np.eye(logs.shape[1])[y], np.full(len(y), 1 / len(y)))
    best = learn_temperature([logs], [truth], [1.0])
    return lambda given: log_softmax(given / best, axis=-1)


def likelihood(logs, y):
    best = minimize_scalar(
        lambda t: nll(log_softmax(logs / np.exp(t), axis=-1), y), bounds=(-3, 3), method="bounded"
    )
    return lambda given: log_softmax(given / np.exp(best.x), axis=-1)


def vector(logs, y, penalty):
    classes, labels = logs.shape[1], np.eye(logs.shape[1])[y]

    def loss(values):
        factors, shifts = np.exp(values[:classes]), values[classes:]
        found = log_softmax(logs * factors + shifts, axis=-1)
        slopes = (np.exp(found) - labels) / len(y)
        apart = values[:classes] - values[:classes].mean()
        penalties = penalty / len(y) * (np.sum(apart**2) + np.sum(shifts**2))
        of_factors = (slopes * logs).sum(axis=0) * factors + 2 * penalty / len(y) * apart
        of_shifts = slopes.sum(axis=0) + 2 * penalty / len(y) * shifts
        return nll(found, y) + penalties, np.concatenate([of_factors, of_shifts])

    best = minimize(loss, np.zeros(2 * classes), jac=True, method="L-BFGS-B").x
    return lambda given: log_softmax(given * np.exp(best[:classes]) + best[classes:], axis=-1)


def isotonic(logs, y):
    fits = [
        IsotonicRegression(y_min=1e-6, y_max=1 - 1e-6, out_of_bounds="clip").fit(own, y == label)
        for label, own in enumerate(np.exp(logs).T)
    ]

    def calibrated(given):
        columns = zip(fits, np.exp(given).T, strict=True)
        found = np.stack([fit.predict(own) for fit, own in columns], axis=-1)
        return np.log(found / found.sum(axis=-1, keepdims=True))

    return calibrated


METHODS = {
    "none": lambda logs, y: lambda given: given,
    "temperature": temperature,
    "likelihood": likelihood,
    "vector, 1": functools.partial(vector, penalty=1),
    "vector, 10": functools.partial(vector, penalty=10),
    "isotonic": isotonic,
}


def predictions(args, name, seed):
    """The logarithms of what an ensemble predicts for the validation and the test data."""
    path = pathlib.Path(args.directory, f"{name}-{args.epochs}-{seed}.npz")
    task = TASKS[name]
    (x, y), validation, (x_test, _) = task.parts(args.root)
    if not path.exists():
        keras.utils.set_random_seed(seed)
        ens = SnapshotEnsemble(task.model(), lr_init=task.peak)
        given = {"validation_data": validation, "batch_size": task.batch, "verbose": 0}
        ens.fit(x, y, epochs=args.epochs or task.epochs, **given)
        path.parent.mkdir(parents=True, exist_ok=True)
        held_out, test = (ens.predict(part, verbose=0) for part in (validation[0], x_test))
        np.savez(path, held_out=held_out, test=test)
    with np.load(path) as saved:
        return [
            np.log(np.maximum(saved[part].astype("float64"), 1e-12))
            for part in ("held_out", "test")
        ]


def scores(logs, y):
    wrong = 100 * np.mean(logs.argmax(axis=-1) != y)
    return [wrong, nll(logs, y), calibration_error(np.exp(logs), y)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["digits_conv"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="the budget (default: the task's own)")
    parser.add_argument("--root", default="/", help="folder with unpacked Debian packages")
    parser.add_argument("--directory", default="calibration", help="where predictions are saved")
    args = parser.parse_args(argv)
    results = {}
    print("| task | method | error | NLL | calibration error |\n|---|---|---|---|---|")
    for name in args.tasks:
        _, (_, y), (_, y_test) = TASKS[name].parts(args.root)
        found = {method: [] for method in METHODS}
        for seed in range(args.seeds):
            held_out, test = predictions(args, name, seed)
            for method, fit in METHODS.items():
                found[method].append(scores(fit(held_out, y)(test), y_test))
        results[name] = {method: np.asarray(rows) for method, rows in found.items()}
        for method, rows in results[name].items():
            shown = rows if method == "temperature" else rows - results[name]["temperature"]
            spread = shown.std(axis=0, ddof=1) / np.sqrt(len(shown)) if len(shown) > 1 else [0] * 3
            sign = "" if method == "temperature" else "+"
            cells = [
                f"{value:{sign}.{digits}f} ± {error:.{digits}f}"
                for value, error, digits in zip(shown.mean(axis=0), spread, (2, 4, 3), strict=True)
            ]
            print(f"| {name} | {method} | {' | '.join(cells)} |", flush=True)
    return results


if __name__ == "__main__":
    main()
