"""The three diffusers autoencoders, tiny and real: shift and scale once each way, and nothing but what is allowed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_processor import tiny_vae
from transfusion.autoencoder import (
    VAE_CLASSES,
    decode_latents,
    encode_pixels,
    load_vae,
    require_finite,
    save_vae,
    spatial_factor,
)


def pixels(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=generator) * 2 - 1 for size in sizes]


def raw_latents(vae: Any, batch: Tensor) -> Tensor:
    encoded = vae.encode(batch, return_dict=False)[0]
    return encoded.mode() if type(vae).__name__ == "AutoencoderKL" else encoded


# shift and scale as in `(z - shift) * scale`, read off `tiny_vae`
STATISTICS = {"AutoencoderKL": (0.3, 0.4), "AutoencoderTiny": (0.2, 0.7), "AutoencoderDC": (0.0, 0.41)}


@pytest.mark.parametrize("name", VAE_CLASSES)
@torch.no_grad()
def test_shift_and_scale_are_applied_once_each_way(name: str) -> None:
    vae, (shift, scale) = tiny_vae(name), STATISTICS[name]
    images = pixels((16, 16), (8, 24), (16, 16))
    latents = encode_pixels(vae, images)
    decoded = decode_latents(vae, latents)
    for image, latent, picture in zip(images, latents, decoded, strict=True):
        raw = raw_latents(vae, image[None])
        torch.testing.assert_close(latent, (raw[0] - shift) * scale)
        torch.testing.assert_close(picture, vae.decode(raw).sample[0], atol=1e-5, rtol=1e-5)
        assert picture.shape == image.shape
        assert spatial_factor(vae) == image.shape[1] // latent.shape[1] == image.shape[2] // latent.shape[2]
        assert latent.shape[0] == vae.config.latent_channels


@pytest.mark.parametrize("shift", [None, 0.0])
@torch.no_grad()
def test_no_shift_is_a_shift_of_zero(shift: float | None) -> None:
    vae = tiny_vae(shift_factor=shift, scaling_factor=1.0)
    torch.testing.assert_close(encode_pixels(vae, pixels((8, 8)))[0], raw_latents(vae, pixels((8, 8))[0][None])[0])


@torch.no_grad()
def test_statistics_per_channel() -> None:
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    vae = tiny_vae(shift_factor=None, latents_mean=mean, latents_std=std)
    images = pixels((8, 8))
    latents, raw = encode_pixels(vae, images), raw_latents(vae, images[0][None])
    for channel in range(4):
        torch.testing.assert_close(latents[0][channel], (raw[0, channel] - mean[channel]) * 0.4 / std[channel])
    torch.testing.assert_close(decode_latents(vae, latents)[0], vae.decode(raw).sample[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_latents_are_sampled_with_a_generator() -> None:
    vae, images = tiny_vae(), pixels((8, 8), (8, 8))
    sampled = [encode_pixels(vae, images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    distribution = vae.encode(torch.stack(images)).latent_dist
    expected = (distribution.sample(torch.Generator().manual_seed(1)) - 0.3) * 0.4
    torch.testing.assert_close(torch.stack(sampled[0]), expected)
    torch.testing.assert_close(sampled[0], sampled[1], atol=0, rtol=0)
    assert not torch.equal(sampled[0][0], sampled[2][0])


@torch.no_grad()
def test_half_precision_gives_float32() -> None:
    vae = tiny_vae().to(torch.bfloat16)
    latents = encode_pixels(vae, pixels((8, 8)))
    assert latents[0].dtype == torch.float32
    torch.testing.assert_close(latents, encode_pixels(tiny_vae(), pixels((8, 8))), atol=0.02, rtol=0.1)
    assert decode_latents(vae, latents)[0].dtype == torch.float32


@pytest.mark.parametrize("name", VAE_CLASSES)
@torch.no_grad()
def test_nan_is_never_a_black_picture(name: str) -> None:
    vae = tiny_vae(name)
    for parameter in vae.parameters():
        parameter.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite.*float32"):
        encode_pixels(vae, pixels((16, 16)))
    with pytest.raises(ValueError, match="not finite.*float32"):
        decode_latents(vae, [torch.zeros(vae.config.latent_channels, 2, 2)])


def test_require_finite() -> None:
    values = torch.ones(2)
    assert require_finite(values, "x") is values
    for value in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(ValueError, match="^x holds"):
            require_finite(torch.tensor([0.0, value]), "x")


def test_other_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="Linear; allowed: AutoencoderKL"):
        spatial_factor(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="4 channels"):
        spatial_factor(tiny_vae(in_channels=4))


@pytest.mark.parametrize("name", VAE_CLASSES)
@torch.no_grad()
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    vae = tiny_vae(name)
    save_vae(vae, tmp_path)
    loaded = load_vae(tmp_path)
    assert type(loaded) is type(vae) and not loaded.training
    torch.testing.assert_close(encode_pixels(loaded, pixels((8, 8))), encode_pixels(vae, pixels((8, 8))))
    save_vae(loaded, tmp_path / "again")
    text = (tmp_path / "again" / "vae" / "config.json").read_text()
    assert str(tmp_path) not in text and json.loads(text)["_class_name"] == name
    assert {path.suffix for path in tmp_path.rglob("*.*")} == {".json", ".safetensors"}
    assert type(load_vae(tmp_path, "again")) is type(vae)


def test_no_folder_is_no_vae(tmp_path: Path) -> None:
    assert load_vae(tmp_path) is None


@pytest.mark.parametrize(
    "name", ["UNet2DModel", "AutoencoderKLWan", "DiffusionPipeline", "os", "__import__", "", None]
)
def test_a_config_cannot_name_another_class(name: str | None, tmp_path: Path) -> None:
    save_vae(tiny_vae(), tmp_path)
    path = tmp_path / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": name}))
    with pytest.raises(ValueError, match="allowed: AutoencoderKL, AutoencoderTiny, AutoencoderDC"):
        load_vae(tmp_path)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae", safe_serialization=False)
    assert (tmp_path / "vae" / "diffusion_pytorch_model.bin").exists()
    with pytest.raises(OSError, match="safetensors"):
        load_vae(tmp_path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    save_vae(tiny_vae(), tmp_path)
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights.pop("decoder.conv_out.bias")
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match="decoder.conv_out.bias"):
        load_vae(tmp_path)
