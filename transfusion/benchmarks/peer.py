"""`transfusion-pytorch` as the benchmark drives it, on its best paths and its defaults; skipped where it is absent.

    pip install transfusion-pytorch==0.20.0

It lays a row out as [sos] text [meta] "16,16" [som] patches [eom] text [eos], so it has a few positions more than ours
for the same text and patches. The rows of its special tokens in its text head are set to zero, so that greedy decoding
neither stops early nor begins an image.
"""

import contextlib
import importlib
import importlib.util
import io
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration import TransfusionConfig
from .ours import Row, TrainingStep, prompts, rotating_rows
from .workloads import IMAGE, PATCH_DIM, TEXT_DROPOUT, Decoding, Denoising, Interleaving, Size, Training


PACKAGE = "transfusion_pytorch"
NUM_TEXT_TOKENS = 512
PROCESSING = {"peer": "flat", "peer, its defaults": "auto"}  # auto chooses by measuring times


def is_installed() -> bool:
    """Whether there is a peer to compare with."""
    return importlib.util.find_spec(PACKAGE) is not None


def build(size: Size, processing: str = "flat", device: str = "cpu") -> nn.Module:
    """A model of the peer with fresh weights, the same ones each time, whose text head writes text alone."""
    importlib.import_module("loguru").logger.disable(PACKAGE)
    torch.manual_seed(0)
    module: nn.Module = (
        importlib.import_module(PACKAGE)
        .Transfusion(
            num_text_tokens=NUM_TEXT_TOKENS,
            transformer={
                "dim": size.width,
                "depth": size.layers,
                "heads": size.heads,
                "dim_head": size.head_dim,
                "use_flex_attn": device == "cuda",
            },
            dim_latent=PATCH_DIM,
            modality_num_dim=2,
            modality_default_shape=IMAGE,
            prob_uncond=TEXT_DROPOUT,
            modality_processing=processing,
        )
        .to(device)
    )
    with torch.no_grad():
        module.to_text_logits.weight[NUM_TEXT_TOKENS:] = 0
    return module


def items(row: Row, config: TransfusionConfig) -> list[Any]:
    """A row of ours as a sample of the peer: text ids, and pictures (0, (rows, columns, patch_dim))."""
    ids, grids = row["input_ids"], row.get("image_grids")
    is_patch, is_control = (
        torch.isin(ids, torch.tensor(those))
        for those in ([config.image_token_id], [config.boi_token_id, config.eoi_token_id, config.eos_token_id])
    )
    sizes = [] if grids is None else [(int(rows), int(columns)) for rows, columns in grids.tolist()]
    pictures = [] if not sizes else list(row["latent_patches"].split([rows * columns for rows, columns in sizes]))
    sample: list[Any] = []
    text: list[Tensor] = []
    for index, (patch, control) in enumerate(zip(is_patch.tolist(), is_control.tolist(), strict=True)):
        if patch and not is_patch[index - 1]:
            sample += [torch.stack(text)] if text else []
            text = []
            grid = sizes[len([part for part in sample if isinstance(part, tuple)])]
            sample.append((0, pictures.pop(0).view(*grid, -1)))
        elif not patch and not control:
            text.append(ids[index])
    return [*sample, torch.stack(text)] if text else sample


def training_step(
    module: nn.Module, workload: Training, config: TransfusionConfig, bf16: bool, device: str = "cpu"
) -> TrainingStep:
    """Steps on the rows that ours get; `config` is ours, whose ids they hold."""
    samples: dict[int, list[Any]] = {}

    def loss(rows: list[Row]) -> Tensor:
        if id(rows) not in samples:  # taking rows of ours apart is no work of the peer's
            samples[id(rows)] = [items(row, config) for row in rows]
        return module(samples[id(rows)])

    rows: Iterator[list[Row]] = rotating_rows(workload, config)
    return TrainingStep(module, loss, rows, bf16, device)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Keeps progress bars off the terminal."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def write_text_only(module: Any, workload: Decoding, tokens: int) -> Tensor:
    """Its fastest way to write: text alone, from a cache."""
    ids = prompts(workload.batch, workload.prompt)
    with without_bars(), torch.no_grad():
        return module.generate_text_only(ids, workload.prompt + tokens, temperature=0.0, cache_kv=True)


def write_one(module: Any, workload: Decoding, tokens: int, cache_kv: bool = True) -> Any:
    """One row by the loop that may also draw; without a cache by default."""
    (ids,) = prompts(1, workload.prompt)
    with without_bars():  # it writes one token more than max_length
        return module.sample_one([ids], max_length=tokens - 1, text_temperature=0.0, cache_kv=cache_kv)


def write_many(module: Any, workload: Decoding, tokens: int) -> Any:
    """Several rows by that loop."""
    rows = [[ids] for ids in prompts(workload.batch, workload.prompt)]
    with without_bars():
        return module.sample_many(rows, max_length=tokens - 1, text_temperature=0.0)


def draw(module: Any, workload: Denoising, many: bool, cache_kv: bool = True) -> Any:
    """Images by midpoint steps, of two evaluations each, and no text after them."""
    rows = [[ids] for ids in prompts(workload.batch, workload.prompt)]
    options = {
        "max_length": 1,
        "force_modality_at_start": (0, workload.grid),
        "modality_steps": workload.evaluations // 2 + 1,
        "cfg_scale": workload.guidance,
    }
    with without_bars():
        if many:
            return module.sample_many(rows, **options)
        return [module.sample_one(row, cache_kv=cache_kv, **options) for row in rows]


def interleave(module: Any, workload: Interleaving, cache_kv: bool = True) -> Any:
    """An image and text after it, in one call."""
    with without_bars():
        return module.sample_one(
            [prompts(1, workload.prompt)[0]],
            max_length=workload.grid[0] * workload.grid[1] + workload.tokens - 1,
            text_temperature=0.0,
            force_modality_at_start=(0, workload.grid),
            modality_steps=workload.evaluations // 2 + 1,
            cfg_scale=workload.guidance,
            cache_kv=cache_kv,
        )


def count_evaluations(module: Any, call: Any) -> int:
    """How often the transformer runs during `call`."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handle = module.transformer.register_forward_hook(count)
    try:
        call()
    finally:
        handle.remove()
    return calls


__all__ = [
    "PROCESSING",
    "build",
    "count_evaluations",
    "draw",
    "interleave",
    "is_installed",
    "items",
    "training_step",
    "write_many",
    "write_one",
    "write_text_only",
]
