"""States of a training as JSON and safetensors: any nest of tensors and numbers, optimizers by parameter name."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from .distributed import named_weights, sharded_like


_TENSOR, _TUPLE = "__tensor__", "__tuple__"


def host_copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the memory of the processor; tensors that are one stay one."""
    copies: dict[tuple, Tensor] = {}
    for tensor in tensors.values():
        if _place(tensor) not in copies:
            copies[_place(tensor)] = tensor.detach().to("cpu", copy=True)
    return {name: copies[_place(tensor)] for name, tensor in tensors.items()}


def _place(tensor: Tensor) -> tuple:
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


class State:
    """A copy of a nest of dicts, lists and tuples, with tensors on the host, that can be written and read.

    Args:
        value: Its leaves are tensors, numbers, strings, booleans and None; keys are strings. Every process that
            shares a tensor has to take part.
        is_kept: Whether this process is to write it.

    Raises:
        ValueError: Another leaf or key; the message says where.
    """

    def __init__(self, value: Any, is_kept: bool = True) -> None:
        self._is_kept = is_kept
        self._tensors: dict[str, Tensor] = {}
        self._tree = self._taken_apart(value, "")

    def write(self, folder: Path, name: str) -> None:
        """Write `name`.json, and `name`.safetensors if there are tensors."""
        (folder / f"{name}.json").write_text(json.dumps(self._tree) + "\n", encoding="utf-8")
        if self._tensors:
            save_file(self._tensors, folder / f"{name}.safetensors")

    def _taken_apart(self, value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            value = value.detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if self._is_kept:
                self._tensors[place] = value.to("cpu", copy=True, memory_format=torch.contiguous_format)
            return {_TENSOR: place}
        if isinstance(value, dict):
            if wrong := [key for key in value if not isinstance(key, str)]:
                raise ValueError(f"{place} has the key {wrong[0]!r}; what a checkpoint holds has names.")
            return {key: self._taken_apart(inner, f"{place}.{key}" if place else key) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            parts = [self._taken_apart(inner, f"{place}.{index}") for index, inner in enumerate(value)]
            return {_TUPLE: parts} if isinstance(value, tuple) else parts
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ValueError(f"{place} is a {type(value).__name__}, which a checkpoint cannot hold.")


def read_state(folder: Path, name: str) -> Any:
    """What `State.write` wrote."""
    tree = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    path = folder / f"{name}.safetensors"
    return _put_together(tree, load_file(path) if path.is_file() else {})


def _put_together(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_put_together(inner, tensors) for inner in tree]
    if not isinstance(tree, dict):
        return tree
    if tree.keys() == {_TENSOR}:
        return tensors[tree[_TENSOR]]
    if tree.keys() == {_TUPLE}:
        return tuple(_put_together(inner, tensors) for inner in tree[_TUPLE])
    return {key: _put_together(inner, tensors) for key, inner in tree.items()}


def fingerprint(value: Any) -> str:
    """A hash of a nest of lists, numbers and strings."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


# -- optimizers


def _parts(optimizer: Optimizer) -> dict[str, Optimizer]:
    """The optimizers that one is made of, by name: `MuonAdamW` has two."""
    return getattr(optimizer, "parts", {"optimizer": optimizer})


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """The options of all groups and the state of all parameters, by the names that `model` gives these.

    Raises:
        ValueError: The optimizer has a parameter that the model has not.
    """
    names = {id(parameter): name for parameter, name in named_weights(model).items()}
    states = {}
    for part, inner in _parts(optimizer).items():
        groups: list[dict[str, Any]] = []
        by_name: dict[str, dict[str, Any]] = {}
        for group in inner.param_groups:
            if any(id(parameter) not in names for parameter in group["params"]):
                raise ValueError(f"The {part} has a parameter that is none of the model's, and so has no name.")
            options = {key: value for key, value in group.items() if key != "params"}
            groups.append({"names": [names[id(parameter)] for parameter in group["params"]], "options": options})
            by_name |= {names[id(p)]: dict(inner.state[p]) for p in group["params"] if inner.state.get(p)}
        states[part] = {"groups": groups, "state": by_name}
    return states


@torch.no_grad()
def restore_optimizer(optimizer: Optimizer, model: nn.Module, states: dict[str, Any]) -> None:
    """Give `optimizer` what `optimizer_state` gave, whatever order its parameters have now.

    Raises:
        ValueError: It has other parts, groups, or parameters.
    """
    parts = _parts(optimizer)
    if parts.keys() != states.keys():
        raise ValueError(f"The checkpoint is of the optimizers {sorted(states)}, not of {sorted(parts)}.")
    names = {id(parameter): name for parameter, name in named_weights(model).items()}
    made = {part: _state_dict(inner, names, states[part], part) for part, inner in parts.items()}
    optimizer.load_state_dict(made if hasattr(optimizer, "parts") else made["optimizer"])
    for part, inner in parts.items():
        parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
        for number, saved_state in made[part]["state"].items():
            state = inner.state[parameters[number]]
            for key, saved in saved_state.items():
                # torch gives a state the dtype of its parameter
                if isinstance(saved, Tensor) and state[key].dtype != saved.dtype:
                    state[key] = saved.to(state[key].device)


def _state_dict(optimizer: Optimizer, names: dict[int, str], saved: dict[str, Any], part: str) -> dict[str, Any]:
    """`saved` with numbers in place of names, as `optimizer.load_state_dict` takes it, sharded as the weights are.

    Tensor parallelism sorts the weights of a group by whether they are sharded; the options are the same.
    """
    options = {name: group["options"] for group in saved["groups"] for name in group["names"]}
    states: dict[int, dict[str, Any]] = {}
    groups = []
    numbered = optimizer.state_dict()["param_groups"]
    own = {names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]}
    if different := sorted(own ^ set(options)):
        raise ValueError(f"The {part} has other parameters than in the checkpoint: {different[:5]}.")
    for group, numbers in zip(optimizer.param_groups, numbered, strict=True):
        members = [names[id(parameter)] for parameter in group["params"]]
        if any(options[name] != options[members[0]] for name in members):
            raise ValueError(f"A group of the {part} has parameters that had other options in the checkpoint.")
        for number, name, parameter in zip(numbers["params"], members, group["params"], strict=True):
            if name in saved["state"]:
                states[number] = {
                    key: sharded_like(parameter, value)
                    if isinstance(value, Tensor) and value.shape == parameter.shape
                    else value
                    for key, value in saved["state"][name].items()
                }
        groups.append({**numbers, **(options[members[0]] if members else {}), "params": numbers["params"]})
    return {"state": states, "param_groups": groups}


# -- random states


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of all global generators of this process: Python's, NumPy's, torch's, and that of `device`."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (kind, [int(key) for key in keys], position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Set the global generators to what `random_states` gave.

    Raises:
        ValueError: The states are of another kind of device.
    """
    if device.type != "cpu" and device.type not in states:
        raise ValueError(f"The checkpoint has no random state of a {device.type} device: it was written on another.")
    random.setstate(states["python"])
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[device.type])


__all__ = [
    "State",
    "fingerprint",
    "host_copy",
    "optimizer_state",
    "random_states",
    "read_state",
    "restore_optimizer",
    "restore_random_states",
]
