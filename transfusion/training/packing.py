"""Packing: rows of unlike length laid one after the other, so that no step computes padding.

Shapes: B rows, L positions, R packed rows, T positions of the longest of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..latents import image_block_ids


# By what padding is filled, beside the `input_ids`.
FILLS = {"labels": -100, "document_ids": -1, "position_ids": 0}
PER_IMAGE = ("image_grids", "image_loss_mask", "timesteps")
PER_PATCH = ("latent_patches", "noise")


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Sort items of `lengths` into as few bins as first-fit decreasing finds: the longest first, each into the first
    bin that has room for it. An item of more than `capacity` is a ValueError.

    Returns:
        The indices of each bin, rising.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if lengths[index] > capacity:
            raise ValueError(
                f"Row {index} has {lengths[index]} tokens and packed_length is {capacity}; raise it, or leave out or "
                "shorten such rows. Images are never cut."
            )
        place = next((place for place, left in enumerate(room) if left >= lengths[index]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(capacity)
        bins[place].append(index)
        room[place] -= lengths[index]
    return [sorted(members) for members in bins]


def pack(batch: Mapping[str, Any], capacity: int, image_token_id: int, pad_token_id: int) -> dict[str, Any]:
    """Lay the rows of a padded `batch` one after the other, in rows of at most `capacity` tokens.

    Documents keep their positions and their images and do not see each other. What the mask hides is left out: neither
    padding nor dropped text is computed.

    Args:
        batch: `input_ids`, `attention_mask` and `labels` (B, L); with images, what lies flat per image and per patch.
        capacity: Tokens of the longest row that may come out.
        image_token_id: The placeholder of patches.
        pad_token_id: What stands in `input_ids` behind shorter rows.

    Returns:
        `input_ids`, `labels`, `position_ids` and `document_ids` (R, T); images in reading order of the new rows.
    """
    visible = batch["attention_mask"].bool()
    bins = first_fit(visible.sum(dim=1).tolist(), capacity)
    positions = torch.arange(visible.shape[1]).expand_as(visible)
    documents = torch.arange(len(visible))[:, None].expand_as(visible)
    columns = {
        "input_ids": batch["input_ids"],
        "labels": batch["labels"],
        "position_ids": positions,
        "document_ids": documents,
    }
    fills = {"input_ids": pad_token_id, **FILLS}
    packed: dict[str, Any] = {
        name: pad_sequence(
            [torch.cat([values[row][visible[row]] for row in rows]) for rows in bins], True, fills[name]
        )
        for name, values in columns.items()
    }
    return packed | _in_new_order(batch, [row for rows in bins for row in rows], image_token_id)


def _in_new_order(batch: Mapping[str, Any], rows: list[int], image_token_id: int) -> dict[str, Any]:
    """What the batch holds per image, per patch and per row, the rows in the order `rows`."""
    moved: dict[str, Any] = {}
    if "sample_ids" in batch:
        moved["sample_ids"] = [batch["sample_ids"][row] for row in rows]
    if "image_grids" in batch:
        images_of_row = image_block_ids(batch["input_ids"], image_token_id).amax(dim=1) + 1
        images = _flat_order(images_of_row, rows)
        patches = _flat_order(batch["image_grids"].prod(dim=1), images.tolist())
        moved |= {name: batch[name][images] for name in PER_IMAGE if name in batch}
        moved |= {name: batch[name][patches] for name in PER_PATCH if name in batch}
    return moved


def _flat_order(counts: Tensor, groups: Sequence[int]) -> Tensor:
    """Indices of flat items, `counts` of which belong to each group, with the groups in the order `groups`."""
    members = torch.arange(int(counts.sum())).split(counts.tolist())
    return torch.cat([members[group] for group in groups])


__all__ = ["first_fit", "pack"]
