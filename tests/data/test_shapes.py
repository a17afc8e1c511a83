import itertools
import math
import random
import re

import numpy as np
import pytest

from transfusion.data.shapes import (
    COLOURS,
    JITTER,
    OBJECT,
    POSITIONS,
    SHAPES,
    Scene,
    Shape,
    caption,
    edit_triples,
    in_reading_order,
    parse_caption,
    render,
    sample_scenes,
    scene_split,
    shapes_world,
    silhouette,
)


def every_scene() -> list[Scene]:
    """All 7,824 scenes of one to three objects."""
    kinds = list(itertools.product(SHAPES, COLOURS))
    return [
        tuple(Shape(*kind, position) for kind, position in zip(chosen, positions, strict=True))
        for count in (1, 2, 3)
        for positions in itertools.combinations(POSITIONS, count)
        for chosen in itertools.product(kinds, repeat=count)
    ]


def test_captions_of_all_scenes_differ_and_lead_back() -> None:
    scenes = every_scene()
    captions = [caption(scene) for scene in scenes]
    assert len(set(captions)) == len(scenes) == 4 * 12 + 6 * 12**2 + 4 * 12**3
    assert [parse_caption(text) for text in captions] == scenes
    chooser = random.Random(0)
    assert [parse_caption(caption(scene, chooser)) for scene in scenes] == scenes
    assert any(caption(scene, chooser) != text for scene, text in zip(scenes, captions, strict=True))


def test_captions_group_what_looks_alike() -> None:
    blue = [Shape("square", "blue", position) for position in ("top left", "bottom right")]
    triangle = Shape("triangle", "green", "bottom left")
    scene = in_reading_order([triangle, *blue])
    assert caption(scene) == "two blue squares top left and bottom right, a green triangle bottom left"
    assert caption((triangle,)) == "a green triangle bottom left"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "a red circle",
        "red circle top left",
        "a red circles top left",
        "two red circle top left and top right",
        "two red circles top left",
        "three red circles top left and top right",
        "a red circle top left and top right",
        "two red circles top left and top left",
        "a red circle top left, a blue square top left",
        "a red circle top left,a blue square top right",
        "a red circle top left, ",
        "a red  circle top left",
        "a red circle top left.",
        "a purple circle top left",
    ],
)
def test_refuses_other_captions(text: str) -> None:
    with pytest.raises(ValueError, match="is not|two objects"):
        parse_caption(text)


@pytest.mark.parametrize(
    ("shape", "area"),
    [("circle", math.pi * OBJECT**2 / 4), ("square", OBJECT**2), ("triangle", OBJECT**2 / 2)],
)
def test_shapes_cover_their_area(shape: str, area: float) -> None:
    covered = np.asarray(silhouette(shape)) / 255
    assert covered.sum() == pytest.approx(area, rel=0.01)
    assert np.abs(covered - covered[:, ::-1]).max() < 0.1
    assert covered[-1].max() > 0, "it touches the edge"


