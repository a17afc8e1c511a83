"""Measures a model of the shipped emoji, and shows what it draws and says.

    python scripts/evaluate.py runs/demo
    python scripts/evaluate.py runs/demo --out report --num_pictures 200 --guidance_scale 2

Writes evaluation.json (scores), samples.png (drawings beside the nearest and the true picture) and captions.md into
the model's folder, or into --out.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from transfusion import TransfusionPipeline
from transfusion.evaluation import EvaluationSettings, evaluate_demo


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; every setting of the evaluation is an option."""
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{EvaluationSettings.__doc__}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of a model")
    parser.add_argument("--out", type=Path, help="folder for the report; the model's without")
    for field in dataclasses.fields(EvaluationSettings):
        kind = float if field.name == "guidance_scale" else int
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=f"{field.default} without")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Evaluates, and prints the scores."""
    settings = EvaluationSettings(
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(EvaluationSettings)}
    )
    pipeline = TransfusionPipeline.from_pretrained(args.model)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    scores = evaluate_demo(pipeline, args.out or args.model, settings)
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main(parse_args())
