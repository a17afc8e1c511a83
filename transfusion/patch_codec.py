"""The linear patch codec: patch vectors to hidden vectors and back (paper, section 3 and footnote 6).

Shapes: P patches of all images of the batch, N images, D = latent_channels * patch_size**2, H = hidden_size.
"""

import math

import torch
from torch import Tensor, nn

from .configuration import TransfusionConfig


FREQUENCY_DIM = 256


def timestep_features(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of `timesteps` (N,), given in steps of the schedule: (N, dim) in float32, sines last.

    The features of Vaswani et al. 2017 as diffusion models use them (Ho et al. 2020, appendix B).
    """
    exponents = torch.arange(dim // 2, dtype=torch.float32, device=timesteps.device) / (dim // 2)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Two layers that turn a noise level into a hidden vector."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(FREQUENCY_DIM, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed `timesteps` (N,) as (N, H) in `dtype`."""
        features = timestep_features(timesteps, FREQUENCY_DIM).to(dtype)
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

    def forward(self, latent_patches: Tensor, timesteps: Tensor, image_index: Tensor) -> Tensor:
        """Encode `latent_patches` (P, D); patch i belongs to image `image_index[i]`, noised to `timesteps` (N,)."""
        return self.proj(latent_patches) + self.time_embed(timesteps, latent_patches.dtype)[image_index]


class LinearPatchDecoder(nn.Module):
    """Hidden vectors that leave the transformer -> the prediction for each patch."""

    def __init__(self, config: TransfusionConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.patch_dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Decode `hidden_states` (P, H) to (P, D)."""
        return self.proj(hidden_states)
