import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from transfusion.data import load_vae, shapes_world
from transfusion.data.autoencoder import pixels_of, reconstruct
from transfusion.data.shapes import (
    CELL,
    COLOURS,
    JITTER,
    OBJECT,
    POSITIONS,
    SHAPES,
    Scene,
    Shape,
    caption,
    render,
    sample_scenes,
)
from transfusion.evaluation.shapes import caption_following, chance, prompt_following, read_scene


RED, BLUE = COLOURS["red"], COLOURS["blue"]
CIRCLE, SQUARE = Shape("circle", "red", "top left"), Shape("square", "blue", "bottom right")


def test_reads_every_single_object_anywhere_in_its_cell() -> None:
    margin = (CELL - OBJECT) // 2
    assert margin > JITTER
    steps = range(-margin, margin + 1)
    for shape, colour, position in itertools.product(SHAPES, COLOURS, POSITIONS):
        scene = (Shape(shape, colour, position),)
        pixels = np.asarray(render(scene))
        for offset in itertools.product(steps, steps):
            assert read_scene(Image.fromarray(np.roll(pixels, offset, (0, 1)))) == scene


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_reads_scenes_with_jitter(split: str) -> None:
    for seed in range(3):
        for scene, picture in zip(sample_scenes(200, seed, split), shapes_world(200, seed, split), strict=True):
            assert read_scene(picture.image) == scene


@pytest.mark.parametrize("size", [32, 48, 64, 128, 256])
def test_reads_other_sizes(size: int) -> None:
    for seed, scene in enumerate(sample_scenes(50, seed=0)):
        assert read_scene(render(scene, seed, size)) == scene


def test_reads_pictures_that_went_through_the_shipped_autoencoder() -> None:
    scenes, pictures = sample_scenes(64, seed=0), shapes_world(64, seed=0)
    decoded = reconstruct(load_vae(), pixels_of([picture.image for picture in pictures])).permute(0, 2, 3, 1)
    assert prompt_following([Image.fromarray(pixels.numpy()) for pixels in decoded], scenes)["all"] == 1


def test_reads_through_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    for seed, scene in enumerate(sample_scenes(100, seed=0)):
        pixels = torch.from_numpy(np.array(render(scene, seed))).float()
        noisy = (pixels + 40 * torch.randn(pixels.shape, generator=generator)).clamp(0, 255).byte()
        assert read_scene(Image.fromarray(noisy.numpy())) == scene


def drawn(*figures: tuple[tuple[int, int, int, int], tuple[int, int, int]]) -> Image.Image:
    """Filled rectangles (left, top, right, bottom, all inside) on white."""
    picture = Image.new("RGB", (64, 64), "white")
    for box, colour in figures:
        ImageDraw.Draw(picture).rectangle(box, fill=colour)
    return picture


def test_reads_what_is_no_object_of_the_world() -> None:
    assert read_scene(drawn()) == ()
    assert read_scene(drawn(((10, 10, 18, 18), RED))) == (), "a dot of 81 pixels"
    cross = drawn(((4, 13, 27, 18), RED), ((13, 4, 18, 27), RED))
    assert read_scene(cross) == (Shape(None, "red", "top left"),)
    two_colours = drawn(((4, 4, 15, 27), RED), ((16, 4, 27, 27), BLUE))
    assert [item.shape for item in read_scene(two_colours)] == [None]
    assert [item.shape for item in read_scene(drawn(((4, 36, 27, 59), (40, 40, 40))))] == [None], "no colour"
    assert [item.shape for item in read_scene(drawn(((0, 0, 63, 63), RED)))] == [None] * 4, "no shape"
    light = drawn(((4, 4, 27, 27), (240, 235, 235)))
    assert read_scene(light) == (), "nearer to white than to a colour"


# Asked for: a red circle top left, a blue square bottom right. Drawn instead, with the scores counted by hand in the
# order count, colour, shape, position, all, cells.
ANSWERS: list[tuple[Scene, tuple[float, ...]]] = [
    ((CIRCLE, SQUARE), (1, 1, 1, 1, 1, 1)),
    ((), (0, 0, 0, 0, 0, 2 / 4)),
    ((CIRCLE,), (0, 0, 0, 0, 0, 3 / 4)),
    ((CIRCLE, Shape("square", "blue", "bottom left")), (1, 1, 1, 0, 0, 2 / 4)),
    ((Shape("square", "blue", "top left"), Shape("circle", "red", "bottom right")), (1, 1, 1, 1, 0, 2 / 4)),
    ((Shape("square", "red", "top left"), Shape("circle", "blue", "bottom right")), (1, 1, 1, 1, 0, 2 / 4)),
    ((CIRCLE, Shape("square", "green", "bottom right")), (1, 0, 1, 1, 0, 3 / 4)),
    ((CIRCLE, Shape("circle", "blue", "bottom right")), (1, 1, 0, 1, 0, 3 / 4)),
    ((CIRCLE, Shape("circle", "red", "top right"), SQUARE), (0, 0, 0, 0, 0, 3 / 4)),
]
NAMES = ("count", "colour", "shape", "position", "all", "cells")


@pytest.mark.parametrize(("answer", "scores"), ANSWERS)
def test_scores_are_those_of_a_hand_count(answer: Scene, scores: tuple[float, ...]) -> None:
    assert prompt_following([render(answer, 3)], [(CIRCLE, SQUARE)]) == dict(zip(NAMES, scores, strict=True))
    if answer:
        assert caption_following([caption(answer)], [(CIRCLE, SQUARE)]) == dict(zip(NAMES, scores, strict=True))


def test_an_object_without_a_shape_counts_but_is_wrong() -> None:
    cross = drawn(((4, 13, 27, 18), RED), ((13, 4, 18, 27), RED))
    scores = dict(zip(NAMES, (1, 1, 0, 1, 0, 3 / 4), strict=True))
    assert prompt_following([cross], [(CIRCLE,)]) == scores


def test_scores_are_means() -> None:
    scenes = [(CIRCLE, SQUARE)] * 4
    right, blank = render((CIRCLE, SQUARE)), drawn()
    scores = prompt_following([right, blank, blank, blank], scenes)
    assert scores["all"] == 1 / 4
    assert scores["cells"] == (1 + 3 * 2 / 4) / 4


def test_captions_that_cannot_be_read_are_wrong() -> None:
    scenes = [(CIRCLE, SQUARE)] * 4
    texts = [f" {caption(scenes[0])}\n", "a blue square bottom right, a red circle top left", "a red circle", ""]
    assert caption_following(texts, scenes) == dict.fromkeys(NAMES, 0.5)


def test_chance_is_the_share_of_training_scenes_that_happen_to_be_right() -> None:
    guesses = sample_scenes(4000, seed=1)
    count, wanted = 1 / 3, [(CIRCLE,)]
    position = sum([item.position for item in guess] == ["top left"] for guess in guesses) / len(guesses)
    floor = chance(wanted, num_guesses=4000)
    assert floor["count"] == pytest.approx(count, abs=0.03)
    assert floor["position"] == pytest.approx(position, abs=0.03)
    assert floor["all"] < 0.03
    assert chance(sample_scenes(50, seed=2, split="held_out"))["all"] == 0, "no training scene is held out"


def test_refuses_answers_without_scenes() -> None:
    with pytest.raises(ValueError, match="1 answers and 2 scenes"):
        prompt_following([drawn()], [(CIRCLE,), (SQUARE,)])
    with pytest.raises(ValueError, match="at least one"):
        caption_following([], [])
