"""Muon for the matrices inside the transformer, AdamW for all else, as one optimizer."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..hyper_connections import is_connection_parameter, is_undecayed_parameter


def is_muon_matrix(name: str, parameter: Tensor) -> bool:
    """Whether `parameter` maps hidden states to hidden states, in a decoder layer: what Muon is for."""
    return parameter.ndim == 2 and ".layers." in name and not is_connection_parameter(name)


def decays(name: str, parameter: Tensor) -> bool:
    """Whether `parameter` is a matrix whose neutral value is zero."""
    return parameter.ndim >= 2 and "embed_tokens" not in name and not is_undecayed_parameter(name)


# Of Jordan et al. 2024: the polynomial whose slope at zero is largest, its steps, and the least norm.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS, MIN_NORM = 5, 1e-7


def orthogonalize(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring the singular values of `matrix` (m, n) near 1 by five Newton-Schulz steps, computed in `dtype`."""
    x = matrix.to(dtype)
    x = x.mT if x.shape[0] > x.shape[1] else x
    x = x / x.norm().clamp(min=MIN_NORM)
    linear, cubic, quintic = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic), x, beta=linear)
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` with the step size of AdamW, in a dtype of choice: torch's is bfloat16, which processors
    without it emulate at a fifth of the speed of float32.

    Args:
        params: Matrices.
        lr, weight_decay, momentum: As there.
        dtype: What is orthogonalised in.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, weight_decay: float, momentum: float, dtype: torch.dtype
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take a step, with Nesterov's momentum."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                average = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalize(parameter.grad.lerp(average, group["momentum"]), self.dtype)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                size = 0.2 * math.sqrt(max(parameter.shape))  # Liu et al., section 2.2
                parameter.add_(update, alpha=-size * group["lr"])


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) on the attention and feed-forward matrices, AdamW on all else.

    Muon orthogonalises the momentum of a matrix, so that every direction of it learns. Its steps are scaled to the
    size of AdamW's (Liu et al. 2025, arXiv:2502.16982, section 2.2), so that one learning rate serves both.

    Args:
        model: Its decoder layers are found by the name `layers`, as transformers has them.
        lr, weight_decay: Of both; no weight decay on vectors, embeddings, and static parameters of residual streams.
        betas: AdamW's.
        momentum: Muon's.
        dtype: What Muon orthogonalises in.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if is_muon_matrix(name, p)]
        others = [(name, p) for name, p in named if not is_muon_matrix(name, p)]
        decayed = [p for name, p in others if decays(name, p)]
        undecayed = [p for name, p in others if not decays(name, p)]
        self.muon = Muon(matrices, lr, weight_decay, momentum, dtype)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in group if isinstance(p, DTensor) == is_sharded], "weight_decay": decay}
            for group, decay in ((decayed, weight_decay), (undecayed, 0.0))
            for is_sharded in (False, True)  # the fused kernel takes either
        ]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)
        super().__init__([{"params": matrices + [p for _, p in others]}], {"lr": lr})
        # The groups are those of the two, so that a scheduler sets the learning rates where they are read.
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]

    @property
    def parts(self) -> dict[str, torch.optim.Optimizer]:
        """Both, by name."""
        return {"muon": self.muon, "adamw": self.adamw}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step with both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        self.adamw.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both, by name."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]


__all__ = ["Muon", "MuonAdamW", "orthogonalize"]
