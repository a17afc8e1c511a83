"""What a training tells while it runs: losses by noise level, speed, memory, and what goes wrong slowly."""

import logging
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import TrainerCallback

from ..diffusion import noise_process_of
from ..latents import patch_image_index
from ..pipeline import TransfusionPipeline
from ..processing import TransfusionProcessor
from .speed import not_compiling


logger = logging.getLogger(__name__)

NUM_LEVELS = 4
# A text loss this much above its lowest is not noise: pictures push out what was known of text.
COLLAPSE = 1.15
SMOOTHED = 5


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
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def flops_per_token(model: torch.nn.Module) -> int:
    """6 for each weight, forward and backward (Chowdhery et al. 2022, appendix B, without attention)."""
    return 6 * sum(weight.numel() for weight in model.parameters())


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 8) -> float:
    """Best FLOP/s of a matrix product here: what MFU is a share of."""
    size = 4096 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in "lr")
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


class TextLossAlert(TrainerCallback):
    """Warns where the text loss, over a few logs, has risen far above its lowest, and stays silent until it falls."""

    def __init__(self, rise: float = COLLAPSE, window: int = SMOOTHED) -> None:
        self.rise, self.window = rise, window
        self.recent: list[float] = []
        self.lowest = float("inf")
        self.is_high = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Look at the text loss, if it was logged."""
        if logs is None or not logs.get("text_loss"):
            return
        self.recent = [*self.recent, logs["text_loss"]][-self.window :]
        if len(self.recent) < self.window:
            return
        mean = sum(self.recent) / self.window
        self.lowest = min(self.lowest, mean)
        was_high, self.is_high = self.is_high, mean > self.rise * self.lowest
        if self.is_high and not was_high and state.is_world_process_zero:
            logger.warning(
                "text_loss is %.3f over the last %d logs and was %.3f: it collapses, as it may where pictures are "
                "added to a language model. Add text to the data, lower learning_rate, or freeze_text.",
                mean,
                self.window,
                self.lowest,
            )


class CaptionCallback(TrainerCallback):
    """Captions the same pictures again and again, into `output_dir/samples/captions.md`.

    Args:
        processor: The model's.
        pictures: What to caption, by name.
        every: Steps between two times; once more at the end.
        weights: Gives a context in which the model has the weights to write with: `trainer.averaged_weights`.
    """

    def __init__(
        self,
        processor: TransfusionProcessor,
        pictures: Mapping[str, Image.Image],
        every: int,
        weights: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        if every < 1 or not pictures:
            raise ValueError(f"every is {every} with {len(pictures)} pictures; give at least 1 of both.")
        self.processor, self.pictures, self.every, self.weights = processor, dict(pictures), every, weights

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Caption, if it is time."""
        if state.global_step % self.every == 0:
            self._caption(args, state, kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Caption with the last weights."""
        if state.global_step % self.every:
            self._caption(args, state, kwargs["model"])

    def _caption(self, args: Any, state: Any, model: Any) -> None:
        was_training = model.training
        model.eval()
        try:
            with self.weights(), not_compiling():
                pipeline = TransfusionPipeline(model, self.processor)
                captions = pipeline.caption(list(self.pictures.values()), do_sample=False).text
        finally:
            model.train(was_training)
        if not state.is_world_process_zero:
            return  # but it took part, for a model that is sharded
        file = Path(args.output_dir, "samples", "captions.md")
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [f"| {name} | {caption} |" for name, caption in zip(self.pictures, captions, strict=True)]
        table = "\n".join(
            [f"## Step {state.global_step}", "", "| picture | caption |", "| --- | --- |", *rows, "", ""]
        )
        with file.open("a", encoding="utf-8") as text:
            text.write(table)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def write_summary(trainer: Any, settings: dict[str, Any], prompts: Sequence[str] = ()) -> Path:
    """Write `summary.md` into the output folder: what was trained, how it went, and where to look."""
    import yaml

    state, folder = trainer.state, Path(trainer.args.output_dir)
    logs = [entry for entry in state.log_history if "text_loss" in entry]
    evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
    lines = ["# Training", "", f"{state.global_step} steps, {state.epoch or 0:.2f} epochs.", ""]
    names = ("text_loss", "image_loss", "grad_norm", "tokens_per_second", "mfu", "peak_memory_gb")
    if logs:
        lines += ["| | first log | last log |", "| --- | ---: | ---: |"]
        shown = [name for name in names if name in logs[-1]]
        lines += [f"| {name} | {_figure(logs[0].get(name))} | {_figure(logs[-1][name])} |" for name in shown]
        lines.append("")
    if evaluations:
        last = evaluations[-1]
        shown = ", ".join(f"{name} {last[name]:.4g}" for name in ("eval_loss", "eval_text_loss", "eval_image_loss"))
        lines += [f"Held out, step {last['step']}: {shown}.", ""]
    lines += ["![losses](losses.png)", ""]
    if sheets := sorted((folder / "samples").glob("step_*.png")):
        lines += [f"![drawings](samples/{sheets[-1].name})", "", *[f"* {prompt}" for prompt in prompts], ""]
    lines += ["```yaml", yaml.safe_dump(settings, sort_keys=False).rstrip(), "```", ""]
    file = folder / "summary.md"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


__all__ = [
    "CaptionCallback",
    "LevelSums",
    "SpeedMeter",
    "TextLossAlert",
    "flops_per_token",
    "matmul_rate",
    "peak_memory",
    "write_summary",
]
