"""Tiny real models and batches, made the same way every time."""

from typing import Any

import torch
from torch import Tensor

from transfusion.configuration import TransfusionConfig
from transfusion.modeling_transfusion import TransfusionForMultimodalGeneration


def tiny_config(**overrides: Any) -> TransfusionConfig:
    """A config of two layers; ids 0 pad, 1 bos, 2 eos, 97 begin of image, 98 end of image, 99 patch."""
    values: dict[str, Any] = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "latent_channels": 3,
        "patch_size": 2,
        "default_image_grid": (2, 3),
    }
    return TransfusionConfig(**{**values, **overrides})


def tiny_model(**overrides: Any) -> TransfusionForMultimodalGeneration:
    """A model in float64, so that tests see formulas and no rounding."""
    torch.manual_seed(0)
    return TransfusionForMultimodalGeneration(tiny_config(**overrides)).double().eval()


def document(*parts: int | tuple[int, int]) -> list[int]:
    """Token ids of a row: an integer is a token, a pair is the grid of an image with its begin and end tokens."""
    ids: list[int] = []
    for part in parts:
        ids += [part] if isinstance(part, int) else [97, *[99] * (part[0] * part[1]), 98]
    return ids


def make_batch(rows: list[list[int | tuple[int, int]]], patch_dim: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """A right-padded batch of documents with random patches."""
    ids = [document(*row) for row in rows]
    length = max(map(len, ids))
    grids = [part for row in rows for part in row if isinstance(part, tuple)]
    generator = torch.Generator().manual_seed(seed)
    num_patches = sum(r * c for r, c in grids)
    batch = {
        "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in ids]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids]),
    }
    if grids:
        batch["latent_patches"] = torch.randn(num_patches, patch_dim, generator=generator, dtype=torch.float64)
        batch["image_grids"] = torch.tensor(grids)
    return batch


def force(model: TransfusionForMultimodalGeneration, answers: dict[int, int]) -> TransfusionForMultimodalGeneration:
    """Make greedy decoding answer token `a` with `answers[a]`: a real model whose weights say so."""
    width = model.config.hidden_size
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        for axis, (token, answer) in enumerate(answers.items()):
            assert axis < width
            model.model.embed_tokens.weight[token, axis] = 1
            model.lm_head.weight[answer, axis] = 1
    return model
