"""Patch vectors and grids against loops that read one number at a time."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transfusion.latents import (
    grid_coordinates,
    image_block_ids,
    patch_image_index,
    patch_places,
    patchify,
    split_images,
    unpatchify,
)


def slow_patchify(latents: Tensor, patch_size: int) -> Tensor:
    channels, height, width = latents.shape
    patches = []
    for row, column in itertools.product(range(height // patch_size), range(width // patch_size)):
        vector = []
        for channel, y, x in itertools.product(range(channels), range(patch_size), range(patch_size)):
            vector.append(latents[channel, row * patch_size + y, column * patch_size + x])
        patches.append(torch.stack(vector))
    return torch.stack(patches)


SIZES = pytest.mark.parametrize(
    ("channels", "rows", "columns", "patch_size"),
    [(4, 2, 2, 2), (3, 1, 5, 1), (8, 3, 2, 2), (1, 2, 4, 3), (2, 4, 1, 4), (5, 1, 1, 8)],
)


@SIZES
def test_patchify_equals_the_loop(channels: int, rows: int, columns: int, patch_size: int) -> None:
    latents = torch.randn(channels, rows * patch_size, columns * patch_size)
    patches = patchify(latents, patch_size)
    assert patches.shape == (rows * columns, channels * patch_size**2)
    assert torch.equal(patches, slow_patchify(latents, patch_size))


@SIZES
def test_a_batch_is_its_images(channels: int, rows: int, columns: int, patch_size: int) -> None:
    latents = torch.randn(3, channels, rows * patch_size, columns * patch_size)
    patches = patchify(latents, patch_size)
    assert torch.equal(patches, torch.stack([slow_patchify(image, patch_size) for image in latents]))
    assert torch.equal(unpatchify(patches, (rows, columns), patch_size), latents)


@settings(deadline=None)
@given(
    channels=st.integers(1, 5),
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    patch_size=st.integers(1, 4),
)
def test_unpatchify_inverts_patchify(channels: int, rows: int, columns: int, patch_size: int) -> None:
    latents = torch.arange(channels * rows * columns * patch_size**2).view(
        channels, rows * patch_size, columns * patch_size
    )
    assert torch.equal(unpatchify(patchify(latents, patch_size), (rows, columns), patch_size), latents)


def test_patches_keep_dtype_and_gradient() -> None:
    latents = torch.randn(2, 4, 6, dtype=torch.bfloat16, requires_grad=True)
    patches = patchify(latents, 2)
    assert patches.dtype == torch.bfloat16
    patches.sum().backward()
    assert torch.equal(latents.grad, torch.ones_like(latents))


@pytest.mark.parametrize(("height", "width", "named"), [(7, 6, "height is 7"), (6, 7, "width is 7")])
def test_patchify_refuses_a_side_that_patches_do_not_fill(height: int, width: int, named: str) -> None:
    with pytest.raises(ValueError, match=rf"{named}.*patch_size=2.*crop or resize.*to 6\."):
        patchify(torch.zeros(3, height, width), 2)


def test_patchify_refuses_other_axes() -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 4\); give \(C, H, W\)"):
        patchify(torch.zeros(4, 4), 2)


def test_unpatchify_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"6 patches do not fill the grid 2 x 2 = 4; give the grid"):
        unpatchify(torch.zeros(6, 8), (2, 2), 2)
    with pytest.raises(
        ValueError, match=r"length 6, which is no multiple of patch_size\*\*2 = 4; give the patch size"
    ):
        unpatchify(torch.zeros(4, 6), (2, 2), 2)
    with pytest.raises(ValueError, match=r"shape \(8,\); give \(rows \* columns"):
        unpatchify(torch.zeros(8), (1, 1), 2)


def test_split_images_cuts_in_reading_order() -> None:
    patches = torch.randn(2 * 3 + 1 + 4, 8)
    images = split_images(patches, torch.tensor([[2, 3], [1, 1], [4, 1]]))
    assert [len(image) for image in images] == [6, 1, 4]
    assert torch.equal(torch.cat(images), patches)


def test_split_images_takes_no_image() -> None:
    assert split_images(torch.zeros(0, 8), torch.zeros(0, 2, dtype=torch.long)) == []


def test_split_images_refuses_grids_of_another_sum() -> None:
    with pytest.raises(
        ValueError, match=r"\[\[2, 3\], \[1, 1\]\] describe 7 patches, but latent_patches hold 8; give"
    ):
        split_images(torch.zeros(8, 4), torch.tensor([[2, 3], [1, 1]]))


def test_split_images_refuses_an_empty_grid() -> None:
    with pytest.raises(ValueError, match=r"grid 0 x 3; an image has at least 1 x 1"):
        split_images(torch.zeros(2, 4), torch.tensor([[0, 3], [1, 2]]))
    with pytest.raises(ValueError, match=r"grid -1 x -2; an image has at least 1 x 1"):
        split_images(torch.zeros(2, 4), torch.tensor([[-1, -2]]))


@pytest.mark.parametrize("shape", [(2,), (2, 3), (1, 2, 2)])
def test_grids_have_two_columns(shape: tuple[int, ...]) -> None:
    grids = torch.ones(shape, dtype=torch.long)
    with pytest.raises(ValueError, match=r"image_grids has shape .*; give \(N, 2\)"):
        split_images(torch.zeros(2, 4), grids)
    with pytest.raises(ValueError, match=r"image_grids has shape .*; give \(N, 2\)"):
        patch_image_index(grids, 2)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=6))
def test_patch_image_index_equals_the_loop(grids: list[tuple[int, int]]) -> None:
    expected = [image for image, (rows, columns) in enumerate(grids) for _ in range(rows * columns)]
    index = patch_image_index(torch.tensor(grids, dtype=torch.long).view(-1, 2), len(expected))
    assert index.dtype == torch.long
    assert index.tolist() == expected


def slow_block_ids(row: list[int], image_token_id: int) -> list[int]:
    ids, block, inside = [], -1, False
    for token in row:
        if token == image_token_id and not inside:
            block += 1
        inside = token == image_token_id
        ids.append(block if inside else -1)
    return ids


@settings(deadline=None)
@given(st.integers(1, 12).flatmap(lambda n: st.lists(st.lists(st.integers(5, 7), min_size=n, max_size=n), min_size=1)))
def test_image_block_ids_equal_the_loop(rows: list[list[int]]) -> None:
    ids = image_block_ids(torch.tensor(rows), 7)
    assert ids.dtype == torch.long
    assert ids.tolist() == [slow_block_ids(row, 7) for row in rows]


def test_image_block_ids_count_within_the_row() -> None:
    rows = torch.tensor([[7, 7, 1, 7], [7, 1, 1, 1]])
    assert image_block_ids(rows, 7).tolist() == [[0, 0, -1, 1], [0, -1, -1, -1]]


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (4, 1), (1, 5)])
def test_grid_coordinates_are_in_reading_order(grid: tuple[int, int]) -> None:
    rows, columns = grid
    coordinates = grid_coordinates(grid)
    assert coordinates.dtype == torch.long
    assert coordinates.tolist() == [[row, column] for row in range(rows) for column in range(columns)]


def test_places_of_patches() -> None:
    mask = torch.rand(3, 7) < 0.5
    places = [row * 7 + position for row in range(3) for position in range(7) if mask[row, position]]
    assert patch_places(mask, len(places)).tolist() == places
    assert patch_places(torch.zeros(2, 3, dtype=torch.bool), 0).tolist() == []
