"""Fine-tunes a Transfusion model on a folder of captioned pictures.

    python scripts/finetune.py --model runs/demo --data pictures --output_dir runs/mine --max_steps 200
    python scripts/finetune.py --model runs/demo --data pictures --output_dir runs/lora --max_steps 200 --lora_rank 8
    python scripts/finetune.py --text_model runs/llama --data pictures --output_dir runs/llama-draws --max_steps 1000

--data is a folder with pictures and a metadata.jsonl: {"file_name": "heart.png", "text": "a red heart"}, line by line.
--model is a checkpoint of ours, whose processor is used too; --text_model is a language model of the Llama family with
its tokenizer, which learns pictures from the beginning. What comes out loads as any model does; adapters (--lora_rank)
load on top of the checkpoint that --model names, or become part of it with --merge. Sample sheets from before, during
and after (samples/), loss curves (losses.png) and TensorBoard's files lie beside it.

Ctrl-C or SIGTERM saves a checkpoint at the end of the step and ends with the code 130 or 143; the same command with
--resume goes on, to the same end as without the stop. A second one ends at once.
"""

import argparse
import logging
from pathlib import Path

from rich.logging import RichHandler

from transfusion.data import read_image_folder
from transfusion.training.finetuning import FinetuneRecipe, finetune, load_start, start_from_text_model
from transfusion.training.recipes import Recipe
from transfusion.training.signals import SaveOnSignal


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; every setting of the recipe is an option."""
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{FinetuneRecipe.__doc__}",
        epilog=Recipe.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--model", help="folder or Hub name of a checkpoint of ours")
    start.add_argument("--text_model", help="folder or Hub name of a language model, to begin with that")
    parser.add_argument("--data", type=Path, required=True, help="folder with pictures and a metadata.jsonl")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the model and all else")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--max_steps", type=int, help="steps of training")
    length.add_argument("--num_epochs", type=float, help="how often each picture is seen, instead of steps")
    parser.add_argument("--sample_every", type=int, default=100, help="steps between two sample sheets; 100 without")
    parser.add_argument("--save_every", type=int, help="steps between two checkpoints; none without")
    parser.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint")
    parser.add_argument("--prompts", nargs="+", help="of the sample sheets; captions of the pictures without")
    parser.add_argument("--merge", action="store_true", help="save a whole model, not adapters")
    begin = parser.add_argument_group("with --text_model")
    begin.add_argument("--image_size", type=int, default=64, help="side of the pictures in pixels; 64 without")
    begin.add_argument("--vae", help="folder or Hub name of a model with another autoencoder in vae/")
    begin.add_argument("--freeze_text", action="store_true", help="train weights of pictures alone, in each layer")
    FinetuneRecipe.add_options(parser)
    args = parser.parse_args(argv)
    if args.freeze_text and args.lora_rank is not None:
        parser.error("--freeze_text trains weights of pictures, --lora_rank adapters of all: leave out one of them.")
    return args


def main(args: argparse.Namespace) -> None:
    """Trains and saves."""
    pictures, _ = read_image_folder(args.data)
    if args.text_model is None:
        model, processor = load_start(args.model)
    else:
        model, processor = start_from_text_model(args.text_model, args.image_size, args.vae, args.freeze_text)
    finetune(
        model,
        processor,
        pictures,
        args.output_dir,
        FinetuneRecipe.from_options(args),
        max_steps=args.max_steps,
        num_epochs=args.num_epochs,
        sample_every=args.sample_every,
        save_every=args.save_every,
        prompts=args.prompts,
        resume=args.resume,
        merge=args.merge,
        callbacks=[SaveOnSignal()],
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    main(parse_args())
