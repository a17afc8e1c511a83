from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.tiny import tiny_config
from transfusion.attention import (
    MAX_TEXT_QUERIES,
    Segment,
    SegmentedMask,
    cached_segments,
    packed_segments,
    segmented_attention,
    transfusion_mask,
)
from transfusion.latents import image_block_ids


# Two rows of documents: texts and images of 97 ... 98 in any order, with padding at the end of the second.
ROWS = torch.tensor(
    [
        [5, 6, 7, 97, 99, 99, 99, 99, 98, 8, 9, 5, 97, 99, 99, 98, 97, 99, 99, 99, 98, 3],
        [97, 99, 99, 98, 5, 6, 5, 5, 5, 5, 97, 99, 98, 4, 4, 4, 4, 4, 4, 0, 0, 0],
    ]
)
DOCUMENTS = torch.tensor([[0] * 11 + [1] * 11, [0] * 6 + [1] * 8 + [2] * 5 + [-1] * 3])


def dense(mask: SegmentedMask, shape: tuple[int, int, int]) -> Tensor:
    """(B, L, K), True where a segment lets a query look at a key; each query is in one segment."""
    allowed = torch.zeros(shape, dtype=torch.bool)
    held = torch.zeros(shape[:2], dtype=torch.long)
    for rows, queries, keys, is_causal in mask.segments:
        length = keys[1] - keys[0]
        for row in range(*rows):
            for query in range(*queries):
                last = length - (queries[1] - 1 - query) if is_causal else length
                allowed[row, query, keys[0] : keys[0] + last] = True
                held[row, query] += 1
    assert (held == 1).all()
    return allowed


def reference_mask(documents: Tensor, blocks: Tensor) -> Tensor:
    """(B, L, L), pair by pair."""
    size = documents.shape[1]
    allowed = torch.zeros(len(documents), size, size, dtype=torch.bool)
    for row in range(len(documents)):
        for i in range(size):
            for j in range(size):
                same_document = documents[row, i] == documents[row, j]
                same_image = blocks[row, i] >= 0 and blocks[row, i] == blocks[row, j]
                allowed[row, i, j] = same_document and (j <= i or same_image)
    return allowed


