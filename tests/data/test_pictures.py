import json
import logging
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from transfusion.data import CaptionedPicture, load_emoji, read_image_folder
from transfusion.data.captions import split_of
from transfusion.data.pictures import ASSETS, EMOJI_FILE


def write_folder(root: Path, rows: list[Any], pictures: tuple[str, ...] = ("a.png", "b.png")) -> Path:
    root.mkdir(exist_ok=True)
    for name in pictures:
        (root / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 6), "red").save(root / name)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


GOOD = {"file_name": "a.png", "text": "a red square"}


def test_embedded_emoji_counts_and_split() -> None:
    train, held_out, everything = (load_emoji(split) for split in ("train", "held_out", "all"))
    assert (len(train), len(held_out), len(everything)) == (1420, 173, 1593)
    assert not {picture.name for picture in train} & {picture.name for picture in held_out}
    assert all(picture.split == split_of(picture.name) for picture in everything)
    assert len({picture.name for picture in everything}) == len({picture.id for picture in everything}) == 1593
    assert len({picture.category for picture in everything}) == 9
    assert {picture.style for picture in everything} == {"fluent"}


def test_embedded_captions_are_clean() -> None:
    for picture in load_emoji("all"):
        assert len(picture.captions) >= 3 and len(set(picture.captions)) == len(picture.captions)
        assert picture.captions[0].endswith(picture.name)
        for caption in picture.captions:
            assert caption == " ".join(caption.split()) and "_" not in caption and "skin tone" not in caption
            assert "flag for" not in caption and "’" not in caption
    captions = Counter(picture.captions[0] for picture in load_emoji("all"))
    assert captions["a red heart"] == 1 and captions.most_common(1)[0][1] == 1


def test_embedded_pictures_are_drawn_on_white() -> None:
    for picture in load_emoji("held_out"):
        image = picture.image
        assert image.mode == "RGB" and image.size == (64, 64)
        pixels = np.asarray(image)
        assert pixels.std() > 2, picture.name
        assert (pixels[0, 0] == 255).all(), picture.name


def test_asset_sizes_and_licences() -> None:
    assert EMOJI_FILE.stat().st_size < 2_000_000
    assert sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()) < 8_000_000
    for licence, words in {
        "fluent-emoji": "Copyright (c) Microsoft Corporation",
        "emojibase": "Copyright (c) 2017-2019 Miles Johnson",
        "wordnet": "WordNet 3.1 Copyright 2011 by Princeton University",
    }.items():
        assert words in (ASSETS / f"LICENSE-{licence}.txt").read_text(encoding="utf-8")
    with zipfile.ZipFile(EMOJI_FILE) as archive:
        assert all(name.endswith(".webp") or name == "metadata.jsonl" for name in archive.namelist())


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'test'.*train, held_out, all"):
        load_emoji("test")


def test_embedded_zip_is_an_image_folder(tmp_path: Path) -> None:
    with zipfile.ZipFile(EMOJI_FILE) as archive:
        archive.extractall(tmp_path)
    pictures, report = read_image_folder(tmp_path, split="held_out", strict=True)
    embedded = load_emoji("held_out")
    assert report.num_pictures == len(pictures) == len(embedded) and not report.faults
    assert [picture.captions for picture in pictures] == [picture.captions for picture in embedded]
    assert pictures[7].image.tobytes() == embedded[7].image.tobytes()


