"""Captioned pictures: the embedded emoji, and imagefolders with a metadata.jsonl."""

import io
import json
import logging
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, ImageOps

from ..image_processing import DEFAULT_MAX_IMAGE_PIXELS, to_rgb


logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"
EMOJI_FILE = ASSETS / "fluent_emoji_64.zip"
SPLITS = ("train", "held_out", "all")
_PICTURE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
_SHOWN_FAULTS = 20
_EXAMPLE = 'Write a line for each picture: {"file_name": "heart.png", "text": "a red heart"}'


@dataclass(frozen=True)
class CaptionedPicture:
    """One picture and what is said of it. The picture is decoded each time `image` is read.

    Attributes:
        id: the file name in its folder or archive.
        name: what the picture shows; equal to the first caption where the metadata has no name.
        captions: phrasings of the caption, at least one, the plain one first; of an edit, of the instruction.
        category, style, split: columns of the metadata, empty where absent.
        source: the encoded picture, or the path of its file.
        original: of an edit, the picture that was edited, which has no captions.
    """

    id: str
    name: str
    captions: tuple[str, ...]
    category: str
    style: str
    split: str
    source: Path | bytes = field(repr=False)
    original: "CaptionedPicture | None" = None

    @property
    def image(self) -> Image.Image:
        """The picture in RGB, turned upright; transparency is laid over white, and 16-bit grey is scaled.

        Raises:
            ValueError, OSError: No picture, of no format that is read, or one of more than 50 million pixels.
        """
        file = io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source
        with Image.open(file, formats=_FORMATS) as opened:
            if opened.width * opened.height > DEFAULT_MAX_IMAGE_PIXELS:
                raise ValueError(f"{opened.width} x {opened.height} pixels; {DEFAULT_MAX_IMAGE_PIXELS} are allowed")
            return to_rgb(ImageOps.exif_transpose(opened))


@dataclass(frozen=True)
class DataFault:
    """A row or picture that cannot be used: the file (with the line, for rows) and the reason."""

    where: str
    reason: str


@dataclass(frozen=True)
class DataReport:
    """What a reader found: usable pictures, or `what` else, and faults. `str()` gives counts and the first faults.

    Attributes:
        path: What was read.
        num_pictures: How many can be used.
        faults: Of what cannot.
        what: `num_pictures` counts.
        too_long: What was left out because of its length, which is no fault.
        file_faults: How many of the `faults`, the first, are of the whole file.
        file_rows: Rows of that, in all splits.
    """

    path: Path
    num_pictures: int
    faults: tuple[DataFault, ...]
    what: str = "pictures"
    too_long: tuple[DataFault, ...] = ()
    file_faults: int = 0
    file_rows: int = 0

    def __str__(self) -> str:
        longer = f", {len(self.too_long)} too long" if self.too_long else ""
        head = f"{self.path}: {self.num_pictures} usable {self.what}, {len(self.faults)} faults{longer}"
        said = [*self.faults, *self.too_long]
        shown = [f"  {fault.where}: {fault.reason}" for fault in said[:_SHOWN_FAULTS]]
        more = len(said) - len(shown)
        return "\n".join([head, *shown, *([f"  and {more} more"] if more else [])])

    @property
    def faulty_share(self) -> float:
        """Share of faults in what was read; of those of the whole file, the part that falls to this split."""
        own = len(self.faults) - self.file_faults
        read = self.num_pictures + len(self.too_long) + own
        of_file = self.file_faults * read / max(self.file_rows, 1)
        return (own + of_file) / max(read + of_file, 1)


def load_emoji(split: str = "train") -> list[CaptionedPicture]:
    """The embedded Fluent emoji: 64 x 64 pixels, on white, with captions.

    Args:
        split: "train", "held_out" (about a tenth of the names, none of them in "train") or "all".

    Raises:
        ValueError: for another split.
    """
    check_split(split)
    with zipfile.ZipFile(EMOJI_FILE) as archive:
        rows = [json.loads(line) for line in archive.read("metadata.jsonl").decode().splitlines()]
        chosen = [row for row in rows if split in ("all", row["split"])]
        return [_picture(row, tuple(row["captions"]), archive.read(row["file_name"])) for row in chosen]


