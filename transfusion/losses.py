"""The two losses of a Transfusion model: of the next token, and of the noise in images (paper, equations 1, 3 and 4).

Shapes: N images of the batch in reading order, P patches of all of them, D patch_dim, T text positions, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .diffusion import NoiseProcess
from .latents import patch_image_index


UNLEARNED = -100


@dataclass(frozen=True)
class NoisyImages:
    """The images of a training step: what the model sees, and what it is to predict.

    Attributes:
        patches: (P, D), noised where `is_learned`, clean elsewhere.
        timesteps: (N,), 0 for clean images.
        target: (P, D), the noise (`ddpm`) or the velocity (`flow`).
        is_learned: (P,), True where the patch has a loss.
    """

    patches: Tensor
    timesteps: Tensor
    target: Tensor
    is_learned: Tensor

    def loss(self, prediction: Tensor, num_patches: Tensor | int | None = None) -> Tensor:
        """Squared error of `prediction` (P, D), a mean over the elements of `num_patches` patches (default: these)."""
        error = (prediction.float() - self.target.float()).square().sum(-1)
        if num_patches is None:
            num_patches = self.is_learned.sum().clamp(min=1)
        return torch.where(self.is_learned, error, 0.0).sum() / (num_patches * prediction.shape[-1])


def noise_images(
    process: NoiseProcess,
    latent_patches: Tensor,
    image_grids: Tensor,
    timesteps: Tensor,
    noise: Tensor | None = None,
    image_loss_mask: Tensor | None = None,
) -> NoisyImages:
    """Noise clean patches to the timesteps of their images.

    Args:
        process: What noise level a timestep stands for, and what is predicted there.
        latent_patches: (P, D), clean.
        image_grids: (N, 2), rows and columns of patches of each image.
        timesteps: (N,).
        noise: (P, D), standard normal; drawn by default.
        image_loss_mask: (N,), False for images that stay clean and have no loss; by default all have one.
    """
    noise = torch.randn_like(latent_patches) if noise is None else noise
    image_index = patch_image_index(image_grids, latent_patches.shape[0])
    is_learned = torch.ones_like(image_index, dtype=torch.bool)
    if image_loss_mask is not None:
        is_learned = image_loss_mask.to(timesteps.device)[image_index]
        timesteps = timesteps.masked_fill(~image_loss_mask.to(timesteps.device), 0)
    patch_timesteps = timesteps[image_index]
    noisy_patches = process.add_noise(latent_patches, noise, patch_timesteps)
    return NoisyImages(
        patches=torch.where(is_learned[:, None], noisy_patches, latent_patches),
        timesteps=timesteps,
        target=process.target(latent_patches, noise, patch_timesteps),
        is_learned=is_learned,
    )


def mean_cross_entropy(logits: Tensor, targets: Tensor, num_targets: Tensor | int | None = None) -> Tensor:
    """Float32 cross-entropy of `logits` (T, V) at `targets` (T,), summed and divided by `num_targets`.

    A target of -100 counts nothing. `num_targets` are by default the others, or 1 where there is none.
    """
    total = F.cross_entropy(logits.float(), targets, ignore_index=UNLEARNED, reduction="sum")
    return total / ((targets != UNLEARNED).sum().clamp(min=1) if num_targets is None else num_targets)


__all__ = ["UNLEARNED", "NoisyImages", "mean_cross_entropy", "noise_images"]
