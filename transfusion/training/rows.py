"""Rows for the collator, from cached latents: captioned pictures and texts, and pictures with their edits."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.mixing import stable_seed
from ..data.pictures import CaptionedPicture
from ..latents import patchify
from ..processing import IGNORE_INDEX, TransfusionProcessor
from .states import fingerprint


SEED_BITS = 63


class SeededRows(Dataset):
    """A dataset whose choices depend on `seed`, epoch and index alone."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        # In shared memory, so that workers which live on from epoch to epoch see it change.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch whose choices are made."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Make the choices of `epoch` from now on."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        raise NotImplementedError

    def chooser(self, index: int) -> random.Random:
        """What chooses for the row `index` in this epoch; IndexError where there is no such row."""
        if not 0 <= index < len(self):
            raise IndexError(f"index is {index}; there are {len(self)} rows.")
        return random.Random(stable_seed(self.seed, self.epoch, index))


class CaptionedPictureRows(SeededRows):
    """Rows for `TransfusionDataCollator`: every picture once an epoch, and a share of the texts.

    For each picture a caption is chosen among its phrasings, and whether it comes before the picture or after it
    (paper, section 4.1: before in 80 % of the pairs). What is chosen depends on `seed`, epoch and index alone.

    Args:
        pictures: Only their names and captions are used.
        latents: (C, h, w) of each, as `encode_pictures` makes them.
        processor: Makes token ids and labels. The ids of a caption are kept once made.
        texts: Documents without a picture.
        text_ratio: Texts per picture in an epoch. Epochs go on where the last one stopped, through all texts in a
            random order, and then again.
        caption_first: Probability that the caption comes first.
        seed: Of all choices.

    Raises:
        ValueError: Pictures and latents of different number, none at all, or a ratio without texts.
    """

    def __init__(
        self,
        pictures: Sequence[CaptionedPicture],
        latents: Sequence[Tensor],
        processor: TransfusionProcessor,
        texts: Sequence[str] = (),
        text_ratio: float = 0.0,
        caption_first: float = 0.8,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        if len(pictures) != len(latents) or not pictures:
            raise ValueError(
                f"There are {len(pictures)} pictures and {len(latents)} latents; give as many of both, at least one."
            )
        if edited := [picture.id for picture in pictures if picture.original is not None]:
            raise ValueError(f"{edited[:3]} are edits of other pictures (source_file_name); make rows with EditRows.")
        if text_ratio < 0 or (text_ratio > 0 and not texts):
            raise ValueError(f"text_ratio is {text_ratio} with {len(texts)} texts; give texts, or a ratio of 0.")
        patch_size = processor.image_processor.patch_size
        self.pictures = list(pictures)
        self.patches = [patchify(latent, patch_size).contiguous() for latent in latents]
        self.shapes = [tuple(latent.shape) for latent in latents]
        self.grids = [torch.tensor([shape[1:]]) // patch_size for shape in self.shapes]
        self.processor = processor
        self.texts = list(texts)
        self.text_order = random.Random(seed).sample(range(len(self.texts)), len(self.texts))
        self.num_texts = round(text_ratio * len(self.pictures))
        self.caption_first = caption_first
        self._encoded: dict[Any, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.pictures) + self.num_texts

    def __getitem__(self, index: int) -> dict[str, Any]:
        chooser = self.chooser(index)
        if index < len(self.pictures):
            return self._picture_row(index, chooser)
        return self._text_row(index - len(self.pictures))

    def longest(self) -> tuple[int, str]:
        """Tokens of the longest row with a picture, and the picture's name."""
        rows = zip(self.pictures, self.shapes, strict=True)
        pairs = [(picture, caption, shape) for picture, shape in rows for caption in picture.captions]
        return max((len(self._encode(caption, True, shape)[0]), picture.id) for picture, caption, shape in pairs)

    @property
    def fingerprint(self) -> str:
        """Of names, captions, sizes, texts and choices: a training resumes with the same ones."""
        pictures = [(picture.id, list(picture.captions)) for picture in self.pictures]
        return fingerprint([pictures, self.shapes, self.texts, self.num_texts, self.caption_first, self.seed])

    def _picture_row(self, index: int, chooser: random.Random) -> dict[str, Any]:
        picture = self.pictures[index]
        caption = chooser.choice(picture.captions)
        is_caption_first = chooser.random() < self.caption_first
        input_ids, labels = self._encode(caption, is_caption_first, self.shapes[index])
        return {
            "input_ids": input_ids,
            "labels": labels,
            "latent_patches": self.patches[index],
            "image_grids": self.grids[index],
            "sample_seed": chooser.getrandbits(SEED_BITS),
            "sample_id": picture.id,
        }

    def _text_row(self, number: int) -> dict[str, Any]:
        position = self.epoch * self.num_texts + number
        chosen = self.text_order[position % len(self.texts)]
        input_ids, labels = self._encode(self.texts[chosen], False, None)
        return {"input_ids": input_ids, "labels": labels, "sample_id": f"text {chosen}"}

    def _encode(self, text: str, is_text_first: bool, shape: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
        """Ids and labels (L_i,) of a text, before or after a picture whose latent has this shape, or alone."""
        key = (text, is_text_first, shape)
        if key not in self._encoded:
            parts: list[dict[str, str]] = [{"type": "text", "text": text}]
            if shape is not None:
                parts.insert(int(is_text_first), {"type": "image"})
            latents = None if shape is None else [torch.zeros(shape)]
            out = self.processor(text=parts, latents=latents, return_labels=True, return_tensors="pt")
            self._encoded[key] = (out["input_ids"][0], out["labels"][0])
        return self._encoded[key]


class EditRows(SeededRows):
    """Rows of a picture, an instruction and the picture after it, for `TransfusionDataCollator`.

    Source and instruction are the user's: the source is fed clean and has no loss, and neither it nor the instruction
    is learned. What is learned is to begin an image after them, to draw it, and to end there. One of several phrasings
    is chosen by `seed`, epoch and index alone.

    Args:
        sources: (C, h, w) of each picture to change, as `encode_pictures` makes them.
        instructions: How to change each, in one phrasing or in several.
        targets: (C, h, w) of each picture that comes out, of any size.
        processor: Makes token ids and labels.
        seed: Of all choices.

    Raises:
        ValueError: Sources, instructions and targets of different number, none at all, or no phrasing of one.
    """

    def __init__(
        self,
        sources: Sequence[Tensor],
        instructions: Sequence[str | Sequence[str]],
        targets: Sequence[Tensor],
        processor: TransfusionProcessor,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        if not len(sources) == len(instructions) == len(targets) or not sources:
            raise ValueError(
                f"There are {len(sources)} sources, {len(instructions)} instructions and {len(targets)} targets; give "
                "as many of each, at least one."
            )
        self.sources = list(sources)
        self.instructions = [[given] if isinstance(given, str) else list(given) for given in instructions]
        for index, phrasings in enumerate(self.instructions):
            if not phrasings or not all(phrasing.strip() for phrasing in phrasings):
                raise ValueError(
                    f"Edit {index} has the instructions {phrasings}; give at least one, and no empty one."
                )
        self.targets = list(targets)
        self.processor = processor

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def fingerprint(self) -> str:
        """Of instructions, sizes and choices: a training resumes with the same ones."""
        sizes = [[list(latent.shape) for latent in latents] for latents in (self.sources, self.targets)]
        return fingerprint([self.instructions, sizes, self.seed])

    def __getitem__(self, index: int) -> dict[str, Any]:
        chooser = self.chooser(index)
        instruction = chooser.choice(self.instructions[index])
        parts = [{"type": "image"}, {"type": "text", "text": instruction}, {"type": "image"}]
        pictures = [self.sources[index], self.targets[index]]
        row = self.processor(text=parts, latents=pictures, return_labels=True, return_tensors="pt")
        input_ids, labels = row["input_ids"][0], row["labels"][0]
        begins = torch.isin(input_ids, torch.tensor(self.processor.boi_token_ids)).nonzero()
        labels[: int(begins[-1])] = IGNORE_INDEX
        return {
            "input_ids": input_ids,
            "labels": labels,
            "latent_patches": row["latent_patches"],
            "image_grids": row["image_grids"],
            "image_loss_mask": torch.tensor([False, True]),
            "sample_seed": chooser.getrandbits(SEED_BITS),
            "sample_id": f"edit {index}",
        }


__all__ = ["CaptionedPictureRows", "EditRows", "SeededRows"]
