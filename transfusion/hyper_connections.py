"""Residual streams: what attention and feed-forward read, and where their output goes.

Shapes: B rows, L positions, n streams, H hidden_size. Around a branch F (norm, then attention or feed-forward), the
streams h_1 .. h_n of a token become

    h'_t = sum_s mix[s, t] h_s + write[t] F(sum_s read[s] h_s)

One stream is the plain residual, h' = h + F(h). A decoder layer does, for each of its two branches,

    branch_input, residual, output_weights = connection(hidden_states)
    hidden_states = add_branch(residual, output_weights, branch(branch_input))

after `expand_streams` and before `reduce_streams`.
"""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast


GATE = 0.01  # of both papers: how much the coefficients depend on the token, to begin with
SINKHORN_ITERATIONS = 20
# Where the manifold begins, which reaches the one-hot read and the identity only at infinite logits. Streams that read
# alike would learn alike forever, and streams that mix much become one within few layers.
READ_SHARE = 0.9
MIX_SHARE = 0.99
UNDECAYED = frozenset({"static_read", "static_mix", "static_write", "dynamic_gates"})
DECAYED = frozenset({"dynamic_weight"})


class PlainConnection(nn.Module):
    """The residual of one stream."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, None]:
        """`hidden_states` (B, L, H) as branch input and as residual; the branch has no weights."""
        return hidden_states, hidden_states, None


class HyperConnection(nn.Module):
    """What the three kinds of n streams share. Coefficients are float32 (float64 for float64 streams).

    Args:
        hidden_size: H.
        num_streams: n.
        index: Number of the branch, counted through the network; in the beginning it reads stream `index` modulo n.
        eps: Of the norm, where there is one.
    """

    def __init__(self, hidden_size: int, num_streams: int, index: int, eps: float) -> None:
        super().__init__()
        self.hidden_size, self.num_streams, self.index, self.eps = hidden_size, num_streams, index, eps
        self.static_read = nn.Parameter(torch.empty(num_streams))
        self.static_mix = nn.Parameter(torch.empty(num_streams, num_streams))
        self.static_write = nn.Parameter(torch.empty(num_streams))

    def reset_parameters(self) -> None:
        """Set the initial values, except where transformers has loaded a parameter. Draws no random numbers."""
        raise NotImplementedError

    def coefficients(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`read` (..., n), `mix` (..., n, n) from the first to the second axis, and `write` (..., n), for a token."""
        raise NotImplementedError

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read from and mix the streams `hidden_states` (B, L, n, H).

        Returns:
            The branch input (B, L, H) and the mixed streams (B, L, n, H), both in the dtype of `hidden_states`; the
            weights (n,) or (B, L, n) of the branch output.
        """
        # Mixing in bfloat16, as autocast would have it, rounds all streams in every layer.
        with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
            streams = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
            read, mix, write = self.coefficients(streams)
            read_mix = torch.cat([read.unsqueeze(-2), mix.transpose(-1, -2)], dim=-2)
            # Expanded, as a product of a matrix and a batch comes back transposed in memory.
            read_mix = read_mix.expand(*streams.shape[:-2], -1, -1)
            mixed = torch.matmul(read_mix, streams).to(hidden_states.dtype)
        return mixed[..., 0, :], mixed[..., 1:, :], write

    def identity(self) -> Tensor:
        """(n, n), its row `index` modulo n being the stream that this branch reads in the beginning."""
        mix = self.static_mix
        return torch.eye(len(mix), dtype=torch.promote_types(mix.dtype, torch.float32), device=mix.device)

    def extra_repr(self) -> str:
        """Show the sizes in the model's repr."""
        return f"{self.hidden_size}, num_streams={self.num_streams}, index={self.index}, eps={self.eps}"


