"""Scores of drawings and captions that need no other network."""

import re
from collections.abc import Sequence

import numpy as np
from PIL import Image


def nearest_pictures(drawings: Sequence[Image.Image], pictures: Sequence[Image.Image], count: int) -> np.ndarray:
    """(drawings, count) indices of the pictures nearest to each drawing, by Euclidean distance of RGB pixels.

    Raises:
        ValueError: Pictures of different sizes, or fewer than `count`.
    """
    if count > len(pictures):
        raise ValueError(f"count={count} is more than the {len(pictures)} pictures to choose from.")
    if len(sizes := {picture.size for picture in (*drawings, *pictures)}) > 1:
        raise ValueError(f"The pictures have the sizes {sorted(sizes)}; bring them to one.")
    rows, columns = (
        np.stack([np.asarray(picture.convert("RGB"), dtype=np.float64).ravel() for picture in group])
        for group in (drawings, pictures)
    )
    squared = (rows**2).sum(1)[:, None] - 2 * rows @ columns.T + (columns**2).sum(1)
    return np.argsort(squared, axis=1, kind="stable")[:, :count]


def nearest_score(
    drawings: Sequence[Image.Image], pictures: Sequence[Image.Image], truth: Sequence[int], count: int = 5
) -> float:
    """Share of drawings whose true picture, `pictures[truth[i]]`, is among the `count` nearest."""
    nearest = nearest_pictures(drawings, pictures, count)
    return float((nearest == np.asarray(truth)[:, None]).any(axis=1).mean())


def caption_score(captions: Sequence[str], names: Sequence[str]) -> float:
    """Share of captions that contain their name, as whole words, whatever the case."""
    if len(captions) != len(names) or not names:
        raise ValueError(
            f"There are {len(captions)} captions and {len(names)} names; give one for each, at least one."
        )
    found = [
        re.search(rf"(?<!\w){re.escape(name.lower())}(?!\w)", caption.lower()) is not None
        for caption, name in zip(captions, names, strict=True)
    ]
    return sum(found) / len(found)


__all__ = ["caption_score", "nearest_pictures", "nearest_score"]
