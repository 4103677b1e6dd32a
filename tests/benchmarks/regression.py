"""Values with uncertainty, by the protocol of the UCI tables, within one budget of 40 epochs.

    python tests/benchmarks/regression.py --root FOLDER --directory runs

Each set is split 20 times at random into 90 % to train on and 10 % to test on. All networks have
one hidden layer of 50 ReLUs and predict a mean and a log-variance (`GaussianNLL`). Inputs and
values are standardized by the training rows; scores are in the unit of the values. Each cell is the
mean and the standard error over the splits.

- *one network*: annealed once over the budget. *deep ensemble*: five of them, for five times the
  budget.
- *warm snapshots*: five cycles with warm restarts, all members.
- *the default*: `SnapshotEnsemble` as it is, with a tenth of the training rows as validation data,
  which choose its members, and on which `calibrate` then learns its temperature.
- *the default, conformal*: the same, with the intervals of `conformalize` on those rows.
- *MC dropout*: one network with dropout of 5 %, 50 samples.

The sets come from packages: `boston` from Debian's `r-cran-mlbench` and `concrete` from
`r-cran-modeldata`, which need not be installed (`apt-get download`, `dpkg -x FILE.deb FOLDER`) and
are read with `pip install rdata`; `diabetes` from scikit-learn. Runs are saved in `--directory` and
not run again.
"""

import argparse
import functools
import lzma
import os
import pathlib
import time
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from scipy import stats

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.losses import GaussianNLL

layers = keras.layers
LEVEL = 0.9
# RMSE and NLL as published, for 40 epochs of such a network: probabilistic backpropagation
# (Hernández-Lobato & Adams, 2015), MC dropout (Gal & Ghahramani, 2016), and a deep ensemble of five
# (Lakshminarayanan et al., 2017), which has five times the budget.
PUBLISHED = {
    "boston": {"PBP": (3.01, 2.57), "MC dropout": (2.97, 2.46), "deep ensemble": (3.28, 2.41)},
    "concrete": {"PBP": (5.67, 3.16), "MC dropout": (5.23, 3.04), "deep ensemble": (6.03, 3.06)},
}


# Data


def boston(root):
    """The median value of houses in 506 parts of a town, in 1000 dollars, from 13 features."""
    import rdata

    path = root / "usr/lib/R/site-library/mlbench/data/BostonHousing.rda"
    with warnings.catch_warnings():  # Of an encoding that is not stated.
        warnings.simplefilter("ignore")
        table = rdata.read_rda(path)["BostonHousing"]
    return _columns(table, "medv")


def concrete(root):
    """The compressive strength of 1030 mixtures of concrete, in MPa, from 8 features."""
    import rdata

    folder = root / "usr/lib/R/site-library/modeldata/data"
    with warnings.catch_warnings():  # Of encodings and classes of tables.
        warnings.simplefilter("ignore")
        index = rdata.read_rds(folder / "Rdata.rdx")
        start, size = map(int, index["variables"]["concrete"])
        packed = (folder / "Rdata.rdb").read_bytes()[start : start + size]
        # Four bytes with the size, one with the kind of compression, and raw LZMA.
        filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 2**26}]
        plain = lzma.decompress(packed[5:], lzma.FORMAT_RAW, filters=filters)
        table = rdata.conversion.convert(rdata.parser.parse_data(plain))
    return _columns(table, "compressive_strength")


def diabetes(root):
    """How far diabetes has come in 442 patients after a year, from 10 features."""
    from sklearn.datasets import load_diabetes

    return load_diabetes(return_X_y=True)


def _columns(table, name):
    y = table[name].to_numpy("float64")
    return table.drop(columns=name).astype("float64").to_numpy(), y


SETS = {"boston": boston, "concrete": concrete, "diabetes": diabetes}


@functools.cache
def loaded(name, root):
    return SETS[name](pathlib.Path(root))


def split_of(x, y, number):
    """Standardized training and test rows of a random split, and the mean and scale of `y`."""
    order = np.random.default_rng(number).permutation(len(y))
    train, test = order[: round(0.9 * len(y))], order[round(0.9 * len(y)) :]
    mean, scale = x[train].mean(0), x[train].std(0)
    x = (x - mean) / np.where(scale > 0, scale, 1)
    center, unit = y[train].mean(), y[train].std()
    y = (y - center) / unit
    return (x[train], y[train]), (x[test], y[test]), (center, unit)


# Methods: each returns the mean, the variance, and the bounds of 90 % of the test rows.


def network(features, args, dropout=0.0):
    inside = [layers.Dense(50, "relu"), layers.Dense(2)]
    if dropout:
        inside = [layers.Dropout(dropout), inside[0], layers.Dropout(dropout), inside[1]]
    model = keras.Sequential([keras.Input((features,)), *inside])
    optimizer = keras.optimizers.AdamW(args.rate, weight_decay=args.decay)
    model.compile(optimizer, GaussianNLL(), steps_per_execution=8)
    return model


