"""What one training budget buys: one run, snapshots, restarts of every kind, independent runs.

    python tests/benchmarks/accuracy.py --task digits --seeds 3
    python tests/benchmarks/accuracy.py --task fashion --seeds 3 --root FOLDER

Every method but `deep` has the same number of epochs, and the same validation data, which only
`auto` and `chosen` look at: restarts with `shrink="auto"`, and of the same run all members or
those that `fit` chooses. Each run is kept in `--directory` as soon as it has ended, and not run
again: broken off, it goes on with the next. Several of these commands may run side by side, with
other tasks. At the end it writes `TASK.json` and `TASK.md` there and prints the table.

Errors are in percent and likelihoods in nats, of the test data, of the mean of all members and of
the last one alone, as mean and standard error over the seeds. `calibrated`: with a temperature
that is fitted on one half of the test data and scored on the other, both ways. `deep equivalent`:
how many full runs, each as long as the whole budget, have a mean as good in calibrated likelihood.
The second table is of differences within seeds.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

try:
    from benchmarks.tasks import TASKS
    from benchmarks.variants import VARIANTS
except ImportError:
    from tasks import TASKS
    from variants import VARIANTS

from snapshot_ensemble import SnapshotEnsemble

COLUMNS = ("error", "nll", "calibrated", "ece", "last error", "last nll", "disagreement")
DEFAULT = ("one", "step", "ordinary", "warm", "auto", "chosen", "0.8", "0.5", "0.2", "0")
DEFAULT += ("independent",)


class Keeping(keras.callbacks.Callback):
    """Predicts the test data at the ends of these epochs."""

    def __init__(self, epochs, x):
        super().__init__()
        self.epochs, self.x, self.members = epochs, x, []

    def on_epoch_end(self, epoch, logs=None):
        if epoch + 1 in self.epochs:
            self.members.append(self.model.predict(self.x, verbose=0))


def ends(epochs, cycles):
    return [len(part) for part in np.array_split(range(epochs), cycles)]


def ordinary(task, parts, epochs, cycles):
    """Snapshots of one run along one cosine."""
    (x, y), validation, (x_test, _) = parts
    keeping = Keeping(set(np.cumsum(ends(epochs, cycles)).tolist()), x_test)
    ens = SnapshotEnsemble(task.model(), cycles=1, lr_init=task.peak)
    given = {"validation_data": validation, "callbacks": [keeping], "verbose": 0}
    ens.fit(x, y, epochs=epochs, batch_size=task.batch, **given)
    return keeping.members


def one(task, parts, epochs, cycles):
    """One run along one cosine."""
    return ordinary(task, parts, epochs, 1)


def step(task, parts, epochs, cycles):
    """One run at the peak, a tenth of it after half, and a hundredth after three quarters."""
    (x, y), _, (x_test, _) = parts
    model = task.model()
    rates = keras.callbacks.LearningRateScheduler(
        lambda epoch: task.peak * (0.1 ** ((2 * epoch >= epochs) + (4 * epoch >= 3 * epochs)))
    )
    model.fit(x, y, epochs=epochs, batch_size=task.batch, verbose=0, callbacks=[rates])
    return [model.predict(x_test, verbose=0)]


def independent(task, parts, epochs, cycles):
    """As many runs, each with its share of the budget."""
    return [one(task, parts, length, 1)[0] for length in ends(epochs, cycles)]


def restarts(shrink):
    """The library, with what a restart is to leave of the weights.

    It returns beside the members how many of the last `fit` has chosen by the validation data.
    """

    def run(task, parts, epochs, cycles):
        (x, y), validation, (x_test, _) = parts
        ens = SnapshotEnsemble(task.model(), cycles=cycles, lr_init=task.peak, shrink=shrink)
        given = {"validation_data": validation, "verbose": 0}
        ens.fit(x, y, epochs=epochs, batch_size=task.batch, **given)
        everyone = ens.predict_members(x_test, members=list(range(len(ens))), verbose=0)
        return list(everyone), ens.members or len(ens)

    return run


def method(name):
    known = {**VARIANTS, "one": one, "step": step, "ordinary": ordinary, "independent": independent}
    known |= {"warm": restarts(1.0), "auto": restarts("auto")}
    return known[name] if name in known else restarts(float(name))


def nll(logs, y):
    return float(-np.mean(logs[np.arange(len(y)), y]))


def tempered(logs, temperature):
    scaled = logs / temperature
    return scaled - logsumexp(scaled, axis=-1, keepdims=True)


def calibrated(logs, y):
    """The likelihood with a temperature of the other half of the data."""
    half, found = len(y) // 2, []
    for fitted, scored in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
        best = minimize_scalar(
            lambda t, part=fitted: nll(tempered(logs[part], np.exp(t)), y[part]),
            bounds=(-3, 3),
            method="bounded",
        )
        found.append(nll(tempered(logs[scored], np.exp(best.x)), y[scored]))
    return float(np.mean(found))


def calibration_error(probabilities, y, bins=15):
    """Of the likeliest class, over bins of equal mass."""
    sure = probabilities.max(-1)
    right = probabilities.argmax(-1) == y
    parts = np.array_split(np.argsort(sure, kind="stable"), min(bins, len(y)))
    return float(sum(abs(right[p].mean() - sure[p].mean()) * len(p) for p in parts) / len(y))


def scores(members, y):
    """All columns of the table, for one run."""
    found = []
    members = np.asarray(members, "float64")
    mean, labels = members.mean(axis=0), members.argmax(-1)
    for probabilities in (mean, members[-1]):
        logs = np.log(np.maximum(probabilities, 1e-12))
        error = 100 * np.mean(probabilities.argmax(-1) != y)
        found.append([error, nll(logs, y), calibrated(logs, y)])
    pairs = [np.mean(labels[i] != labels[j]) for i in range(len(labels)) for j in range(i)]
    more = [calibration_error(mean, y), *found[1][:2], 100 * np.mean(pairs) if pairs else 0.0]
    return dict(zip(COLUMNS, map(float, [*found[0], *more]), strict=True))


def deep_ensembles(runs, y):
    """Scores of 1, 2, … full runs, each the mean over all choices of neighbours in a circle."""
    table = {}
    for size in range(1, len(runs) + 1):
        rows = [
            scores([runs[(first + i) % len(runs)] for i in range(size)], y)
            for first in range(len(runs) if size < len(runs) else 1)
        ]
        table[size] = {name: float(np.mean([row[name] for row in rows])) for name in COLUMNS}
    return table


def equivalent(likelihood, deep):
    """How many full runs are as good: between two sizes along a line; outside, the nearest."""
    sizes = sorted(deep)
    values = np.minimum.accumulate([deep[size]["calibrated"] for size in sizes])
    return float(np.interp(-likelihood, -values, sizes))


def named(args):
    """The task, and the peak if it is not the task's own."""
    return args.task if args.peak is None else f"{args.task}-{args.peak:g}"


