"""Block masks of flex attention, found from the borders of documents and images instead of pair by pair.

Shapes: B rows, L positions, n blocks of `BLOCK_SIZE` positions in a row.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from .latents import begin_positions


BLOCK_SIZE = 128


def key_runs(document_ids: Tensor, block_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """The run of keys that each position may look at, which is all that the Transfusion mask says: (first, end).

    It begins with the document, and ends with the position itself or with its image.

    Args:
        document_ids: (B, L), which document a position belongs to.
        block_ids: (B, L), which image block it belongs to, -1 at text; or None where images are causal, like text.

    Returns:
        Two (B, L) of int32.
    """
    places = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    last = places
    if block_ids is not None:
        is_last = block_ids != pad(block_ids[:, 1:], (0, 1), value=-2)
        # From the end: the next place at which a run of equal block ids ends.
        ends = torch.where(is_last, places, document_ids.shape[1]).flip(1).cummin(dim=1).values.flip(1)
        last = torch.where(block_ids >= 0, ends, places)
    return begin_positions(document_ids).to(torch.int32), (last + 1).to(torch.int32)


def block_mask(document_ids: Tensor, block_ids: Tensor | None) -> BlockMask:
    """The Transfusion mask of rows in which documents lie one after the other; arguments as for `key_runs`.

    Of two blocks of positions the runs of the one tell whether it sees nothing, something or all of the other; where
    it sees something, the kernel tries each pair, with two numbers for a query and none for a key.
    """
    first, end = key_runs(document_ids, block_ids)

    def may_look(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first[batch, query]) & (key < end[batch, query])

    length = document_ids.shape[1]
    missing = -length % BLOCK_SIZE
    # Positions beyond the row see nothing, so that no block in which they stand sees all of another.
    firsts = pad(first, (0, missing), value=length).unflatten(1, (-1, BLOCK_SIZE))
    ends = pad(end, (0, missing), value=0).unflatten(1, (-1, BLOCK_SIZE))
    keys = BLOCK_SIZE * torch.arange(firsts.shape[1], device=first.device)
    sees_some = (keys < ends.amax(dim=2, keepdim=True)) & (keys + BLOCK_SIZE > firsts.amin(dim=2, keepdim=True))
    sees_all = (keys >= firsts.amax(dim=2, keepdim=True)) & (keys + BLOCK_SIZE <= ends.amin(dim=2, keepdim=True))
    return BlockMask.from_kv_blocks(
        *_as_lists(sees_some & ~sees_all), *_as_lists(sees_all), BLOCK_SIZE, may_look, seq_lengths=(length, length)
    )


def _as_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """For each block of queries in (B, n, n) how many blocks of keys it sees, and all blocks, these first."""
    counts = blocks.sum(dim=2, dtype=torch.int32)
    order = blocks.to(torch.int8).argsort(dim=2, descending=True, stable=True)
    return counts[:, None], order[:, None].to(torch.int32)


__all__ = ["BLOCK_SIZE", "block_mask", "key_runs"]
