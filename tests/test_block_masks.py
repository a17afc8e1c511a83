import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from tests.test_attention import reference_mask
from transfusion.block_masks import BLOCK_SIZE, block_mask


def random_rows(seed: int, length: int) -> tuple[Tensor, Tensor]:
    """Two rows of documents of unlike length, with images of up to three blocks in them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    documents, images = torch.full((2, length), -1), torch.full((2, length), -1)
    for row in range(2):
        place, document, image = 0, draw(0, 5), 0
        while place < length - draw(0, 50):
            end = min(length, place + draw(1, 700))
            documents[row, place:end] = document
            while place < end:
                start = min(end, place + draw(0, 200))
                stop = min(end, start + draw(1, 400))
                images[row, start:stop] = image
                place, image = stop + 1, image + 1
            place, document = end, document + 1
    return documents, images


def by_block(allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Whether a block holds any allowed pair, and whether all of its are."""
    missing = -allowed.shape[1] % BLOCK_SIZE
    whole = torch.nn.functional.pad(allowed, (0, missing, 0, missing))
    blocks = whole.unflatten(2, (-1, BLOCK_SIZE)).unflatten(1, (-1, BLOCK_SIZE))
    return blocks.any(dim=4).any(dim=2), blocks.all(dim=4).all(dim=2)


def listed(counts: Tensor, order: Tensor) -> Tensor:
    blocks = torch.zeros(order.shape, dtype=torch.bool)
    is_listed = torch.arange(order.shape[-1]) < counts[..., None]
    return blocks.scatter(-1, order.long(), is_listed)[:, 0]


@pytest.mark.parametrize("length", [1024, 900, 100])
@pytest.mark.parametrize("seed", range(4))
def test_no_pair_is_lost_and_none_is_added(seed: int, length: int) -> None:
    documents, images = random_rows(seed, length)
    allowed = torch.stack([fast_reference(documents[row], images[row]) for row in range(2)])
    mask = block_mask(documents, images)
    some = listed(mask.kv_num_blocks, mask.kv_indices)
    everything = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    any_pair, all_pairs = by_block(allowed)
    assert not (some & everything).any()
    assert not (any_pair & ~some & ~everything).any()  # what may be seen is looked at
    assert not (everything & ~all_pairs).any()  # and taken whole where all of it may
    rows, queries, keys = torch.arange(2)[:, None, None], torch.arange(length)[:, None], torch.arange(length)
    assert torch.equal(mask.mask_mod(rows, None, queries, keys), allowed)
    # It finds what trying each pair finds, but for blocks whose pairs are all between documents.
    tried = create_block_mask(mask.mask_mod, 2, None, length, length, device="cpu")
    found = listed(tried.full_kv_num_blocks, tried.full_kv_indices)
    assert torch.equal(all_pairs, found) and torch.equal(everything, found)
    assert some.sum() <= 1.1 * listed(tried.kv_num_blocks, tried.kv_indices).sum() + 2


def fast_reference(documents: Tensor, images: Tensor) -> Tensor:
    places = torch.arange(len(documents))
    runs = torch.cat([torch.zeros(1, dtype=torch.long), (documents[1:] != documents[:-1]).long()]).cumsum(0)
    is_same_image = (images[:, None] >= 0) & (images[:, None] == images)
    return (runs[:, None] == runs) & ((places <= places[:, None]) | is_same_image)


def test_the_fast_reference_is_the_slow_one() -> None:
    documents, images = random_rows(0, 90)
    expected = reference_mask(documents, images)
    assert torch.equal(torch.stack([fast_reference(documents[row], images[row]) for row in range(2)]), expected)


def test_causal_images_are_text() -> None:
    documents, images = random_rows(1, 300)
    mask = block_mask(documents, None)
    rows, queries, keys = torch.arange(2)[:, None, None], torch.arange(300)[:, None], torch.arange(300)
    allowed = torch.stack([fast_reference(row, torch.full_like(row, -1)) for row in documents])
    assert torch.equal(mask.mask_mod(rows, None, queries, keys), allowed)
    assert images.max() > 0