class StaticHyperConnection(HyperConnection):
    """Static hyper-connections (Zhu et al. 2024, arXiv:2409.19606, section 2.1): numbers, alike for all tokens.

    In the beginning (section 2.3) one stream is read, the mix is the identity and every stream is written with weight
    1: equal streams stay equal, and the network computes what the plain one does, to the bit.
    """

    def reset_parameters(self) -> None:
        """Set the initial values of the static parameters."""
        init.copy_(self.static_read, self.identity()[self.index % self.num_streams])
        init.copy_(self.static_mix, self.identity())
        init.ones_(self.static_write)

    def coefficients(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The static parameters: (n,), (n, n), (n,)."""
        dtype = streams.dtype
        # A copy, because it is used after `forward`, when FSDP may have taken the parameter away.
        return self.static_read.to(dtype), self.static_mix.to(dtype), self.static_write.to(dtype, copy=True)


class DynamicHyperConnection(StaticHyperConnection):
    """Dynamic hyper-connections (Zhu et al. 2024, arXiv:2409.19606, section 2.2 and algorithm 2).

    To the static coefficients of stream s comes `gate * tanh(norm(h_s) @ dynamic_weight)`, whose n + 2 columns belong
    to its `read`, its row of `mix` and its `write`. The norm is a root-mean-square norm, where the paper's
    algorithm has a LayerNorm. `dynamic_weight` begins at zero, so this too begins as the plain network, to the bit.
    """

    def __init__(self, hidden_size: int, num_streams: int, index: int, eps: float) -> None:
        super().__init__(hidden_size, num_streams, index, eps)
        self.dynamic_weight = nn.Parameter(torch.empty(hidden_size, num_streams + 2))
        self.dynamic_gates = nn.Parameter(torch.empty(2))  # of read and mix; of write

    def reset_parameters(self) -> None:
        """Set the initial values of all parameters."""
        super().reset_parameters()
        init.zeros_(self.dynamic_weight)
        init.constant_(self.dynamic_gates, GATE)

    def coefficients(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, n), (B, L, n, n) and (B, L, n)."""
        static_read, static_mix, static_write = super().coefficients(streams)
        changes = torch.tanh(normed_product(streams, self.dynamic_weight, self.eps))
        read, mix, write = changes.split([1, self.num_streams, 1], dim=-1)
        read_mix_gate, write_gate = self.dynamic_gates.to(streams.dtype).unbind()
        return (
            static_read + read_mix_gate * read.squeeze(-1),
            static_mix + read_mix_gate * mix,
            static_write + write_gate * write.squeeze(-1),
        )


class ManifoldHyperConnection(HyperConnection):
    """Manifold-constrained hyper-connections (Xie et al. 2025, arXiv:2512.24880, section 4.2).

    The n streams of a token, as one vector v of n * H, give the logits `static + gate * norm(v) @ dynamic_weight` of
    all n + n + n * n coefficients. `read` is their sigmoid, `write` twice their sigmoid, and `mix` is made doubly
    stochastic by `sinkhorn`: no product of mixes can grow.

    In the beginning `dynamic_weight` is zero and the logits are such that the reads are positive and add up to 1
    (0.9 of it the own stream's), every write is 1, and every stream keeps 0.99 of itself. As any such mix leaves equal
    streams equal, the network computes what the plain one does up to rounding (in float32 about 1e-7).
    """

    def __init__(self, hidden_size: int, num_streams: int, index: int, eps: float) -> None:
        super().__init__(hidden_size, num_streams, index, eps)
        num_coefficients = (2 + num_streams) * num_streams
        self.dynamic_weight = nn.Parameter(torch.empty(num_streams * hidden_size, num_coefficients))
        self.dynamic_gates = nn.Parameter(torch.empty(3))  # of read, write, mix: the order of the columns

    def reset_parameters(self) -> None:
        """Set the initial values of all parameters."""
        others = self.num_streams - 1
        own, other = logit(READ_SHARE), logit((1 - READ_SHARE) / others)
        init.copy_(self.static_read, other + (own - other) * self.identity()[self.index % self.num_streams])
        init.copy_(self.static_mix, self.identity() * math.log(others * MIX_SHARE / (1 - MIX_SHARE)))
        init.zeros_(self.static_write)
        init.zeros_(self.dynamic_weight)
        init.constant_(self.dynamic_gates, GATE)

    def coefficients(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, n), (B, L, n, n) and (B, L, n)."""
        n, dtype = self.num_streams, streams.dtype
        changes = normed_product(streams.flatten(-2), self.dynamic_weight, self.eps)
        read, write, mix = changes.split([n, n, n * n], dim=-1)
        read_gate, write_gate, mix_gate = self.dynamic_gates.to(dtype).unbind()
        return (
            torch.sigmoid(self.static_read.to(dtype) + read_gate * read),
            sinkhorn(self.static_mix.to(dtype) + mix_gate * mix.unflatten(-1, (n, n))),
            2 * torch.sigmoid(self.static_write.to(dtype) + write_gate * write),
        )


def logit(probability: float) -> float:
    """The number whose sigmoid is `probability`."""
    return math.log(probability / (1 - probability))


def normed_product(vectors: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The product of the RMS-normalised `vectors` (..., K) and `weight` (K, C): (..., C).

    The norm, one number a vector, is applied last (Xie et al., section 4.3.1): no normalised copy is kept.
    """
    inverse_norm = torch.rsqrt(vectors.square().mean(-1, keepdim=True) + eps)
    return torch.matmul(vectors, weight.to(vectors.dtype)) * inverse_norm


def sinkhorn(logits: Tensor) -> Tensor:
    """Scale the rows and columns of exp(`logits`) (..., n, n) in turn, until all of them add up to 1.

    Columns are scaled last: each stream becomes a weighted mean of the streams, however far the rows are from 1.
    """
    # Tokens last in memory, as sums over a short axis are slow where its numbers are neighbours.
    matrix = logits.movedim((-2, -1), (0, 1)).contiguous()
    matrix = torch.exp(matrix - matrix.amax(dim=1, keepdim=True))
    matrix = matrix.clamp(min=1e-12)  # a column of zeros has no scale, and one of 1e-30 no finite gradient
    columns = torch.ones_like(matrix[0])
    for _ in range(SINKHORN_ITERATIONS):
        rows = (matrix * columns).sum(1).reciprocal()
        columns = (matrix * rows.unsqueeze(1)).sum(0).reciprocal()
    return (rows.unsqueeze(1) * matrix * columns).movedim((0, 1), (-2, -1))


KINDS: dict[str, type[HyperConnection]] = {
    "static": StaticHyperConnection,
    "dynamic": DynamicHyperConnection,
    "manifold": ManifoldHyperConnection,
}


def make_connection(hidden_size: int, num_streams: int, kind: str, index: int, eps: float) -> nn.Module:
    """The connection of one branch.

    Args:
        hidden_size: H.
        num_streams: n; with 1 the residual is plain and has no parameters, whatever `kind`.
        kind: `"static"`, `"dynamic"` or `"manifold"`.
        index: Number of the branch, counted through the network: 2 * layer for attention, 2 * layer + 1 for
            feed-forward.
        eps: Of the norm of the streams.

    Raises:
        ValueError: Another kind, or no stream.
    """
    if kind not in KINDS:
        raise ValueError(f"hyper_connections={kind!r} is unknown; choose one of {', '.join(map(repr, KINDS))}.")
    if num_streams < 1:
        raise ValueError(f"num_residual_streams={num_streams} must be at least 1; 1 is the plain residual.")
    if num_streams == 1:
        return PlainConnection()
    connection = KINDS[kind](hidden_size, num_streams, index, eps)
    connection.reset_parameters()
    return connection


def add_branch(residual: Tensor, output_weights: Tensor | None, branch_output: Tensor) -> Tensor:
    """Add what a branch computed to the streams that its connection has mixed.

    Args:
        residual: (B, L, n, H), or (B, L, H) of the plain connection.
        output_weights: (n,) or (B, L, n), or None of the plain connection.
        branch_output: (B, L, H).
    """
    if output_weights is None:
        return residual + branch_output
    return residual + output_weights.to(residual.dtype).unsqueeze(-1) * branch_output.unsqueeze(-2)


def expand_streams(hidden_states: Tensor, num_streams: int) -> Tensor:
    """Repeat `hidden_states` (B, L, H) as every stream: (B, L, n, H); one stream has no axis."""
    return hidden_states if num_streams == 1 else hidden_states.unsqueeze(-2).repeat(1, 1, num_streams, 1)


def reduce_streams(hidden_states: Tensor) -> Tensor:
    """The mean (B, L, H) over the streams of `hidden_states` (B, L, n, H); one stream, (B, L, H), as it is.

    Zhu et al. sum. The final norm takes the factor n out again, but for its eps.
    """
    return hidden_states if hidden_states.ndim == 3 else hidden_states.mean(dim=-2)


def is_connection_parameter(name: str) -> bool:
    """Whether `name`, as a model names it, is a parameter of a connection; none of them is for Muon."""
    return name.rpartition(".")[2] in UNDECAYED | DECAYED


def is_undecayed_parameter(name: str) -> bool:
    """Whether `name` is a parameter of a connection that weight decay would pull away from the plain residual.

    These are the static parameters, as in Zhu et al., and the gates; `dynamic_weight` is a matrix like others.
    """
    return name.rpartition(".")[2] in UNDECAYED


__all__ = [
    "add_branch",
    "expand_streams",
    "is_connection_parameter",
    "is_undecayed_parameter",
    "make_connection",
    "reduce_streams",
]
