"""Compares what one training budget gives: one run, snapshots, restarts, independent runs.

    python tests/benchmarks/accuracy.py --task digits --seeds 3
    python tests/benchmarks/accuracy.py --task fashion --seeds 3 --root FOLDER

All methods except `deep` have the same number of epochs and the same validation data. Only `auto`,
`chosen` and `planned` use the validation data. The first two are the same run of five cycles, with
`shrink="auto"`: `auto` combines all members, `chosen` those that `fit` chooses. `planned` is the
default: the same as `chosen`, with `cycles="auto"`. Each run is saved in `--directory` when it has
ended and is not run again, so an interrupted benchmark continues with the next run. Several of
these commands may run in parallel on different tasks. At the end, the script writes `TASK.json`
and `TASK.md` to the directory and prints the table.

Errors are in percent and negative log-likelihoods in nats, on the test data, for the mean of all
members and for the last member, as mean and standard error over the seeds. `calibrated`: the
likelihood with a temperature that is fitted on one half of the test data and scored on the other,
and vice versa. For a regression, errors are root mean squared ones, in percent of the target's
standard deviation, and likelihoods those of a normal distribution around the prediction, with a
variance from the other half of the test data. `deep equivalent`: the number of full runs, each as
long as the whole budget, whose mean has the same calibrated likelihood. The second table shows
differences within seeds.
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
from scipy.stats import norm

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


class PredictionRecorder(keras.callbacks.Callback):
    """Records predictions of the test data at the end of the given epochs."""

    def __init__(self, epochs, x):
        super().__init__()
        self.epochs, self.x, self.members = epochs, x, []

    def on_epoch_end(self, epoch, logs=None):
        if epoch + 1 in self.epochs:
            self.members.append(self.model.predict(self.x, verbose=0))


def ends(epochs, cycles):
    return [len(part) for part in np.array_split(range(epochs), cycles)]


def ordinary(task, parts, epochs, cycles):
    """Snapshots of one run with one cosine decay."""
    (x, y), validation, (x_test, _) = parts
    recorder = PredictionRecorder(set(np.cumsum(ends(epochs, cycles)).tolist()), x_test)
    ens = SnapshotEnsemble(task.model(), cycles=1, lr_init=task.peak)
    given = {"validation_data": validation, "callbacks": [recorder], "verbose": 0}
    ens.fit(x, y, epochs=epochs, batch_size=task.batch, **given)
    return recorder.members


def one(task, parts, epochs, cycles):
    """One run with one cosine decay."""
    return ordinary(task, parts, epochs, 1)


def step(task, parts, epochs, cycles):
    """One run with step decay: a tenth of the peak after half, a hundredth after three quarters."""
    (x, y), _, (x_test, _) = parts
    model = task.model()
    rates = keras.callbacks.LearningRateScheduler(
        lambda epoch: task.peak * (0.1 ** ((2 * epoch >= epochs) + (4 * epoch >= 3 * epochs)))
    )
    model.fit(x, y, epochs=epochs, batch_size=task.batch, verbose=0, callbacks=[rates])
    return [model.predict(x_test, verbose=0)]


def independent(task, parts, epochs, cycles):
    """One independent run per cycle, each with an equal share of the budget."""
    return [one(task, parts, length, 1)[0] for length in ends(epochs, cycles)]


def restarts(shrink, cycles=None):
    """`SnapshotEnsemble` with this `shrink` and, if they are given, `cycles`.

    Returns the members, and how many of the last ones `fit` has chosen on the validation data.
    """

    def run(task, parts, epochs, given):
        (x, y), validation, (x_test, _) = parts
        count = given if cycles is None else cycles
        ens = SnapshotEnsemble(task.model(), cycles=count, lr_init=task.peak, shrink=shrink)
        given = {"validation_data": validation, "verbose": 0}
        ens.fit(x, y, epochs=epochs, batch_size=task.batch, **given)
        everyone = ens.predict_members(x_test, members=list(range(len(ens))), verbose=0)
        return list(everyone), ens.members or len(ens)

    return run


def method(name):
    known = {**VARIANTS, "one": one, "step": step, "ordinary": ordinary, "independent": independent}
    known |= {"warm": restarts(1.0), "auto": restarts("auto")}
    known["planned"] = restarts("auto", "auto")
    return known[name] if name in known else restarts(float(name))


def nll(logs, y):
    return float(-np.mean(logs[np.arange(len(y)), y]))


def tempered(logs, temperature):
    scaled = logs / temperature
    return scaled - logsumexp(scaled, axis=-1, keepdims=True)


def calibrated(logs, y):
    """The likelihood of each half of the data with a temperature fitted on the other half."""
    half, likelihoods = len(y) // 2, []
    for fitted, scored in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
        best = minimize_scalar(
            lambda t, part=fitted: nll(tempered(logs[part], np.exp(t)), y[part]),
            bounds=(-3, 3),
            method="bounded",
        )
        likelihoods.append(nll(tempered(logs[scored], np.exp(best.x)), y[scored]))
    return float(np.mean(likelihoods))


def calibration_error(probabilities, y, bins=15):
    """The expected calibration error of the predicted class, over bins of equal size."""
    confidence = probabilities.max(-1)
    right = probabilities.argmax(-1) == y
    parts = np.array_split(np.argsort(confidence, kind="stable"), min(bins, len(y)))
    return float(sum(abs(right[p].mean() - confidence[p].mean()) * len(p) for p in parts) / len(y))


def normal_nll(errors):
    """The likelihood of each half of some errors, with the mean square of the other half."""
    parts = errors[: len(errors) // 2], errors[len(errors) // 2 :]
    scales = [np.sqrt(np.mean(np.square(part))) for part in parts[::-1]]
    pairs = zip(parts, scales, strict=True)
    return float(np.mean([-norm.logpdf(part, scale=scale).mean() for part, scale in pairs]))


def regression_scores(members, y):
    """All columns of the table, for one run of a regression."""
    members, spread = np.asarray(members, "float64")[..., 0], np.std(y)
    rows = [
        [100 * np.sqrt(np.mean(np.square(p - y))) / spread, normal_nll(p - y), normal_nll(p - y)]
        for p in (members.mean(axis=0), members[-1])
    ]
    many = range(len(members))
    pairs = [np.std(members[i] - members[j]) / spread for i in many for j in range(i)]
    more = [0.0, *rows[1][:2], 100 * np.mean(pairs) if pairs else 0.0]
    return dict(zip(COLUMNS, map(float, [*rows[0], *more]), strict=True))


def scores(members, y):
    """All columns of the table, for one run."""
    if np.issubdtype(y.dtype, np.floating):
        return regression_scores(members, y)
    rows = []
    members = np.asarray(members, "float64")
    mean, labels = members.mean(axis=0), members.argmax(-1)
    for probabilities in (mean, members[-1]):
        logs = np.log(np.maximum(probabilities, 1e-12))
        error = 100 * np.mean(probabilities.argmax(-1) != y)
        rows.append([error, nll(logs, y), calibrated(logs, y)])
    pairs = [np.mean(labels[i] != labels[j]) for i in range(len(labels)) for j in range(i)]
    more = [calibration_error(mean, y), *rows[1][:2], 100 * np.mean(pairs) if pairs else 0.0]
    return dict(zip(COLUMNS, map(float, [*rows[0], *more]), strict=True))


def deep_ensembles(runs, y):
    """Scores of ensembles of 1, 2, … full runs, averaged over cyclic choices of runs."""
    table = {}
    for size in range(1, len(runs) + 1):
        rows = [
            scores([runs[(first + i) % len(runs)] for i in range(size)], y)
            for first in range(len(runs) if size < len(runs) else 1)
        ]
        table[size] = {name: float(np.mean([row[name] for row in rows])) for name in COLUMNS}
    return table


def equivalent(likelihood, deep):
    """The number of full runs that are equally good, interpolated and clipped at the ends."""
    sizes = sorted(deep)
    values = np.minimum.accumulate([deep[size]["calibrated"] for size in sizes])
    return float(np.interp(-likelihood, -values, sizes))


def named(args):
    """The name of the task, with the peak if it is not the task's own."""
    return args.task if args.peak is None else f"{args.task}-{args.peak:g}"


