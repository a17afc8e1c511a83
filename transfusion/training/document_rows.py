"""Rows for the collator from documents of any kind, by index or from a stream."""

import json
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ..data.documents import Document, Picture, Text
from ..data.mixing import Mixture, stable_seed
from ..data.pictures import DataFault, DataReport
from ..data.sources import Documents
from ..data.streams import RecordStream
from ..data.survey import PICTURE_ERRORS, PictureKey, Survey, picture_key
from ..image_processing import load_picture
from ..processing import IGNORE_INDEX, TransfusionProcessor
from .latent_cache import LatentStore
from .rows import SEED_BITS, SeededRows
from .states import fingerprint


logger = logging.getLogger(__name__)


def nearest_size(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The one of the `sizes` (height, width) whose aspect is nearest, by ratio; of equally near ones the first."""
    return min(sizes, key=lambda size: abs(np.log(size[0] * width / (size[1] * height))))


@dataclass(frozen=True)
class RowMaker:
    """Makes a row of a document.

    Args:
        processor: Makes token ids and labels, and latents.
        caption_first: Share of the pairs in which the caption comes first.
        buckets: Sizes (height, width) in pixels that pictures are brought to, in place of the image processor's.
        flip: Mirror every second picture, by chance.
        crop: `"center"` or `"random"`: which part is kept of a picture whose aspect is not that of its size.
        latents: Of all pictures, by digest; None: pictures are encoded each time.

    Raises:
        ValueError: A bucket that does not divide into patches, or random crops of pictures that keep their sizes.
    """

    processor: TransfusionProcessor
    caption_first: float = 0.8
    buckets: tuple[tuple[int, int], ...] = ()
    flip: bool = False
    crop: str = "center"
    latents: LatentStore | None = field(default=None, repr=False)

    @property
    def settings(self) -> list[Any]:
        """What rows depend on, beside documents and latents."""
        return [self.caption_first, self.buckets, self.flip, self.crop]

    def __post_init__(self) -> None:
        """Check the buckets as the image processor checks its size."""
        for height, width in self.buckets:
            self.processor.image_processor.patch_grid(height, width, size={"height": height, "width": width})
        if self.crop == "random" and not self.buckets and self.processor.image_processor.size is None:
            raise ValueError("crop is 'random', but pictures keep their sizes; set buckets, or a size.")

    def row(self, document: Document, keys: Sequence[PictureKey] | None, chooser: random.Random) -> dict[str, Any]:
        """The row of a document.

        Args:
            document: What to train on.
            keys: Of its pictures, where they have stored latents.
            chooser: Chooses phrasings, the order of a pair, what is mirrored and cropped, and the row's seed.

        Raises:
            ValueError: A picture that cannot be used.
        """
        parts = list(document.parts)
        if document.is_pair and chooser.random() >= self.caption_first:
            parts.reverse()
        texts = {id(part): chooser.choice(part.phrasings) for part in parts if isinstance(part, Text)}
        if self.latents is not None and keys is not None:
            latents = [self.latents[key.digest] for key in keys]
        else:
            latents = [self._encode(picture, chooser) for picture in document.pictures]
        given = [_text_part(texts[id(part)]) if isinstance(part, Text) else {"type": "image"} for part in parts]
        out = self.processor(text=given, latents=latents or None, return_labels=True, return_tensors="pt")
        row = {name: out[name] for name in ("latent_patches", "image_grids") if name in out}
        row |= {"input_ids": out["input_ids"][0], "labels": out["labels"][0], "sample_id": document.id}
        if document.num_context:
            self._hide_context(row, document)
        return {**row, "sample_seed": chooser.getrandbits(SEED_BITS)}

    def pixels(
        self, picture: Picture, centering: tuple[float, float] = (0.5, 0.5), mirror: bool = False
    ) -> np.ndarray:
        """Pixels (3, H, W) of a picture, brought to the nearest size.

        Args:
            picture: An encoded picture.
            centering: Which part is kept where the aspect is another: (0, 0) the left and upper one.
            mirror: Left to right.

        Raises:
            ValueError: A picture that cannot be used.
        """
        image_processor = self.processor.image_processor
        image: Any = load_picture(picture.read(), image_processor.max_image_pixels)
        size = self._size(image.height, image.width)
        if size is not None and centering != (0.5, 0.5):
            image = ImageOps.fit(image, size[::-1], method=image_processor.resample, centering=centering)
        if mirror:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        options = {"size": list(size)} if self.buckets and size is not None else {}
        return image_processor(image, **options)["pixel_values"][0]

    def longest(self, document: Document, keys: Sequence[PictureKey]) -> int:
        """Tokens of the document with its longest phrasings."""
        side, channels = self.processor.image_processor.patch_size, self.processor.latent_channels
        grids = [self._grid(key) for key in keys]
        latents = [torch.zeros(channels, rows * side, columns * side) for rows, columns in grids]
        parts = [
            _text_part(max(part.phrasings, key=self._num_tokens)) if isinstance(part, Text) else {"type": "image"}
            for part in document.parts
        ]
        return len(self.processor(text=parts, latents=latents or None, return_labels=True)["input_ids"][0])

    @property
    def length_key(self) -> str:
        """A hash of what `longest` depends on beside documents."""
        processor = self.processor
        tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
        # What the last call set, which the next one sets anew.
        del tokenizer["padding"], tokenizer["truncation"]
        names = [processor.boi_token_ids, processor.eoi_token_id, processor.image_token_id, processor.size_token_grids]
        sizes = [processor.image_processor.to_json_string(), processor.latent_channels, self.buckets]
        return fingerprint([tokenizer, processor.tokenizer.special_tokens_map, names, sizes])

    def _num_tokens(self, text: str) -> int:
        return len(self.processor.tokenizer(text, split_special_tokens=True)["input_ids"])

    def _size(self, height: int, width: int) -> tuple[int, int] | None:
        if self.buckets:
            return nearest_size(height, width, self.buckets)
        size = self.processor.image_processor.size
        return None if size is None else (size["height"], size["width"])

    def _grid(self, key: PictureKey) -> tuple[int, int]:
        height, width = self._size(key.height, key.width) or (key.height, key.width)
        block = self.processor.image_processor.block
        return height // block, width // block

    def _encode(self, picture: Picture, chooser: random.Random) -> Tensor:
        centering = (chooser.random(), chooser.random()) if self.crop == "random" else (0.5, 0.5)
        mirror = self.flip and chooser.random() < 0.5
        return self.processor.encode_images([self.pixels(picture, centering, mirror)])[0].cpu()

    def _hide_context(self, row: dict[str, Any], document: Document) -> None:
        """Let nothing of the leading parts be learned."""
        given = sum(isinstance(part, Picture) for part in document.parts[: document.num_context])
        begins = torch.isin(row["input_ids"], torch.tensor(self.processor.boi_token_ids)).nonzero()
        row["labels"][: int(begins[given])] = IGNORE_INDEX
        row["image_loss_mask"] = torch.arange(len(row["image_grids"])) >= given


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


class DocumentRows(SeededRows):
    """Rows of several sources in a stated mixture; what is chosen depends on seed, epoch and index alone.

    Args:
        sources: Documents of each source.
        surveys: Which of them to use, and what their pictures are.
        maker: Makes the rows.
        weights, length: As for `Mixture`.
        reports: On the sources, for whoever asks.
        seed: Of all choices.
    """

    def __init__(
        self,
        sources: Sequence[Documents],
        surveys: Sequence[Survey],
        maker: RowMaker,
        weights: Sequence[float] | None = None,
        length: int | None = None,
        reports: Sequence[DataReport] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self.sources, self.surveys, self.maker = list(sources), list(surveys), maker
        self.mixture = Mixture([len(survey.rows) for survey in surveys], weights, length, seed)
        self.reports = list(reports)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of which rows there are, of their texts and pictures, and of how they are made and mixed."""
        found = [
            [survey.rows, survey.texts, [[key.digest for key in keys] for keys in survey.pictures]]
            for survey in self.surveys
        ]
        return fingerprint([found, self.mixture.counts, self.maker.settings, self.seed])

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, index: int) -> dict[str, Any]:
        chooser = self.chooser(index)
        source, place = self.mixture.locate(self.epoch, index)
        survey = self.surveys[source]
        document = self.sources[source][survey.rows[place]]
        return self.maker.row(document, survey.pictures[place], chooser)


