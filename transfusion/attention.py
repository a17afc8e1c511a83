"""Attention without a mask in memory: the Transfusion mask as a list of dense pieces (paper, section 3).

Whatever a stretch of text or an image may look at lies in one run of keys. So the mask of a row falls into pieces,
each of which a fused kernel computes alone, without reading a mask and without computing what it would hide: for text
that begins a document a causal square, for an image all keys from the beginning of its document to its own end, and
for text after that the same with a small triangle at the end.

Shapes: B rows, L positions, K keys, h heads, d head_dim.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function

from .block_masks import block_mask
from .configuration import TransfusionConfig
from .latents import image_block_ids


# Text in the middle of a document is cut to so many queries, so that their triangle stays small.
MAX_TEXT_QUERIES = 512
# Measured on documents of 98 and of 28 segments at 4,000 positions, forward and backward.
PAIRS_PER_KEY = {"single": 32, "half": 64}


class Segment(NamedTuple):
    """Queries that may look at one run of keys.

    Attributes:
        rows: (first, end) of the rows of the batch.
        queries: (first, end) of the queries.
        keys: (first, end) of the keys.
        is_causal: Whether the last query sees all keys, the one before it all but one, and so on; else all see all.
    """

    rows: tuple[int, int]
    queries: tuple[int, int]
    keys: tuple[int, int]
    is_causal: bool


class SegmentedMask:
    """A mask as segments, none of which share a query. Compiled layers pass it on without looking inside."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = tuple(segments)

    def work(self, pairs_per_key: int) -> int:
        """Pairs that are computed, and what each call does for each of its keys, in pairs."""
        keys = sum((rows[1] - rows[0]) * (keys[1] - keys[0]) for rows, _, keys, _ in self.segments)
        return self.num_pairs() + pairs_per_key * keys

    def num_pairs(self) -> int:
        """How many pairs of query and key are computed, those above the diagonal of causal segments left out."""
        return sum(map(_num_pairs, self.segments))


# What a layer gets: None, a 4-D tensor, a block mask of flex attention, or segments.
AttentionMask = Any