def train(args, name, seed, cycles):
    """The members' predictions of the test data, trained or read."""
    task, start = TASKS[args.task], time.perf_counter()
    kind = "auto" if name == "chosen" else name
    file = f"{named(args)}-{args.epochs or task.epochs}-{cycles}-{kind}-{seed}.npz"
    path = pathlib.Path(args.directory, file)
    if not path.exists():
        task = dataclasses.replace(task, peak=task.peak if args.peak is None else args.peak)
        keras.utils.set_random_seed(seed)
        epochs = args.epochs or task.epochs
        found = method(kind)(task, task.parts(args.root), epochs, cycles)
        members, chosen = found if isinstance(found, tuple) else (found, len(found))
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".writing")
        with draft.open("wb") as written:
            np.savez(written, members=np.asarray(members, "float32"), chosen=chosen)
        draft.rename(path)
        print(f"{file}: {time.perf_counter() - start:.0f} s", flush=True)
    with np.load(path) as found:
        return list(found["members"][-int(found["chosen"]) if name == "chosen" else 0 :])


def shown(column, value):
    return f"{value:.{2 if 'error' in column or column == 'disagreement' else 4}f}"


def spread(column, values):
    """The mean and its standard error."""
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return f"{shown(column, values.mean())} ± {shown(column, error)}"


