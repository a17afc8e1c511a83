"""A world of coloured shapes: scenes drawn, captioned and edited by rule, so that every answer can be checked exactly.

A picture has 2 x 2 cells; one to three of them hold a flat circle, square or triangle. `transfusion.evaluation.shapes`
reads scenes back from pictures.
"""

import hashlib
import io
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from PIL import Image, ImageDraw

from .pictures import CaptionedPicture


SHAPES = ("circle", "square", "triangle")
COLOURS = {"red": (220, 30, 40), "green": (30, 160, 70), "blue": (30, 80, 220), "yellow": (250, 200, 20)}
POSITIONS = ("top left", "top right", "bottom left", "bottom right")
MAX_OBJECTS = 3
SPLITS = ("train", "held_out")

# Pixels of a picture of side SIDE.
SIDE = 64
CELL = SIDE // 2
OBJECT = 24
JITTER = 2

_SUPERSAMPLING = 8
_NUMBERS = ("a", "two", "three", "four")
_REPEATS = 0.3  # share of the further objects that look like the first: counts above one are rare otherwise
_HELD_OUT_ONE_IN = 5
_POSITION = f"(?:{'|'.join(POSITIONS)})"
_GROUP = re.compile(
    f"({'|'.join(_NUMBERS)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(s?) ({_POSITION}(?: and {_POSITION})*)"
)


@dataclass(frozen=True)
class Shape:
    """One object of a scene.

    Attributes:
        shape: one of SHAPES; None where a drawing shows something else.
        colour: one of COLOURS.
        position: one of POSITIONS.
    """

    shape: str | None
    colour: str
    position: str

    def __post_init__(self) -> None:
        if self.shape not in (*SHAPES, None) or self.colour not in COLOURS or self.position not in POSITIONS:
            raise ValueError(f"{self} is not of this world: {SHAPES}, {tuple(COLOURS)}, {POSITIONS}")


Scene = tuple[Shape, ...]
"""Objects in reading order (that of POSITIONS), each in its own cell."""


@dataclass(frozen=True)
class EditTriple:
    """A picture, an instruction, and the picture that it asks for. What is not edited stays where it was."""

    source: CaptionedPicture
    instruction: str
    target: CaptionedPicture


