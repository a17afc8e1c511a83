"""The report on a model of the shapes world, whose drawings and captions are read back by rule."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data import CaptionedPicture, load_glosses
from ..data.shapes import parse_caption, shapes_world
from .frechet import frechet_scores
from .pages import Score, caption_page, sheet
from .report import (
    EvaluationSettings,
    draw,
    frechet_lines,
    picture_size,
    report_folder,
    text_lines,
    text_scores,
    write_captions,
    write_scores,
)
from .shapes import caption_following, chance, prompt_following


_WHAT = {
    "count": "the right number of objects",
    "colour": "the right colours",
    "shape": "the right shapes",
    "position": "objects in the right cells",
    "all": "everything right",
    "cells": "cells that are right",
}


def evaluate_shapes(
    pipeline: Any, output_dir: str | Path, settings: EvaluationSettings | None = None
) -> dict[str, Any]:
    """Measure a model of the shapes world on scenes that no training picture shows.

    Writes `evaluation.json`, `evaluation.md`, `samples.png` and `captions.md`.

    Returns:
        What `evaluation.json` holds: the scores of `prompt_following` as `drawn_count`, ..., of `caption_following` as
        `captioned_count`, ..., and what answering blindly scores as `chance_count`, ...; `perplexity` and
        `trigram_perplexity` of held-out definitions, unless the tokenizer lacks characters of them; with
        `num_frechet`, what `frechet_scores` returns for the drawings and other held-out pictures.

    Raises:
        ImportError: `num_frechet` is given and the extra `eval` is not installed.
    """
    settings = settings or EvaluationSettings()
    folder = report_folder(output_dir, settings)
    num_drawings = max(settings.num_pictures, settings.num_frechet)
    drawn = shapes_world(num_drawings, settings.seed, "held_out")
    scenes = [parse_caption(picture.captions[0]) for picture in drawn]
    pictures = drawn[: settings.num_pictures]

    drawings = draw(pipeline, [picture.captions[0] for picture in drawn], settings)
    captions = write_captions(
        pipeline, [picture.image for picture in pictures], settings, longest_caption(pipeline, drawn)
    )
    scores: dict[str, Any] = {
        **{f"drawn_{name}": value for name, value in prompt_following(drawings, scenes).items()},
        **{f"captioned_{name}": value for name, value in caption_following(captions, scenes[: len(pictures)]).items()},
        **{f"chance_{name}": value for name, value in chance(scenes).items()},
        "num_drawings": len(drawings),
        "num_pictures": len(pictures),
    }
    if reads_definitions(pipeline.processor.tokenizer):
        scores |= text_scores(pipeline, settings)
    size = picture_size(pipeline)
    true = [picture.image.resize(size) for picture in drawn]
    if settings.num_frechet:
        others = shapes_world(num_drawings, settings.seed + 1, "held_out")
        scores |= frechet_scores(drawings, true, [picture.image.resize(size) for picture in others])
    write_scores(scores, shapes_table(scores), settings, folder)

    titled = [(picture.captions[0], list(pair)) for picture, *pair in zip(drawn, drawings, true, strict=True)]
    sheet(titled[: 2 * settings.num_shown], ["drawn", "true"]).save(folder / "samples.png")
    count = 2 * settings.num_shown
    (folder / "captions.md").write_text(caption_page(pictures[:count], captions[:count], folder / "captions"))
    return scores


def longest_caption(pipeline: Any, pictures: Sequence[CaptionedPicture]) -> int:
    """Tokens of the longest true caption and its end, so that no tokenizer's captions are cut off."""
    texts = [picture.captions[0] for picture in pictures]
    return 1 + max(map(len, pipeline.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]))


def reads_definitions(tokenizer: Any) -> bool:
    """Whether the tokenizer has tokens for all of the held-out definitions."""
    rows = tokenizer(load_glosses("held_out"), add_special_tokens=False)["input_ids"]
    return tokenizer.unk_token_id is None or not any(tokenizer.unk_token_id in row for row in rows)


def shapes_table(scores: dict[str, Any]) -> list[Score]:
    """The lines of `evaluation.md` for what `evaluate_shapes` measured."""
    following = [
        Score(f"{kind}: {what}", scores[f"{verb}_{name}"], ("chance", scores[f"chance_{name}"]), (kind, scores[count]))
        for verb, kind, count in (("drawn", "drawings", "num_drawings"), ("captioned", "captions", "num_pictures"))
        for name, what in _WHAT.items()
    ]
    return [*following, *(text_lines(scores) if "perplexity" in scores else []), *frechet_lines(scores)]


__all__ = ["evaluate_shapes", "longest_caption", "reads_definitions", "shapes_table"]
