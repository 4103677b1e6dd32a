"""The command line: `python -m snapshot_ensemble`, or `snapshot-ensemble`."""

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from snapshot_ensemble.demo import run_demo
from snapshot_ensemble.ensemble import SnapshotEnsemble
from snapshot_ensemble.schedules import CosineAnnealing, as_schedule
from snapshot_ensemble.storage.directory import DirectoryStore
from snapshot_ensemble.storage.snapshot import SnapshotError
from snapshot_ensemble.tables import text_table

EXAMPLES = """\
examples:
  snapshot-ensemble demo --epochs 40 --cycles 4 --directory digits
  snapshot-ensemble plan --epochs 50 --cycles 5 --lr-init 0.1 --plot plan.png
  snapshot-ensemble inspect digits/ensemble
  snapshot-ensemble report digits/ensemble --data held_out.npz
  snapshot-ensemble export digits/ensemble served/2 --combine mean
"""


def plan(arguments: argparse.Namespace) -> None:
    """Prints the cycles that a budget is split into."""
    if arguments.cycle_length is None:
        schedule: Any = as_schedule(arguments.cycles, None, arguments.lr_init, arguments.lr_min)
    else:
        schedule = CosineAnnealing(
            arguments.cycle_length,
            arguments.cycle_length_multiplier,
            arguments.lr_init,
            arguments.lr_min,
            arguments.lr_multiplier,
            arguments.warmup,
        )
    cycles = schedule.plan(arguments.epochs)
    names = ["index", "first_epoch", "last_epoch", "lr_max", "lr_min", "warmup", "is_decided"]
    names += ["span", "offset"]
    rows = [{name: getattr(cycle, name) for name in names} for cycle in cycles]
    print(json.dumps(rows) if arguments.json else cycles)
    if arguments.plot:
        from matplotlib.figure import Figure  # noqa: PLC0415  Slow to import.

        from snapshot_ensemble.plots import plot_schedule  # noqa: PLC0415

        figure = Figure(layout="constrained")
        plot_schedule(cycles, ax=figure.subplots())
        figure.savefig(arguments.plot)


def inspect(arguments: argparse.Namespace) -> None:
    """Prints the files of a directory and whether they are intact; loads no model."""
    contents = DirectoryStore.open(arguments.directory).inspect()
    if arguments.json:
        print(json.dumps(contents))
    else:
        columns = ["cycle", "epoch"]
        if any(entry["chain"] is not None for entry in contents["files"]):
            columns.insert(0, "chain")
        rows = [("file", "bytes", *columns, "metrics")]
        for entry in contents["files"]:
            numbers = ("" if entry[n] is None else str(entry[n]) for n in columns)
            metrics = [f"{name}={value:.4g}" for name, value in (entry["metrics"] or {}).items()]
            metrics += [] if entry["intact"] else ["DAMAGED"]
            rows.append((entry["name"], str(entry["bytes"]), *numbers, " ".join(metrics)))
        print(text_table(rows, f"lr{'r' * len(columns)}l"))
        print(
            f"weights: {contents['weights']}  temperature: {contents['temperature']:.4g}  "
            f"members: {contents['members'] or 'all'}"
        )
    damaged = [entry["name"] for entry in contents["files"] if not entry["intact"]]
    if damaged:
        raise SnapshotError(f"Files that differ from what was saved: {', '.join(damaged)}")


def export(arguments: argparse.Namespace) -> None:
    """Exports the ensemble in a directory as one model."""
    SnapshotEnsemble.load(arguments.directory).export(
        arguments.out,
        arguments.format,
        combine=arguments.combine,
        members=arguments.members,
        overwrite=arguments.overwrite,
        verbose=False,
    )


def report(arguments: argparse.Namespace) -> None:
    """Prints the scores of members and combinations on the data in a file."""
    with np.load(arguments.data, allow_pickle=False) as file:
        missing = {arguments.x, arguments.y} - set(file.files)
        if missing:
            raise ValueError(
                f"The file has no array {' or '.join(map(repr, sorted(missing)))}. Received: "
                f"--data {arguments.data} with the arrays {file.files}. Name them with --x and --y."
            )
        x, y = file[arguments.x], file[arguments.y]
    scores = SnapshotEnsemble.load(arguments.directory).report(x, y, verbose=0)
    print(json.dumps(scores.to_dict()) if arguments.json else scores)


