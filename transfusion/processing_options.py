# trf-ignore: TRF028 - the licence of all files stands in LICENSE.
"""What a call of `TransfusionProcessor` takes beside texts and pictures."""

from collections.abc import Mapping
from typing import Any

from transformers.processing_utils import ImagesKwargs, ProcessingKwargs

from .image_processing import TransfusionImageProcessorKwargs


# transformers' options of a tokenizer that rows with pictures cannot have.
REFUSED_OPTIONS = (
    "text_pair",
    "text_target",
    "text_pair_target",
    "stride",
    "is_split_into_words",
    "return_token_type_ids",
    "return_overflowing_tokens",
    "return_special_tokens_mask",
    "return_offsets_mapping",
    "return_length",
    "return_text_replacement_offsets",
)


class TransfusionImagesKwargs(TransfusionImageProcessorKwargs, total=False):
    """What the image processor takes in a call."""

    return_tensors: str | None
    data_format: str | None
    device: str | None
    disable_grouping: bool | None


# trf-ignore: TRF019 - transformers 5.17 reads no defaults elsewhere
class TransfusionProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """What a call of `TransfusionProcessor` takes beside texts and pictures, and beside `return_labels`.

    transformers 5.17 takes each entry for a group of options, and reads defaults from here alone.
    """

    images_kwargs: TransfusionImagesKwargs
    _defaults = {"text_kwargs": {"padding": True}}


def unknown_options(kwargs: Mapping[str, Any]) -> set[str]:
    """Names, of options or inside of a group of them, that nothing takes."""
    groups = TransfusionProcessorKwargs.__annotations__
    names = {group: set(getattr(fields, "__annotations__", ())) for group, fields in groups.items()}
    # Options of sounds and videos pass, as callers give them to every processor; not if they sound like a picture's.
    foreign = (names["audio_kwargs"] | names["videos_kwargs"]) - set(ImagesKwargs.__annotations__)
    known = {"common_kwargs", "return_labels", *groups} | names["text_kwargs"] | names["images_kwargs"] | foreign
    unknown = set(kwargs) - known
    for group in ("text_kwargs", "images_kwargs"):
        unknown |= set(kwargs.get(group, ())) - names[group]
    return unknown


__all__ = ["REFUSED_OPTIONS", "TransfusionImagesKwargs", "TransfusionProcessorKwargs", "unknown_options"]
