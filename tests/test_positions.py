import math
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.tiny import document, make_batch, tiny_config, tiny_model
from transfusion.modeling_transfusion import TransfusionForMultimodalGeneration
from transfusion.positions import (
    AXIS_FREQUENCY_DIM,
    ContinuousAxialPositionalEmbedding,
    TransfusionRotaryEmbedding,
    apply_rotary_pos_emb,
    packed_documents,
    patch_position_ids,
    sinusoids,
)


def test_sinusoids_by_the_formula() -> None:
    values = torch.tensor([0.0, 1.0, 37.5, 999.0])
    for row, value in zip(sinusoids(values, 8).tolist(), values.tolist(), strict=True):
        angles = [value * 10000 ** (-k / 4) for k in range(4)]
        assert row == pytest.approx([*map(math.cos, angles), *map(math.sin, angles)], abs=1e-4)
    assert torch.equal(sinusoids(torch.tensor([5, 499]), 16), sinusoids(torch.tensor([5.0, 499.0]), 16))


def slow_embedding(embedding: ContinuousAxialPositionalEmbedding, place: tuple[int, ...]) -> torch.Tensor:
    """One place: each axis's network, at its coordinate."""
    total = torch.zeros(())
    for axis, coordinate in zip(embedding.axes, place, strict=True):
        hidden = axis.linear_1(sinusoids(torch.tensor([coordinate]), AXIS_FREQUENCY_DIM, 1000.0))
        total = total + axis.linear_2(hidden * torch.sigmoid(hidden))[0]
    return total


@pytest.mark.parametrize("sizes", [(5,), (3, 4), (2, 3, 2)])
def test_a_grid_is_row_major_and_the_sum_over_axes(sizes: tuple[int, ...]) -> None:
    embedding = ContinuousAxialPositionalEmbedding(8, num_axes=len(sizes))
    places = torch.cartesian_prod(*map(torch.arange, sizes)).reshape(-1, len(sizes))
    expected = torch.stack([slow_embedding(embedding, tuple(place.tolist())) for place in places])
    torch.testing.assert_close(embedding(sizes), expected)
    shuffled = places[torch.randperm(len(places))]
    by_place = torch.stack([slow_embedding(embedding, tuple(place.tolist())) for place in shuffled])
    torch.testing.assert_close(embedding.at(shuffled), by_place)


def test_a_small_grid_is_the_corner_of_a_large_one() -> None:
    embedding = ContinuousAxialPositionalEmbedding(8)
    large = embedding((9, 7)).unflatten(0, (9, 7))
    torch.testing.assert_close(embedding((4, 3)).unflatten(0, (4, 3)), large[:4, :3])


def test_the_spread_does_not_grow_with_the_grid_and_neighbours_differ() -> None:
    torch.manual_seed(0)
    embedding = ContinuousAxialPositionalEmbedding(64, num_axes=1)
    table = embedding((1024,)).detach()
    assert table[512:].norm(dim=1).mean() < 1.5 * table[:32].norm(dim=1).mean()
    assert (table[1:] - table[:-1]).norm(dim=1).min() > 0.01 * table.norm(dim=1).mean()


def test_bfloat16_keeps_large_coordinates_apart() -> None:
    table = ContinuousAxialPositionalEmbedding(64, num_axes=1).bfloat16()((600,))
    assert len(table.unique(dim=0)) == 600


def test_wrong_number_of_axes() -> None:
    with pytest.raises(ValueError, match=r"sizes=\(2, 2, 2\) has 3 axes; this embedding has 2"):
        ContinuousAxialPositionalEmbedding(8)((2, 2, 2))


# -- rotary positions of two axes


def slow_positions(ids: list[int], grids: list[tuple[int, int]], start: int) -> list[tuple[float, float]]:
    """Walk along a row: text stands on the diagonal, and an image has its middle in the middle of its positions."""
    positions: list[tuple[float, float]] = []
    grids = list(grids)
    while len(positions) < len(ids):
        here = start + len(positions)
        if ids[len(positions)] != 99:
            positions.append((here, here))
            continue
        rows, columns = grids.pop(0)
        middle = here + (rows * columns - 1) / 2
        positions += [
            (middle + row - (rows - 1) / 2, middle + column - (columns - 1) / 2)
            for row in range(rows)
            for column in range(columns)
        ]
    return positions


def test_patches_stand_at_row_and_column_around_the_middle_of_their_image() -> None:
    rows: list[list[int | tuple[int, int]]] = [[5, (2, 3), 6, (1, 4), 7], [(3, 3), 5, 6, (1, 1), 8, 8, 8, 8]]
    batch = make_batch(rows)
    start = torch.tensor([[0], [40]])
    flat = torch.arange(batch["input_ids"].shape[1])[None] + start
    is_patch = batch["input_ids"] == 99
    found = patch_position_ids(flat, is_patch, batch["image_grids"], int(is_patch.sum()))
    for row, parts in enumerate(rows):
        grids = [part for part in parts if isinstance(part, tuple)]
        expected = slow_positions(document(*parts), grids, int(start[row]))
        assert found[row, : len(expected)].tolist() == [list(place) for place in expected]


def test_text_is_turned_by_two_axes_as_by_one_to_the_bit() -> None:
    rotary = TransfusionRotaryEmbedding(tiny_config())
    flat = torch.randint(0, 4096, (2, 50))
    for one, two in zip(
        rotary(torch.zeros(1), flat), rotary(torch.zeros(1), flat[..., None].repeat(1, 1, 2)), strict=True
    ):
        assert torch.equal(one, two)