def train(args, name, seed, cycles):
    """The members' predictions of the test data, from training or from an earlier run."""
    task, start = TASKS[args.task], time.perf_counter()
    kind = "auto" if name == "chosen" else name
    file = f"{named(args)}-{args.epochs or task.epochs}-{cycles}-{kind}-{seed}.npz"
    path = pathlib.Path(args.directory, file)
    if not path.exists():
        task = dataclasses.replace(task, peak=task.peak if args.peak is None else args.peak)
        keras.utils.set_random_seed(seed)
        epochs = args.epochs or task.epochs
        result = method(kind)(task, task.parts(args.root), epochs, cycles)
        members, chosen = result if isinstance(result, tuple) else (result, len(result))
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".writing")
        with draft.open("wb") as written:
            np.savez(written, members=np.asarray(members, "float32"), chosen=chosen)
        draft.rename(path)
        print(f"{file}: {time.perf_counter() - start:.0f} s", flush=True)
    with np.load(path) as saved:
        is_chosen = name in ("chosen", "planned")
        return list(saved["members"][-int(saved["chosen"]) if is_chosen else 0 :])


def shown(column, value):
    return f"{value:.{2 if 'error' in column or column == 'disagreement' else 4}f}"


def spread(column, values):
    """The mean and its standard error."""
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return f"{shown(column, values.mean())} ± {shown(column, error)}"