@pytest.mark.parametrize("column", ["text", "caption", "captions"])
def test_caption_columns(tmp_path: Path, column: str) -> None:
    value = [" one ", "", "two"] if column == "captions" else " one "
    pictures, report = read_image_folder(write_folder(tmp_path, [{"file_name": "a.png", column: value}], ("a.png",)))
    assert pictures[0].captions == (("one", "two") if column == "captions" else ("one",))
    assert pictures[0].name == "one" and not report.faults


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"file_name": "../secret.png", "text": "x"}, "leaves the folder"),
        ({"file_name": "sub/../../secret.png", "text": "x"}, "leaves the folder"),
        ({"file_name": "link.png", "text": "x"}, "leaves the folder"),
        ({"file_name": "linked/secret.png", "text": "x"}, "leaves the folder"),
        ({"file_name": "a\0.png", "text": "x"}, "leaves the folder"),
        ({"file_name": "missing.png", "text": "x"}, "no such file"),
        ({"file_name": "sub", "text": "x"}, "no such file"),
        ({"file_name": "cut.png", "text": "x"}, "cannot be decoded"),
        ({"file_name": "words.png", "text": "x"}, "cannot be decoded"),
        ({"file_name": "b.png", "text": "  "}, "no caption"),
        ({"file_name": "b.png", "captions": ["", 3]}, "no caption"),
        ({"file_name": "b.png", "text": 7}, "no caption"),
        ({"file_name": "b.png"}, "no caption"),
        ({"text": "x"}, "no file_name"),
        ({"file_name": 3, "text": "x"}, "no file_name"),
        ([1, 2], "a list, not an object"),
        ('{"file_name": "b.png", "text": "x"', "not JSON"),
    ],
)
def test_faults_are_reported_and_the_rest_is_read(
    tmp_path: Path, row: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (8, 6)).save(tmp_path / "secret.png")
    root = write_folder(tmp_path / "set", [GOOD, row], ("a.png",))
    (root / "sub").mkdir()
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "linked").symlink_to(tmp_path)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "whole.png")
    (root / "cut.png").write_bytes((root / "whole.png").read_bytes()[:2000])
    (root / "words.png").write_text("no picture")
    with caplog.at_level(logging.WARNING):
        pictures, report = read_image_folder(root)
    assert [picture.id for picture in pictures] == ["a.png"]
    found = [fault for fault in report.faults if reason in fault.reason]
    assert len(found) == 1, report
    assert str(root) in found[0].where
    assert str(report) in caplog.text and f"{len(report.faults)} faults" in caplog.text
    with pytest.raises(ValueError, match=reason):
        read_image_folder(root, strict=True)


def test_absolute_file_names_are_refused_even_inside_the_folder(tmp_path: Path) -> None:
    root = write_folder(tmp_path, [GOOD])
    (root / "metadata.jsonl").write_text(
        json.dumps(GOOD) + "\n" + json.dumps({"file_name": str(root / "b.png"), "text": "x"}), encoding="utf-8"
    )
    assert [fault.reason for fault in read_image_folder(root)[1].faults][0].endswith("leaves the folder")


def test_pictures_without_a_row_are_reported(tmp_path: Path) -> None:
    report = read_image_folder(write_folder(tmp_path, [GOOD]))[1]
    (fault,) = report.faults
    assert (Path(fault.where).name, fault.reason) == ("b.png", "no row in metadata.jsonl")


def test_report_of_many_faults_is_short(tmp_path: Path) -> None:
    rows = [GOOD, *({"file_name": f"{number}.png", "text": "x"} for number in range(500))]
    report = read_image_folder(write_folder(tmp_path, rows, ("a.png",)))[1]
    assert len(report.faults) == 500 and len(str(report).splitlines()) == 22 and "480 more" in str(report)


EDIT = {"file_name": "after.png", "text": "make it blue", "source_file_name": "before.png"}


def test_edits_are_read_with_their_originals(tmp_path: Path) -> None:
    rows = [GOOD, EDIT | {"split": "train"}, {**EDIT, "file_name": "b.png", "source_file_name": "a.png"}]
    root = write_folder(tmp_path, rows, ("a.png", "b.png", "after.png", "before.png"))
    Image.new("RGB", (8, 6), "blue").save(root / "after.png")
    plain, edit, other = read_image_folder(root, strict=True)[0]  # the original needs no row of its own
    assert plain.original is None and other.original is not None and other.original.id == "a.png"
    assert edit.original is not None and (edit.id, edit.captions) == ("after.png", ("make it blue",))
    assert (edit.original.id, edit.original.captions, edit.original.split) == ("before.png", (), "train")
    assert edit.image.getpixel((0, 0)) == (0, 0, 255) and edit.original.image.getpixel((0, 0)) == (255, 0, 0)
    assert edit.original.source == (root / "before.png").resolve()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("../secret.png", "source_file_name '../secret.png' leaves the folder"),
        ("link.png", "leaves the folder"),
        ("missing.png", "no such file"),
        ("words.png", "cannot be decoded"),
        (3, "no source_file_name"),
        ("", "no source_file_name"),
    ],
)
def test_edits_whose_original_has_a_fault_are_left_out(tmp_path: Path, source: Any, reason: str) -> None:
    Image.new("RGB", (8, 6)).save(tmp_path / "secret.png")
    root = write_folder(tmp_path / "set", [GOOD, EDIT | {"source_file_name": source}], ("a.png", "after.png"))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "words.png").write_text("no picture")
    pictures, report = read_image_folder(root)
    assert [picture.id for picture in pictures] == ["a.png"]
    found = [fault for fault in report.faults if reason in fault.reason]
    assert len(found) == 1 and str(root) in found[0].where, report