def test_attention_between_patches_depends_on_how_far_apart_their_rows_and_columns_are() -> None:
    rotary = TransfusionRotaryEmbedding(tiny_config(head_dim=16))
    query, key = torch.randn(1, 1, 1, 16).double(), torch.randn(1, 1, 1, 16).double()

    def score(place: list[float], other: list[float]) -> float:
        cos, sin = rotary(query, torch.tensor([[place, other]]))
        turned = apply_rotary_pos_emb(query.repeat(1, 1, 2, 1), key.repeat(1, 1, 2, 1), cos, sin)
        return float((turned[0][0, 0, 0] * turned[1][0, 0, 1]).sum())

    assert score([3, 5], [1, 9]) == pytest.approx(score([13, 25], [11, 29]), abs=1e-5)
    assert score([3, 5], [1, 9]) != pytest.approx(score([5, 3], [9, 1]), abs=1e-3)


def test_two_axes_turn_by_alternating_frequencies() -> None:
    config = tiny_config(head_dim=8)
    rotary = TransfusionRotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1), torch.tensor([[[3.5, 7.0]]]))
    frequencies = [10000 ** (-k / 4) for k in range(4)]
    angles = [place * frequency for place, frequency in zip([3.5, 7.0, 3.5, 7.0], frequencies, strict=True)]
    assert cos[0, 0].tolist() == pytest.approx([math.cos(angle) for angle in angles] * 2, abs=1e-5)
    assert sin[0, 0].tolist() == pytest.approx([math.sin(angle) for angle in angles] * 2, abs=1e-5)


@pytest.mark.parametrize("overrides", [{}, {"axial_positions": True}, {"image_rope": "2d"}], ids=str)
def test_permuting_patches_changes_more_than_their_order(overrides: dict[str, bool | str]) -> None:
    model = tiny_model(**overrides)
    batch = make_batch([[5, (2, 3), 6]])
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    timesteps = torch.tensor([300])
    straight = model(**batch, timesteps=timesteps).image_prediction
    batch["latent_patches"] = batch["latent_patches"][order]
    permuted = model(**batch, timesteps=timesteps).image_prediction
    assert (permuted - straight[order]).abs().max() > 1e-4


def test_a_document_begins_where_positions_fall_back() -> None:
    """Not where they stay or jump: patches of an image may share one, with the tokens around them."""
    no_patch = torch.zeros(1, 6, dtype=torch.bool)
    patches = torch.tensor([[False, True, True, False, False, False]])
    for positions, image_mask, expected in (
        ([0, 1, 2, 3, 4, 5], None, None),
        ([0, 1, 1, 2, 9, 10], no_patch, None),
        ([0, 0, 0, 0, 1, 2], patches, None),
        ([0, 0, 0, 1, 0, 1], no_patch, [0, 1, 2, 2, 3, 3]),
        ([0, 0, 0, 1, 0, 0], patches, [0, 0, 0, 0, 1, 2]),
        ([4, 5, 3, 4, 5, 6], None, [0, 0, 1, 1, 1, 1]),
    ):
        found = packed_documents(torch.tensor([positions]), image_mask)
        assert (found if found is None else found[0].tolist()) == expected


# -- what positions are for

TOP_AND_BOTTOM = torch.tensor([1.0, 1.0, -1.0, -1.0])


def drawn_contrast(model: TransfusionForMultimodalGeneration) -> float:
    """Train on a picture whose upper rows are +1 and lower ones -1; how much of it is drawn then: 1 is all, 0 nothing.

    All patches get one rotary position, as in the best-known implementation.
    """
    rows, steps = 4, 10
    ids = torch.tensor([document(5, (4, 4))]).repeat(rows, 1)
    position_ids = torch.where(ids == 99, 2, torch.arange(ids.shape[1]))
    common = {"input_ids": ids, "position_ids": position_ids, "image_grids": torch.tensor([[4, 4]] * rows)}
    x_0 = TOP_AND_BOTTOM.repeat_interleave(4)[:, None].repeat(rows, model.config.patch_dim)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        noise = torch.randn(x_0.shape, generator=generator)
        timesteps = 1000 * torch.rand(rows, generator=generator)
        optimizer.zero_grad()
        model(**common, latent_patches=x_0, timesteps=timesteps, noise=noise).loss.backward()
        optimizer.step()
    x_t = torch.randn(x_0.shape, generator=generator)
    for step in range(steps, 0, -1):
        timesteps = torch.full((rows,), 1000.0 * step / steps)
        with torch.no_grad():
            x_t = x_t - model(**common, latent_patches=x_t, timesteps=timesteps).image_prediction / steps
    return float((x_t * x_0).mean())


def test_a_picture_of_top_and_bottom_is_learnt_where_positions_tell_them_apart() -> None:
    options: list[dict[str, Any]] = [{}, {"axial_positions": True}, {"image_rope": "2d"}]
    contrasts = []
    for overrides in options:
        torch.manual_seed(0)
        contrasts.append(
            drawn_contrast(TransfusionForMultimodalGeneration(tiny_config(objective="flow", **overrides)))
        )
    blind, axial, rotary = contrasts
    assert abs(blind) < 0.2
    assert 0.8 < axial < 1.2
    assert 0.8 < rotary < 1.2


def test_places_compile_into_one_graph() -> None:
    """Of any number and size; there each place runs through the networks, in place of a table of each axis."""
    torch._dynamo.reset()
    embedding, counter = ContinuousAxialPositionalEmbedding(8).double(), CompileCounter()
    compiled = torch.compile(embedding.at, fullgraph=True, backend=counter, dynamic=True)
    for rows, columns in ((2, 3), (7, 2), (5, 40)):
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        torch.testing.assert_close(compiled(places), embedding.at(places))
    assert counter.frame_count == 1
