"""Rows as a dataset gives them, of the tiny config: ids 1 bos, 2 eos, 97 begin of image, 98 end of image, 99 patch."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tests.tiny import document


UNLEARNED = (98, 99)


def training_row(*parts: int | tuple[int, int], seed: int = 0, **extra: Any) -> dict[str, Any]:
    """A row of tokens and image grids, with random patches and labels as the processor makes them."""
    ids = document(*parts)
    grids = [part for part in parts if isinstance(part, tuple)]
    generator = torch.Generator().manual_seed(1000 + seed)
    row: dict[str, Any] = {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor([-100 if token in UNLEARNED else token for token in ids]),
        "sample_seed": seed,
        "sample_id": f"sample-{seed}",
    }
    if grids:
        num_patches = sum(rows * columns for rows, columns in grids)
        row["latent_patches"] = torch.randn(num_patches, 12, generator=generator, dtype=torch.float64)
        row["image_grids"] = torch.tensor(grids)
    return {**row, **extra}


def ragged_rows() -> list[dict[str, Any]]:
    """Twelve rows of unlike shape: texts alone, images before and after text, two images, one as context only."""
    shapes: list[list[int | tuple[int, int]]] = [
        [5, 6, 7, (2, 3), 2],
        [(2, 2), 9, 10, 2],
        [11, 12, 13, 14, 15, 16, 17, 2],
        [5, (1, 2), 6, 7, (2, 2), 2],
        [8, 9, (3, 3), 2],
        [20, 2],
        [21, 22, 23, (1, 1), 24, 2],
        [(2, 3), 30, 31, 32, 33, 2],
        [5, 6, 2],
        [40, (2, 2), 2],
        [41, 42, 43, 44, 45, 46, (1, 3), 2],
        [(1, 2), (2, 1), 50, 2],
    ]
    rows = [training_row(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    rows[3]["image_loss_mask"] = torch.tensor([False, True])
    return rows


class RowList(Dataset):
    """A dataset of given rows."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest difference between two state dicts."""
    return max((first[name] - second[name]).abs().max().item() for name in first)
