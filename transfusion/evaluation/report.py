"""The report on a model of the shipped emoji: scores, a sheet of drawings, and a page of captions."""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..data import load_emoji, load_glosses
from .frechet import FRECHET, MIN_PICTURES, frechet_scores, load_frechet
from .pages import Score, caption_page, score_table, sheet
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
        num_frechet: Drawings for the Frechet distance, at least 50; it needs the extra `eval`, so 0 goes without it.

    Raises:
        ValueError: `num_frechet` of 1 to 49.
    """

    num_pictures: int = 100
    num_texts: int = 1000
    num_shown: int = 12
    batch_size: int = 50
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    num_frechet: int = 0

    def __post_init__(self) -> None:
        if self.num_frechet and self.num_frechet < MIN_PICTURES:
            raise ValueError(
                f"num_frechet={self.num_frechet}; a Frechet distance needs at least {MIN_PICTURES} drawings, "
                "and 0 goes without it."
            )


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


def write_captions(
    pipeline: Any, pictures: Sequence[Image.Image], settings: EvaluationSettings, max_new_tokens: int = 24
) -> list[str]:
    """The model's caption of each picture, decoded greedily."""
    captions: list[str] = []
    for start in range(0, len(pictures), settings.batch_size):
        batch = list(pictures[start : start + settings.batch_size])
        captions += pipeline.caption(batch, max_new_tokens=max_new_tokens, do_sample=False).text
    return captions


