"""The patch codecs: patch vectors to hidden vectors and back, by linear layers or by a U-Net (paper, section 3).

Shapes: P patches of all images of the batch in reading order, N images, D = latent_channels * patch_size**2,
H = hidden_size; R guidance branches, which a decoder finds in order: all images of one branch, then all of the next.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .configuration import TransfusionConfig
from .latents import patch_coordinates, patch_image_index, patchify, unpatchify
from .positions import ContinuousAxialPositionalEmbedding, sinusoids


FREQUENCY_DIM = 256
NORM_EPS = 1e-5
# What the decoder of a U-Net takes from its encoder: the activations on the way down, for each grid of the batch.
Skips = list[tuple[Tensor, ...]]


class TimestepEmbedding(nn.Module):
    """Two layers that turn a noise level into a vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(FREQUENCY_DIM, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed `timesteps` (N,) as (N, width) in `dtype`."""
        features = sinusoids(timesteps, FREQUENCY_DIM).to(dtype)
        return self.linear_2(F.silu(self.linear_1(features)))


def dtype_of(layer: nn.Module) -> torch.dtype:
    """What `layer` computes in: the dtype of its bias, as a quantized weight holds integers."""
    return layer.bias.dtype


class LinearPatchEncoder(nn.Module):
    """Noisy patches and their image's timestep -> hidden vectors that enter the transformer.

    The paper adds the timestep embedding to every patch vector before the linear layer. We add a vector of width H
    after it: a linear layer maps the sum of two vectors to the sum of their images, so this contains the paper's form,
    and its parameter count is the one that fits the paper's "under 0.5 %" (Table 7).
    """

    def __init__(self, config: TransfusionConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.patch_dim, config.hidden_size)
        self.time_embed = TimestepEmbedding(config.hidden_size)
        self.position_embed = make_position_embedding(config)

    def forward(self, latent_patches: Tensor, timesteps: Tensor, image_grids: Tensor) -> tuple[Tensor, None]:
        """Encode `latent_patches` (P, D) of images of `image_grids` (N, 2), noised to `timesteps` (N,).

        Returns:
            Hidden vectors (P, H), and None: there are no skip connections.
        """
        latent_patches = latent_patches.to(dtype_of(self.proj))
        image_index = patch_image_index(image_grids, latent_patches.shape[0])
        hidden_states = self.proj(latent_patches) + self.time_embed(timesteps, latent_patches.dtype)[image_index]
        if self.position_embed is not None:
            hidden_states = hidden_states + self.position_embed.at(patch_coordinates(image_grids, image_index))
        return hidden_states, None


class LinearPatchDecoder(nn.Module):
    """Hidden vectors that leave the transformer -> the prediction for each patch."""

    def __init__(self, config: TransfusionConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.patch_dim)

    def forward(self, hidden_states: Tensor, skips: None, timesteps: Tensor, image_grids: Tensor) -> Tensor:
        """Decode `hidden_states` (R * P, H) to (R * P, D); the rest is for codecs that mix patches."""
        return self.proj(hidden_states.to(dtype_of(self.proj)))


class LinearSkipPatchEncoder(LinearPatchEncoder):
    """The linear encoder, which also hands the noisy patches on to `LinearSkipPatchDecoder`."""

    def forward(self, latent_patches: Tensor, timesteps: Tensor, image_grids: Tensor) -> tuple[Tensor, Tensor]:
        """As `LinearPatchEncoder`, and `latent_patches` (P, D) in place of None."""
        hidden_states, _ = super().forward(latent_patches, timesteps, image_grids)
        return hidden_states, latent_patches


class LinearSkipPatchDecoder(nn.Module):
    """The linear decoder, plus the noisy patch itself, each number times a scale that depends on the timestep.

    Noise and velocity hold the noise of every patch, D numbers of it, which otherwise has to pass through the
    transformer beside all else. The paper's U-Net has a way around it by its skips; Karras et al. 2022
    (arXiv:2206.00364, section 5) scale the noisy image so. Not in the paper for linear layers.
    """

    def __init__(self, config: TransfusionConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.patch_dim)
        self.skip_scale = TimestepEmbedding(config.patch_dim)

    def forward(self, hidden_states: Tensor, skips: Tensor, timesteps: Tensor, image_grids: Tensor) -> Tensor:
        """Decode `hidden_states` (R * P, H) beside the noisy patches `skips` (P, D) to (R * P, D)."""
        hidden_states = hidden_states.to(dtype_of(self.proj))
        image_index = patch_image_index(image_grids, hidden_states.shape[0])
        noisy_patches = skips.repeat(len(hidden_states) // max(len(skips), 1), 1)
        return self.proj(hidden_states) + self.skip_scale(timesteps, hidden_states.dtype)[image_index] * noisy_patches


class ZeroConv2d(nn.Conv2d):
    """A convolution that starts at zero."""

    def reset_parameters(self) -> None:
        """Set weight and bias to zero, except where transformers has loaded them."""
        init.zeros_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)


class UNetPatchEncoder(nn.Module):
    """The down blocks of a U-Net: noisy latents and timestep -> one hidden vector per patch.

    The paper (section 3, footnote 7) takes the blocks of Nichol & Dhariwal 2021 and Saharia et al. 2022, with a
    regular norm in place of the adaptive one, and gives no more than their size. Here each level has residual blocks
    with group norm and an added timestep, each followed by self-attention over its image, and halves the resolution
    until a patch is one position.
    """

    def __init__(self, config: TransfusionConfig) -> None:
        super().__init__()
        channels = unet_channels(config)
        self.patch_size = config.patch_size
        self.time_embed = TimestepEmbedding(4 * channels[0])
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], kernel_size=3, padding=1)
        self.down_blocks = nn.ModuleList(
            [make_down_block(channels, level, config.unet_layers_per_block) for level in range(len(channels))]
        )
        self.proj = nn.Linear(channels[-1], config.hidden_size)
        self.position_embed = make_position_embedding(config)

    def forward(self, latent_patches: Tensor, timesteps: Tensor, image_grids: Tensor) -> tuple[Tensor, Skips]:
        """Encode `latent_patches` (P, D) of images of `image_grids` (N, 2), noised to `timesteps` (N,).

        Returns:
            Hidden vectors (P, H), and all activations on the way down for the decoder.
        """
        if len(image_grids) == 0:
            encoded, skips = self.forward(*blank_image(latent_patches, timesteps, image_grids))
            return encoded[:0], skips
        latent_patches = latent_patches.to(dtype_of(self.proj))
        time_vectors = self.time_embed(timesteps, latent_patches.dtype)
        groups = group_by_grid(image_grids)
        hidden_states, skips = [], []
        for group in groups:
            latents = unpatchify(latent_patches[group.patches], group.grid, self.patch_size)
            coarsest, activations = self.down(latents, time_vectors[group.images])
            hidden_states.append(self.proj(coarsest.permute(0, 2, 3, 1)).flatten(0, 2))
            skips.append(activations)
        encoded = in_flat_order(hidden_states, groups)
        if self.position_embed is not None:
            image_index = patch_image_index(image_grids, latent_patches.shape[0])
            encoded = encoded + self.position_embed.at(patch_coordinates(image_grids, image_index))
        return encoded, skips

    def down(self, latents: Tensor, time_vectors: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Images (n, C, h, w) of one size -> (n, channels[-1], rows, columns), and every activation on the way."""
        hidden_states = self.conv_in(latents)
        activations: tuple[Tensor, ...] = (hidden_states,)
        for block in self.down_blocks:
            hidden_states, outputs = block(hidden_states, time_vectors)
            activations += outputs
        return hidden_states, activations


class UNetPatchDecoder(nn.Module):
    """The up blocks of the U-Net: hidden vectors, skips and timestep -> the prediction for each patch.

    Each residual block reads one activation of the way down beside its input, so it has one block more per level than
    the encoder. The last convolution starts at zero (Nichol & Dhariwal 2021), so an untrained model predicts zero.
    """

    def __init__(self, config: TransfusionConfig) -> None:
        super().__init__()
        channels = unet_channels(config)
        self.patch_size = config.patch_size
        self.time_embed = TimestepEmbedding(4 * channels[0])
        self.proj = nn.Linear(config.hidden_size, channels[-1])
        self.skips_per_block = config.unet_layers_per_block + 1
        self.up_blocks = nn.ModuleList(
            [make_up_block(channels, level, self.skips_per_block) for level in reversed(range(len(channels)))]
        )
        self.norm_out = nn.GroupNorm(num_norm_groups(channels), channels[0], eps=NORM_EPS)
        self.conv_out = ZeroConv2d(channels[0], config.latent_channels, kernel_size=3, padding=1)

    def forward(self, hidden_states: Tensor, skips: Skips, timesteps: Tensor, image_grids: Tensor) -> Tensor:
        """Decode `hidden_states` (R * P, H) with the `skips` of one encoding, which all R branches share.

        Args:
            hidden_states: (R * P, H).
            skips: What the encoder returned for N images.
            timesteps: (R * N,).
            image_grids: (R * N, 2), the N grids of the encoding, R times over.

        Returns:
            (R * P, D).
        """
        if len(image_grids) == 0:
            hidden_states, timesteps, image_grids = blank_image(hidden_states, timesteps, image_grids)
            return self.forward(hidden_states, skips, timesteps, image_grids)[:0]
        hidden_states = hidden_states.to(dtype_of(self.proj))
        time_vectors = self.time_embed(timesteps, hidden_states.dtype)
        groups = group_by_grid(image_grids)
        predictions = []
        for group, activations in zip(groups, skips, strict=True):
            vectors = self.proj(hidden_states[group.patches]).unflatten(1, group.grid)
            latents = self.up(vectors.permute(0, 3, 1, 2), activations, time_vectors[group.images])
            predictions.append(patchify(latents, self.patch_size).flatten(0, 1))
        return in_flat_order(predictions, groups)

    def up(self, hidden_states: Tensor, activations: tuple[Tensor, ...], time_vectors: Tensor) -> Tensor:
        """(R * n, channels[-1], rows, columns) and activations of n images -> the prediction (R * n, C, h, w)."""
        branches = len(hidden_states) // len(activations[0])
        skips = [activation.to(hidden_states.dtype).repeat(branches, 1, 1, 1) for activation in activations]
        for block in self.up_blocks:
            skips, block_skips = skips[: -self.skips_per_block], tuple(skips[-self.skips_per_block :])
            hidden_states = block(hidden_states, block_skips, time_vectors)
        return self.conv_out(F.silu(self.norm_out(hidden_states)))


class GridGroup(NamedTuple):
    """The images of one grid, in order.

    Attributes:
        grid: (rows, columns) of patches.
        images: (n,), which images these are.
        patches: (n, rows * columns), where their patches lie in the flat axis.
    """

    grid: tuple[int, int]
    images: Tensor
    patches: Tensor


def group_by_grid(image_grids: Tensor) -> list[GridGroup]:
    """Sort images by their grid, so that each group is one batch; grids come in order of their first image.

    `image_grids` (N, 2) is read on the host.
    """
    by_grid: dict[tuple[int, int], list[int]] = {}
    for image, (rows, columns) in enumerate(image_grids.tolist()):
        by_grid.setdefault((rows, columns), []).append(image)
    counts = image_grids.prod(dim=1)
    starts = counts.cumsum(dim=0) - counts
    groups = []
    for (rows, columns), members in by_grid.items():
        images = torch.tensor(members, dtype=torch.long, device=image_grids.device)
        places = torch.arange(rows * columns, device=image_grids.device)
        groups.append(GridGroup((rows, columns), images, starts[images, None] + places))
    return groups


def blank_image(vectors: Tensor, timesteps: Tensor, image_grids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One patch of zeros in place of no image, so that every parameter takes part and has its (zero) gradient.

    Training on several processes waits for each of them. `vectors` (0, any width) stay in the graph too.
    """
    return F.pad(vectors, (0, 0, 0, 1)), F.pad(timesteps, (0, 1)), F.pad(image_grids, (0, 0, 0, 1), value=1)


def in_flat_order(vectors: Sequence[Tensor], groups: Sequence[GridGroup]) -> Tensor:
    """Put the patches of all groups, (n * rows * columns, ...) each, back where they were: (P, ...)."""
    return torch.cat(list(vectors))[torch.cat([group.patches.flatten() for group in groups]).argsort()]


def unet_channels(config: TransfusionConfig) -> tuple[int, ...]:
    """Width of each level, from the full latent resolution down to one position per patch."""
    if config.unet_channels is None:  # patch_codec was changed after the config was made
        raise ValueError(
            "unet_channels is None: make the config with patch_codec='unet', which fills it in, or set both fields."
        )
    return tuple(config.unet_channels)


def num_norm_groups(channels: Sequence[int]) -> int:
    """Groups of every group norm: 32 as usual, or as many as divide all widths and leave each group 4 channels.

    A group of one channel at a single position would be normalised to nothing.
    """
    groups = math.gcd(32, *channels)
    while groups > 1 and 4 * groups > min(channels):
        groups //= 2
    return groups


def block_settings(channels: Sequence[int], level: int) -> dict[str, int | float | str]:
    """What the blocks of one level have in common on the way down and up."""
    return {
        "out_channels": channels[level],
        "temb_channels": 4 * channels[0],
        "resnet_eps": NORM_EPS,
        "resnet_groups": num_norm_groups(channels),
        "attention_head_dim": math.gcd(64, channels[level]),
    }


def make_down_block(channels: Sequence[int], level: int, num_layers: int) -> nn.Module:
    """Residual blocks and attention of one level, then half the resolution, except at the last level."""
    from diffusers.models.unets.unet_2d_blocks import AttnDownBlock2D

    return AttnDownBlock2D(
        in_channels=channels[max(level - 1, 0)],
        num_layers=num_layers,
        downsample_type="conv" if level < len(channels) - 1 else "none",
        **block_settings(channels, level),
    )


def make_up_block(channels: Sequence[int], level: int, num_layers: int) -> nn.Module:
    """Residual blocks and attention of one level, then twice the resolution, except at the first level."""
    from diffusers.models.unets.unet_2d_blocks import AttnUpBlock2D

    return AttnUpBlock2D(
        in_channels=channels[max(level - 1, 0)],
        prev_output_channel=channels[min(level + 1, len(channels) - 1)],
        num_layers=num_layers,
        upsample_type="conv" if level > 0 else "none",
        **block_settings(channels, level),
    )


def make_position_embedding(config: TransfusionConfig) -> ContinuousAxialPositionalEmbedding | None:
    """The embedding of row and column that a codec adds to its hidden vectors, if the config wants it."""
    return ContinuousAxialPositionalEmbedding(config.hidden_size) if config.axial_positions else None


def make_patch_encoder(config: TransfusionConfig) -> nn.Module:
    """The encoder of `config.patch_codec`.

    Its `forward(latent_patches (P, D), timesteps (N,), image_grids (N, 2))` returns hidden vectors (P, H) and what the
    decoder of the same codec takes as `skips`.
    """
    encoders = {"linear": LinearPatchEncoder, "linear_skip": LinearSkipPatchEncoder, "unet": UNetPatchEncoder}
    return encoders[config.patch_codec](config)


def make_patch_decoder(config: TransfusionConfig) -> nn.Module:
    """The decoder of `config.patch_codec`.

    Its `forward(hidden_states (R * P, H), skips, timesteps (R * N,), image_grids (R * N, 2))` returns (R * P, D).
    """
    decoders = {"linear": LinearPatchDecoder, "linear_skip": LinearSkipPatchDecoder, "unet": UNetPatchDecoder}
    return decoders[config.patch_codec](config)


__all__ = [
    "LinearPatchDecoder",
    "LinearPatchEncoder",
    "LinearSkipPatchDecoder",
    "LinearSkipPatchEncoder",
    "TimestepEmbedding",
    "UNetPatchDecoder",
    "UNetPatchEncoder",
    "ZeroConv2d",
    "make_patch_decoder",
    "make_patch_encoder",
]
