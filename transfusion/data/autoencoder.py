"""The image autoencoder that ships with the package, and the measures of one."""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from .pictures import ASSETS


if TYPE_CHECKING:
    from diffusers import AutoencoderDC

VAE_FOLDER = ASSETS / "vae"


def load_vae() -> "AutoencoderDC":
    """The shipped autoencoder, in evaluation mode and float32.

    It takes pictures (N, 3, H, W) in [-1, 1], H and W divisible by 4, to latents (N, 8, H / 4, W / 4); multiplied by
    `vae.config.scaling_factor` these have unit variance over the training pictures.
    """
    from diffusers import AutoencoderDC

    return AutoencoderDC.from_pretrained(VAE_FOLDER, torch_dtype=torch.float32).eval()


def pixels_of(pictures: list[Image.Image]) -> torch.Tensor:
    """RGB pictures of one size as uint8 (N, 3, H, W)."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).contiguous()


def to_model_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels as float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0


def to_pixels(decoded: torch.Tensor) -> torch.Tensor:
    """The autoencoder's output as uint8, clamped and rounded."""
    return ((decoded.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def peak_signal_to_noise(pixels: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """PSNR in dB of each picture pair: 20 log10(255) - 10 log10(mean squared error).

    Args:
        pixels: uint8 (N, 3, H, W).
        others: uint8 of the same shape.

    Returns:
        (N,); the error is counted as at least that of one unit in one subpixel, so that equal pictures stay finite.
    """
    error = (pixels.double() - others.double()).square().flatten(1)
    return 20 * math.log10(255) - 10 * error.sum(1).clamp(min=1).div(error.shape[1]).log10()


@torch.no_grad()
def reconstruct(
    vae: "AutoencoderDC", pixels: torch.Tensor, noise_std: float = 0.0, batch_size: int = 64
) -> torch.Tensor:
    """Pictures encoded and decoded: uint8 (N, 3, H, W) to the same.

    Args:
        vae: the autoencoder.
        pixels: uint8 pictures.
        noise_std: standard deviation of the Gaussian noise added to the scaled (unit-variance) latents.
        batch_size: pictures at once.
    """
    generator = torch.Generator().manual_seed(0)
    out = []
    for batch in pixels.split(batch_size):
        latents = vae.encode(to_model_range(batch)).latent
        noise = torch.randn(latents.shape, generator=generator) * (noise_std / vae.config.scaling_factor)
        out.append(to_pixels(vae.decode(latents + noise).sample))
    return torch.cat(out)


@torch.no_grad()
def encode(vae: "AutoencoderDC", pixels: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
    """Scaled latents (N, C, H / 4, W / 4) of uint8 pictures (N, 3, H, W)."""
    latents = [vae.encode(to_model_range(batch)).latent for batch in pixels.split(batch_size)]
    return torch.cat(latents) * vae.config.scaling_factor