def table(found, deep):
    """The rows as Markdown."""
    head = ("method", *COLUMNS, "deep equivalent")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, rows in found.items():
        cells = [name, *(spread(c, np.asarray([row[c] for row in rows])) for c in COLUMNS)]
        mean = np.mean([row["calibrated"] for row in rows])
        lines.append("| " + " | ".join([*cells, f"{equivalent(mean, deep):.1f}"]) + " |")
    for size, row in deep.items():
        if size > 1:
            cells = [f"deep, {size} full runs", *(shown(c, row[c]) for c in COLUMNS), f"{size}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compared(found, ours="chosen"):
    """What one method has more than each other, of the same seeds, as Markdown.

    Differences within a seed are surer than those of means: both begin with the same weights.
    """
    columns = ("error", "nll", "calibrated")
    lines = ["| " + " | ".join((f"{ours} less", *columns)) + " |", "|---" * 4 + "|"]
    for name, rows in found.items():
        if name != ours:
            pairs = list(zip(found[ours], rows, strict=True))
            cells = [
                spread(column, np.asarray([mine[column] - other[column] for mine, other in pairs]))
                for column in columns
            ]
            lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def parsed(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=DEFAULT,
        help="also numbers, as `shrink`, and those of variants.py",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--deep", type=int, help="seeds of full runs (default: as --seeds)")
    parser.add_argument("--cycles", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="the budget (default: the task's own)")
    parser.add_argument("--peak", type=float, help="peak rate (default: the task's own)")
    parser.add_argument("--root", default="/", help="folder where Debian's packages are")
    parser.add_argument("--directory", default="accuracy", help="where runs are kept")
    parser.add_argument("--threads", type=int, default=0, help="(default: all)")
    return parser.parse_args(argv)


def command_of(args):
    """What makes the same tables again."""
    return (
        f"python tests/benchmarks/accuracy.py --task {args.task} --cycles {args.cycles} "
        f"--seeds {args.seeds} --deep {args.deep or args.seeds}"
        + ("" if args.epochs is None else f" --epochs {args.epochs}")
        + ("" if args.peak is None else f" --peak {args.peak:g}")
        + ("" if args.methods == DEFAULT else f" --methods {' '.join(args.methods)}")
    )


def main(argv=None):
    args = parsed(argv)
    if args.threads:
        tf.config.threading.set_intra_op_parallelism_threads(args.threads)
        tf.config.threading.set_inter_op_parallelism_threads(args.threads)
    y = TASKS[args.task].parts(args.root)[2][1]
    found = {
        name: [
            scores(train(args, name, seed, 1 if name in ("one", "step") else args.cycles), y)
            for seed in range(args.seeds)
        ]
        for name in args.methods
    }
    full = [train(args, "one", seed, 1)[0] for seed in range(args.deep or args.seeds)]
    deep = deep_ensembles(full, y)
    command = command_of(args)
    text = f"`{command}`\n\n{table(found, deep)}\n"
    if "chosen" in found:
        text += f"\n{compared(found)}\n"
    result = {"command": command, "methods": found, "deep": deep}
    home = pathlib.Path(args.directory)
    (home / f"{named(args)}-{args.cycles}.json").write_text(json.dumps(result, indent=1))
    (home / f"{named(args)}-{args.cycles}.md").write_text(text)
    print(text)
    return result


if __name__ == "__main__":
    main()
