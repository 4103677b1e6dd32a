"""The command line: `python -m snapshot_ensemble`."""

import argparse
import sys
import tempfile
from collections.abc import Sequence

from snapshot_ensemble.demo import run_demo

EXAMPLES = """\
examples:
  python -m snapshot_ensemble demo
  python -m snapshot_ensemble demo --epochs 30 --cycles 3 --directory digits
"""


def parser() -> argparse.ArgumentParser:
    """The arguments that the command line takes."""
    main = argparse.ArgumentParser(
        prog="python -m snapshot_ensemble",
        description="Snapshot ensembles for Keras.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="train on handwritten digits and show what is gained")
    demo.add_argument("--epochs", type=int, default=50, help="the budget (default: 50)")
    demo.add_argument("--cycles", type=int, default=5, help="number of cycles (default: 5)")
    demo.add_argument("--seed", type=int, default=0, help="seed of both runs (default: 0)")
    demo.add_argument("--directory", help="where to leave what it makes (default: a new folder)")
    demo.add_argument("--overwrite", action="store_true", help="replace what is there")
    return main


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, or 2 after one line on stderr that says what is wrong."""
    arguments = parser().parse_args(argv)
    try:
        run_demo(
            arguments.directory or tempfile.mkdtemp(prefix="snapshot-ensemble-"),
            epochs=arguments.epochs,
            cycles=arguments.cycles,
            seed=arguments.seed,
            overwrite=arguments.overwrite,
        )
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "sklearn":
            raise
        print("The demo needs scikit-learn: pip install 'snapshot-ensemble[demo]'", file=sys.stderr)
        return 2
    except (TypeError, ValueError) as error:
        print(f"{' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
