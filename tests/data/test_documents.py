import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.data.tiny_sources import png
from transfusion.data.documents import (
    Columns,
    Document,
    OutsideError,
    Picture,
    Text,
    caption_pair,
    edit_triple,
    find_picture,
    phrasings,
    picture_size,
    text_only,
)


ONE, TWO = png(1), png(2)


def made(record: dict[str, Any], root: Path | None = None, **columns: Any) -> Document:
    return Columns(**columns).resolve(record, "a source").document(record, "here", root)


def test_records_become_documents() -> None:
    pair = made({"image": ONE, "text": " a cat "})
    assert pair == caption_pair("here", Picture("here", ONE), ["a cat"])
    assert pair.is_pair and pair.pictures[0].read() == ONE
    edit = made({"image": TWO, "source_image": ONE, "captions": ["redden", "make it red"]})
    assert edit == edit_triple("here", Picture("here", ONE), ["redden", "make it red"], Picture("here", TWO))
    assert edit.num_context == 2 and [picture.read() for picture in edit.pictures] == [ONE, TWO]
    assert made({"text": "a story"}) == text_only("here", "a story")
    parts = [{"type": "image", "image": ONE}, {"type": "text", "text": "then"}, {"type": "image", "image": TWO}]
    document = made({"parts": parts, "text": "not read"})
    assert [type(part) for part in document.parts] == [Picture, Text, Picture] and not document.is_pair


def test_columns_can_be_named_and_content_chosen() -> None:
    record = {"jpg_0": ONE, "label": "a cat", "text": "x", "png": TWO, "before": ONE}
    assert made(record, picture="jpg_0", caption="label") == caption_pair("here", Picture("here", ONE), ["a cat"])
    assert made(record, content="texts").parts == (Text(("x",)),)
    assert made(record, original="before").num_context == 2
    assert made({**record, "before": None}, original="before").is_pair


def test_the_first_column_that_is_filled_counts() -> None:
    record = {"image": ONE, "text": "", "caption": "a cat", "captions": None}
    assert made(record).parts[0] == Text(("a cat",))


@pytest.mark.parametrize(
    ("columns", "record", "message"),
    [
        (
            {"caption": "titel"},
            {"title": "x", "image": ONE},
            "caption is the column 'titel', and a source has image, ti",
        ),
        ({}, {"picture": ONE, "title": "x"}, "has the columns picture, title; name those of picture and caption"),
        ({"content": "edits"}, {"image": ONE, "text": "x"}, "name those of picture and original and caption"),
        ({"content": "poems"}, {"text": "x"}, "content is 'poems'; allowed: documents, edits, pairs, texts"),
    ],
)
def test_columns_that_are_missing_are_named_with_those_there_are(
    columns: dict[str, Any], record: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        made(record, **columns)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": ONE, "text": "  "}, "no text in text"),
        ({"image": ONE, "text": 7}, "no text in text"),
        ({"image": None, "text": "x"}, "no picture: 'None'"),
        ({"image": {"bytes": None, "path": None}, "text": "x"}, "no picture"),
        ({"image": "https://example.org/a.png", "text": "x"}, "is a URL; nothing is fetched"),
        ({"image": "../a.png", "text": "x"}, "leaves the folder"),
        ({"image": "linked.png", "text": "x"}, "leaves the folder"),
        ({"image": "sub/../../a.png", "text": "x"}, "leaves the folder"),
        ({"image": "a\0.png", "text": "x"}, "leaves the folder"),
        ({"image": {"bytes": None, "path": "../a.png"}, "text": "x"}, "leaves the folder"),
        ({"image": "absent.png", "text": "x"}, "no such file"),
        ({"image": "sub", "text": "x"}, "no such file"),
        ({"parts": "text"}, "no parts"),
        ({"parts": []}, "no parts"),
        ({"parts": [{"type": "text", "text": " "}]}, "part 0 is .*write"),
        ({"parts": [{"type": "text", "text": "x"}, {"type": "audio"}]}, "part 1 is .*audio"),
        ({"parts": ["x"]}, "part 0 is x"),
        ({"parts": [{"type": "image"}]}, "no picture"),
    ],
)
def test_faults_of_records(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "a.png").write_bytes(ONE)
    (root / "linked.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(ValueError, match=message):
        made(record, root)


def test_files_are_read_within_the_root_alone(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(ONE)
    assert find_picture("a.png", {}, tmp_path, "here").read() == ONE
    assert find_picture(str(tmp_path / "a.png"), {}, tmp_path, "here").read() == ONE
    for outside in (tmp_path / "a.png", tmp_path / "root/../a.png"):
        with pytest.raises(OutsideError, match="leaves the folder"):
            find_picture(str(outside), {}, tmp_path / "root", "here")
    with pytest.raises(OutsideError, match="must hold the bytes"):
        find_picture("a.png", {}, None, "here")


def test_phrasings() -> None:
    assert phrasings(" a ") == ("a",)
    assert phrasings(["a", "", " b", 3, None]) == ("a", "b")
    assert phrasings(None) == phrasings({"text": "a"}) == phrasings("") == ()


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_size_is_that_of_the_upright_picture(orientation: int) -> None:
    image, exif = Image.new("RGB", (30, 20)), Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert picture_size(buffer.getvalue(), 600) == ((30, 20) if orientation > 4 else (20, 30))


def test_pictures_that_are_none_or_too_large_are_refused_before_they_are_decoded() -> None:
    with pytest.raises(ValueError, match="cannot be opened as PNG"):
        picture_size(b"words", 64)
    with pytest.raises(ValueError, match="8 x 8 pixels; between 1 and 63"):
        picture_size(ONE, 63)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "BMP")
    with pytest.raises(ValueError, match="cannot be opened as PNG, JPEG, WEBP, GIF"):
        picture_size(buffer.getvalue(), 64)
