"""Muon for the matrices inside the transformer, AdamW for all else, as one optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..hyper_connections import is_connection_parameter, is_undecayed_parameter


def is_muon_matrix(name: str, parameter: Tensor) -> bool:
    """Whether `parameter` maps hidden states to hidden states, in a decoder layer: what Muon is for."""
    return parameter.ndim == 2 and ".layers." in name and not is_connection_parameter(name)


def decays(name: str, parameter: Tensor) -> bool:
    """Whether `parameter` is a matrix whose neutral value is zero."""
    return parameter.ndim >= 2 and "embed_tokens" not in name and not is_undecayed_parameter(name)


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) on the attention and feed-forward matrices, AdamW on all else.

    Muon orthogonalises the momentum of a matrix, so that every direction of it learns. Its steps are scaled to the
    size of AdamW's (Liu et al. 2025, arXiv:2502.16982, section 2.2), so that one learning rate serves both.

    Args:
        model: Its decoder layers are found by the name `layers`, as transformers has them.
        lr, weight_decay: Of both; no weight decay on vectors, embeddings, and static parameters of residual streams.
        betas: AdamW's.
        momentum: Muon's.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
    ) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if is_muon_matrix(name, p)]
        others = [(name, p) for name, p in named if not is_muon_matrix(name, p)]
        decayed = [p for name, p in others if decays(name, p)]
        undecayed = [p for name, p in others if not decays(name, p)]
        self.muon = torch.optim.Muon(
            matrices, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"
        )
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": undecayed, "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)
        super().__init__([{"params": matrices + [p for _, p in others]}], {"lr": lr})
        # The groups are those of the two, so that a scheduler sets the learning rates where they are read.
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]

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


__all__ = ["MuonAdamW"]
