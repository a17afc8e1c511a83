"""The report of the demo: scores, a sheet of drawings, and a page of captions."""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from ..data import CaptionedPicture, load_emoji, load_glosses
from .pictures import caption_score, nearest_pictures
from .text import TrigramBaseline, text_perplexity


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured.

    Attributes:
        num_pictures: Training captions drawn, and training pictures captioned.
        num_texts: Held-out definitions read.
        num_shown: Train and held-out names on the sheet, each.
        batch_size: Pictures at a time.
        num_inference_steps, guidance_scale: Of the drawings; by default those of the model.
        seed: Of the choice, and of the noise.
    """

    num_pictures: int = 100
    num_texts: int = 1000
    num_shown: int = 12
    batch_size: int = 50
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0


def draw(pipeline: Any, captions: Sequence[str], settings: EvaluationSettings) -> list[Image.Image]:
    """One drawing of each caption, each from its own seed."""
    drawings: list[Image.Image] = []
    for start in range(0, len(captions), settings.batch_size):
        prompts = list(captions[start : start + settings.batch_size])
        seeds = range(settings.seed + start, settings.seed + start + len(prompts))
        drawings += pipeline(
            prompts,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images
    return drawings


def write_captions(pipeline: Any, pictures: Sequence[Image.Image], settings: EvaluationSettings) -> list[str]:
    """The model's caption of each picture, decoded greedily."""
    captions: list[str] = []
    for start in range(0, len(pictures), settings.batch_size):
        batch = list(pictures[start : start + settings.batch_size])
        captions += pipeline.caption(batch, max_new_tokens=24, do_sample=False).text
    return captions


def sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], headings: Sequence[str], columns: int = 3) -> Image.Image:
    """A page of titled rows of pictures, `columns` rows side by side; `headings` stand over the pictures."""
    font = ImageFont.load_default(11)
    side, title = 64, 150
    width, height = title + len(headings) * (side + 6) + 14, side + 6
    lines = -(-len(rows) // columns)
    page = Image.new("RGB", (columns * width, lines * height + 22), "white")
    pen = ImageDraw.Draw(page)
    for column in range(columns):
        for place, heading in enumerate(headings):
            pen.text((column * width + title + place * (side + 6), 5), heading, "black", font)
    for index, (text, pictures) in enumerate(rows):
        left, top = index % columns * width, index // columns * height + 22
        pen.multiline_text((left + 6, top + 18), _wrap(text, 24), "black", font)
        for place, picture in enumerate(pictures):
            page.paste(picture.resize((side, side)), (left + title + place * (side + 6), top))
    return page


def _wrap(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines[:3])


def caption_page(pictures: Sequence[CaptionedPicture], captions: Sequence[str], folder: Path) -> str:
    """A Markdown table of picture, true name and caption; the pictures are written into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["| picture | split | name | the model's caption |", "| --- | --- | --- | --- |"]
    for picture, caption in zip(pictures, captions, strict=True):
        path = folder / f"{Path(picture.id).stem}.png"
        picture.image.save(path)
        said = caption.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| ![{picture.name}]({folder.name}/{path.name}) | {picture.split} | {picture.name} | {said} |")
    return "\n".join(lines) + "\n"


def evaluate_demo(
    pipeline: Any, output_dir: str | Path, settings: EvaluationSettings | None = None
) -> dict[str, float | int | dict]:
    """Measure a model of the shipped emoji; write `evaluation.json`, `samples.png` and `captions.md`.

    Returns:
        `drawn_in_nearest_5`: share of drawings of training captions whose picture is among their 5 nearest training
        pictures; `captions_with_name`: share of captions of training pictures that hold the name; `perplexity` and
        `trigram_perplexity` of held-out definitions; and `chance`, what drawing blindly would score.
    """
    settings = settings or EvaluationSettings()
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = load_emoji("train"), load_emoji("held_out")
    block, (rows, columns) = pipeline.processor.image_processor.block, pipeline.model.config.default_image_grid
    size = (columns * block, rows * block)
    images = [picture.image.resize(size) for picture in train]
    chosen = random.Random(settings.seed).sample(range(len(train)), min(settings.num_pictures, len(train)))
    shown = random.Random(settings.seed).sample(held_out, min(settings.num_shown, len(held_out)))

    drawings = draw(pipeline, [train[index].captions[0] for index in chosen], settings)
    nearest = nearest_pictures(drawings, images, 5)
    captions = write_captions(pipeline, [train[index].image for index in chosen], settings)
    scores = {
        "drawn_in_nearest_5": sum(i in row for i, row in zip(chosen, nearest, strict=True)) / len(chosen),
        "drawn_nearest": sum(i == row[0] for i, row in zip(chosen, nearest, strict=True)) / len(chosen),
        "chance": 5 / len(train),
        "captions_with_name": caption_score(captions, [train[index].name for index in chosen]),
        **text_scores(pipeline, settings),
        "settings": asdict(settings),
    }
    (folder / "evaluation.json").write_text(json.dumps(scores, indent=2) + "\n")

    titled = [
        (train[index].captions[0], [drawing, images[near[0]], images[index]])
        for index, drawing, near in list(zip(chosen, drawings, nearest, strict=True))[: settings.num_shown]
    ]
    new = draw(pipeline, [picture.captions[0] for picture in shown], settings)
    near_new = nearest_pictures(new, images, 1)[:, 0]
    titled += [
        (f"held out: {picture.captions[0]}", [drawing, images[near], picture.image.resize(size)])
        for picture, drawing, near in zip(shown, new, near_new, strict=True)
    ]
    sheet(titled, ["drawn", "nearest", "true"]).save(folder / "samples.png")
    pictures = [train[index] for index in chosen[: settings.num_shown]] + shown
    new_captions = write_captions(pipeline, [picture.image for picture in shown], settings)
    page = caption_page(pictures, captions[: settings.num_shown] + new_captions, folder / "captions")
    (folder / "captions.md").write_text(page)
    return scores


def text_scores(pipeline: Any, settings: EvaluationSettings) -> dict[str, float]:
    """Perplexity of held-out definitions by the model, and by a trigram model of the training definitions."""
    processor, model = pipeline.processor, pipeline.model
    texts = load_glosses("held_out")[: settings.num_texts]

    def ids(texts: Sequence[str]) -> list[list[int]]:
        rows = [[{"type": "text", "text": text}] for text in texts]
        return processor(text=rows, return_labels=True, padding=False)["input_ids"]

    baseline = TrigramBaseline(ids(load_glosses("train")), model.config.vocab_size)
    return {
        "perplexity": text_perplexity(model, processor, texts),
        "trigram_perplexity": baseline.perplexity(ids(texts)),
    }


__all__ = ["EvaluationSettings", "caption_page", "draw", "evaluate_demo", "sheet", "text_scores", "write_captions"]
