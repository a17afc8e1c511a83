"""The floor: the matrix products and the attention of a step or an evaluation, and nothing between them."""

import functools

import torch
from torch import Tensor

from .workloads import Size


class FloorStep:
    """The matrix products of a training step or of an evaluation, and fused attention: nothing else."""

    def __init__(
        self,
        size: Size,
        rows: int,
        attention: list[tuple[int, int, int]],
        dtype: torch.dtype,
        device: str,
        backward: bool,
        inner: int | None = None,
    ) -> None:
        """`attention` lists (batch, queries, keys) of the calls of a layer; `rows` go through its products."""
        inner = inner or size.inner
        heads = size.heads * size.head_dim
        shapes = [(size.width, heads)] * 4 + [(size.width, inner)] * 2 + [(inner, size.width)]
        self.size, self.backward = size, backward
        make = functools.partial(random_tensor, dtype=dtype, device=device)
        self.states = {width: make(rows, width) for width in (size.width, heads, inner)}  # of all layers
        self.outputs = {width: make(rows, width) for width in self.states}  # taken for their gradients too
        self.gradients = {width: make(rows, width) for width in self.states}
        self.weights = [[make(narrow, wide) for wide, narrow in shapes] for _ in range(size.layers)]
        self.weight_gradients = {(wide, narrow): make(narrow, wide) for wide, narrow in shapes}
        self.attention = []
        for batch, queries, keys in attention:
            lengths = (queries, keys, keys)
            states = [make(batch, size.heads, length, size.head_dim).requires_grad_(backward) for length in lengths]
            self.attention.append((states, make(batch, size.heads, queries, size.head_dim)))

    def __call__(self) -> None:
        """Run once."""
        for layer in self.weights:
            for weight in layer:
                self.multiply(weight)
            for states, gradient in self.attention:
                self.attend(states, gradient)

    def multiply(self, weight: Tensor) -> None:
        """What a linear layer with `weight` (narrow, wide) multiplies, into tensors that are there already."""
        narrow, wide = weight.shape
        torch.mm(self.states[wide], weight.T, out=self.outputs[narrow])
        if self.backward:
            torch.mm(self.outputs[narrow], weight, out=self.gradients[wide])
            torch.mm(self.outputs[narrow].T, self.states[wide], out=self.weight_gradients[wide, narrow])

    def attend(self, states: list[Tensor], gradient: Tensor) -> None:
        """Fused attention without a mask, causal where there are as many keys as queries."""
        query, key, value = states
        is_causal = self.backward and query.shape[2] == key.shape[2]
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
        if self.backward:
            torch.autograd.grad(out, states, gradient)


def random_tensor(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """Small normal numbers, so that products of products stay finite."""
    return (torch.randn(shape, device=device) / 100).to(dtype)


__all__ = ["FloorStep"]
