import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transfusion.data import read_image_folder
from transfusion.data.emoji_builder import (
    EmojiNames,
    EmojiStyle,
    build_rows,
    clean_icon_name,
    file_stem,
    is_skin_tone_variant,
    read_set,
    write_image_folder,
)
from transfusion.data.packages import EMOJIBASE, package_folder


STYLE = EmojiStyle("tiny", "@set/tiny@1.0.0", "MIT")


@pytest.mark.parametrize(
    ("icon", "variant"),
    [
        ("hand-dark", True), ("hand-medium-light", True), ("hand-dark-skin-tone", True), ("elf-tone3", True),
        ("police-car-light", False), ("light-blue-heart", False), ("hand", False),
    ],
)  # fmt: skip
def test_skin_tone_variants(icon: str, variant: bool) -> None:
    assert is_skin_tone_variant(icon, {"hand": {}, "police-car-light": {}}) is variant


@pytest.mark.parametrize(
    ("icon", "name"),
    [
        ("flag-for-flag-niue", "flag-niue"), ("flag-for-niue", "flag-niue"), ("computer-mouse2", "computer-mouse"),
        ("flag-curaao", "flag-curacao"), ("keycap-10", "keycap-10"), ("hal-9000", "hal-9000"), ("a_b", "a-b"),
    ],
)  # fmt: skip
def test_dirty_names_are_cleaned(icon: str, name: str) -> None:
    assert clean_icon_name(icon) == name


def test_icons_are_joined_by_code_name_and_alias(packages: Path) -> None:
    names = EmojiNames(packages / package_folder(EMOJIBASE))
    drawings = {drawing.entry.name: drawing for drawing in read_set(packages / package_folder(STYLE.package), names)}
    assert sorted(drawings) == [
        "axe", "bear", "flag of Niue", "hand pointing left", "hand pointing right", "police car light", "red heart"
    ]  # fmt: skip
    assert drawings["red heart"].entry.tags == ("love", "red")
    assert drawings["bear"].entry.category == "animals & nature"
    assert drawings["police car light"].entry.category == "travel & places"
    assert drawings["axe"].entry.category == "extras"
    assert "#ff0000" in drawings["axe"].svg, "the hidden icon of the same name was taken"
    assert drawings["hand pointing right"].mirrored and not drawings["hand pointing left"].mirrored


def test_set_is_drawn_on_white_as_an_image_folder(packages: Path, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    assert write_image_folder(build_rows(packages, (STYLE,), 16), tmp_path / "out") == 7
    pictures, report = read_image_folder(tmp_path / "out", strict=True)
    assert not report.faults
    images = {picture.name: np.asarray(picture.image) for picture in pictures}
    left_half_red = np.full((16, 16, 3), 255)
    left_half_red[:, :8, 1:] = 0
    np.testing.assert_array_equal(images["hand pointing left"], left_half_red)
    np.testing.assert_array_equal(images["hand pointing right"], left_half_red[:, ::-1])
    assert (images["flag of Niue"] == 255).all()
    assert pictures[-1].captions[0] == "a red heart" and pictures[-1].style == "tiny"


def test_same_rows_make_the_same_zip(packages: Path, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    files = [tmp_path / "one.zip", tmp_path / "sub" / "two.zip"]
    for file in files:
        write_image_folder(build_rows(packages, (STYLE, replace(STYLE, name="other")), 16), file)
    assert files[0].read_bytes() == files[1].read_bytes()
    with zipfile.ZipFile(files[0]) as archive:
        rows = [json.loads(line) for line in archive.read("metadata.jsonl").decode().splitlines()]
        with Image.open(io.BytesIO(archive.read(rows[0]["file_name"]))) as image:
            assert image.size == (16, 16)
    assert rows[0]["captions"][-1] == "an axe, tiny style" and rows[0]["license"] == "MIT"


def test_names_without_letters_get_a_file_name() -> None:
    assert file_stem("✓") == "2713" and file_stem("red heart") == "red-heart"