def render(scene: Scene, jitter_seed: int | None = None, size: int = SIDE) -> Image.Image:
    """The picture of a scene: RGB, (size, size), on white.

    Args:
        scene: at most one object in a cell, every one with a known shape.
        jitter_seed: draws one offset for each cell, at most JITTER pixels of 64 each way; None: objects are centred.
        size: side in pixels, a multiple of 16.

    Raises:
        ValueError: for another size, or a scene that cannot be drawn.
    """
    _check(scene)
    if size <= 0 or size % 16:
        raise ValueError(f"size is {size}; give a multiple of 16, such as {SIDE}")
    picture = Image.new("RGB", (size, size), "white")
    offsets = _offsets(jitter_seed)
    for item in scene:
        cell = POSITIONS.index(item.position)
        corner = (CELL * (cell % 2), CELL * (cell // 2))
        inset = (CELL - OBJECT) // 2
        left, top = (round((corner[axis] + inset + offsets[cell][axis]) * size / SIDE) for axis in (0, 1))
        picture.paste(COLOURS[item.colour], (left, top), silhouette(str(item.shape), OBJECT * size // SIDE))
    return picture


def _offsets(jitter_seed: int | None) -> list[tuple[int, int]]:
    """Pixels to the right and down for each cell."""
    if jitter_seed is None:
        return [(0, 0)] * len(POSITIONS)
    chooser = random.Random(jitter_seed)
    return [(chooser.randint(-JITTER, JITTER), chooser.randint(-JITTER, JITTER)) for _ in POSITIONS]


@cache
def silhouette(shape: str, side: int = OBJECT) -> Image.Image:
    """Coverage of the pixels of a (side, side) square by a shape that touches its edges: 8-bit grey, antialiased."""
    wide = side * _SUPERSAMPLING
    mask = Image.new("L", (wide, wide))
    pen = ImageDraw.Draw(mask)
    end = wide - 1
    if shape == "circle":
        pen.ellipse((0, 0, end, end), fill=255)
    elif shape == "square":
        pen.rectangle((0, 0, end, end), fill=255)
    else:
        pen.polygon([(end / 2, 0), (end, end), (0, end)], fill=255)
    return mask.reduce(_SUPERSAMPLING)


def _check(scene: Scene) -> None:
    places = [POSITIONS.index(item.position) for item in scene]
    if places != sorted(set(places)) or any(item.shape is None for item in scene):
        raise ValueError(f"{scene} needs known shapes, one in a cell, in the order {', '.join(POSITIONS)}")


def caption(scene: Scene, chooser: random.Random | None = None) -> str:
    """What a scene shows: "two blue squares top left and bottom right, a green triangle bottom left".

    Objects that look alike are named together. No two scenes have the same caption.

    Args:
        scene: at least one object.
        chooser: shuffles groups and positions; without it they stand in reading order, the canonical caption.

    Raises:
        ValueError: for a scene without objects or that cannot be drawn.
    """
    _check(scene)
    if not scene:
        raise ValueError("the scene is empty; captions name at least one object")
    groups: dict[str, list[str]] = {}
    for item in scene:
        groups.setdefault(f"{item.colour} {item.shape}", []).append(item.position)
    order = list(groups)
    if chooser is not None:
        chooser.shuffle(order)
        for positions in groups.values():
            chooser.shuffle(positions)
    return ", ".join(
        f"{_NUMBERS[len(groups[kind]) - 1]} {kind}{'s'[: len(groups[kind]) - 1]} {' and '.join(groups[kind])}"
        for kind in order
    )


def parse_caption(text: str) -> Scene:
    """The scene that a caption names, `caption`'s inverse; groups and positions may stand in any order.

    Raises:
        ValueError: for anything else: other words or spaces, a number that does not fit its positions, a cell with two
            objects.
    """
    found: list[Shape] = []
    for part in text.split(", "):
        group = _GROUP.fullmatch(part)
        positions = group[5].split(" and ") if group else []
        if group is None or len(positions) != _NUMBERS.index(group[1]) + 1 or bool(group[4]) != (len(positions) > 1):
            raise ValueError(f'{part!r} is not "a red circle top left" or "two red circles top left and top right"')
        found += [Shape(group[3], group[2], position) for position in positions]
    scene = in_reading_order(found)
    if len({item.position for item in scene}) < len(scene):
        raise ValueError(f"{text!r} puts two objects into one cell")
    return scene


def in_reading_order(objects: list[Shape]) -> Scene:
    """The objects as a scene, sorted by cell."""
    return tuple(sorted(objects, key=lambda item: POSITIONS.index(item.position)))


def scene_split(scene: Scene) -> str:
    """ "train" or "held_out" (a fifth of the scenes with several objects, by a hash), whatever the jitter."""
    if len(scene) < 2:
        return "train"
    return (
        "held_out"
        if int(hashlib.sha256(caption(scene).encode()).hexdigest()[:8], 16) % _HELD_OUT_ONE_IN == 0
        else "train"
    )


def sample_scenes(num: int, seed: int, split: str = "train") -> list[Scene]:
    """Random scenes; the first of a longer list are those of a shorter one.

    One, two and three objects are equally frequent in "train", two and three in "held_out".

    Raises:
        ValueError: for another split.
    """
    scenes = _scenes(random.Random(f"scenes {split} {seed}"), split)
    return [next(scenes) for _ in range(num)]


def _scenes(chooser: random.Random, split: str) -> Iterator[Scene]:
    """Endless random scenes of a split."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; the shapes have {', '.join(SPLITS)}")
    while True:
        num_objects = chooser.randint(1 if split == "train" else 2, MAX_OBJECTS)
        while scene_split(scene := _random_scene(chooser, num_objects)) != split:
            pass
        yield scene


def _random_scene(chooser: random.Random, num_objects: int) -> Scene:
    kinds: list[tuple[str, str]] = []
    for _ in range(num_objects):
        repeated = bool(kinds) and chooser.random() < _REPEATS
        kinds.append(kinds[0] if repeated else (chooser.choice(SHAPES), chooser.choice(list(COLOURS))))
    positions = chooser.sample(POSITIONS, num_objects)
    return in_reading_order([Shape(*kind, position) for kind, position in zip(kinds, positions, strict=True)])


def shapes_world(num: int, seed: int = 0, split: str = "train") -> list[CaptionedPicture]:
    """Captioned pictures of random scenes with jitter; `parse_caption(picture.captions[0])` is a picture's scene.

    Args:
        num: how many; the first of a longer list are those of a shorter one.
        seed: equal seeds give equal pictures.
        split: "train", or "held_out": scenes that no training picture shows, whatever the seed.

    Raises:
        ValueError: for another split.
    """
    return [
        _picture(scene, jitter_seed=seed * 1_000_003 + index, id=f"{split}-{seed}-{index:06d}.png", split=split)
        for index, scene in enumerate(sample_scenes(num, seed, split))
    ]


def _picture(scene: Scene, jitter_seed: int, id: str, split: str) -> CaptionedPicture:
    encoded = io.BytesIO()
    render(scene, jitter_seed).save(encoded, "PNG", compress_level=1)
    text = caption(scene)
    return CaptionedPicture(id, text, (text,), "shapes", "", split, encoded.getvalue())


def edit_triples(num: int, seed: int = 0, split: str = "train") -> list[EditTriple]:
    """Random edits: "make the red circle blue", "remove the green square", "add a yellow triangle bottom left".

    An instruction names an object that no other of the scene looks like. Source and target are scenes of the split.

    Raises:
        ValueError: for another split.
    """
    chooser = random.Random(f"edits {split} {seed}")
    scenes = _scenes(chooser, split)
    triples: list[EditTriple] = []
    while len(triples) < num:
        scene = next(scenes)
        instruction, target = chooser.choice(list(_edits(scene, chooser)) or [("", scene)])
        if target == scene or scene_split(target) != split:
            continue
        jitter_seed = chooser.getrandbits(32)
        id = f"edit-{split}-{seed}-{len(triples):06d}"
        source, wanted = (
            _picture(shown, jitter_seed, f"{id}-{role}.png", split)
            for shown, role in ((scene, "source"), (target, "target"))
        )
        triples.append(EditTriple(source, instruction, wanted))
    return triples


def _edits(scene: Scene, chooser: random.Random) -> Iterator[tuple[str, Scene]]:
    """At most one edit of each kind that the scene allows: the instruction and what it leads to."""
    kinds = [(item.shape, item.colour) for item in scene]
    named = [item for item, kind in zip(scene, kinds, strict=True) if kinds.count(kind) == 1]
    if named:
        item = chooser.choice(named)
        colour = chooser.choice([other for other in COLOURS if other != item.colour])
        painted = [replace(other, colour=colour) if other == item else other for other in scene]
        yield f"make the {item.colour} {item.shape} {colour}", tuple(painted)
    if named and len(scene) > 1:
        item = chooser.choice(named)
        yield f"remove the {item.colour} {item.shape}", tuple(other for other in scene if other != item)
    if len(scene) < MAX_OBJECTS:
        free = [position for position in POSITIONS if position not in {item.position for item in scene}]
        item = Shape(chooser.choice(SHAPES), chooser.choice(list(COLOURS)), chooser.choice(free))
        yield f"add {caption((item,))}", in_reading_order([*scene, item])


__all__ = [
    "CELL",
    "COLOURS",
    "JITTER",
    "MAX_OBJECTS",
    "OBJECT",
    "POSITIONS",
    "SHAPES",
    "SIDE",
    "EditTriple",
    "Scene",
    "Shape",
    "caption",
    "edit_triples",
    "in_reading_order",
    "parse_caption",
    "render",
    "sample_scenes",
    "scene_split",
    "shapes_world",
    "silhouette",
]
