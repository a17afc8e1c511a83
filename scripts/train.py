"""Trains a Transfusion model.

    python scripts/train.py demo --output_dir runs/demo                      # the shipped emoji, 12 minutes
    python scripts/train.py demo --output_dir runs/demo --max_minutes 30
    python scripts/train.py demo --output_dir runs/mine --data my_pictures --max_steps 2000
    python scripts/train.py run scripts/recipes/finetune.yaml                # what a file states; --resume goes on
    torchrun --nproc_per_node 2 scripts/train.py run my_run.yaml

`demo` trains the preset `demo` from scratch, with the VAE and tokenizer that ship with the package, on captioned
pictures and WordNet definitions. --data is a folder with pictures and a metadata.jsonl of lines such as
{"file_name": "heart.png", "text": "a red heart"}. The model, the processor, sample sheets (samples/), loss curves
(losses.png) and TensorBoard's files go to --output_dir. With the shipped emoji a report follows: samples.png,
captions.md and evaluation.json.

`run` trains what a YAML file states, as `transfusion train` does.
"""

import argparse
import json
import logging
from pathlib import Path

from rich.logging import RichHandler

from transfusion import TransfusionPipeline
from transfusion.evaluation import EvaluationSettings, evaluate_demo
from transfusion.training.recipes import DEMO_MINUTES, DemoRecipe, Recipe, train_demo
from transfusion.training.run import train_run
from transfusion.training.specs import read_spec


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; every setting of the recipe is an option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipes = parser.add_subparsers(dest="recipe", required=True)
    demo = recipes.add_parser(
        "demo",
        help="a small model from scratch",
        description=DemoRecipe.__doc__,
        epilog=Recipe.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument("--output_dir", type=Path, required=True, help="folder for the model and all else")
    demo.add_argument("--data", type=Path, help="folder with pictures and a metadata.jsonl; the shipped emoji without")
    length = demo.add_mutually_exclusive_group()
    length.add_argument("--max_minutes", type=float, help=f"minutes of training; {DEMO_MINUTES:g} without")
    length.add_argument("--max_steps", type=int, help="steps of training, instead of minutes")
    demo.add_argument("--sample_every", type=int, default=500, help="steps between two sample sheets; 500 without")
    DemoRecipe.add_options(demo)
    run = recipes.add_parser("run", help="what a YAML file states")
    run.add_argument("file", type=Path, help="see scripts/recipes")
    run.add_argument(
        "--resume", action="store_true", help="go on from the newest complete checkpoint, if there is one"
    )
    run.add_argument("--set", dest="changes", action="append", default=[], help="an entry, such as length.max_steps=9")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Trains what the command names."""
    if args.recipe == "run":
        train_run(read_spec(args.file, args.changes), args.resume)
        return
    minutes = DEMO_MINUTES if args.max_minutes is None and args.max_steps is None else args.max_minutes
    trainer = train_demo(
        args.output_dir, DemoRecipe.from_options(args), args.data, minutes, args.max_steps, args.sample_every
    )
    if args.data is None and trainer.is_world_process_zero():
        evaluation = EvaluationSettings(
            num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale, seed=args.seed
        )
        scores = evaluate_demo(TransfusionPipeline.from_pretrained(args.output_dir), args.output_dir, evaluation)
        print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    main(parse_args())
