import numpy as np
import pytest
from PIL import Image

from transfusion.evaluation.pictures import caption_score, nearest_pictures, nearest_score


def noise(seed: int, size: tuple[int, int] = (5, 4)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_nearest_pictures_equal_the_sorted_distances() -> None:
    pictures, drawings = [noise(seed) for seed in range(12)], [noise(seed) for seed in range(100, 104)]
    for row, drawing in zip(nearest_pictures(drawings, pictures, 12), drawings, strict=True):
        distances = [
            sum((int(a) - int(b)) ** 2 for a, b in zip(drawing.tobytes(), picture.tobytes(), strict=True))
            for picture in pictures
        ]
        assert row.tolist() == sorted(range(12), key=distances.__getitem__)


def test_nearest_score_counts_the_true_picture_among_the_nearest() -> None:
    pictures = [noise(seed) for seed in range(12)]
    assert nearest_score(pictures[:6], pictures, [0, 1, 2, 3, 4, 11], count=1) == 5 / 6
    assert nearest_score(pictures[:6], pictures, [0, 1, 2, 3, 4, 11], count=12) == 1.0


def test_refuses_pictures_that_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="sizes"):
        nearest_pictures([noise(0)], [noise(1, (8, 8))], 1)
    with pytest.raises(ValueError, match="count=2"):
        nearest_pictures([noise(0)], [noise(1)], 2)


def test_captions_hold_whole_words_in_any_case() -> None:
    captions = ["an emoji of a Red Heart", "a redheart", "heart, red", "a cat, a category"]
    names = ["red heart", "red heart", "red heart", "cat"]
    assert caption_score(captions, names) == 0.5
    assert caption_score(["a category"], ["cat"]) == 0
    assert caption_score(["a redheart"], ["heart"]) == 0
    assert caption_score(["a red heart"], ["Red Heart"]) == 1
    with pytest.raises(ValueError, match="2 captions and 1 names"):
        caption_score(["a", "b"], ["a"])
