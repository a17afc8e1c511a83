"""Measures a model of the shipped emoji or of the shapes world, and shows what it draws and says.

    python scripts/evaluate.py runs/demo
    python scripts/evaluate.py runs/demo --out report --num_pictures 200 --guidance_scale 2
    python scripts/evaluate.py runs/shapes --data shapes

Writes evaluation.json and evaluation.md (scores, with chance, baseline or floor beside them), samples.png (drawings
beside the true picture) and captions.md into the model's folder, or into --out. The Frechet distance needs
pip install "transfusion-transformers[eval]"; --num_frechet 0 goes without it.
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from transfusion import TransfusionPipeline
from transfusion.evaluation import EvaluationSettings, evaluate_demo, evaluate_shapes


REPORTS = {"emoji": evaluate_demo, "shapes": evaluate_shapes}
# Unlike the report that ends a training, this one has the time and the packages for a Frechet distance.
NUM_FRECHET = 300


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; every setting of the evaluation is an option."""
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{EvaluationSettings.__doc__}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of a model")
    parser.add_argument("--out", type=Path, help="folder for the report; the model's without")
    parser.add_argument("--data", choices=REPORTS, default="emoji", help="what it was trained on; emoji without")
    for field in dataclasses.fields(EvaluationSettings):
        kind = float if field.name == "guidance_scale" else int
        default = NUM_FRECHET if field.name == "num_frechet" else field.default
        parser.add_argument(f"--{field.name}", type=kind, default=default, help=f"{default} without")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Evaluates, and prints the scores."""
    settings = EvaluationSettings(
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(EvaluationSettings)}
    )
    pipeline = TransfusionPipeline.from_pretrained(args.model)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    folder = args.out or args.model
    REPORTS[args.data](pipeline, folder, settings)
    print((folder / "evaluation.json").read_text(), end="")


if __name__ == "__main__":
    main(parse_args())
