"""A diffusers autoencoder as Transfusion uses it: pixels in [-1, 1] <-> scaled latents, never silently wrong.

The latents that the model sees are `(z - shift) * scale`, of about unit variance. Shift and scale are the VAE's own
(`shift_factor` and `scaling_factor`, or per channel `latents_mean` and `latents_std`), applied once each way.
"""

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils.hub import cached_file


VAE_CLASSES = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")
VAE_SUBFOLDER = "vae"


def spatial_factor(vae: Any) -> int:
    """Pixels per latent position, along a side.

    Raises:
        ValueError: The VAE is of a class that is not allowed, or does not read three channels.
    """
    name = type(vae).__name__
    if name not in VAE_CLASSES:
        raise ValueError(f"vae is a {name}; allowed: {', '.join(VAE_CLASSES)}.")
    config = vae.config
    if config.in_channels != 3:
        raise ValueError(f"vae reads {config.in_channels} channels; pictures have 3 (RGB). Take a VAE of pictures.")
    blocks = config.block_out_channels if name == "AutoencoderKL" else config.encoder_block_out_channels
    return 2 ** (len(blocks) - 1)


def encode_pixels(vae: Any, pixels: Sequence[Tensor], generator: torch.Generator | None = None) -> list[Tensor]:
    """Pixels (3, H, W) -> scaled float32 latents (C, h, w) on the VAE's device; equal sizes go through as one batch.

    Args:
        vae: The autoencoder; its dtype and device are used.
        pixels: In [-1, 1], H and W multiples of `spatial_factor(vae)`.
        generator: Sample an `AutoencoderKL`'s distribution with it, size by size; None takes the mode. The other
            classes have no distribution.

    Raises:
        ValueError: The VAE made a latent that is not finite.
    """
    shift, scale = _statistics(vae)

    def encode(batch: Tensor) -> Tensor:
        encoded = vae.encode(batch.to(vae.device, vae.dtype))
        if type(vae).__name__ == "AutoencoderTiny":
            latent = encoded.latents
        elif type(vae).__name__ == "AutoencoderDC":
            latent = encoded.latent
        else:
            distribution = encoded.latent_dist
            latent = distribution.mode() if generator is None else distribution.sample(generator)
        return (require_finite(latent.float(), f"A latent that the VAE made in {vae.dtype}") - shift) * scale

    return _by_size(encode, pixels)


def decode_latents(vae: Any, latents: Sequence[Tensor]) -> list[Tensor]:
    """Scaled latents (C, h, w) -> float32 pixels (3, H, W) around [-1, 1]; equal sizes go through as one batch.

    Raises:
        ValueError: The VAE made a pixel that is not finite.
    """
    shift, scale = _statistics(vae)

    def decode(batch: Tensor) -> Tensor:
        raw = batch.to(vae.device).float() / scale + shift
        pixels = vae.decode(raw.to(vae.dtype)).sample
        return require_finite(pixels.float(), f"A picture that the VAE decoded in {vae.dtype}")

    return _by_size(decode, latents)


def require_finite(values: Tensor, name: str) -> Tensor:
    """Return `values`, or raise a `ValueError`: NaN would become a black picture without a word."""
    if not values.isfinite().all():
        raise ValueError(
            f"{name} holds values that are not finite; look for NaN in the input, and run a half-precision VAE in "
            "float32 (`processor.vae.float()`)."
        )
    return values


def save_vae(vae: Any, path: str | os.PathLike) -> None:
    """Save the VAE in `<path>/vae/`, as safetensors."""
    folder = os.path.join(path, VAE_SUBFOLDER)
    vae.save_pretrained(folder, safe_serialization=True)
    with open(os.path.join(folder, "config.json"), "r+", encoding="utf-8") as file:
        config = json.load(file)
        config.pop("_name_or_path", None)  # where it was loaded from: a path of this machine
        file.seek(0)
        file.truncate()
        file.write(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_vae(path: str | os.PathLike, subfolder: str = "", **hub_kwargs: Any) -> Any:
    """Load the VAE in `<path>/vae/`, a folder or a Hub repository; None where there is none.

    Only safetensors are read, and only a class of `VAE_CLASSES`, which the folder's `config.json` names.

    Args:
        path: What `from_pretrained` takes.
        subfolder: Where in it the processor lies.
        hub_kwargs: `cache_dir`, `revision`, `token`, `local_files_only`, `force_download`.

    Raises:
        ValueError: Another class, or weights that lack a parameter.
        OSError: No safetensors.
    """
    subfolder = os.path.join(subfolder, VAE_SUBFOLDER)
    config_file = cached_file(
        path, "config.json", subfolder=subfolder, _raise_exceptions_for_missing_entries=False, **hub_kwargs
    )
    if config_file is None:
        return None
    with open(config_file, encoding="utf-8") as file:
        name = json.load(file).get("_class_name")
    from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny

    allowed = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny, "AutoencoderDC": AutoencoderDC}
    if name not in allowed:
        raise ValueError(f"{subfolder}/config.json of {path} names the class {name!r}; allowed: {', '.join(allowed)}.")
    vae, loading_info = allowed[name].from_pretrained(
        path, subfolder=subfolder, use_safetensors=True, output_loading_info=True, **hub_kwargs
    )
    if missing := loading_info["missing_keys"]:
        raise ValueError(
            f"The weights in {subfolder} of {path} lack {len(missing)} parameters, such as {missing[0]}; save them "
            "again."
        )
    return vae


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """(shift, scale) of the latents, each (C, 1, 1) or (1, 1, 1)."""
    config = vae.config
    shift = config.get("latents_mean") or [config.get("shift_factor") or 0.0]
    std = config.get("latents_std") or [1.0]
    shift, std = (torch.tensor(values, device=vae.device).view(-1, 1, 1) for values in (shift, std))
    return shift, config.scaling_factor / std


def _by_size(function: Callable[[Tensor], Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Apply a function of batches to tensors of various shapes, and return the results in their order."""
    groups: dict[torch.Size, list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault(tensor.shape, []).append(index)
    results: dict[int, Tensor] = {}
    for indices in groups.values():
        results |= zip(indices, function(torch.stack([tensors[index] for index in indices])), strict=True)
    return [results[index] for index in range(len(tensors))]


__all__ = [
    "VAE_CLASSES",
    "VAE_SUBFOLDER",
    "decode_latents",
    "encode_pixels",
    "load_vae",
    "require_finite",
    "save_vae",
    "spatial_factor",
]