def fitted(train, args, dropout=0.0, validation=None, **arguments):
    model = network(train[0].shape[1], args, dropout)
    ens = SnapshotEnsemble(model, **arguments)
    own = {"epochs": args.epochs, "batch_size": args.batch, "verbose": 0}
    ens.fit(*train, validation_data=validation, **own)
    return ens


def normal(predicted):
    """What a normal distribution gives: mean, variance, and bounds."""
    mean, variance = predicted[:, 0].astype("float64"), np.exp(predicted[:, 1].astype("float64"))
    reach = stats.norm.ppf((1 + LEVEL) / 2) * np.sqrt(variance)
    return np.stack([mean, variance, mean - reach, mean + reach])


def mixed(members):
    """The mixture of several predictions."""
    mean, variance = members[..., 0].astype("float64"), np.exp(members[..., 1].astype("float64"))
    center = mean.mean(0)
    total = variance.mean(0) + mean.var(0)
    return normal(np.stack([center, np.log(total)], axis=-1))


def warm(train, test, args):
    ens = fitted(train, args, cycles=5, shrink=1.0)
    return {"warm snapshots": normal(ens.predict(test[0], verbose=0))}


def default(train, test, args):
    cut = round(0.9 * len(train[0]))
    train, validation = [part[:cut] for part in train], tuple(part[cut:] for part in train)
    ens = fitted(train, args, validation=validation)
    ens.calibrate(*validation, verbose=0)
    found = normal(ens.predict(test[0], verbose=0))
    ens.conformalize(*validation, confidence_level=LEVEL, verbose=0)
    bounds = [bound[:, 0] for bound in ens.predict_interval(test[0], verbose=0)]
    return {
        "the default": found,
        "the default, conformal": np.stack([*found[:2], *bounds]),
    }


def deep(train, test, args):
    predicted = [fitted(train, args, cycles=1).predict(test[0], verbose=0) for _ in range(5)]
    return {"one network": normal(predicted[0]), "deep ensemble": mixed(np.stack(predicted))}


def dropout(train, test, args):
    model = fitted(train, args, dropout=0.05, cycles=1)[0]
    samples = [np.asarray(model(test[0], training=True)) for _ in range(50)]
    return {"MC dropout": mixed(np.stack(samples))}


METHODS = {"deep": deep, "warm": warm, "default": default, "dropout": dropout}


# Scores


def scores(found, y, center, unit):
    """RMSE, NLL, coverage and mean width, in the unit of the values."""
    mean, variance, low, high = found
    nll = -stats.norm(mean, np.sqrt(variance)).logpdf(y).mean() + np.log(unit)
    covered = ((low <= y) & (y <= high)).mean()
    return [unit * np.sqrt(np.square(mean - y).mean()), nll, covered, unit * (high - low).mean()]


def run(args, name, number, method):
    """The scores of what a method gives for a split, saved or new."""
    settings = f"{args.epochs}-{args.batch}-{args.rate:g}-{args.decay:g}"
    path = pathlib.Path(args.directory, f"{name}-{settings}-{method}-{number}.npz")
    train, test, scale = split_of(*loaded(name, args.root), number)
    if not path.exists():
        start = time.perf_counter()
        keras.utils.set_random_seed(number)
        found = METHODS[method](train, test, args)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".writing")
        with draft.open("wb") as file:
            np.savez(file, **found)
        draft.rename(path)
        keras.backend.clear_session()
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)
    with np.load(path) as found:
        return {label: scores(values, test[1], *scale) for label, values in found.items()}


def cell(values, digits):
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return f"{values.mean():.{digits}f} ± {error:.{digits}f}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="the number of the first split")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--decay", type=float, default=0.01)
    parser.add_argument("--root", default="/", help="folder with unpacked Debian packages")
    parser.add_argument("--directory", default="regression", help="where runs are saved")
    args = parser.parse_args(argv)
    result = {}
    for name in args.sets:
        rows = {}
        for number in range(args.first, args.first + args.splits):
            for method in args.methods:
                for label, values in run(args, name, number, method).items():
                    rows.setdefault(label, []).append(values)
        result[name] = {label: np.asarray(values) for label, values in rows.items()}
        print(f"\n| {name} | RMSE | NLL | coverage of 90 % | width |", "|---" * 5 + "|", sep="\n")
        for label, values in result[name].items():
            cells = [cell(values[:, i], 3 if i == 2 else 2) for i in range(4)]
            print(f"| {label} | {' | '.join(cells)} |")
        for label, (rmse, nll) in PUBLISHED.get(name, {}).items():
            print(f"| {label}, as published | {rmse} | {nll} | | |")
    return result


if __name__ == "__main__":
    main()
