"""The package's own model as the benchmark drives it: built at a size, given rows, called as users call it."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration import TransfusionConfig
from ..modeling_transfusion import TransfusionForMultimodalGeneration
from ..training.collator import TransfusionDataCollator
from ..training.speed import choose_attention
from .workloads import (
    IMAGE,
    LATENT_CHANNELS,
    PATCH_DIM,
    PATCH_SIZE,
    TEXT_DROPOUT,
    TEXT_IDS,
    VOCABULARY,
    Decoding,
    Denoising,
    Document,
    Interleaving,
    Size,
    Training,
)


Row = dict[str, Tensor]
Call = Callable[[], Any]
NUM_BATCHES = 3  # that take turns, so that no step sees the tensors of the one before it


def make_config(size: Size, length: int, inner: int | None = None, **overrides: Any) -> TransfusionConfig:
    """A config of `size` for rows of `length`; `inner` widens the feed-forward layers."""
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": size.width,
        "intermediate_size": inner or size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "max_position_embeddings": max(length, IMAGE[0] * IMAGE[1] + 2),
        "pad_token_id": 0,
        "latent_channels": LATENT_CHANNELS,
        "patch_size": PATCH_SIZE,
        "objective": "flow",  # as the peer's
    }
    return TransfusionConfig(**{**fields, **overrides})


def build(config: TransfusionConfig, device: str = "cpu") -> TransfusionForMultimodalGeneration:
    """A model with fresh weights, the same ones each time."""
    torch.manual_seed(0)
    with torch.device(device):
        return TransfusionForMultimodalGeneration(config)


def num_parameters(module: nn.Module) -> int:
    """All of them, embeddings included, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def matching_inner(size: Size, parameters: int) -> int:
    """Width of the feed-forward layers with which a model of `size` has about this many parameters."""
    with torch.device("meta"):
        least = num_parameters(TransfusionForMultimodalGeneration(make_config(size, 0, inner=8)))
    return 8 + 8 * max(0, round((parameters - least) / (size.layers * 3 * size.width * 8)))


def make_row(document: Document, seed: int, config: TransfusionConfig) -> Row:
    """A training row of `document` with random text and patches."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[Tensor] = []
    grids = [part for part in document if isinstance(part, tuple)]
    for part in document:
        if isinstance(part, int):
            ids.append(torch.randint(*TEXT_IDS, (part,), generator=generator))
        else:
            patches = [config.image_token_id] * (part[0] * part[1])
            ids.append(torch.tensor([config.boi_token_id, *patches, config.eoi_token_id]))
    input_ids = torch.cat([*ids, torch.tensor([config.eos_token_id])])
    row = {"input_ids": input_ids, "labels": input_ids.masked_fill(input_ids == config.image_token_id, -100)}
    if grids:
        num_patches = sum(rows * columns for rows, columns in grids)
        row["latent_patches"] = torch.randn(num_patches, PATCH_DIM, generator=generator)
        row["image_grids"] = torch.tensor(grids)
    return row


def make_rows(documents: Sequence[Document], config: TransfusionConfig, seed: int = 0) -> list[Row]:
    """A row for each document."""
    return [make_row(document, 1000 * seed + index, config) for index, document in enumerate(documents)]


def rotating_rows(workload: Training, config: TransfusionConfig) -> Iterator[list[Row]]:
    """Batches of rows, a few of them in turn."""
    return itertools.cycle([make_rows(workload.documents, config, seed) for seed in range(NUM_BATCHES)])


def make_collator(
    config: TransfusionConfig, packed_length: int | None = None, text_dropout: float = TEXT_DROPOUT
) -> TransfusionDataCollator:
    """The collator, which packs rows to `packed_length` where it is given."""
    return TransfusionDataCollator(config, text_dropout, packed_length)


class TrainingStep:
    """Forward, backward and AdamW (fused, for every system) on rows that take turns.

    Making a batch of rows belongs to the step, as the peer does it in its `forward`.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[Any], Tensor],
        rows: Iterator[Any],
        bf16: bool,
        device: str,
    ) -> None:
        self.module, self.loss, self.rows = module.train(), loss, rows
        self.device, self.bf16 = device, bf16
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def __call__(self) -> Tensor:
        """One step."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            loss = self.loss(next(self.rows))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def to_device(batch: dict[str, Any], device: str) -> dict[str, Any]:
    """Move a batch."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def training_step(
    model: TransfusionForMultimodalGeneration, workload: Training, bf16: bool, device: str = "cpu"
) -> TrainingStep:
    """Steps of `model` as its trainer makes them."""
    collate = make_collator(model.config, workload.packed_length)

    def loss(rows: list[Row]) -> Tensor:
        return model(**to_device(collate(rows), device), skip_logits=True, use_cache=False).loss

    return TrainingStep(model, loss, rotating_rows(workload, model.config), bf16, device)


def for_training(
    model: TransfusionForMultimodalGeneration, workload: Training | None = None, compiled: bool = False
) -> TransfusionForMultimodalGeneration:
    """Choose attention as the trainings do, and compile the layers if asked."""
    choose_attention(model, workload.longest if workload is not None else model.config.max_position_embeddings)
    if compiled:
        model.compile_layers()
    return model


def prompts(batch: int, length: int, device: str = "cpu") -> Tensor:
    """(batch, length) random text."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(*TEXT_IDS, (batch, length), generator=generator).to(device)


def write(model: TransfusionForMultimodalGeneration, workload: Decoding, tokens: int, **options: Any) -> Tensor:
    """The ids of `generate` with `tokens` new ones in each row, the end suppressed."""
    ids = prompts(workload.batch, workload.prompt, str(model.device))
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **length, **options)


def draw(model: TransfusionForMultimodalGeneration, workload: Denoising, **options: Any) -> Tensor:
    """Patches of `generate_images`."""
    ids = prompts(workload.batch, workload.prompt, str(model.device))
    drawn = model.generate_images(
        ids,
        image_grids=workload.grid,
        num_inference_steps=workload.evaluations,
        guidance_scale=workload.guidance,
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    assert drawn.latent_patches is not None
    return drawn.latent_patches


def interleave(model: TransfusionForMultimodalGeneration, workload: Interleaving) -> Any:
    """The output of `generate`: an image at once, then text without another one."""
    ids = prompts(1, workload.prompt, str(model.device))
    ids = torch.cat([ids, ids.new_tensor([[model.config.boi_token_id]])], dim=1)
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_mode="interleaved",
        image_grids=workload.grid,
        num_inference_steps=workload.evaluations,
        guidance_scale=workload.guidance,
        max_images=1,
        max_new_tokens=workload.tokens,
        min_new_tokens=workload.tokens,
        do_sample=False,
        generator=torch.Generator().manual_seed(0),
    )


__all__ = [
    "TrainingStep",
    "build",
    "draw",
    "for_training",
    "interleave",
    "make_collator",
    "make_config",
    "make_row",
    "make_rows",
    "matching_inner",
    "num_parameters",
    "prompts",
    "rotating_rows",
    "to_device",
    "training_step",
    "write",
]
