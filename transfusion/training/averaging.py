"""An exponential moving average of the weights, for drawing, evaluation and the final model."""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import SAFE_WEIGHTS_NAME

from .distributed import load_weights, local_shard, model_writer, named_weights, whole_tensors


EMA_FOLDER = "ema"


def warmed_decay(decay: float, num_averaged: int) -> float:
    """The decay after n updates, `min(decay, (1 + n) / (10 + n))`: a short training forgets its start too."""
    return min(decay, (1 + num_averaged) / (10 + num_averaged))


class AveragedWeights:
    """The average `a <- d * a + (1 - d) * weights`, with d from `warmed_decay`; the first update copies the weights.

    Of weights that are sharded, each process averages its own share.

    Args:
        model: Averaged from now on; its weights are float32 or float64 (bf16 would round the updates away).
        decay: The decay in the long run, 0 to 1 without 1.

    Attributes:
        weights: The average of each weight, by name; sharded where the model is.
        num_averaged: How many updates there were.

    Raises:
        ValueError: Another decay, or half-precision weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay is {decay}; give 0 or more and less than 1, for example 0.999.")
        if halves := {parameter.dtype for parameter in model.parameters()} - {torch.float32, torch.float64}:
            raise ValueError(
                f"The model has {halves.pop()} weights, in which an average over steps would be rounded away; load it "
                "in float32 and train with bf16=True, or set ema_decay=None."
            )
        self.decay = decay
        self.num_averaged = 0
        self.weights = {name: parameter.detach().clone() for parameter, name in named_weights(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the weights of `model`."""
        averages, weights = zip(*self._pairs(model), strict=True)
        if self.num_averaged == 0:
            torch._foreach_copy_(averages, weights)
        else:
            torch._foreach_lerp_(averages, weights, 1 - warmed_decay(self.decay, self.num_averaged))
        self.num_averaged += 1

    @contextmanager
    def swapped_into(self, model: nn.Module) -> Iterator[None]:
        """Let `model` hold the average, and this the weights of `model`, for the time of a `with` block."""
        _swap(self._pairs(model))
        try:
            yield
        finally:
            _swap(self._pairs(model))

    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Average and weight, what this process holds of both."""
        names = named_weights(model)
        return [(local_shard(self.weights[name]), local_shard(parameter)) for parameter, name in names.items()]

    def snapshot(self, model: PreTrainedModel) -> Callable[[Path], None]:
        """Copy the average; what comes back writes it to `ema/` in a checkpoint, which `from_pretrained` reads.

        Every process of those that share the weights has to call this; the first one writes.
        """
        config = copy.deepcopy(model.config)
        config.use_cache = True  # which Trainer turned off for training
        write = model_writer(model, config, whole_tensors(self.weights))
        return lambda checkpoint: write(checkpoint / EMA_FOLDER)

    @torch.no_grad()
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
        load_weights(self.weights, load_file(folder / SAFE_WEIGHTS_NAME))
        self.num_averaged = num_averaged


@torch.no_grad()
def _swap(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """In place: FSDP gathers from the memory that it knows."""
    for first, second in pairs:
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)


class EmaCallback(TrainerCallback):
    """Keeps an average over the steps of a training, and takes up that of a checkpoint."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: AveragedWeights | None = None
        self.checkpoint: Path | None = None  # where the training goes on from

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin with the weights of the model, or with the average of the checkpoint."""
        self.average = AveragedWeights(kwargs["model"], self.decay)
        if self.checkpoint is not None:
            self.average.load(self.checkpoint, state.global_step)
            self.checkpoint = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Average in the new weights."""
        assert self.average is not None
        self.average.update(kwargs["model"])


__all__ = ["EMA_FOLDER", "AveragedWeights", "EmaCallback", "warmed_decay"]
