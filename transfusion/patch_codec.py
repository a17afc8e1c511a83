"""The linear patch codec: patch vectors to hidden vectors and back (paper, section 3 and footnote 6).

Shapes: P patches of all images of the batch, N images, D = latent_channels * patch_size**2, H = hidden_size.
"""

import torch
from torch import Tensor, nn

from .configuration import TransfusionConfig
from .latents import patch_coordinates, patch_image_index
from .positions import ContinuousAxialPositionalEmbedding, sinusoids


FREQUENCY_DIM = 256


class TimestepEmbedding(nn.Module):
    """Two layers that turn a noise level into a hidden vector."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(FREQUENCY_DIM, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed `timesteps` (N,) as (N, H) in `dtype`."""
        features = sinusoids(timesteps, FREQUENCY_DIM).to(dtype)
        return self.linear_2(nn.functional.silu(self.linear_1(features)))


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
        self.position_embed = (
            ContinuousAxialPositionalEmbedding(config.hidden_size) if config.axial_positions else None
        )

    def forward(self, latent_patches: Tensor, timesteps: Tensor, image_grids: Tensor) -> Tensor:
        """Encode `latent_patches` (P, D) of images of `image_grids` (N, 2), noised to `timesteps` (N,)."""
        image_index = patch_image_index(image_grids, latent_patches.shape[0])
        hidden_states = self.proj(latent_patches) + self.time_embed(timesteps, latent_patches.dtype)[image_index]
        if self.position_embed is not None:
            hidden_states = hidden_states + self.position_embed.at(patch_coordinates(image_grids, image_index))
        return hidden_states


class LinearPatchDecoder(nn.Module):
    """Hidden vectors that leave the transformer -> the prediction for each patch."""

    def __init__(self, config: TransfusionConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.patch_dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Decode `hidden_states` (P, H) to (P, D)."""
        return self.proj(hidden_states)