def table(results, deep):
    """The first table, as Markdown."""
    head = ("method", *COLUMNS, "deep equivalent")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, rows in results.items():
        cells = [name, *(spread(c, np.asarray([row[c] for row in rows])) for c in COLUMNS)]
        mean = np.mean([row["calibrated"] for row in rows])
        lines.append("| " + " | ".join([*cells, f"{equivalent(mean, deep):.1f}"]) + " |")
    for size, row in deep.items():
        if size > 1:
            cells = [f"deep, {size} full runs", *(shown(c, row[c]) for c in COLUMNS), f"{size}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compared(results, ours="chosen"):
    """The differences of one method to each other one for the same seeds, as Markdown.

    Differences within a seed have less variance than differences of means, since both runs start
    from the same weights.
    """
    columns = ("error", "nll", "calibrated")
    lines = ["| " + " | ".join((f"{ours} minus", *columns)) + " |", "|---" * 4 + "|"]
    for name, rows in results.items():
        if name != ours:
            pairs = list(zip(results[ours], rows, strict=True))
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
        help="names, numbers (values of `shrink`), or methods of variants.py",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--deep", type=int, help="number of full runs (default: as --seeds)")
    parser.add_argument("--cycles", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="the budget (default: the task's own)")
    parser.add_argument("--peak", type=float, help="peak rate (default: the task's own)")
    parser.add_argument("--root", default="/", help="folder with unpacked Debian packages")
    parser.add_argument("--directory", default="accuracy", help="where runs are saved")
    parser.add_argument("--threads", type=int, default=0, help="(default: all)")
    return parser.parse_args(argv)


def command_of(args):
    """The command that makes the same tables again."""
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
    results = {
        name: [
            scores(train(args, name, seed, 1 if name in ("one", "step") else args.cycles), y)
            for seed in range(args.seeds)
        ]
        for name in args.methods
    }
    full = [train(args, "one", seed, 1)[0] for seed in range(args.deep or args.seeds)]
    deep = deep_ensembles(full, y)
    command = command_of(args)
    text = f"`{command}`\n\n{table(results, deep)}\n"
    for ours in {"chosen", "planned"} & set(results):
        text += f"\n{compared(results, ours)}\n"
    result = {"command": command, "methods": results, "deep": deep}
    home = pathlib.Path(args.directory)
    (home / f"{named(args)}-{args.cycles}.json").write_text(json.dumps(result, indent=1))
    (home / f"{named(args)}-{args.cycles}.md").write_text(text)
    print(text)
    return result


if __name__ == "__main__":
    main()