def _num_pairs(segment: Segment) -> int:
    rows, queries, keys = (end - first for first, end in segment[:3])
    return rows * (queries * keys - segment.is_causal * queries * (queries - 1) // 2)


def transfusion_mask(
    config: TransfusionConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Cache | None,
    image_mask: Tensor | None,
    document_ids: Tensor | None = None,
    training: bool = False,
) -> AttentionMask:
    """Causal everywhere, bidirectional inside each image (paper, section 3 and figure 4).

    Position i may look at j where `j <= i`, or where both are patches of one image. Begin- and end-of-image tokens
    are causal, like text; so are patches with `config.image_attention = "causal"`. For
    `a red <boi> patch patch patch <eoi> heart`, with 1 where a row may look at a column:

        a        1 . . . . . . .
        red      1 1 . . . . . .
        <boi>    1 1 1 . . . . .
        patch    1 1 1 1 1 1 . .
        patch    1 1 1 1 1 1 . .
        patch    1 1 1 1 1 1 . .
        <eoi>    1 1 1 1 1 1 1 .
        heart    1 1 1 1 1 1 1 1

    Args:
        config: Names the attention implementation, which decides the form of the mask.
        inputs_embeds: (B, L, H); only its shape, dtype and device matter.
        attention_mask: (B, past + L) with 0 where a key is hidden from every query, or a finished 4-D mask.
        past_key_values: The cache, whose positions come before the L of this call.
        image_mask: (B, L), True at patches, or None where there is none.
        document_ids: (B, L), in rows that hold several documents; these do not see each other.
        training: Whether attention dropout is on, which the kernels for segments lack.

    Returns:
        What the attention implementation takes: None, a 4-D tensor or a block mask; or segments, for documents that
        SDPA is to attend to on a CPU, whose fused kernel would compute all that a mask hides, where that is more than
        many small calls cost.
    """
    if hasattr(attention_mask, "segments"):
        return attention_mask
    block_ids = None
    if image_mask is not None and config.image_attention == "bidirectional":
        block_ids = image_block_ids(image_mask.long(), 1)
        if past_key_values is not None:  # ids count from the first cached position
            block_ids = F.pad(block_ids, (past_key_values.get_seq_length(), 0), value=-1)
    if config._attn_implementation == "flex_attention" and attention_mask is None and past_key_values is None:
        rows = inputs_embeds.shape[:2]
        documents = inputs_embeds.new_zeros(rows, dtype=torch.long) if document_ids is None else document_ids
        return block_mask(documents, block_ids)
    same_document = None
    if document_ids is not None:
        if _takes_segments(config, inputs_embeds, attention_mask, training):
            segments = packed_segments(document_ids, block_ids)
            if segments.work(_pairs_per_key(inputs_embeds)) < document_ids.numel() * document_ids.shape[1]:
                return segments
        same_document = packed_sequence_mask_function(document_ids)
    # Without position_ids: transformers takes any jump in them for a border between packed documents, and takes none
    # for one where there is a mask or a cache.
    return create_causal_mask(
        config,
        inputs_embeds,
        attention_mask,
        past_key_values,
        and_mask_function=same_document,
        block_sequence_ids=block_ids,
    )


def _takes_segments(config: Any, hidden_states: Tensor, attention_mask: Tensor | None, training: bool) -> bool:
    is_plain = attention_mask is None and not (training and config.attention_dropout)
    on_cpu = hidden_states.device.type == "cpu" and not torch.compiler.is_compiling()
    return is_plain and on_cpu and config._attn_implementation == "sdpa"


def _pairs_per_key(hidden_states: Tensor) -> int:
    """What a call of the fused kernel does for each key beside its queries: it packs keys for half precision."""
    is_half = torch.is_autocast_enabled("cpu") or hidden_states.dtype.itemsize < 4
    return PAIRS_PER_KEY["half" if is_half else "single"]


def packed_segments(document_ids: Tensor, block_ids: Tensor | None) -> SegmentedMask:
    """The segments of rows in which documents lie one after the other.

    Args:
        document_ids: (B, L), which document a position belongs to; -1 at padding, which looks at nothing but padding.
        block_ids: (B, L), which image block it belongs to, -1 at text, as `image_block_ids` gives them; or None where
            images are causal, like text.
    """
    blocks = torch.full_like(document_ids, -1) if block_ids is None else block_ids
    segments: list[Segment] = []
    for row, (row_documents, row_blocks) in enumerate(zip(document_ids.tolist(), blocks.tolist(), strict=True)):
        start = 0
        for first, end in _runs(list(zip(row_documents, row_blocks, strict=True))):
            if first == 0 or row_documents[first] != row_documents[first - 1]:
                start = first
            segments += _segments_of_run(row, start, first, end, is_image=row_blocks[first] >= 0)
    return SegmentedMask(segments)


def _runs(values: list[Any]) -> Iterator[tuple[int, int]]:
    """(first, end) of each run of equal `values`."""
    borders = [0, *(i for i in range(1, len(values)) if values[i] != values[i - 1]), len(values)]
    return zip(borders, borders[1:], strict=False)


def _segments_of_run(row: int, start: int, first: int, end: int, is_image: bool) -> Iterator[Segment]:
    """The segments of the run from `first` to `end`, of a document that begins at `start`."""
    step = MAX_TEXT_QUERIES if first > start and not is_image else end - first
    for query in range(first, end, step):
        stop = min(query + step, end)
        yield Segment((row, row + 1), (query, stop), (start, stop), is_causal=not is_image)


def cached_segments(keys: Sequence[tuple[int, int]], num_queries: Sequence[int], is_causal: bool) -> SegmentedMask:
    """The segments of rows of which each has cached keys.

    Args:
        keys: For each row the (first, end) of the keys that its queries look at.
        num_queries: How many queries it has; what follows them in a batch of unlike rows is padding.
        is_causal: Whether they look at each other as text does, or as the patches of an image do.
    """
    kinds = list(zip(keys, num_queries, strict=True))
    return SegmentedMask(
        [Segment(rows, (0, kinds[rows[0]][1]), kinds[rows[0]][0], is_causal) for rows in _runs(kinds)]
    )


def segmented_attention(query: Tensor, key: Tensor, value: Tensor, mask: SegmentedMask, scaling: float) -> Tensor:
    """Attention of `query` (B, h, L, d) to `key` and `value` (B, h or fewer, K, d), as `mask` has it: (B, L, h, d).

    Queries of no segment come out as zeros.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if torch.is_autocast_enabled(query.device.type):  # which knows the public function, and not the kernel behind it
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        return _SegmentedAttention.apply(query, key, value, mask, scaling)
    output = _zeros_for(query, value)
    for segment in mask.segments:
        attended = F.scaled_dot_product_attention(
            _cut(query, segment, segment.queries),
            _cut(key, segment, segment.keys),
            _cut(value, segment, segment.keys),
            **_options(segment, query, scaling),
        )
        _cut(output.transpose(1, 2), segment, segment.queries).copy_(attended)
    return output


@torch.compiler.disable
def segmented_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: SegmentedMask,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`segmented_attention`, called as transformers' attention functions are."""
    return segmented_attention(query, key, value, attention_mask, scaling), None


class _SegmentedAttention(torch.autograd.Function):
    """The same with gradients, by the fused kernels of CPUs.

    Autograd would fill a gradient of zeros as long as the row for each segment and add it up, which makes long rows of
    many images quadratic in memory traffic; here all segments add into one.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: SegmentedMask, scaling: float) -> Tensor:
        output, norms = _zeros_for(query, value), []
        for segment in mask.segments:
            attended, norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _cut(query, segment, segment.queries),
                _cut(key, segment, segment.keys),
                _cut(value, segment, segment.keys),
                **_options(segment, query, scaling),
            )
            _cut(output.transpose(1, 2), segment, segment.queries).copy_(attended)
            norms.append(norm)
        ctx.save_for_backward(query, key, value, output, *norms)
        ctx.mask, ctx.scaling = mask, scaling
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, *norms = ctx.saved_tensors
        grads = [torch.zeros_like(tensor) for tensor in (query, key, value)]
        for segment, norm in zip(ctx.mask.segments, norms, strict=True):
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _cut(grad_outputs[0].transpose(1, 2), segment, segment.queries),
                _cut(query, segment, segment.queries),
                _cut(key, segment, segment.keys),
                _cut(value, segment, segment.keys),
                _cut(output.transpose(1, 2), segment, segment.queries),
                norm,
                0.0,
                **_options(segment, query, ctx.scaling),
            )
            places = (segment.queries, segment.keys, segment.keys)
            for grad, part, place in zip(grads, parts, places, strict=True):
                _cut(grad, segment, place).add_(part)
        return *grads, None, None


def _zeros_for(query: Tensor, value: Tensor) -> Tensor:
    """(B, L, h, d), to be filled."""
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])


def _cut(tensor: Tensor, segment: Segment, places: tuple[int, int]) -> Tensor:
    """The rows of a segment and some positions, of `tensor` (B, h, positions, d): a view."""
    return tensor[slice(*segment.rows), :, slice(*places)]


def _options(segment: Segment, query: Tensor, scaling: float) -> dict[str, Any]:
    """The options of a kernel, which can hide what is above the diagonal of a square, and else needs a mask."""
    num_queries, num_keys = (end - first for first, end in segment[1:3])
    if not segment.is_causal or num_queries == num_keys:
        return {"is_causal": segment.is_causal, "attn_mask": None, "scale": scaling}
    hidden = query.new_full((num_queries, num_keys), -torch.inf).triu(num_keys - num_queries + 1)
    return {"is_causal": False, "attn_mask": hidden, "scale": scaling}


__all__ = [
    "AttentionMask",
    "Segment",
    "SegmentedMask",
    "cached_segments",
    "packed_segments",
    "segmented_attention",
    "segmented_attention_forward",
    "transfusion_mask",
]
