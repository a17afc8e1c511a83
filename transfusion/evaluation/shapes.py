"""Prompt following in the world of shapes: drawings are read back by rule, so that no network judges another."""

from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
from PIL import Image

from ..data.shapes import (
    CELL,
    COLOURS,
    OBJECT,
    POSITIONS,
    SHAPES,
    SIDE,
    Scene,
    Shape,
    parse_caption,
    sample_scenes,
    silhouette,
)


# A third of a triangle, the smallest shape: with fewer coloured pixels a cell is empty.
_FEWEST_PIXELS = 96
# Below these a cell holds something, but no shape: share of its pixels with one colour, and overlap with a shape.
_LEAST_COLOUR_SHARE = 0.6
_LEAST_OVERLAP = 0.7
# In RGB space; the two nearest colours of the palette are 145 apart.
_FARTHEST_COLOUR = 100.0


def read_scene(picture: Image.Image) -> Scene:
    """The scene that a picture shows; exact for what `render` draws from 32 pixels up, with or without jitter.

    It asks what a cell shows, not how cleanly: pixels nearer to white than to a colour are background, light grey ones
    too, and so are a few coloured ones (less than a third of the smallest shape).

    In each cell, pixels nearer to a colour of the palette than to white are the object, and its colour is that of
    most of them. Its shape is the one whose silhouette, moved by a few pixels, has the largest intersection over
    union with them; None where no shape fits or no colour prevails.
    """
    pixels = np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)
    cells = pixels.reshape(2, CELL, 2, CELL, 3).swapaxes(1, 2).reshape(len(POSITIONS), CELL * CELL, 3)
    palette = np.array([(255, 255, 255), *COLOURS.values()], dtype=np.float32)
    distances = np.linalg.norm(cells[:, :, None] - palette, axis=-1)
    nearest = distances.argmin(-1)
    known = np.where(distances.min(-1) < _FARTHEST_COLOUR, nearest, -1)
    items = (
        _read_cell(object_pixels, colours, position)
        for object_pixels, colours, position in zip(nearest > 0, known, POSITIONS, strict=True)
    )
    return tuple(item for item in items if item is not None)


def _read_cell(object_pixels: np.ndarray, colours: np.ndarray, position: str) -> Shape | None:
    """The object of one cell from its pixels (CELL * CELL,): of an object or not; number of the colour or -1."""
    size = object_pixels.sum()
    if size < _FEWEST_PIXELS:
        return None
    counts = np.array([(colours == number).sum() for number in range(1, len(COLOURS) + 1)])
    templates = _templates()
    common = templates @ object_pixels.astype(np.float32)
    overlaps = (common / (templates.sum(-1) + size - common)).max(-1)
    clear = overlaps.max() >= _LEAST_OVERLAP and counts.max() >= _LEAST_COLOUR_SHARE * size
    return Shape(SHAPES[overlaps.argmax()] if clear else None, list(COLOURS)[counts.argmax()], position)


@cache
def _templates() -> np.ndarray:
    """(shapes, offsets, CELL * CELL): 1 where a shape covers more than half of a pixel, 0 elsewhere."""
    margin = CELL - OBJECT
    placed = []
    for shape in SHAPES:
        covered = np.asarray(silhouette(shape)) > 127
        for top in range(margin + 1):
            for left in range(margin + 1):
                placed.append(np.pad(covered, ((top, margin - top), (left, margin - left))).ravel())
    return np.stack(placed).astype(np.float32).reshape(len(SHAPES), -1, CELL * CELL)


def prompt_following(drawings: Sequence[Image.Image], scenes: Sequence[Scene]) -> dict[str, float]:
    """How well drawings show the scenes that were asked for, each score the mean over the drawings.

    Returns:
        Shares of drawings with the right number of objects (`count`), colours (`colour`) and shapes (`shape`), both
        as often as asked but wherever they are, occupied cells (`position`), and with everything right (`all`); and
        the share of all cells that are right (`cells`): empty, or with the colour and the shape asked for. An object
        without a recognisable shape counts, but its shape is wrong. See `chance` for the floor of each.

    Raises:
        ValueError: for no drawings, or another number of scenes.
    """
    return _mean_scores([read_scene(drawing) for drawing in drawings], scenes)


def caption_following(captions: Sequence[str], scenes: Sequence[Scene]) -> dict[str, float]:
    """The scores of `prompt_following` for captions of pictures; one that `parse_caption` refuses scores 0 in each.

    Raises:
        ValueError: for no captions, or another number of scenes.
    """
    return _mean_scores([_scene_or_none(caption) for caption in captions], scenes)


def chance(scenes: Sequence[Scene], num_guesses: int = 16) -> dict[str, float]:
    """The scores of a model that does not listen: each scene answered with `num_guesses` random training scenes."""
    guesses = sample_scenes(len(scenes) * num_guesses, seed=0)
    return _mean_scores(guesses, [scene for scene in scenes for _ in range(num_guesses)])


def _scene_or_none(text: str) -> Scene | None:
    try:
        return parse_caption(text.strip())
    except ValueError:
        return None


def _mean_scores(answers: Sequence[Scene | None], scenes: Sequence[Scene]) -> dict[str, float]:
    if len(answers) != len(scenes) or not scenes:
        raise ValueError(
            f"There are {len(answers)} answers and {len(scenes)} scenes; give one for each, at least one."
        )
    scores = [_scores(answer, scene) for answer, scene in zip(answers, scenes, strict=True)]
    return {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}


def _scores(answer: Scene | None, scene: Scene) -> dict[str, float]:
    if answer is None:
        return dict.fromkeys(("count", "colour", "shape", "position", "all", "cells"), 0.0)
    found, wanted = ({item.position: item for item in items} for items in (answer, scene))
    return {
        "count": float(len(answer) == len(scene)),
        "colour": float(_tally(item.colour for item in answer) == _tally(item.colour for item in scene)),
        "shape": float(_tally(item.shape for item in answer) == _tally(item.shape for item in scene)),
        "position": float(found.keys() == wanted.keys()),
        "all": float(found == wanted),
        "cells": sum(found.get(position) == wanted.get(position) for position in POSITIONS) / len(POSITIONS),
    }


def _tally(names: Iterable[str | None]) -> list[str]:
    return sorted(map(str, names))


__all__ = ["caption_following", "chance", "prompt_following", "read_scene"]