def check_split(split: str) -> None:
    """Raises ValueError unless the split is one that the embedded data has."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; the embedded data has {', '.join(SPLITS)}")


def read_image_folder(
    path: str | Path, split: str | None = None, strict: bool = False
) -> tuple[list[CaptionedPicture], DataReport]:
    """Reads an imagefolder: pictures and a metadata.jsonl with `file_name` and `text`, `caption` or `captions`.

    A row with `source_file_name` beside them is an edit: its text says how that picture is to be changed, `file_name`
    is the result, and the picture that is read has the other one as its `original`.

    Every picture is decoded once. Rows and pictures with a fault (missing, outside the folder, undecodable, without a
    caption, not in the metadata) are left out, counted and logged as a warning.

    Args:
        path: the folder.
        split: keep only the rows with this value of the column `split`.
        strict: raise instead of leaving faulty rows out.

    Returns:
        The usable pictures in the order of the rows, and the report.

    Raises:
        ValueError: no metadata.jsonl, a split that no row has, no usable picture, or, if `strict`, any fault.
    """
    metadata = find_metadata(path)
    root = metadata.parent
    pictures: list[CaptionedPicture] = []
    faults: list[DataFault] = []
    listed: set[str] = set()
    for where, line in _lines(metadata):
        result = _read_row(line, where, root, listed)
        if isinstance(result, DataFault):
            faults.append(result)
        else:
            pictures.append(result)
    faults += unlisted_pictures(root, listed)
    if split is not None:
        splits = sorted({picture.split for picture in pictures})
        if split not in splits:
            raise ValueError(f"no row of {metadata} has split {split!r}; they have {', '.join(splits) or 'none'}")
        pictures = [picture for picture in pictures if picture.split == split]
    report = DataReport(root, len(pictures), tuple(faults))
    if not pictures:
        raise ValueError(f"{report}\n{_EXAMPLE}")
    if faults and strict:
        raise ValueError(str(report))
    if faults:
        logger.warning("%s", report)
    return pictures, report


def find_metadata(path: str | Path) -> Path:
    """The metadata.jsonl of an imagefolder, with links followed; ValueError where there is none."""
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"the folder is {path!r}; give the path of one with pictures and a metadata.jsonl")
    root = Path(path).resolve()
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; give one with pictures and a metadata.jsonl")
    metadata = root / "metadata.jsonl"
    if not metadata.is_file():
        raise ValueError(f"{root} has no metadata.jsonl. {_EXAMPLE}")
    return metadata


def _lines(metadata: Path) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(metadata.read_bytes().splitlines(), start=1):
        if line.strip():
            yield f"{metadata}:{number}", line


def _read_row(line: bytes, where: str, root: Path, listed: set[str]) -> CaptionedPicture | DataFault:
    """The picture of one row, decoded once to see that it can be; adds the row's files to `listed`."""
    try:
        row = json.loads(line)
    except ValueError as error:
        return DataFault(where, f"not JSON: {error}")
    if not isinstance(row, dict):
        return DataFault(where, f"a {type(row).__name__}, not an object")
    columns = ["file_name"] if row.get("source_file_name") is None else ["file_name", "source_file_name"]
    for column in columns:
        name = row.get(column)
        if not isinstance(name, str) or not name:
            return DataFault(where, f"no {column} in {str(row)[:100]}")
        if file_inside(root, name) is None:
            return DataFault(where, f"{column} {name!r} leaves the folder")
        listed.add(PurePosixPath(name).as_posix())
    captions = _captions(row)
    if not captions:
        return DataFault(
            where, f"{row['file_name']} has no caption (a string in text or caption, or a list of them in captions)"
        )
    picture = _picture(row, captions, (root / row["file_name"]).resolve())
    if len(columns) == 2:
        file = (root / row["source_file_name"]).resolve()
        original = CaptionedPicture(row["source_file_name"], "", (), "", "", picture.split, file)
        picture = replace(picture, original=original)
    return _fault_of(picture) or (picture.original and _fault_of(picture.original)) or picture


def _fault_of(picture: CaptionedPicture) -> DataFault | None:
    """Why the picture's file cannot be decoded, or None where it can."""
    file = picture.source
    assert isinstance(file, Path)  # those of a folder are
    if not file.is_file():
        return DataFault(str(file), "no such file")
    try:
        picture.image.close()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return DataFault(str(file), f"cannot be decoded: {error}")
    return None


def file_inside(root: Path, name: str) -> Path | None:
    """The file's path with links followed, or None if it is not below the root."""
    if "\0" in name or PurePosixPath(name).is_absolute():
        return None
    file = (root / name).resolve()
    return file if file.is_relative_to(root) else None


def _captions(row: dict[str, Any]) -> tuple[str, ...]:
    given = row.get("captions") or row.get("text") or row.get("caption") or []
    listed = [given] if isinstance(given, str) else given
    if not isinstance(listed, list):
        return ()
    return tuple(caption.strip() for caption in listed if isinstance(caption, str) and caption.strip())


def _picture(row: dict[str, Any], captions: tuple[str, ...], source: Path | bytes) -> CaptionedPicture:
    name, category, style, split = (str(row.get(column) or "") for column in ("name", "category", "style", "split"))
    return CaptionedPicture(row["file_name"], name or captions[0], captions, category, style, split, source)


def unlisted_pictures(root: Path, listed: set[str]) -> Iterator[DataFault]:
    """A fault for each picture below the folder that no row names."""
    for file in sorted(root.rglob("*")):
        if file.suffix.lower() in _PICTURE_SUFFIXES and file.relative_to(root).as_posix() not in listed:
            yield DataFault(str(file), "no row in metadata.jsonl")
