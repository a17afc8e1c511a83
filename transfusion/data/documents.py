"""Documents: ordered parts of text and pictures, and how records of any source become documents.

A record is a mapping from columns to values. A picture in it is bytes, `{"bytes": ..., "path": ...}`, a file name, or
anything with a `read` that returns bytes.
"""

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..image_processing import PICTURE_FORMATS
from .pictures import file_inside


PICTURE_COLUMNS = ("image", "file_name", "jpg", "jpeg", "png", "webp")
SOURCE_COLUMNS = ("source_image", "source_file_name", "source.jpg", "source.jpeg", "source.png", "source.webp")
CAPTION_COLUMNS = ("captions", "text", "caption", "txt")
PARTS_COLUMNS = ("parts",)
PART_COLUMNS = ("image", "file_name")
CONTENTS = ("documents", "edits", "pairs", "texts")

Record = Mapping[str, Any]


class OutsideError(ValueError):
    """A picture is named that lies where nothing is read from."""


@dataclass(frozen=True)
class Picture:
    """An encoded picture and its name. `source` is bytes, a path, or what has a `read`."""

    name: str
    source: Any = field(repr=False)

    def read(self) -> bytes:
        """The encoded picture."""
        if isinstance(self.source, bytes):
            return self.source
        return self.source.read_bytes() if isinstance(self.source, Path) else self.source.read()


@dataclass(frozen=True)
class Text:
    """A text in one phrasing or several, of which training chooses one each time."""

    phrasings: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """Texts and pictures in order.

    Attributes:
        id: Where it comes from, for messages.
        parts: In order.
        is_pair: Whether the first of two parts may come second.
        num_context: How many leading parts are given and not learned; a picture follows them.
    """

    id: str
    parts: tuple[Text | Picture, ...]
    is_pair: bool = False
    num_context: int = 0

    @property
    def pictures(self) -> list[Picture]:
        """The pictures in order."""
        return [part for part in self.parts if isinstance(part, Picture)]


def caption_pair(id: str, picture: Picture, captions: Sequence[str]) -> Document:
    """A picture and its caption, either of which may come first."""
    return Document(id, (Text(tuple(captions)), picture), is_pair=True)


def edit_triple(id: str, original: Picture, instructions: Sequence[str], result: Picture) -> Document:
    """A picture, how it is to be changed, and the result, which alone is learned."""
    return Document(id, (original, Text(tuple(instructions)), result), num_context=2)


def text_only(id: str, text: str) -> Document:
    """A text without pictures."""
    return Document(id, (Text((text,)),))


@dataclass(frozen=True)
class Columns:
    """Which columns of a record hold what; None takes the usual names that are there.

    Attributes:
        content: `"documents"`, `"edits"`, `"pairs"` or `"texts"`; None: the first of them that the columns allow.
        picture: Of pairs the picture, of edits the result.
        original: The picture that an edit changes. Where it is empty the record is a pair.
        caption: A string or a list of phrasings; of edits the instruction.
        parts: A list of `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`.
    """

    content: str | None = None
    picture: str | None = None
    original: str | None = None
    caption: str | None = None
    parts: str | None = None

    @property
    def of_pictures(self) -> list[str]:
        """Columns that may hold a picture: the given ones, and those of the usual names."""
        return [name for name in (self.picture, self.original, *PICTURE_COLUMNS, *SOURCE_COLUMNS) if name is not None]

    @property
    def of_parts(self) -> list[str]:
        """Likewise for lists of parts."""
        return [name for name in (self.parts, *PARTS_COLUMNS) if name is not None]

    def resolve(self, available: Iterable[str], where: object) -> "Layout":
        """The columns of a source that has the `available` ones.

        Raises:
            ValueError: A column that is not there, a content that is none, or one whose columns are missing.
        """
        names = list(available)
        if self.content not in (None, *CONTENTS):
            raise ValueError(f"content is {self.content!r}; allowed: {', '.join(CONTENTS)}, or leave it out.")
        usual = {
            "parts": PARTS_COLUMNS,
            "original": SOURCE_COLUMNS,
            "picture": PICTURE_COLUMNS,
            "caption": CAPTION_COLUMNS,
        }
        found: dict[str, tuple[str, ...]] = {}
        for role, candidates in usual.items():
            given = getattr(self, role)
            if given is not None and given not in names:
                raise ValueError(f"{role} is the column {given!r}, and {where} has {', '.join(sorted(names))}.")
            wanted = candidates if given is None else (given,)
            found[role] = tuple(name for name in wanted if name in names)
        needs = {
            "documents": ("parts",),
            "edits": ("picture", "original", "caption"),
            "pairs": ("picture", "caption"),
            "texts": ("caption",),
        }
        possible = [content for content in CONTENTS if all(found[role] for role in needs[content])]
        if not possible or self.content not in (None, *possible):
            wanted_roles = " and ".join(needs[self.content or "pairs"])
            raise ValueError(
                f"{where} has the columns {', '.join(sorted(names))}; name those of {wanted_roles} (in the source's "
                f"settings), as none is called {', '.join(name for role in usual for name in usual[role])}."
            )
        return Layout(self.content or possible[0], **found)


