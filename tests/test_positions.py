import math

import pytest
import torch

from transfusion.positions import AXIS_FREQUENCY_DIM, ContinuousAxialPositionalEmbedding, sinusoids


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
