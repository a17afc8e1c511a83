"""Asks again, at small scale, what the paper and its followers found: trains trials on the shapes world, by seeds.

    python scripts/ablate.py --out runs/ablations                                # all of it: a day on one core
    python scripts/ablate.py --out runs/ablations --trials base unet --seeds 0 1 2
    python scripts/ablate.py --out runs/ablations --table                        # tables of what is there

Every trial and seed leaves a JSON file and a sheet of drawings in --out; what is there already is not run again, so an
interrupted one goes on, and several can share the work if their trials or seeds differ.
"""

import argparse
import json
import logging
from pathlib import Path

from transfusion.experiments import QUESTIONS, TRIALS, RunSettings, comparison_table, run_trial


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--trials", nargs="+", choices=TRIALS, default=list(TRIALS), metavar="NAME", help="all without"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="0 1 without")
    parser.add_argument(
        "--steps", type=int, default=RunSettings.steps, help=f"of training; {RunSettings.steps} without"
    )
    parser.add_argument("--table", action="store_true", help="only print the tables")
    return parser.parse_args(argv)


def print_tables(folder: Path) -> None:
    """Prints a table for each question that has results."""
    results = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    for question in QUESTIONS:
        print(f"**{question.title}.** {question.paper}\n\n{comparison_table(question, results)}")


def main(args: argparse.Namespace) -> None:
    """Runs the trials, seed by seed."""
    for seed in [] if args.table else args.seeds:
        for name in args.trials:
            result = run_trial(TRIALS[name], seed, RunSettings(steps=args.steps), args.out)
            print(json.dumps({key: value for key, value in result.items() if not isinstance(value, dict)}))
    print_tables(args.out)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(parse_args())