@dataclass(frozen=True)
class Layout:
    """Columns that a source has, and what its records become; of several columns the first that is filled counts."""

    content: str
    parts: tuple[str, ...]
    original: tuple[str, ...]
    picture: tuple[str, ...]
    caption: tuple[str, ...]

    def document(self, record: Record, id: str, root: Path | None) -> Document:
        """The document of a record.

        Args:
            record: Its values.
            id: Where it comes from.
            root: The folder that file names must lie in; None: there are no files.

        Raises:
            ValueError: What is missing or cannot be used.
        """
        if self.content == "documents":
            return _interleaved(id, _first(record, self.parts), record, root)
        captions = phrasings(_first(record, self.caption))
        if not captions:
            raise ValueError(f"no text in {' or '.join(self.caption)}: a string, or a list of them")
        if self.content == "texts":
            return Document(id, (Text(captions),))
        result = find_picture(_first(record, self.picture), record, root, id)
        if self.content == "edits" and (original := _first(record, self.original)) is not None:
            return edit_triple(id, find_picture(original, record, root, id), captions, result)
        return caption_pair(id, result, captions)


def phrasings(value: Any) -> tuple[str, ...]:
    """The texts of a string or a list of strings, stripped, without empty ones; none where it is neither."""
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list):
        return ()
    return tuple(text.strip() for text in listed if isinstance(text, str) and text.strip())


def find_picture(value: Any, record: Record, root: Path | None, id: str) -> Picture:
    """The picture that a value of a record stands for; a name may be that of another column (of a tar's member).

    Raises:
        ValueError: No picture, or a file that is missing.
        OutsideError: A URL, or a file that is not below the root.
    """
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return Picture(id, value)
    if hasattr(value, "read"):
        return Picture(str(getattr(value, "name", id)), value)
    if not isinstance(value, str) or not value:
        raise ValueError(f"no picture: {str(value)[:100]!r}")
    if hasattr(record.get(value), "read"):
        return Picture(f"{id}: {value}", record[value])
    if "://" in value:
        raise OutsideError(f"{value[:200]!r} is a URL; nothing is fetched")
    if root is None:
        raise OutsideError(f"{value[:200]!r} names a file; a source of this kind must hold the bytes of its pictures")
    # `datasets` gives absolute paths.
    inner = os.path.relpath(value, root) if Path(value).is_relative_to(root) else value
    file = file_inside(root, inner)
    if file is None:
        raise OutsideError(f"{value[:200]!r} leaves the folder (links are followed)")
    if not os.path.isfile(file):  # unlike Path.is_file, also where the name is longer than any file's may be
        raise ValueError(f"{value[:200]!r}: no such file")
    return Picture(str(file), file)


def picture_size(encoded: bytes, max_image_pixels: int) -> tuple[int, int]:
    """Height and width of an encoded picture once it stands upright, from its header alone.

    Raises:
        ValueError: No picture of an allowed format, or one with too many pixels.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=PICTURE_FORMATS)
    except Exception as error:  # Pillow's plugins raise what they like on broken files
        raise ValueError(f"cannot be opened as {', '.join(PICTURE_FORMATS)}: {error}") from error
    with image:
        width, height = image.size
        if not 0 < width * height <= max_image_pixels:
            raise ValueError(f"{width} x {height} pixels; between 1 and {max_image_pixels} in all are allowed")
        try:
            orientation = image.getexif().get(_ORIENTATION, 1)
        except Exception as error:
            raise ValueError(f"cannot be read: {error}") from error
    return (width, height) if orientation in _TURNED else (height, width)


_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)


def _first(record: Record, columns: Sequence[str]) -> Any:
    """The first value that is not empty."""
    return next((record[name] for name in columns if record.get(name) not in (None, "", [])), None)


def _interleaved(id: str, parts: Any, record: Record, root: Path | None) -> Document:
    if not isinstance(parts, Sequence) or isinstance(parts, str | bytes) or not parts:
        raise ValueError("no parts: a list of texts and images")
    found: list[Text | Picture] = []
    for number, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and (texts := phrasings(part.get("text"))):
            found.append(Text(texts))
        elif kind == "image":
            value = _first(part, PART_COLUMNS)
            found.append(find_picture(value, record, root, f"{id}, part {number}"))
        else:
            shown = str(part)[:100]
            raise ValueError(f'part {number} is {shown}; write {{"type": "text", "text": ...}} or {{"type": "image"}}')
    return Document(id, tuple(found))


__all__ = [
    "CONTENTS",
    "Columns",
    "Document",
    "Layout",
    "OutsideError",
    "Picture",
    "Record",
    "Text",
    "caption_pair",
    "edit_triple",
    "find_picture",
    "phrasings",
    "picture_size",
    "text_only",
]