def attention_by_mask(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scaling: float) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~allowed[:, None], -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("max_queries", [2, MAX_TEXT_QUERIES])
def test_packed_segments_are_the_mask(max_queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transfusion.attention.MAX_TEXT_QUERIES", max_queries)
    blocks = image_block_ids(ROWS, 99)
    mask = packed_segments(DOCUMENTS, blocks)
    allowed = reference_mask(DOCUMENTS, blocks)
    assert torch.equal(dense(mask, allowed.shape), allowed)
    assert mask.num_pairs() == allowed.sum()


def test_images_without_blocks_are_causal() -> None:
    mask = packed_segments(DOCUMENTS, None)
    expected = reference_mask(DOCUMENTS, torch.full_like(DOCUMENTS, -1))
    assert torch.equal(dense(mask, expected.shape), expected)


def test_long_text_is_cut_where_a_triangle_would_grow() -> None:
    documents = torch.zeros(1, 3 * MAX_TEXT_QUERIES + 3, dtype=torch.long)
    blocks = torch.full_like(documents, -1)
    assert len(packed_segments(documents, blocks).segments) == 1  # a square, which needs no mask
    blocks[0, 1:3] = 0
    segments = packed_segments(documents, blocks).segments
    assert [segment.queries[1] - segment.queries[0] for segment in segments] == [1, 2, *[MAX_TEXT_QUERIES] * 3]


@pytest.mark.parametrize("is_causal", [False, True])
def test_rows_alike_are_one_segment(is_causal: bool) -> None:
    firsts, queries = [3, 3, 0, 5, 5], [4, 4, 4, 4, 2]
    keys = [(first, 5 + count) for first, count in zip(firsts, queries, strict=True)]
    mask = cached_segments(keys, queries, is_causal)
    assert [segment.rows for segment in mask.segments] == [(0, 2), (2, 3), (3, 4), (4, 5)]
    query, key, value = (torch.randn(5, 2, length, 8, dtype=torch.float64) for length in (4, 9, 9))
    output = segmented_attention(query, key, value, mask, 0.3)
    for row, ((first, end), count) in enumerate(zip(keys, queries, strict=True)):
        allowed = torch.ones(1, count, end - first, dtype=torch.bool)
        queries, keys_alone, values = query[row, None, :, :count], key[row, None, :, first:end], value[row, None]
        allowed = allowed.tril(end - first - count) if is_causal else allowed
        assert torch.allclose(
            output[row, None, :count],
            attention_by_mask(queries, keys_alone, values[:, :, first:end], allowed, 0.3),
            atol=1e-12,
        )
        assert not output[row, count:].any()


@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention_and_its_gradients_are_those_of_a_mask(key_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 22, 4, 8)  # laid out as projections are
    query = torch.randn(shape, dtype=torch.float64, generator=generator).transpose(1, 2)
    key, value = (
        torch.randn(2, 22, key_heads, 8, dtype=torch.float64, generator=generator).transpose(1, 2) for _ in range(2)
    )
    direction = torch.randn(shape, dtype=torch.float64, generator=generator)
    blocks = image_block_ids(ROWS, 99)
    mask, allowed = packed_segments(DOCUMENTS, blocks), reference_mask(DOCUMENTS, blocks)
    attentions: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
        lambda query, key, value: segmented_attention(query, key, value, mask, 0.3),
        lambda query, key, value: attention_by_mask(query, key, value, allowed, 0.3),
    ]
    results = []
    for attention in attentions:
        states = query.clone().requires_grad_(), key.clone().requires_grad_(), value.clone().requires_grad_()
        output = attention(*states)
        results.append([output, *torch.autograd.grad((output * direction).sum(), states)])
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours, expected, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(segmented_attention(query, key, value, mask, 0.3), results[1][0], atol=1e-12)


def test_gradients_by_finite_differences() -> None:
    mask = SegmentedMask([Segment((0, 1), (0, 2), (0, 2), True), Segment((0, 1), (2, 3), (0, 3), False)])
    states = [torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda q, k, v: segmented_attention(q, k, v, mask, 0.5), states)


def test_segments_are_taken_where_they_are_less_work_than_a_mask() -> None:
    def taken(num_images: int, patches: int, text: int, half: bool = False) -> bool:
        blocks = [block for image in range(num_images) for block in [-1] * text + [image] * patches]
        config = tiny_config(attn_implementation="sdpa")
        hidden = torch.zeros(1, len(blocks), 8, dtype=torch.bfloat16 if half else torch.float32)
        is_patch = torch.tensor([blocks]) >= 0
        documents = torch.zeros(1, len(blocks), dtype=torch.long)
        return isinstance(transfusion_mask(config, hidden, None, None, is_patch, documents), SegmentedMask)

    # As measured at 4,000 positions: small images pay in float32 alone, large ones in both.
    assert taken(49, 64, 18) and not taken(49, 64, 18, half=True)
    assert taken(14, 256, 30) and taken(14, 256, 30, half=True)
    assert not taken(4, 4, 3)


def test_work_is_counted_in_pairs_and_keys() -> None:
    triangle = Segment((0, 1), (0, 4), (0, 4), is_causal=True)
    image = Segment((0, 2), (4, 7), (0, 7), is_causal=False)
    text = Segment((0, 1), (7, 9), (0, 9), is_causal=True)
    assert SegmentedMask([triangle, image, text]).work(0) == 10 + 2 * 21 + 17
    assert SegmentedMask([triangle, image, text]).work(5) == 10 + 2 * 21 + 17 + 5 * (4 + 2 * 7 + 9)
