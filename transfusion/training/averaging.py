"""An exponential moving average of the weights, for drawing, evaluation and the final model."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedModel, TrainerCallback

from .states import host_copy


EMA_FOLDER = "ema"


def warmed_decay(decay: float, num_averaged: int) -> float:
    """The decay after n updates, `min(decay, (1 + n) / (10 + n))`: a short training forgets its start too."""
    return min(decay, (1 + num_averaged) / (10 + num_averaged))


class AveragedWeights:
    """The average `a <- d * a + (1 - d) * weights`, with d from `warmed_decay`; the first update copies the weights.

    Args:
        model: Averaged from now on; its weights are float32 or float64 (bf16 would round the updates away).
        decay: The decay in the long run, 0 to 1 without 1.

    Raises:
        ValueError: Another decay, or half-precision weights.
    """

    def __init__(self, model: PreTrainedModel, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay is {decay}; give 0 or more and less than 1, for example 0.999.")
        if halves := {parameter.dtype for parameter in model.parameters()} - {torch.float32, torch.float64}:
            raise ValueError(
                f"The model has {halves.pop()} weights, in which an average over steps would be rounded away; load it "
                "in float32 and train with bf16=True, or set ema_decay=None."
            )
        self.decay = decay
        self._average = AveragedModel(model, multi_avg_fn=self._step)

    @property
    def model(self) -> PreTrainedModel:
        """A model that holds the average."""
        return self._average.module

    def update(self, model: PreTrainedModel) -> None:
        """Move the average towards the weights of `model`."""
        self._average.update_parameters(model)

    @torch.no_grad()
    def _step(self, averages: Any, weights: Any, num_averaged: Tensor | int) -> None:
        torch._foreach_lerp_(averages, weights, 1 - warmed_decay(self.decay, int(num_averaged)))

    @contextmanager
    def swapped_into(self, model: PreTrainedModel) -> Iterator[None]:
        """Let `model` hold the average, and this the weights of `model`, for the time of a `with` block."""
        pairs = list(zip(self.model.parameters(), model.parameters(), strict=True))
        _swap(pairs)
        try:
            yield
        finally:
            _swap(pairs)

    def snapshot(self) -> Callable[[Path], None]:
        """Copy the average; what comes back writes it to `ema/` in a checkpoint, which `from_pretrained` reads."""
        weights = host_copy(self.model.state_dict())
        return lambda checkpoint: self.model.save_pretrained(checkpoint / EMA_FOLDER, state_dict=weights)

    def load(self, checkpoint: str | os.PathLike, num_averaged: int) -> None:
        """Take up the average of a checkpoint that was written after `num_averaged` updates.

        Raises:
            ValueError: The checkpoint has none.
        """
        folder = Path(checkpoint, EMA_FOLDER)
        if not folder.is_dir():
            raise ValueError(
                f"{checkpoint} has no folder {EMA_FOLDER}: it was written without an average, or not to the end. "
                "Resume from another checkpoint, or set ema_decay=None."
            )
        dtype = next(self.model.parameters()).dtype
        self.model.load_state_dict(type(self.model).from_pretrained(folder, dtype=dtype).state_dict())
        self._average.n_averaged.fill_(num_averaged)


def _swap(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for first, second in pairs:
        first.data, second.data = second.data, first.data


class EmaCallback(TrainerCallback):
    """Keeps an average over the steps of a training, and takes up that of a checkpoint."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: AveragedWeights | None = None
        self.checkpoint: Path | None = None  # where the training goes on from

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin with the weights of the model, or with the average of the checkpoint."""
        self.average = AveragedWeights(kwargs["model"], self.decay)
        self.average.model.config.use_cache = True  # which Trainer turned off for training
        if self.checkpoint is not None:
            self.average.load(self.checkpoint, state.global_step)
            self.checkpoint = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Average in the new weights."""
        assert self.average is not None
        self.average.update(kwargs["model"])


__all__ = ["EMA_FOLDER", "AveragedWeights", "EmaCallback", "warmed_decay"]
