"""Where a patch is: continuous axial positional embeddings, and the sinusoids that they and timesteps are read by."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


AXIS_FREQUENCY_DIM = 64


def sinusoids(values: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Cosines, then sines, of `values` (N,) at `dim` / 2 geometrically falling frequencies: (N, dim) in float32.

    The features of Vaswani et al. 2017 as diffusion models use them (Ho et al. 2020, appendix B).
    """
    exponents = torch.arange(dim // 2, dtype=torch.float32, device=values.device) / (dim // 2)
    angles = values.float()[:, None] * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class AxisEmbedding(nn.Module):
    """A two-layer network from the coordinate on one axis to a vector."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(AXIS_FREQUENCY_DIM, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, length: int) -> Tensor:
        """Embed the coordinates 0 .. `length` - 1: (length, dim)."""
        coordinates = torch.arange(length, device=self.linear_1.weight.device)
        features = sinusoids(coordinates, AXIS_FREQUENCY_DIM, max_period=1000.0).to(self.linear_1.bias.dtype)
        return self.linear_2(nn.functional.silu(self.linear_1(features)))


class ContinuousAxialPositionalEmbedding(nn.Module):
    """The sum of one network per axis, for grids of any size and any number of axes.

    The networks of the best-known implementation read the bare index, so that the embedding grows with it and the
    indices above 256 collapse in bfloat16. Ours read sinusoids of it, computed in float32: bounded for any grid, and a
    smaller grid is the corner of a larger one. A grid costs the sum of its sides in network rows, not their product.

    Args:
        dim: Width of the embedding.
        num_axes: 2 for images.
    """

    def __init__(self, dim: int, num_axes: int = 2) -> None:
        super().__init__()
        self.axes = nn.ModuleList([AxisEmbedding(dim) for _ in range(num_axes)])

    def forward(self, sizes: Sequence[int]) -> Tensor:
        """Embed a grid: (product of `sizes`, dim), the last axis running fastest."""
        return torch.stack([table.flatten(0, -2) for table in torch.broadcast_tensors(*self.factors(sizes))]).sum(0)

    def factors(self, sizes: Sequence[int]) -> list[Tensor]:
        """One table per axis, shaped to be summed: (n_1, 1, ..., dim), (1, n_2, ..., dim), ..."""
        if len(sizes) != len(self.axes):
            raise ValueError(f"sizes={tuple(sizes)} has {len(sizes)} axes; this embedding has {len(self.axes)}.")
        shapes = [[-1 if a == axis else 1 for a in range(len(sizes))] for axis in range(len(sizes))]
        tables = [axis(int(size)) for axis, size in zip(self.axes, sizes, strict=True)]
        return [table.reshape(*shape, table.shape[-1]) for table, shape in zip(tables, shapes, strict=True)]

    def at(self, coordinates: Tensor) -> Tensor:
        """Embed `coordinates` (P, axes), whole numbers of 0 or more: (P, dim)."""
        sizes = (coordinates.amax(dim=0) + 1).tolist() if len(coordinates) else [1] * len(self.axes)
        tables = [axis(size) for axis, size in zip(self.axes, sizes, strict=True)]
        return torch.stack([table[place] for table, place in zip(tables, coordinates.T, strict=True)]).sum(0)


__all__ = ["AxisEmbedding", "ContinuousAxialPositionalEmbedding", "sinusoids"]
