"""The near-limit: the same network, written plainly for its default options, without any library around it.

Its parameters have the names of the package's model with less in front, so that it takes that model's weights. It
knows linear patches, rotary positions over the flat index, and rectified flow.

Shapes: B rows, L positions, K keys, h heads, d head_dim, P patches, N images.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..configuration import TransfusionConfig
from .flops import FREQUENCIES
from .ours import Row, TrainingStep, make_collator, rotating_rows, to_device
from .workloads import Training


class PlainLayer(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: TransfusionConfig) -> None:
        super().__init__()
        width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
        assert inner is not None and config.head_dim is not None
        self.head_dim = config.head_dim
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(width, config.rms_norm_eps) for _ in "ab")
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, heads * self.head_dim, bias=False) for _ in "qkv")
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=False)
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in "gu")
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        is_causal: bool = False,
        cache: tuple[Tensor, Tensor] | None = None,
        start: int = 0,
    ) -> Tensor:
        """Update `hidden` (B, L, width); keys and values go into `cache`, (B, h, K, d) each, from `start` on."""
        normed = self.input_layernorm(hidden)
        shape = (*hidden.shape[:2], -1, self.head_dim)
        query, key, value = (
            project(normed).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = turn(query, *rotary), turn(key, *rotary)
        if cache is not None:
            end = start + hidden.shape[1]
            for kept, new in zip(cache, (key, value), strict=True):
                kept[:, :, start:end] = new
            key, value = (kept[:, :, :end] for kept in cache)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal)
        hidden = hidden + self.o_proj(attended.transpose(1, 2).flatten(2))
        normed = self.post_attention_layernorm(hidden)
        return hidden + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))


def turn(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of `states` (B, h, L, d) against each other."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


class TimeEmbedding(nn.Module):
    """Two layers over sinusoids of a noise level."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(FREQUENCIES, width), nn.Linear(width, width)

    def forward(self, timesteps: Tensor) -> Tensor:
        """Embed `timesteps` (N,)."""
        half = FREQUENCIES // 2
        places = torch.arange(half, device=timesteps.device, dtype=torch.float32) / half
        angles = timesteps.float()[:, None] * torch.exp(-math.log(10_000) * places)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.linear_2(F.silu(self.linear_1(features.to(self.linear_1.weight.dtype))))


