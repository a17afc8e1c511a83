import pytest
import torch

from transfusion.data import load_emoji, load_vae
from transfusion.data.autoencoder import (
    VAE_FOLDER,
    encode,
    peak_signal_to_noise,
    pixels_of,
    reconstruct,
    to_model_range,
    to_pixels,
)


VAE = load_vae()
TRAIN = pixels_of([picture.image for picture in load_emoji("train")[::24]])
HELD_OUT = pixels_of([picture.image for picture in load_emoji("held_out")[::3]])


def test_psnr_of_a_constant_difference_is_known() -> None:
    pixels = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    others = pixels + torch.tensor([5, 51], dtype=torch.uint8).view(2, 1, 1, 1)
    expected = 20 * torch.log10(torch.tensor([51.0, 5.0], dtype=torch.float64))
    torch.testing.assert_close(peak_signal_to_noise(pixels, others), expected)
    assert peak_signal_to_noise(pixels, pixels).isfinite().all()


def test_every_pixel_value_survives_the_model_range() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    scaled = to_model_range(pixels)
    assert scaled.min() == -1 and scaled.max() == 1
    assert torch.equal(to_pixels(scaled), pixels)
    assert to_pixels(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_shipped_autoencoder_is_small_and_ready() -> None:
    assert not VAE.training and VAE.dtype == torch.float32
    assert sum(file.stat().st_size for file in VAE_FOLDER.iterdir()) < 6_000_000
    assert encode(VAE, HELD_OUT[:2]).shape == (2, 8, 16, 16)


@pytest.mark.parametrize("size", [(64, 64), (32, 48), (128, 64)])
def test_takes_other_sizes(size: tuple[int, int]) -> None:
    pixels = torch.nn.functional.interpolate(HELD_OUT[:2].float(), size).to(torch.uint8)
    assert encode(VAE, pixels).shape == (2, 8, size[0] // 4, size[1] // 4)
    assert reconstruct(VAE, pixels).shape == pixels.shape


def test_scaled_latents_have_zero_mean_and_unit_variance() -> None:
    latents = encode(VAE, TRAIN)
    assert latents.std().item() == pytest.approx(1.0, abs=0.1)
    assert (latents.mean(dim=(0, 2, 3)).abs() < 0.2).all()
    deviations = latents.std(dim=(0, 2, 3))
    assert 0.75 < deviations.min() and deviations.max() < 1.3


def test_reconstruction_of_held_out_names() -> None:
    psnr = peak_signal_to_noise(HELD_OUT, reconstruct(VAE, HELD_OUT))
    assert psnr.mean() > 30


def test_decoder_bears_small_errors_of_the_latents() -> None:
    exact = reconstruct(VAE, HELD_OUT)
    clean = peak_signal_to_noise(HELD_OUT, exact).mean()
    assert peak_signal_to_noise(HELD_OUT, reconstruct(VAE, HELD_OUT, noise_std=0.1)).mean() > clean - 2
    # Noise is not amplified: latents 5 % off give pictures more than 35 dB from the exact decoding.
    assert peak_signal_to_noise(exact, reconstruct(VAE, HELD_OUT, noise_std=0.05)).mean() > 35