def evaluate_demo(pipeline: Any, output_dir: str | Path, settings: EvaluationSettings | None = None) -> dict[str, Any]:
    """Measure a model of the shipped emoji; write `evaluation.json`, `evaluation.md`, `samples.png`, `captions.md`.

    Returns:
        What `evaluation.json` holds. `drawn_in_nearest_5`: share of drawings of training captions whose picture is
        among their 5 nearest training pictures, and `chance`, what drawing blindly would score;
        `captions_with_name`: share of captions of training pictures that hold the name, and
        `captions_with_another_name`, the share that holds that of another of the pictures; `perplexity` and
        `trigram_perplexity` of held-out definitions; with `num_frechet`, what `emoji_frechet` returns.

    Raises:
        ValueError: `num_frechet` is more than half of the training pictures.
        ImportError: `num_frechet` is given and the extra `eval` is not installed.
    """
    settings = settings or EvaluationSettings()
    folder = report_folder(output_dir, settings)
    train, held_out = load_emoji("train"), load_emoji("held_out")
    if 2 * settings.num_frechet > len(train):
        raise ValueError(f"num_frechet={settings.num_frechet}; at most half of the {len(train)} training pictures.")
    size = picture_size(pipeline)
    images = [picture.image.resize(size) for picture in train]
    chosen = random.Random(settings.seed).sample(range(len(train)), min(settings.num_pictures, len(train)))
    shown = random.Random(settings.seed).sample(held_out, min(settings.num_shown, len(held_out)))

    prompts = [picture.captions[0] for picture in train]
    drawings = draw(pipeline, [prompts[index] for index in chosen], settings)
    nearest = nearest_pictures(drawings, images, 5)
    captions = write_captions(pipeline, [train[index].image for index in chosen], settings)
    scores = {
        "drawn_in_nearest_5": sum(i in row for i, row in zip(chosen, nearest, strict=True)) / len(chosen),
        "drawn_nearest": sum(i == row[0] for i, row in zip(chosen, nearest, strict=True)) / len(chosen),
        "chance": 5 / len(train),
        "num_pictures": len(chosen),
        **name_scores(captions, [train[index].name for index in chosen]),
        **text_scores(pipeline, settings),
    }
    if settings.num_frechet:
        scores |= emoji_frechet(pipeline, prompts, images, chosen, drawings, settings)
    write_scores(scores, emoji_table(scores), settings, folder)

    titled = [
        (prompts[index], [drawing, images[near[0]], images[index]])
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


def report_folder(output_dir: str | Path, settings: EvaluationSettings) -> Path:
    """The folder, made where it is missing. A missing package is missed here, not after minutes of drawing."""
    if settings.num_frechet:
        load_frechet()
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def picture_size(pipeline: Any) -> tuple[int, int]:
    """Width and height, in pixels, of what the model draws."""
    block, (rows, columns) = pipeline.processor.image_processor.block, pipeline.model.config.default_image_grid
    return columns * block, rows * block


def write_scores(scores: dict[str, Any], table: Sequence[Score], settings: EvaluationSettings, folder: Path) -> None:
    """Writes `evaluation.json` and `evaluation.md`; adds the settings to `scores`."""
    scores["settings"] = asdict(settings)
    (folder / "evaluation.json").write_text(json.dumps(scores, indent=2) + "\n")
    (folder / "evaluation.md").write_text(score_table(table))


def name_scores(captions: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """Share of captions that hold their name; and, as chance, the share over all pairs with another's name."""
    others = [
        caption_score(captions, [*names[shift:], *names[:shift]])  # each caption beside every other name once
        for shift in range(1, len(names))
    ]
    return {
        "captions_with_name": caption_score(captions, names),
        "captions_with_another_name": sum(others) / max(len(others), 1),
    }


def emoji_frechet(
    pipeline: Any,
    prompts: Sequence[str],
    images: Sequence[Image.Image],
    chosen: Sequence[int],
    drawings: Sequence[Image.Image],
    settings: EvaluationSettings,
) -> dict[str, float | int]:
    """`frechet_scores` of drawings of one half of the pictures, beside the pictures of the other half.

    Args:
        pipeline: Draws what `drawings` lacks.
        prompts, images: Of all pictures.
        chosen, drawings: What was drawn before, and the drawings.
        settings: `num_frechet` is the size of each half.
    """
    own, others = two_halves(chosen, len(prompts), settings.num_frechet, settings.seed)
    new = [prompts[index] for index in own[len(chosen) :]]
    more = draw(pipeline, new, replace(settings, seed=settings.seed + len(chosen)))
    drawn = [*drawings[: len(own)], *more]
    return frechet_scores(drawn, [images[index] for index in own], [images[index] for index in others])


def two_halves(chosen: Sequence[int], num_pictures: int, count: int, seed: int) -> tuple[list[int], list[int]]:
    """Twice `count` different indices below `num_pictures`; the first half begins with `chosen`."""
    rest = sorted(set(range(num_pictures)) - set(chosen))
    order = [*chosen, *random.Random(seed).sample(rest, len(rest))]
    return order[:count], order[count : 2 * count]


def emoji_table(scores: dict[str, Any]) -> list[Score]:
    """The lines of `evaluation.md` for what `evaluate_demo` measured."""
    drawings, pictures = ("drawings", scores["num_pictures"]), ("pictures", scores["num_pictures"])
    another = ("another's name", scores["captions_with_another_name"])
    return [
        Score(
            "drawings with their picture among the 5 nearest",
            scores["drawn_in_nearest_5"],
            ("chance", scores["chance"]),
            drawings,
        ),
        Score(
            "drawings whose nearest picture is theirs",
            scores["drawn_nearest"],
            ("chance", scores["chance"] / 5),
            drawings,
        ),
        Score("captions with the right name", scores["captions_with_name"], another, pictures),
        *text_lines(scores),
        *frechet_lines(scores),
    ]


def text_lines(scores: dict[str, Any]) -> list[Score]:
    """The line of what `text_scores` returned."""
    baseline = ("trigrams", scores["trigram_perplexity"])
    texts = ("definitions", scores["num_texts"])
    return [Score("perplexity of held-out definitions", scores["perplexity"], baseline, texts, is_share=False)]


def frechet_lines(scores: dict[str, Any]) -> list[Score]:
    """The line of what `frechet_scores` returned; none where it was not asked."""
    if FRECHET not in scores:
        return []
    floor = ("floor (real pictures)", scores[f"{FRECHET}_floor"])
    drawings = ("drawings", scores["frechet_num_pictures"])
    return [Score("Frechet distance (EfficientNet-Lite0)", scores[FRECHET], floor, drawings, is_share=False)]


def text_scores(pipeline: Any, settings: EvaluationSettings) -> dict[str, float | int]:
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
        "num_texts": len(texts),
    }


__all__ = [
    "EvaluationSettings",
    "draw",
    "emoji_frechet",
    "emoji_table",
    "evaluate_demo",
    "frechet_lines",
    "name_scores",
    "picture_size",
    "report_folder",
    "text_lines",
    "text_scores",
    "two_halves",
    "write_captions",
    "write_scores",
]