class PlainTransfusion(nn.Module):
    """Learns, writes and draws; see the head of the file for what it leaves out."""

    def __init__(self, config: TransfusionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList([PlainLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(width, config.rms_norm_eps)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.patch_in, self.patch_out = nn.Linear(config.patch_dim, width), nn.Linear(width, config.patch_dim)
        self.time_embed = TimeEmbedding(width)
        assert config.head_dim is not None
        places = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        angles = torch.arange(config.max_position_embeddings)[:, None] * 10_000.0**-places
        angles = torch.cat([angles, angles], dim=-1)
        self.cos, self.sin = (nn.Buffer(table, persistent=False) for table in (angles.cos(), angles.sin()))

    def take_weights(self, state: Mapping[str, Tensor]) -> "PlainTransfusion":
        """Copy the state dict of the package's model."""
        renamed = {}
        for name, tensor in state.items():
            for long, short in (
                ("model.", ""),
                ("self_attn.", ""),
                ("mlp.", ""),
                ("patch_encoder.proj", "patch_in"),
                ("patch_encoder.time_embed", "time_embed"),
                ("patch_decoder.proj", "patch_out"),
            ):
                name = name.replace(long, short)
            renamed[name] = tensor
        self.load_state_dict(renamed)
        return self

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Tables (B or 1, 1, L, d) at `positions` (B or 1, L)."""
        return self.cos[positions].unsqueeze(1).to(dtype), self.sin[positions].unsqueeze(1).to(dtype)

    def embed(self, ids: Tensor, patches: Tensor, counts: Tensor, timesteps: Tensor) -> Tensor:
        """Tokens, with the patches of images of `counts` (N,) patches in their places."""
        times = self.time_embed(timesteps).repeat_interleave(counts, dim=0, output_size=len(patches))
        embedded = self.patch_in(patches.to(self.patch_in.weight.dtype)) + times
        hidden = self.embed_tokens(ids)
        is_patch = (ids == self.config.image_token_id)[..., None]
        return hidden.masked_scatter(is_patch, embedded.to(hidden.dtype))

    def predictions(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits at the text targets, those targets, and predicted velocities (P, patch_dim) of a training batch."""
        ids, config = batch["input_ids"], self.config
        sigma = batch["timesteps"] / config.num_train_timesteps
        counts = batch["image_grids"].prod(dim=1)
        levels = sigma.repeat_interleave(counts)[:, None]
        noisy = (1 - levels) * batch["latent_patches"] + levels * batch["noise"]
        hidden = self.embed(ids, noisy, counts, batch["timesteps"])
        positions = batch.get("position_ids")
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        rotary, mask = self.rotary(positions, hidden.dtype), training_mask(batch, config)
        for layer in self.layers:
            hidden = layer(hidden, rotary, mask)
        hidden = self.norm(hidden)
        targets = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        is_patch = ids == config.image_token_id
        is_learned = (targets != -100) & ~is_patch & (ids != config.boi_token_id)
        return self.lm_head(hidden[is_learned]), targets[is_learned], self.patch_out(hidden[is_patch])

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Text and image loss, weighed as the config says."""
        logits, targets, velocity = self.predictions(batch)
        error = F.mse_loss(velocity.float(), batch["noise"] - batch["latent_patches"])
        return F.cross_entropy(logits.float(), targets) + self.config.image_loss_weight * error

    def make_cache(self, rows: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of all layers, of fixed size."""
        weight = self.lm_head.weight
        shape = (rows, self.config.num_attention_heads, length, self.config.head_dim)
        return [(weight.new_empty(shape), weight.new_empty(shape)) for _ in self.layers]

    def run(self, hidden: Tensor, cache: list, start: int, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Run `hidden` (B, L, width) at positions `start` on against the cache."""
        positions = torch.arange(start, start + hidden.shape[1], device=hidden.device)[None]
        rotary = self.rotary(positions, hidden.dtype)
        for layer, kept in zip(self.layers, cache, strict=True):
            hidden = layer(hidden, rotary, mask, causal and mask is None, kept, start)
        return self.norm(hidden)

    @torch.no_grad()
    def write(self, ids: Tensor, tokens: int) -> Tensor:
        """`tokens` greedy tokens (B, tokens) after `ids` (B, L): text alone, no end."""
        length = ids.shape[1]
        cache = self.make_cache(len(ids), length + tokens)
        hidden = self.run(self.embed_tokens(ids), cache, 0, causal=True)
        written: list[Tensor] = []
        for index in range(tokens):
            scores = self.lm_head(hidden[:, -1])
            scores[:, [self.config.eos_token_id, *control_ids(self.config)]] = -math.inf
            written.append(scores.argmax(dim=-1, keepdim=True))
            if index + 1 < tokens:
                hidden = self.run(self.embed_tokens(written[-1]), cache, length + index)
        return torch.cat(written, dim=1)

    @torch.no_grad()
    def draw(self, ids: Tensor, noise: Tensor, evaluations: int, scale: float) -> Tensor:
        """Images (B, n, patch_dim) after `ids` (B, L), which end in begin-of-image, from `noise` by Euler's method."""
        rows, length, patches = len(ids), ids.shape[1], noise.shape[1]
        branches = 1 if scale == 1 else 2
        keys = torch.ones(branches * rows, 1, 1, length + patches, dtype=torch.bool, device=ids.device)
        if branches == 2:
            control = torch.tensor(control_ids(self.config), device=ids.device)
            keys[rows:, ..., :length] = torch.isin(ids, control)[:, None, None]
        ids = ids.repeat(branches, 1)
        cache = self.make_cache(len(ids), length + patches)
        square = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        lone = torch.eye(length, dtype=torch.bool, device=ids.device)
        self.run(self.embed_tokens(ids), cache, 0, mask=(square & keys[..., :length]) | lone)
        images = noise
        for step in range(evaluations):
            time = self.time_embed(noise.new_tensor([1000 * (1 - step / evaluations)]))
            embedded = self.patch_in(images.to(self.patch_in.weight.dtype)) + time
            hidden = self.run(embedded.repeat(branches, 1, 1), cache, length, mask=keys if branches == 2 else None)
            given, *without = self.patch_out(hidden).float().split(rows)
            velocity = without[0] + scale * (given - without[0]) if without else given
            images = images - velocity / evaluations
        return images


def training_step(plain: PlainTransfusion, workload: Training, bf16: bool, device: str = "cpu") -> TrainingStep:
    """Steps on the rows and by the collator that the package's model gets."""
    collate = make_collator(plain.config, workload.packed_length)

    def loss(rows: list[Row]) -> Tensor:
        return plain.loss(to_device(collate(rows), device))

    return TrainingStep(plain, loss, rotating_rows(workload, plain.config), bf16, device)


def compile_layers(plain: PlainTransfusion) -> PlainTransfusion:
    """Compile each block."""
    for layer in plain.layers:
        layer.compile()
    return plain


def control_ids(config: TransfusionConfig) -> list[int | None]:
    """Begin, end and patch of images."""
    return [config.boi_token_id, config.eoi_token_id, config.image_token_id]


def training_mask(batch: Mapping[str, Any], config: TransfusionConfig) -> Tensor:
    """(B, 1, L, L): causal, bidirectional within images, within one document, without hidden keys."""
    ids = batch["input_ids"]
    is_patch = ids == config.image_token_id
    starts = is_patch & ~F.pad(is_patch, (1, 0))[:, :-1]
    block = starts.cumsum(dim=1).masked_fill(~is_patch, -1)
    square = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device)
    mask = square.tril() | ((block[:, :, None] == block[:, None, :]) & is_patch[:, :, None])
    if (documents := batch.get("document_ids")) is not None:
        mask = mask & (documents[:, :, None] == documents[:, None, :])
    if (visible := batch.get("attention_mask")) is not None:
        mask = mask & visible.bool()[:, None, :]
    return (mask | torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device))[:, None]


__all__ = ["PlainLayer", "PlainTransfusion", "compile_layers", "control_ids", "training_mask", "training_step"]