# Rows that are read before a share of them says anything.
_LEAST_READ = 100


class StreamRows(IterableDataset):
    """Rows of a stream of records, pass after pass; what is chosen depends on seed, pass and number alone.

    Each pass has every record once, in another order. A record with a fault, or one that is too long, becomes a row of
    which nothing is learned, so that whoever divides the rows among processes need not read them. They are logged, and
    listed in the `faults` and the `too_long` of the process that read them.

    Args:
        stream: Records.
        maker: Makes the rows.
        num_passes: Over all records; None: without end, as a training that counts its steps wants it.
        max_faulty: Share of faults, of at least 100 rows, above which there is an error.
        strict: An error for each fault.
        max_length: Longest row in tokens.
        seed: Of all choices.
    """

    def __init__(
        self,
        stream: RecordStream,
        maker: RowMaker,
        num_passes: int | None = None,
        max_faulty: float = 0.1,
        strict: bool = False,
        max_length: int | None = None,
        seed: int = 0,
    ) -> None:
        self.stream, self.maker, self.num_passes = stream, maker, num_passes
        self.max_faulty, self.strict, self.max_length, self.seed = max_faulty, strict, max_length, seed
        self.faults: list[DataFault] = []
        self.too_long: list[DataFault] = []
        self.num_read = 0

    @property
    def fingerprint(self) -> str:
        """A hash of how rows are made; what the stream holds is not known."""
        return fingerprint([str(self.stream.path), self.max_length, self.maker.settings, self.seed])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        turn, turns = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return (make() for make in islice(self.deferred(), turn, None, turns))

    def deferred(self, start: int = 0) -> Iterator[Callable[[], dict[str, Any]]]:
        """What makes each row, without making it, from row `start` on; in any worker all of them."""
        passes = count() if self.num_passes is None else range(self.num_passes)
        rows = (partial(self._row, number, *row) for number in passes for row in self.stream.records(number))
        return islice(rows, start, None)

    def blank(self, name: str = "blank") -> dict[str, Any]:
        """A row of which nothing is learned."""
        eos = self.maker.processor.tokenizer.eos_token_id
        return {"input_ids": torch.tensor([eos]), "labels": torch.tensor([IGNORE_INDEX]), "sample_id": name}

    def _row(self, epoch: int, number: int, record: Any) -> dict[str, Any]:
        self.num_read += 1
        where = f"{self.stream.path}, row {number}"
        try:
            document = self.stream.document(record, where)
            limit = self.maker.processor.image_processor.max_image_pixels
            keys = [picture_key(picture.read(), limit) for picture in document.pictures]
            length = 0 if self.max_length is None else self.maker.longest(document, keys)
            if self.max_length is None or length <= self.max_length:
                return self.maker.row(document, None, random.Random(stable_seed(self.seed, epoch, number)))
        except PICTURE_ERRORS as error:
            self._count(DataFault(where, str(error)))
        else:
            self._leave_out(DataFault(where, f"{length} tokens, and max_length is {self.max_length}"))
        return self.blank(where)

    def _leave_out(self, reason: DataFault) -> None:
        self.too_long.append(reason)
        logger.warning("%s: %s", reason.where, reason.reason)
        if len(self.too_long) == self.num_read >= _LEAST_READ:
            raise ValueError(
                f"All of the first {self.num_read} rows of {self.stream.path} are longer than max_length="
                f"{self.max_length}; raise it."
            )

    def _count(self, fault: DataFault) -> None:
        self.faults.append(fault)
        logger.warning("%s: %s", fault.where, fault.reason)
        share = len(self.faults) / max(self.num_read, _LEAST_READ)
        if self.strict or share > self.max_faulty:
            raise ValueError(
                f"{len(self.faults)} of {self.num_read} rows of {self.stream.path} are faulty, with max_faulty="
                f"{self.max_faulty} and strict={self.strict}. The last is {fault.where}: {fault.reason}"
            )


__all__ = ["DocumentRows", "RowMaker", "StreamRows", "nearest_size"]
