"""What is logged of a training beside its two losses: losses by noise level, speed and memory."""

import sys
import time
from typing import Any

import torch
from torch import Tensor

from ..diffusion import noise_process_of
from ..latents import patch_image_index


NUM_LEVELS = 4


class LevelSums:
    """Squared errors of image predictions, apart for `NUM_LEVELS` equal parts of the noise schedule."""

    def __init__(self) -> None:
        self.entries: list[Tensor] = []  # (2, NUM_LEVELS): errors, and how many patches they are of

    @torch.no_grad()
    def add(self, config: Any, batch: dict[str, Any], prediction: Tensor | None) -> None:
        """Add a batch with `timesteps` (N,) and `noise` (P, D), of which the model predicted (P, D), or nothing."""
        if prediction is None or batch.get("noise") is None or batch.get("timesteps") is None:
            return
        patches = batch["latent_patches"]
        index = patch_image_index(batch["image_grids"], len(patches))
        timesteps = batch["timesteps"][index]
        target = noise_process_of(config).target(patches, batch["noise"], timesteps).float()
        error = (prediction.detach().float() - target).square().mean(dim=1)
        learned = torch.ones_like(index, dtype=torch.bool)
        if batch.get("image_loss_mask") is not None:
            learned = batch["image_loss_mask"][index]
        level = (timesteps.float() * NUM_LEVELS / config.num_train_timesteps).long().clamp(max=NUM_LEVELS - 1)[learned]
        sums = torch.zeros(2, NUM_LEVELS, device=error.device)
        sums[0].index_add_(0, level, error[learned])
        sums[1].index_add_(0, level, torch.ones_like(error[learned]))
        self.entries.append(sums)

    def pop(self, trainer: Any) -> dict[str, float]:
        """Means over all processes since the last call, by level from clean to noisy, where there were images."""
        sums = torch.stack([torch.zeros(2, NUM_LEVELS, device=trainer.args.device), *self.entries]).sum(dim=0)
        self.entries.clear()
        totals, counts = trainer.accelerator.reduce(sums, "sum").cpu().tolist()
        names = [f"image_loss_at_{part / NUM_LEVELS:g}_to_{(part + 1) / NUM_LEVELS:g}" for part in range(NUM_LEVELS)]
        return {name: total / count for name, total, count in zip(names, totals, counts, strict=True) if count > 0}


def peak_memory(device: torch.device) -> float:
    """The most that this process has held so far, in GB: of the device's memory, or of the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        import psutil  # of accelerate

        return psutil.Process().memory_info().peak_wset / 1e9
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def flops_per_token(model: torch.nn.Module) -> int:
    """6 for each weight, forward and backward (Chowdhery et al. 2022, appendix B, without attention)."""
    return 6 * sum(weight.numel() for weight in model.parameters())


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 8) -> float:
    """Best FLOP/s of a matrix product here: what MFU is a share of."""
    size = 4096 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)  # the training's own would draw otherwise after a first log
    left, right = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in "lr")
    times = []
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        left @ right
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class SpeedMeter:
    """Tokens and time between two logs. The first step, which compiles and waits for data, is not counted."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []
        self.since: float | None = None
        self.rate: float | None = None

    def add(self, batch: dict[str, Any]) -> None:
        """Count the tokens of a batch that are no padding."""
        if self.since is None:
            self.since = time.perf_counter()
            return
        documents, mask = batch.get("document_ids"), batch.get("attention_mask")
        if documents is not None:
            self.tokens.append((documents >= 0).sum())
        else:
            self.tokens.append(torch.ones_like(batch["input_ids"]).sum() if mask is None else mask.sum())

    def pop(self, trainer: Any) -> dict[str, float]:
        """Tokens a second over all processes, MFU, and the peak of memory of this one, in GB."""
        device = trainer.args.device
        if self.rate is None:
            self.rate = matmul_rate(device, torch.bfloat16 if trainer.args.bf16 else torch.float32)
        _synchronize(device)
        seconds = time.perf_counter() - (self.since or 0.0)
        tokens = torch.stack([torch.zeros((), dtype=torch.long, device=device), *self.tokens]).sum()
        tokens = trainer.accelerator.reduce(tokens, "sum").item()
        is_first = not self.tokens
        self.tokens, self.since = [], time.perf_counter()
        found = {"peak_memory_gb": peak_memory(device)}
        if not is_first:
            flops = tokens * flops_per_token(trainer.model) / trainer.accelerator.num_processes
            found |= {"tokens_per_second": tokens / seconds, "mfu": flops / seconds / self.rate}
        return found


__all__ = ["LevelSums", "SpeedMeter", "flops_per_token", "matmul_rate", "peak_memory"]