def test_splits(tmp_path: Path) -> None:
    root = write_folder(tmp_path, [GOOD | {"split": "train"}, {"file_name": "b.png", "text": "x", "split": "test"}])
    assert [picture.id for picture in read_image_folder(root, split="test")[0]] == ["b.png"]
    assert len(read_image_folder(root)[0]) == 2
    with pytest.raises(ValueError, match="'held_out'; they have test, train"):
        read_image_folder(root, split="held_out")


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no metadata\.jsonl"):
        read_image_folder(tmp_path)
    with pytest.raises(ValueError, match="0 usable pictures, 1 faults"):
        read_image_folder(write_folder(tmp_path, [{"file_name": "a.png"}], ("a.png",)))


@pytest.mark.parametrize("path", [None, 5, ["a"]])
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(ValueError, match="the folder is .*; give the path"):
        read_image_folder(path)


def test_a_missing_folder_is_told_from_one_without_metadata(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is no folder; give one"):
        read_image_folder(tmp_path / "nowhere")
    (tmp_path / "metadata.jsonl").touch()
    for match in ("0 usable pictures, 0 faults", r'Write a line for each picture: \{"file_name": '):
        with pytest.raises(ValueError, match=match):
            read_image_folder(tmp_path)


def test_a_row_without_a_file_name_is_shown(tmp_path: Path) -> None:
    (fault,) = read_image_folder(write_folder(tmp_path, [GOOD, {"filename": "a.png", "text": "x"}], ("a.png",)))[
        1
    ].faults
    assert fault.reason == "no file_name in {'filename': 'a.png', 'text': 'x'}"


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, name: str) -> None:
    levels = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(levels).save(tmp_path / name)
    (picture,), _ = read_image_folder(write_folder(tmp_path, [{"file_name": name, "text": "grey"}], ()), strict=True)
    assert np.abs(np.asarray(picture.image)[..., 0] - levels / 257.0).max() < 1


def test_transparent_pictures_are_put_on_white_and_turned_upright(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    palette = Image.new("P", (4, 2))
    palette.info["transparency"] = 0
    palette.save(tmp_path / "palette.png", transparency=0)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2), "red").save(tmp_path / "turned.png", exif=exif)
    read = {
        name: CaptionedPicture(name, name, (name,), "", "", "", tmp_path / name).image
        for name in ("clear.png", "palette.png", "turned.png")
    }
    assert read["clear.png"].getcolors() == read["palette.png"].getcolors() == [(8, (255, 255, 255))]
    assert read["turned.png"].size == (2, 4)


def test_only_formats_of_the_list_and_pictures_that_are_not_huge_are_decoded(tmp_path: Path) -> None:
    rows = [{"file_name": f"{name}.png", "text": "x"} for name in "abcd"]
    root = write_folder(tmp_path, rows, ("a.png",))
    Image.new("RGB", (8, 8)).save(root / "b.png", "PPM")
    Image.new("RGB", (8, 8)).save(root / "c.png", "EPS")
    Image.new("1", (8000, 7000)).save(root / "d.png", "PNG")
    pictures, report = read_image_folder(root)
    assert [picture.id for picture in pictures] == ["a.png"] and len(report.faults) == 3
    assert "8000 x 7000 pixels; 50000000 are allowed" in report.faults[2].reason
