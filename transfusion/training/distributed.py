"""Weights that a training divides among processes, as whole tensors and back."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME


def is_sharded(model: nn.Module) -> bool:
    """Whether processes share weights of `model`: by FSDP2, or tensor-parallel."""
    return any(isinstance(parameter, DTensor) for parameter in named_weights(model))


def local_shard(tensor: Tensor) -> Tensor:
    """What this process holds of `tensor`, in the same memory: all of it where it is not sharded."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of all of `tensors`, on the CPU, in the first process; in others nothing, but they have to call this."""
    is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    gathered = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if is_first:
            gathered[name] = tensor.to("cpu", copy=True)
    return gathered


def sharded_like(tensor: Tensor, whole: Tensor) -> Tensor:
    """Divide `whole` as `tensor` of the same shape is divided; every process has all of `whole`."""
    if not isinstance(tensor, DTensor):
        return whole
    plain = [Shard(placement.dim) if placement.is_shard() else placement for placement in tensor.placements]
    whole = distribute_tensor(whole.to(tensor.device), tensor.device_mesh, plain, src_data_rank=None)
    return whole.redistribute(placements=tensor.placements)  # where two kinds of sharding divide one dimension


def named_weights(model: nn.Module) -> dict[nn.Parameter, str]:
    """The name of each weight, as the model has them by itself: sharded, and without the names of wrappers."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # or what an evaluation left gathered would be read, and be used again
    return {parameter: name.replace("_checkpoint_wrapped_module.", "") for name, parameter in model.named_parameters()}


@torch.no_grad()
def load_weights(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy whole `saved` weights into `tensors` of the same names, each process its share.

    Raises:
        ValueError: Weights that are missing, not known, or of another shape.
    """
    _require_same("weights", set(saved), set(tensors))
    for name, tensor in tensors.items():
        if saved[name].shape != tensor.shape:
            raise ValueError(
                f"The saved {name} has shape {tuple(saved[name].shape)} and the model's {tuple(tensor.shape)}; "
                "load it into a model of the same config."
            )
        local_shard(tensor).copy_(local_shard(sharded_like(tensor, saved[name])))


def model_writer(model: PreTrainedModel, config: Any, weights: dict[str, Tensor]) -> Callable[[Path], None]:
    """Writes `weights` into a folder, with what else `from_pretrained` reads; nothing where there are none.

    `save_pretrained` of a sharded model would gather its weights again, in all processes together.
    """
    config, generation_config = copy.deepcopy(config), copy.deepcopy(model.generation_config)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]

    def write(folder: Path) -> None:
        if weights:
            config.save_pretrained(folder)
            generation_config.save_pretrained(folder)
            save_file(weights, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})

    return write


def _require_same(what: str, saved: set[str], wanted: set[str]) -> None:
    if missing := sorted(wanted - saved):
        raise ValueError(f"The saved {what} lack {', '.join(missing[:3])} ({len(missing)} in all); use another save.")
    if unknown := sorted(saved - wanted):
        raise ValueError(
            f"The saved {what} hold {', '.join(unknown[:3])} ({len(unknown)} in all), which the model does not train; "
            "load them into a model of the same config."
        )


__all__ = [
    "is_sharded",
    "load_weights",
    "local_shard",
    "model_writer",
    "named_weights",
    "sharded_like",
    "whole_tensors",
]
