"""Block masks of flex attention, found from the borders of documents and images instead of pair by pair.

Shapes: B rows, L positions, n blocks of `BLOCK_SIZE` positions in a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from .latents import begin_positions


BLOCK_SIZE = 128


class _Spans(NamedTuple):
    """The lowest and the highest number in each block of positions, both (B, n)."""

    first: Tensor
    last: Tensor

    def meet(self) -> Tensor:
        """(B, n, n), whether the ranges of two blocks have a number in common."""
        return (self.first[:, :, None] <= self.last[:, None]) & (self.first[:, None] <= self.last[:, :, None])

    def are_one(self) -> Tensor:
        """(B, n, n), whether two blocks hold one number and no other."""
        is_one = self.first == self.last
        return is_one[:, :, None] & is_one[:, None] & (self.first[:, :, None] == self.first[:, None])


def _spans(lowest: Tensor, highest: Tensor) -> _Spans:
    low, high = (numbers.unflatten(1, (-1, BLOCK_SIZE)) for numbers in (lowest, highest))
    return _Spans(low.amin(dim=2), high.amax(dim=2))


def block_mask(document_ids: Tensor, block_ids: Tensor | None) -> BlockMask:
    """The Transfusion mask of rows in which documents lie one after the other.

    Two blocks whose ranges of documents do not meet see nothing of each other; two that lie in one document, or in one
    image, see all or nothing; the others the kernel looks at pair by pair.

    Args:
        document_ids: (B, L), which document a position belongs to.
        block_ids: (B, L), which image block it belongs to, -1 at text; or None where images are causal, like text.
    """
    documents = begin_positions(document_ids)  # numbers that rise, whatever those of the caller are
    images = torch.full_like(document_ids, -1) if block_ids is None else block_ids

    def may_look(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_same_image = (images[batch, query] >= 0) & (images[batch, query] == images[batch, key])
        return (documents[batch, query] == documents[batch, key]) & ((key <= query) | is_same_image)

    length = document_ids.shape[1]
    rest = (0, -length % BLOCK_SIZE)
    whole_documents, whole_images = pad(documents, rest, value=length), pad(images, rest, value=-1)
    document_spans, image_spans = _spans(whole_documents, whole_documents), _spans(whole_images, whole_images)
    patch_spans = _spans(whole_images.masked_fill(whole_images < 0, length), whole_images)  # text left out
    places = torch.arange(document_spans.first.shape[1], device=documents.device)
    is_before, is_diagonal = places[:, None] > places, places[:, None] == places
    in_one_image = image_spans.are_one() & (image_spans.first >= 0)[:, :, None]
    sees_all = document_spans.are_one() & (is_before | in_one_image)
    sees_some = document_spans.meet() & (is_before | is_diagonal | patch_spans.meet()) & ~sees_all
    return BlockMask.from_kv_blocks(
        *_as_lists(sees_some), *_as_lists(sees_all), BLOCK_SIZE, may_look, seq_lengths=(length, length)
    )


def _as_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """For each block of queries in (B, n, n) how many blocks of keys it sees, and all blocks, these first."""
    counts = blocks.sum(dim=2, dtype=torch.int32)
    order = blocks.to(torch.int8).argsort(dim=2, descending=True, stable=True)
    return counts[:, None], order[:, None].to(torch.int32)


__all__ = ["BLOCK_SIZE", "block_mask"]
