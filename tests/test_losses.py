"""The losses, against sums that are written out."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from transfusion.diffusion import DDPM, NoiseProcess, RectifiedFlow
from transfusion.losses import NoisyImages, mean_cross_entropy, noise_images


GRIDS = torch.tensor([[2, 3], [2, 2], [1, 3]])
SIZES = [6, 4, 3]


@pytest.fixture(params=[DDPM(), RectifiedFlow()], ids=["ddpm", "flow"])
def process(request: pytest.FixtureRequest) -> NoiseProcess:
    return request.param


def draws(seed: int) -> Tensor:
    return torch.randn(13, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def timesteps_of(process: NoiseProcess, values: list[float]) -> Tensor:
    timesteps = torch.tensor(values)
    return timesteps.long() if process.prediction_type == "noise" else timesteps


def test_noise_is_added_image_by_image(process: NoiseProcess) -> None:
    latents, noise, timesteps = draws(0), draws(1), timesteps_of(process, [20.0, 500.0, 980.0])
    images = noise_images(process, latents, GRIDS, timesteps, noise)
    starts = [0, 6, 10]
    for image, (start, size) in enumerate(zip(starts, SIZES, strict=True)):
        place = slice(start, start + size)
        alone = noise_images(process, latents[place], GRIDS[image, None], timesteps[image, None], noise[place])
        assert torch.equal(images.patches[place], alone.patches)
        assert torch.equal(images.target[place], alone.target)
    assert images.is_learned.all()


def test_noise_by_the_formulas() -> None:
    latents, noise = draws(0), draws(1)
    flow = noise_images(RectifiedFlow(), latents, GRIDS, torch.tensor([20.0, 500.0, 980.0]), noise)
    sigma = torch.tensor([20.0, 500.0, 980.0]).repeat_interleave(GRIDS.prod(1)).double()[:, None] / 1000
    torch.testing.assert_close(flow.patches, (1 - sigma) * latents + sigma * noise)
    torch.testing.assert_close(flow.target, noise - latents)
    ddpm = noise_images(DDPM(), latents, GRIDS, torch.tensor([20, 500, 980]), noise)
    f = torch.cos((torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    alpha_bars = (1 - (1 - f[1:] / f[:-1]).clamp(max=0.999)).cumprod(0)
    alpha_bar = alpha_bars[torch.tensor([20, 500, 980]).repeat_interleave(GRIDS.prod(1))][:, None]
    torch.testing.assert_close(ddpm.patches, alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise)
    torch.testing.assert_close(ddpm.target, noise)


def test_given_timesteps_are_never_capped(process: NoiseProcess) -> None:
    noise = draws(1)
    last = timesteps_of(process, [999.0 if process.prediction_type == "noise" else 1000.0] * 3)
    torch.testing.assert_close(
        noise_images(process, draws(0), GRIDS, last, noise).patches, noise, atol=1e-3, rtol=1e-3
    )


def test_context_images_stay_clean(process: NoiseProcess) -> None:
    latents, mask = draws(0), torch.tensor([True, False, True])
    images = noise_images(process, latents, GRIDS, timesteps_of(process, [500.0] * 3), draws(1), mask)
    assert images.timesteps.tolist() == [500, 0, 500]
    assert torch.equal(images.patches[6:10], latents[6:10])
    assert not torch.equal(images.patches[:6], latents[:6])
    assert images.is_learned.tolist() == [True] * 6 + [False] * 4 + [True] * 3


def test_noise_is_drawn_where_none_is_given(process: NoiseProcess) -> None:
    timesteps = timesteps_of(process, [500.0] * 3)
    torch.manual_seed(0)
    one, two = (noise_images(process, draws(0), GRIDS, timesteps).target for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(noise_images(process, draws(0), GRIDS, timesteps).target, one)
    assert not torch.equal(one, two)


@pytest.mark.parametrize("num_patches", [None, 26])
def test_image_loss_is_the_mean_over_what_is_learned(num_patches: int | None) -> None:
    target, prediction = draws(0), draws(1)
    is_learned = torch.arange(13) % 3 > 0
    images = NoisyImages(draws(2), torch.zeros(3), target, is_learned)
    squares = [
        (float(prediction[patch, column]) - float(target[patch, column])) ** 2
        for patch in range(13)
        for column in range(12)
        if is_learned[patch]
    ]
    count = len(squares) if num_patches is None else 12 * num_patches
    assert images.loss(prediction, num_patches).item() == pytest.approx(sum(squares) / count, rel=1e-5)


def test_no_patch_and_no_token_cost_nothing() -> None:
    patches = torch.zeros(0, 12)
    images = NoisyImages(patches, torch.zeros(0), patches, torch.zeros(0, dtype=torch.bool))
    assert images.loss(patches) == 0
    assert mean_cross_entropy(torch.zeros(0, 100), torch.zeros(0, dtype=torch.long)) == 0
    assert mean_cross_entropy(torch.zeros(2, 100), torch.tensor([-100, -100])) == 0


def test_text_loss_is_taken_in_float32() -> None:
    logits, targets = torch.randn(50, 100).bfloat16(), torch.arange(50)
    assert torch.equal(mean_cross_entropy(logits, targets), F.cross_entropy(logits.float(), targets))
    assert mean_cross_entropy(logits, targets, 25) == 2 * mean_cross_entropy(logits, targets)


def test_text_loss_counts_learned_targets_alone() -> None:
    logits, targets = torch.randn(50, 100), torch.arange(50)
    unlearned = targets.masked_fill(targets % 2 == 0, -100)
    torch.testing.assert_close(mean_cross_entropy(logits, unlearned), mean_cross_entropy(logits[1::2], targets[1::2]))