@pytest.mark.parametrize("size", [64, 128])
def test_objects_are_flat_and_in_their_cells(size: int) -> None:
    for shape, colour, (cell, position) in itertools.product(SHAPES, COLOURS, enumerate(POSITIONS)):
        pixels = np.asarray(render((Shape(shape, colour, position),), size=size)).astype(int)
        half = size // 2
        row, column = cell // 2 * half, cell % 2 * half
        assert tuple(pixels[row + half // 2, column + half // 2]) == COLOURS[colour]
        pixels[row : row + half, column : column + half] = 255
        assert (pixels == 255).all(), "the other cells are white"


def test_jitter_moves_an_object_by_up_to_its_limit() -> None:
    scene = (Shape("triangle", "red", "top right"),)
    centred = np.asarray(render(scene))
    steps = range(-JITTER, JITTER + 1)
    moved = {np.roll(centred, step, (0, 1)).tobytes(): step for step in itertools.product(steps, steps)}
    seen = {moved[render(scene, seed).tobytes()] for seed in range(300)}
    assert seen == set(itertools.product(steps, steps))
    assert render(scene, 7).tobytes() == render(scene, 7).tobytes()


def test_objects_of_a_picture_move_independently() -> None:
    left, right = Shape("square", "red", "top left"), Shape("square", "red", "top right")
    halves = [np.hsplit(np.asarray(render((left, right), seed)), 2) for seed in range(20)]
    assert any((first != second).any() for first, second in halves)


def test_refuses_what_cannot_be_drawn_or_named() -> None:
    first, second = Shape("circle", "red", "top left"), Shape("square", "red", "top right")
    for scene in ((second, first), (first, first), (Shape(None, "red", "top left"),)):
        with pytest.raises(ValueError, match="in the order"):
            render(scene)
        with pytest.raises(ValueError, match="in the order"):
            caption(scene)
    with pytest.raises(ValueError, match="multiple of 16"):
        render((first,), size=60)
    with pytest.raises(ValueError, match="empty"):
        caption(())
    with pytest.raises(ValueError, match="not of this world"):
        Shape("circle", "mauve", "top left")
    with pytest.raises(ValueError, match="train, held_out"):
        shapes_world(1, split="test")


def test_a_fifth_of_the_scenes_with_several_objects_is_held_out() -> None:
    splits = [(len(scene), scene_split(scene)) for scene in every_scene()]
    assert not any(split == "held_out" for count, split in splits if count == 1)
    several = [split == "held_out" for count, split in splits if count > 1]
    assert sum(several) / len(several) == pytest.approx(0.2, abs=0.015)  # three standard deviations


def test_splits_share_no_scene_whatever_the_seed() -> None:
    train, held_out = (
        {scene for seed in range(4) for scene in sample_scenes(1000, seed, split)} for split in ("train", "held_out")
    )
    assert len(train) > 1000 and len(held_out) > 500
    assert not train & held_out


def test_pictures_are_those_of_the_sampled_scenes_and_repeat() -> None:
    pictures = shapes_world(30, seed=5, split="held_out")
    scenes = sample_scenes(30, seed=5, split="held_out")
    assert [parse_caption(picture.captions[0]) for picture in pictures] == scenes
    assert shapes_world(10, seed=5, split="held_out") == pictures[:10]
    assert sample_scenes(30, seed=6, split="held_out") != scenes
    assert len({picture.id for picture in pictures}) == 30
    assert {(picture.image.size, picture.image.mode, picture.split) for picture in pictures} == {
        ((64, 64), "RGB", "held_out")
    }


def test_counts_are_balanced_and_objects_repeat() -> None:
    scenes = sample_scenes(3000, seed=0)
    for count in (1, 2, 3):
        assert sum(len(scene) == count for scene in scenes) / len(scenes) == pytest.approx(1 / 3, abs=0.03)
    pairs = [scene for scene in scenes if len(scene) == 2]
    alike = sum(first.colour == second.colour and first.shape == second.shape for first, second in pairs)
    assert alike / len(pairs) == pytest.approx(0.3 + 0.7 / 12, abs=0.05)


def follow(scene: Scene, instruction: str) -> Scene:
    """The edited scene, from the words of the instruction alone."""
    if found := re.fullmatch(r"add (a .*)", instruction):
        return in_reading_order([*scene, *parse_caption(found[1])])
    found = re.fullmatch(r"(?:make|remove) the (\w+) (\w+)(?: (\w+))?", instruction)
    assert found is not None, instruction
    (named,) = (item for item in scene if (item.colour, item.shape) == (found[1], found[2]))
    rest = [item for item in scene if item != named]
    return in_reading_order([*rest, Shape(found[2], found[3], named.position)] if found[3] else rest)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_edits_lead_from_the_source_to_the_target(split: str) -> None:
    triples = edit_triples(300, seed=1, split=split)
    for triple in triples:
        source, target = (parse_caption(picture.captions[0]) for picture in (triple.source, triple.target))
        assert follow(source, triple.instruction) == target
        assert scene_split(source) == scene_split(target) == split
    assert {triple.instruction.split()[0] for triple in triples} == {"make", "remove", "add"}
    assert edit_triples(20, seed=1, split=split) == triples[:20]


def test_edits_leave_the_rest_of_the_picture_as_it_is() -> None:
    for triple in edit_triples(100, seed=2):
        source, target = (parse_caption(picture.captions[0]) for picture in (triple.source, triple.target))
        before, after = (np.asarray(picture.image) for picture in (triple.source, triple.target))
        edited = {item.position for item in set(source) ^ set(target)}
        assert len(edited) == 1
        changed = (before != after).any(-1).reshape(2, 32, 2, 32).any((1, 3)).ravel()
        assert {position for position, differs in zip(POSITIONS, changed, strict=True) if differs} == edited
