import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.tiny import tiny_model
from transfusion.training.optimizers import MuonAdamW
from transfusion.training.states import (
    State,
    host_copy,
    optimizer_state,
    random_states,
    read_state,
    restore_optimizer,
    restore_random_states,
)


def through_files(value: Any, folder: Path) -> Any:
    State(value).write(folder, "state")
    return read_state(folder, "state")


def test_a_nest_comes_back_as_it_was(tmp_path: Path) -> None:
    tensors = {"half": torch.randn(3, 4).bfloat16().T, "empty": torch.zeros(0), "number": torch.tensor(2.5)}
    tensors |= {"mask": torch.tensor([True, False]), "bytes": torch.arange(256, dtype=torch.uint8)}
    value = {
        "a": [1, 2.5, (None, True, "text")],
        "b": {},
        "c": (),
        "d": tensors,
        "e": [float("inf"), 0.1 + 0.2, 2**63],
    }
    back = through_files(value, tmp_path)
    for name, tensor in tensors.items():
        assert back["d"][name].dtype == tensor.dtype and torch.equal(back["d"][name], tensor)
    assert {**back, "d": None} == {**value, "d": None}
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert through_files({"only": 1}, tmp_path / "..") == {"only": 1}


@pytest.mark.parametrize(
    ("value", "reason"),
    [({"a": {"b": [object()]}}, "a.b.0 is a object"), ({"a": {1: 2}}, "a has the key 1"), ({1, 2}, "is a set")],
)
def test_what_cannot_be_written_is_named(value: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        State(value)


def test_copies_do_not_change_with_their_originals() -> None:
    tensor = torch.ones(2)
    state, copies = State({"a": tensor}), host_copy({"a": tensor, "b": tensor, "c": tensor[:1]})
    tensor.zero_()
    assert state._tensors["a"].tolist() == [1, 1] and copies["a"].tolist() == [1, 1] and copies["c"].tolist() == [1]
    assert copies["a"].data_ptr() == copies["b"].data_ptr() != copies["c"].data_ptr()


def two_layers(order: str = "ab") -> nn.Module:
    """Two layers, which have their parameters in either order."""
    torch.manual_seed(0)
    layers = {"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)}
    return nn.ModuleDict({name: layers[name] for name in order})


def steps(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        for _, parameter in sorted(model.named_parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        optimizer.step()


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), 0.1),
    "fused adamw": lambda model: torch.optim.AdamW(model.parameters(), 0.1, fused=True, amsgrad=True),
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters(), 0.1),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), 0.1),
    "rprop": lambda model: torch.optim.Rprop(model.parameters(), 0.1),
    "named": lambda model: torch.optim.RMSprop(list(model.named_parameters()), 0.1, centered=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_goes_on_where_it_was_in_another_order(kind: str, tmp_path: Path) -> None:
    model, other = two_layers("ab"), two_layers("ba")
    optimizer, again = OPTIMIZERS[kind](model), OPTIMIZERS[kind](other)
    steps(model, optimizer, 0)
    optimizer.param_groups[0]["lr"] = 0.05
    other.load_state_dict(model.state_dict())
    restore_optimizer(again, other, through_files(optimizer_state(optimizer, model), tmp_path))
    assert again.param_groups[0]["lr"] == 0.05
    assert type(again.param_groups[0].get("betas")) is type(optimizer.param_groups[0].get("betas"))
    for pair in ((model, optimizer), (other, again)):
        steps(*pair, 1)
    own = other.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


def test_both_parts_of_muon_go_on(tmp_path: Path) -> None:
    model, other = tiny_model().float(), tiny_model().float()
    optimizer, again = (MuonAdamW(each, lr=1e-2, weight_decay=0.1) for each in (model, other))
    scheduler = torch.optim.lr_scheduler.LambdaLR(again, lambda step: 0.5)
    steps(model, optimizer, 0)
    other.load_state_dict(model.state_dict())
    restore_optimizer(again, other, through_files(optimizer_state(optimizer, model), tmp_path))
    for pair in ((model, optimizer), (other, again)):
        steps(*pair, 1)
    own = other.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    scheduler.step()
    assert [group["lr"] for part in again.parts.values() for group in part.param_groups] == [5e-3] * 3


def test_states_keep_their_dtype(tmp_path: Path) -> None:
    """torch gives them that of the parameters."""
    model = two_layers().bfloat16()
    optimizer, again = (torch.optim.AdamW(model.parameters(), 0.1) for _ in range(2))
    steps(model, optimizer, 0)
    for state in optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].float() + 1e-6
    restore_optimizer(again, model, through_files(optimizer_state(optimizer, model), tmp_path))
    for parameter in model.parameters():
        assert torch.equal(again.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])
        assert again.state[parameter]["exp_avg"].dtype == torch.float32


def test_optimizers_that_do_not_fit() -> None:
    model = two_layers()
    state = optimizer_state(torch.optim.SGD(model.parameters(), 0.1), model)
    with pytest.raises(ValueError, match="is none of the model's"):
        optimizer_state(torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1), model)
    with pytest.raises(ValueError, match="has other parameters than in the checkpoint: .*'b.bias', 'b.weight'"):
        restore_optimizer(torch.optim.SGD(model["a"].parameters(), 0.1), model, state)
    groups = [{"params": layer.parameters(), "lr": lr} for layer, lr in zip(model.values(), (0.2, 0.3), strict=True)]
    divided = torch.optim.SGD(groups)
    state_of_groups = optimizer_state(divided, model)
    restore_optimizer(divided, model, state)  # of one group
    assert [group["lr"] for group in divided.param_groups] == [0.1, 0.1]
    with pytest.raises(ValueError, match="had other options"):
        restore_optimizer(torch.optim.SGD(model.parameters(), 0.1), model, state_of_groups)
    with pytest.raises(ValueError, match=r"of the optimizers \['optimizer'\], not of \['adamw', 'muon'\]"):
        restore_optimizer(MuonAdamW(tiny_model(), 0.1), model, state)


def test_random_states_come_back(tmp_path: Path) -> None:
    device = torch.device("cpu")
    random.gauss(0, 1), np.random.randn()  # each keeps a second number
    states = through_files(random_states(device), tmp_path)

    def draw() -> list[float]:
        return [random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.rand(()).item()]

    drawn = draw()
    assert draw() != drawn
    restore_random_states(states, device)
    assert draw() == drawn
    with pytest.raises(ValueError, match="no random state of a cuda device"):
        restore_random_states(states, torch.device("cuda"))
