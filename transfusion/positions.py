"""Where a token is: rotary positions of one or two axes, continuous axial embeddings, and sinusoids.

Shapes: B rows, L positions, P patches of all images of the batch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .latents import patch_coordinates, patch_image_index


AXIS_FREQUENCY_DIM = 64


def sinusoids(values: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Cosines, then sines, of `values` (N,) at `dim` / 2 geometrically falling frequencies: (N, dim) in float32.

    The features of Vaswani et al. 2017 as diffusion models use them (Ho et al. 2020, appendix B).
    """
    exponents = torch.arange(dim // 2, dtype=torch.float32, device=values.device) / (dim // 2)
    angles = values.float()[:, None] * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TransfusionRotaryEmbedding(nn.Module):
    """Rotary angles over the flat sequence index, images included (paper, section 4.1, footnote 4), or over two axes.

    With two coordinates a position, the frequencies take turns: the first, third, ... turn by the row, the others by
    the column. Text has both equal to its index, so it is turned exactly as by one coordinate.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.config = config
        rope_parameters: Any = config.rope_parameters
        self.rope_type = rope_parameters["rope_type"]
        inv_freq, self.attention_scaling = self.rope_init_fn(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @property
    def rope_init_fn(self) -> Callable[..., tuple[Tensor, float]]:
        """The function that makes the inverse frequencies of this rope type."""
        is_default = self.rope_type == "default"
        return self.compute_default_rope_parameters if is_default else ROPE_INIT_FUNCTIONS[self.rope_type]

    @staticmethod
    def compute_default_rope_parameters(config: Any, device: object = None) -> tuple[Tensor, float]:
        """Inverse frequencies (head_dim / 2,) of Su et al. 2021, and the attention scaling, which is 1."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
        rope_parameters: Any = config.rope_parameters
        return rope_parameters["rope_theta"] ** -exponents, 1.0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TransfusionRotaryEmbedding":
        """Move as any module does, but never cast: bfloat16 frequencies would turn position 1000 by radians."""
        before = self.inv_freq, self.original_inv_freq
        super()._apply(fn, recurse)
        if not self.inv_freq.is_meta and not before[0].is_meta:
            self.inv_freq, self.original_inv_freq = (tensor.to(self.inv_freq.device) for tensor in before)
        return self

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, L, head_dim) of `position_ids` (B, L) or (B, L, 2), in `hidden_states`' dtype."""
        frequencies = self.inv_freq.to(device=hidden_states.device, dtype=torch.float32)
        if position_ids.dim() == 2:
            positions = position_ids[..., None].float()
        else:
            axis = torch.arange(len(frequencies), device=position_ids.device) % 2
            positions = position_ids.float()[..., axis]
        angles = positions * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def patch_position_ids(position_ids: Tensor, image_mask: Tensor, image_grids: Tensor, num_patches: int) -> Tensor:
    """Give each patch the row and column of its place, and text its index twice: (B, L, 2) float.

    The grid of an image is laid along the diagonal, its centre on the centre of the positions that its patches take,
    so that text keeps its positions (as the generalised rotary positions of HunyuanImage 3.0 do).

    Args:
        position_ids: (B, L) or (1, L), the flat index of each position.
        image_mask: (B, L), True at patches.
        image_grids: (N, 2), rows and columns of patches of each image in reading order.
        num_patches: P, to which the grids sum.
    """
    image_index = patch_image_index(image_grids, num_patches)
    coordinates, grids = patch_coordinates(image_grids, image_index), image_grids[image_index]
    flat_index = coordinates[:, :1] * grids[:, 1:] + coordinates[:, 1:]
    offsets = coordinates + (grids.prod(dim=1, keepdim=True) - grids) / 2 - flat_index
    diagonal = position_ids.expand(image_mask.shape)[..., None].float().repeat(1, 1, 2)
    return diagonal + torch.zeros_like(diagonal).masked_scatter(image_mask[..., None], offsets)


def rotate_half(x: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + dim / 2]) by a quarter."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_pos_emb(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate `query` and `key` (B, heads, L, head_dim) by the angles behind `cos` and `sin` (B, L, head_dim)."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin


class AxisEmbedding(nn.Module):
    """A two-layer network from the coordinate on one axis to a vector."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(AXIS_FREQUENCY_DIM, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, coordinates: Tensor) -> Tensor:
        """Embed whole `coordinates` (n,) of 0 or more: (n, dim)."""
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
        device = next(self.parameters()).device
        tables = [axis(torch.arange(int(size), device=device)) for axis, size in zip(self.axes, sizes, strict=True)]
        return [table.reshape(*shape, table.shape[-1]) for table, shape in zip(tables, shapes, strict=True)]

    def at(self, coordinates: Tensor) -> Tensor:
        """Embed `coordinates` (P, axes), whole numbers of 0 or more: (P, dim)."""
        places = coordinates.unbind(dim=1)
        # A table per axis is less work, but its length depends on values, which neither graphs nor meta tensors have.
        is_graph = torch.compiler.is_compiling() or (coordinates.is_cuda and torch.cuda.is_current_stream_capturing())
        if is_graph or coordinates.is_meta:
            return torch.stack([axis(place) for axis, place in zip(self.axes, places, strict=True)]).sum(0)
        sizes = (coordinates.amax(dim=0) + 1).tolist() if len(coordinates) else [1] * len(self.axes)
        lengths = [torch.arange(size, device=coordinates.device) for size in sizes]
        tables = [axis(length) for axis, length in zip(self.axes, lengths, strict=True)]
        return torch.stack([table[place] for table, place in zip(tables, places, strict=True)]).sum(0)


def packed_documents(position_ids: Tensor, image_mask: Tensor | None) -> Tensor | None:
    """(B, L) which document of its row each position belongs to; None where every row is one document.

    A document begins where positions fall back. So it does where text stays at 0, as after a document of one token;
    the patches of an image may share a position, at the begin of a row too.

    Args:
        position_ids: (B, L).
        image_mask: (B, L), True at patches, or None where there is none.
    """
    before, here = position_ids[:, :-1], position_ids[:, 1:]
    is_alone = (before == 0) & (here == 0)
    if image_mask is not None:
        is_alone = is_alone & ~(image_mask[:, :-1] | image_mask[:, 1:])
    begins = F.pad((here < before) | is_alone, (1, 0))
    if not (torch.compiler.is_compiling() or begins.is_meta or begins.any()):
        return None
    return begins.cumsum(dim=1)


__all__ = [
    "AxisEmbedding",
    "ContinuousAxialPositionalEmbedding",
    "TransfusionRotaryEmbedding",
    "apply_rotary_pos_emb",
    "packed_documents",
    "patch_position_ids",
    "sinusoids",
]
