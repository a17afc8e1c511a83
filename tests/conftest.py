"""Fixtures: tiny real models and batches (see tiny.py), without a network."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny import make_batch, tiny_model
from transfusion.modeling_transfusion import TransfusionForMultimodalGeneration


@pytest.fixture(params=["ddpm", "flow"])
def objective(request: pytest.FixtureRequest) -> str:
    """Each training objective in turn."""
    return request.param


@pytest.fixture
def model(objective: str) -> TransfusionForMultimodalGeneration:
    """A tiny float64 model of each objective."""
    return tiny_model(objective=objective)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Two rows: a caption and its picture; a picture, its caption, and another picture."""
    return make_batch([[5, 6, 7, (2, 3), 8, 2], [(2, 2), 9, 10, (1, 3), 11, 12, 13, 2]])


@pytest.fixture
def generator() -> Callable[[int], torch.Generator]:
    """Seeded generators."""
    return lambda seed: torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that README, guides and notebook assume; copy it before writing into it."""
    from tests.workplace import make_workplace  # here, for the seconds that its imports take

    folder = tmp_path_factory.mktemp("workplace")
    make_workplace(folder)
    return folder