def demo(arguments: argparse.Namespace) -> None:
    """Trains on handwritten digits and shows what an ensemble gains over ordinary runs."""
    # TensorFlow would warn that one process traces so many small models.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    try:
        run_demo(
            arguments.directory or tempfile.mkdtemp(prefix="snapshot-ensemble-"),
            epochs=arguments.epochs,
            cycles=arguments.cycles,
            seed=arguments.seed,
            runs=arguments.runs,
            dense=arguments.dense,
            overwrite=arguments.overwrite,
        )
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "sklearn":
            raise
        raise ImportError(
            "The demo needs scikit-learn: pip install 'snapshot-ensemble[demo]'"
        ) from None


def _cycles(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _demo_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--epochs", type=int, default=30, help="number of epochs, the budget (default: 30)")
    add("--cycles", type=_cycles, default="auto", help="number of cycles (default: auto)")
    add("--seed", type=int, default=0, help="the first seed (default: 0)")
    add("--runs", type=int, default=3, help="number of seeds to compare over (default: 3)")
    add("--dense", action="store_true", help="a dense network instead of a convolutional one")
    add("--directory", help="where to write the results (default: a new folder)")
    add("--overwrite", action="store_true", help="replace existing files")


def _plan_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--epochs", type=int, required=True, help="number of epochs, the budget")
    add("--cycles", type=_cycles, default="auto", help="number of equal cycles (default: auto)")
    add("--lr-init", type=float, default=0.1, help="peak learning rate (default: 0.1)")
    add("--lr-min", type=float, default=0.0, help="floor of the learning rate (default: 0)")
    add("--cycle-length", type=int, help="epochs of the first cycle, instead of --cycles")
    add(
        "--cycle-length-multiplier",
        type=float,
        default=1.0,
        help="factor from one cycle's length to the next (default: 1)",
    )
    add(
        "--lr-multiplier",
        type=float,
        default=1.0,
        help="factor from one cycle's peak to the next (default: 1)",
    )
    add("--warmup", type=int, default=0, help="epochs of linear warmup (default: 0)")
    add("--plot", metavar="FILE", help="also plot the learning rates to a file")
    add("--json", action="store_true", help="print JSON")


def _inspect_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("directory")
    command.add_argument("--json", action="store_true", help="print JSON")


def _export_arguments(command: argparse.ArgumentParser) -> None:
    add, formats = command.add_argument, ("tf_saved_model", "onnx", "litert", "openvino")
    add("directory")
    add("out")
    add("--format", choices=formats, default=formats[0], help="format (default: %(default)s)")
    add("--combine", default="mean", help="how to combine (default: mean)")
    add("--members", type=int, help="use only the last N members (default: all)", metavar="N")
    add("--overwrite", action="store_true", help="replace an earlier export")


def _report_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("directory")
    add("--data", metavar="FILE", required=True, help="an .npz file with held-out data")
    add("--x", default="x", help="name of the array of inputs (default: x)")
    add("--y", default="y", help="name of the array of targets (default: y)")
    add("--json", action="store_true", help="print JSON")


COMMANDS = (
    (demo, "train on handwritten digits and show what the ensemble gains", _demo_arguments),
    (plan, "print the cycles that a budget is split into", _plan_arguments),
    (inspect, "list the files of a directory and whether they are intact", _inspect_arguments),
    (export, "export the ensemble as one model for serving", _export_arguments),
    (report, "score members and combinations on held-out data", _report_arguments),
)


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    main = argparse.ArgumentParser(
        prog="snapshot-ensemble",
        description="Snapshot ensembles for Keras.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for run, about, add_arguments in COMMANDS:
        command = commands.add_parser(run.__name__, help=about, description=f"{about}.")
        command.set_defaults(run=run)
        add_arguments(command)
    return main


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, or 2 after printing the error as one line on stderr."""
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ImportError, OSError, SnapshotError, TypeError, ValueError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
