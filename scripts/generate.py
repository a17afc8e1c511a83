"""Draws pictures, captions pictures or writes on, with a trained model.

    python scripts/generate.py runs/demo draw "a red heart" "a pizza" --out drawings
    python scripts/generate.py runs/demo caption heart.png pizza.png
    python scripts/generate.py runs/demo write "a heart that is" --max_new_tokens 40

A model folder is one that `scripts/train.py` leaves, or any that `TransfusionPipeline.from_pretrained` loads.
"""

import argparse
import re
from pathlib import Path

import torch

from transfusion import TransfusionPipeline


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub name of a model")
    verbs = parser.add_subparsers(dest="verb", required=True)
    draw = verbs.add_parser("draw", help="text to pictures")
    draw.add_argument("prompts", nargs="+")
    draw.add_argument("--out", type=Path, default=Path("drawings"), help="folder for the PNG files; drawings without")
    draw.add_argument("--num_images_per_prompt", type=int, default=1)
    draw.add_argument("--num_inference_steps", type=int, help="the model's default without")
    draw.add_argument("--guidance_scale", type=float, help="the model's default without")
    draw.add_argument("--negative_prompt")
    caption = verbs.add_parser("caption", help="pictures to text")
    caption.add_argument("pictures", nargs="+", help="files")
    write = verbs.add_parser("write", help="text to more text")
    write.add_argument("prompts", nargs="+")
    for verb in (caption, write):
        verb.add_argument("--max_new_tokens", type=int, default=32)
        verb.add_argument("--sample", action="store_true", help="sample, instead of taking the best token")
    for verb in (draw, caption, write):
        verb.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def draw(pipeline: TransfusionPipeline, args: argparse.Namespace) -> None:
    """Writes a PNG for each drawing, named after its prompt."""
    args.out.mkdir(parents=True, exist_ok=True)
    count = len(args.prompts) * args.num_images_per_prompt
    images = pipeline(
        args.prompts,
        negative_prompt=args.negative_prompt,
        num_images_per_prompt=args.num_images_per_prompt,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=[torch.Generator().manual_seed(args.seed + index) for index in range(count)],
    ).images
    for index, image in enumerate(images):
        prompt = args.prompts[index // args.num_images_per_prompt]
        path = args.out / f"{index:03d}-{re.sub(r'[^a-z0-9]+', '-', prompt.lower()).strip('-')[:60]}.png"
        image.save(path)
        print(path)


def write(pipeline: TransfusionPipeline, args: argparse.Namespace) -> None:
    """Prints each prompt with what the model adds."""
    processor = pipeline.processor
    inputs = processor(text=[[{"type": "text", "text": prompt}] for prompt in args.prompts], return_tensors="pt")
    inputs = inputs.to(pipeline.model.device)
    ids = pipeline.model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=args.sample)
    print("\n".join(processor.batch_decode(ids, skip_special_tokens=True)))


def main(args: argparse.Namespace) -> None:
    """Runs the verb of the command line."""
    torch.manual_seed(args.seed)
    pipeline = TransfusionPipeline.from_pretrained(args.model)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    if args.verb == "draw":
        draw(pipeline, args)
    elif args.verb == "caption":
        captions = pipeline.caption(args.pictures, max_new_tokens=args.max_new_tokens, do_sample=args.sample).text
        print("\n".join(f"{path}: {caption}" for path, caption in zip(args.pictures, captions, strict=True)))
    else:
        write(pipeline, args)


if __name__ == "__main__":
    main(parse_args())
