"""One pass over the documents of a source: which can be used, and what their pictures are."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from .documents import Document, Text, picture_size
from .pictures import DataFault, DataReport
from .sources import Documents, Records
from .specs import SourceSpec
from .tars import write_json


logger = logging.getLogger(__name__)

_VERSION = 2
# What reading and decoding a picture raises.
PICTURE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True)
class PictureKey:
    """What a picture is: a hash of its bytes, and its height and width, upright."""

    digest: str
    height: int
    width: int


@dataclass(frozen=True)
class Survey:
    """Usable rows of a source in order, with the pictures of each and a hash of its texts, and faults.

    Attributes:
        rows: Where they stand in the source.
        pictures: Of each.
        texts: A hash of each one's texts, and of how they lie between the pictures.
        faults: Of single rows.
        file_faults: Of the source as a whole, whichever split is read.
        file_rows: Rows of the source, in all its splits.
        too_long: Rows that were left out because of their length.
        is_final: False where a file could not be read, which another time it may.
    """

    rows: list[int]
    pictures: list[list[PictureKey]]
    texts: list[str]
    faults: list[DataFault]
    file_faults: list[DataFault]
    file_rows: int
    too_long: tuple[DataFault, ...] = ()
    is_final: bool = True

    def without(self, faults: dict[int, DataFault]) -> "Survey":
        """The survey without the rows that have a fault, by row."""
        return replace(self._kept(faults), faults=[*self.faults, *(faults[row] for row in sorted(faults))])

    def without_long(self, reasons: dict[int, DataFault]) -> "Survey":
        """The survey without the rows that are too long, with the reason, by row."""
        return replace(self._kept(reasons), too_long=(*self.too_long, *(reasons[row] for row in sorted(reasons))))

    def _kept(self, left_out: Container[int]) -> "Survey":
        kept = [place for place, row in enumerate(self.rows) if row not in left_out]
        return replace(
            self,
            rows=[self.rows[place] for place in kept],
            pictures=[self.pictures[place] for place in kept],
            texts=[self.texts[place] for place in kept],
        )

    def report(self, path: Path) -> DataReport:
        """How many rows can be used, and the faults."""
        faults = (*self.file_faults, *self.faults)
        return DataReport(path, len(self.rows), faults, "rows", self.too_long, len(self.file_faults), self.file_rows)


def survey(
    documents: Documents,
    max_image_pixels: int,
    split: str | None = None,
    check: Callable[[Document], None] | None = None,
) -> Survey:
    """Read every document once.

    Args:
        documents: Of one source.
        max_image_pixels: Pictures may have so many.
        split: Keep the rows that have this in the column `split`.
        check: Raises a ValueError for what else makes a document unusable.

    Raises:
        ValueError: A split that no row has.
    """
    rows: list[int] = []
    pictures: list[list[PictureKey]] = []
    texts: list[str] = []
    faults: list[DataFault] = []
    splits: set[str] = set()
    is_final = True
    for index in range(len(documents)):
        try:
            record = documents.records[index]
            splits.add(str(record.get("split")))
            if split is not None and record.get("split") != split:
                continue
            document = documents.document(index, record)
            keys = [picture_key(picture.read(), max_image_pixels) for picture in document.pictures]
            if check is not None:
                check(document)
        except PICTURE_ERRORS as error:
            faults.append(DataFault(documents.records.where(index), str(error)))
            is_final = is_final and not isinstance(error, OSError)
            continue
        rows.append(index)
        pictures.append(keys)
        texts.append(_text_key(document))
    if split is not None and split not in splits:
        raise ValueError(f"No row of {documents.records.path} has split {split!r}; they have {sorted(splits)}.")
    return Survey(rows, pictures, texts, faults, list(documents.records.faults), len(documents), is_final=is_final)


def _text_key(document: Document) -> str:
    """A hash of all of a document but its pictures."""
    parts = [part.phrasings if isinstance(part, Text) else None for part in document.parts]
    found = json.dumps([parts, document.is_pair, document.num_context])
    return hashlib.sha256(found.encode()).hexdigest()[:16]


def picture_key(encoded: bytes, max_image_pixels: int) -> PictureKey:
    """What an encoded picture is; ValueError where it is no picture or has too many pixels."""
    return PictureKey(hashlib.sha256(encoded).hexdigest()[:32], *picture_size(encoded, max_image_pixels))


def cached_survey(
    documents: Documents,
    spec: SourceSpec,
    cache_dir: str | Path | None,
    max_image_pixels: int,
    check: Callable[[Document], None] | None = None,
    checked: str = "",
) -> Survey:
    """As `survey`, but taken from the cache where the files have the sizes and times of last time.

    Args:
        documents, max_image_pixels, check: As for `survey`.
        spec: Of the source.
        cache_dir: Folder of the cache; None keeps nothing.
        checked: What `check` depends on.
    """
    if cache_dir is None:
        return survey(documents, max_image_pixels, spec.split, check)
    identity = [_VERSION, repr(spec), max_image_pixels, checked, *_file_states(documents.records)]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    kept = Path(cache_dir) / f"survey-{digest}.json"
    try:
        found = json.loads(kept.read_bytes())
        return Survey(
            found["rows"],
            [[PictureKey(*key) for key in keys] for keys in found["pictures"]],
            found["texts"],
            [DataFault(*fault) for fault in found["faults"]],
            list(documents.records.faults),
            len(documents),
        )
    except (OSError, ValueError, KeyError, TypeError):
        made = survey(documents, max_image_pixels, spec.split, check)
    if not made.is_final:
        return made
    write_json(
        kept,
        {
            "rows": made.rows,
            "pictures": [[[key.digest, key.height, key.width] for key in keys] for keys in made.pictures],
            "texts": made.texts,
            "faults": [[fault.where, fault.reason] for fault in made.faults],
        },
    )
    return made


def cached_lengths(
    found: Survey, cache_dir: str | Path | None, settings: str, measure: Callable[[int], int]
) -> list[int]:
    """The length of each row of a survey, of the cache where texts, sizes of pictures and settings are the same.

    Args:
        found: The rows.
        cache_dir: Folder of the cache; None keeps nothing.
        settings: What lengths depend on beside the documents.
        measure: The length of the row at a place of the survey.
    """
    sizes = [[(key.height, key.width) for key in keys] for keys in found.pictures]
    digest = hashlib.sha256(json.dumps([_VERSION, settings, found.texts, sizes]).encode()).hexdigest()[:32]
    kept = None if cache_dir is None else Path(cache_dir) / f"lengths-{digest}.json"
    try:
        lengths = [] if kept is None else json.loads(kept.read_bytes())
    except (OSError, ValueError):
        lengths = []
    if len(lengths) != len(found.rows):
        lengths = [measure(place) for place in range(len(found.rows))]
        if kept is not None:
            write_json(kept, lengths)
    return lengths


def _file_states(records: Records) -> Iterator[tuple[str, int, int]]:
    for file in records.files():
        state = file.stat() if os.path.isfile(file) else None
        yield str(file), state.st_size if state else -1, state.st_mtime_ns if state else -1


def require_usable(reports: Sequence[DataReport], max_faulty: float, strict: bool) -> None:
    """Log the faults of reports.

    Raises:
        ValueError: No usable row in one; any fault, if `strict`; or a larger share of faults than `max_faulty`.
    """
    for report in reports:
        share = report.faulty_share
        if not report.num_pictures:
            raise ValueError(f"No row can be used.\n{report}")
        if report.faults and strict:
            raise ValueError(f"strict allows no fault.\n{report}")
        if share > max_faulty:
            raise ValueError(f"A share of {share:.3f} is faulty, and max_faulty is {max_faulty}.\n{report}")
        if report.faults or report.too_long:
            logger.warning("%s", report)


__all__ = [
    "PICTURE_ERRORS",
    "PictureKey",
    "Survey",
    "cached_lengths",
    "cached_survey",
    "picture_key",
    "require_usable",
    "survey",
]
