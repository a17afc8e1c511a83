import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from transfusion.hyper_connections import (
    add_branch,
    expand_streams,
    is_connection_parameter,
    is_undecayed_parameter,
    make_connection,
    reduce_streams,
    sinkhorn,
)


KINDS = ["static", "dynamic", "manifold"]
EPS = 1e-5
WIDTH = 6


def fresh(kind: str, num_streams: int, index: int, width: int, dtype: torch.dtype) -> nn.Module:
    """A connection at its initialisation, computed in `dtype`."""
    with torch.device("meta"):
        connection = make_connection(width, num_streams, kind, index, EPS).to(dtype)
    connection.to_empty(device="cpu")
    if num_streams > 1:
        connection.reset_parameters()
    return connection


def perturbed(kind: str, num_streams: int, index: int = 1, width: int = WIDTH) -> nn.Module:
    """A float64 connection away from its initialisation, so that every parameter matters."""
    torch.manual_seed(0)
    connection = make_connection(width, num_streams, kind, index, EPS).double()
    with torch.no_grad():
        for parameter in connection.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return connection


def random_streams(num_streams: int, width: int = WIDTH) -> Tensor:
    return torch.randn(2, 3, num_streams, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def rms_normed(vector: Tensor) -> Tensor:
    return vector / math.sqrt(sum(float(x) ** 2 for x in vector) / len(vector) + EPS)


def slow_sinkhorn(logits: Tensor) -> Tensor:
    """Divide rows, then columns, by their sums, twenty times, on the matrix itself."""
    matrix = logits.exp()
    for _ in range(20):
        matrix = torch.stack([row / row.sum() for row in matrix])
        matrix = torch.stack([column / column.sum() for column in matrix.T]).T
    return matrix


Coefficients = tuple[Tensor, Tensor, Tensor]


def slow_static(connection: nn.Module, streams: Tensor) -> Coefficients:
    p = dict(connection.named_parameters())
    return p["static_read"], p["static_mix"], p["static_write"]


def slow_dynamic(connection: nn.Module, streams: Tensor) -> Coefficients:
    """Algorithm 2 of arXiv:2409.19606, one stream of one token at a time."""
    p = {name: parameter.clone() for name, parameter in connection.named_parameters()}
    read, mix, write = p["static_read"], p["static_mix"], p["static_write"]
    for s, stream in enumerate(streams):
        change = torch.tanh(rms_normed(stream) @ p["dynamic_weight"])
        read[s] += p["dynamic_gates"][0] * change[0]
        mix[s] += p["dynamic_gates"][0] * change[1:-1]
        write[s] += p["dynamic_gates"][1] * change[-1]
    return read, mix, write


def slow_manifold(connection: nn.Module, streams: Tensor) -> Coefficients:
    """Equations 7 and 8 of arXiv:2512.24880, its residual mapping transposed."""
    n = len(streams)
    p = dict(connection.named_parameters())
    change = rms_normed(torch.cat(list(streams))) @ p["dynamic_weight"]
    gates = p["dynamic_gates"]
    read = p["static_read"] + gates[0] * change[:n]
    write = p["static_write"] + gates[1] * change[n : 2 * n]
    mix = p["static_mix"] + gates[2] * change[2 * n :].reshape(n, n)
    return 1 / (1 + (-read).exp()), slow_sinkhorn(mix), 2 / (1 + (-write).exp())


SLOW: dict[str, Callable[[nn.Module, Tensor], Coefficients]] = {
    "static": slow_static,
    "dynamic": slow_dynamic,
    "manifold": slow_manifold,
}


@pytest.mark.parametrize("num_streams", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_connection_by_the_formula(kind: str, num_streams: int) -> None:
    connection, hidden_states = perturbed(kind, num_streams), random_streams(num_streams)
    branch = torch.sin
    branch_input, residual, weights = connection(hidden_states)
    output = add_branch(residual, weights, branch(branch_input))
    for row in range(hidden_states.shape[0]):
        for place in range(hidden_states.shape[1]):
            streams = hidden_states[row, place]
            read, mix, write = SLOW[kind](connection, streams)
            x = sum(read[s] * streams[s] for s in range(num_streams))
            torch.testing.assert_close(branch_input[row, place], x)
            for t in range(num_streams):
                mixed = sum(mix[s, t] * streams[s] for s in range(num_streams))
                torch.testing.assert_close(output[row, place, t], mixed + write[t] * branch(x))


def run_layers(num_streams: int, kind: str, dtype: torch.dtype, num_branches: int = 8) -> tuple[Tensor, Tensor]:
    """Several fresh connections around random branches, and the plain residual around the same."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 5, 32, generator=generator, dtype=torch.float64).to(dtype)
    weights_of = torch.randn(num_branches, 32, 32, generator=generator, dtype=torch.float64) / 32**0.5
    plain, hidden_states = start, expand_streams(start, num_streams)
    for index, weight in enumerate(weights_of.to(dtype)):
        plain = plain + torch.tanh(plain @ weight)
        branch_input, residual, weights = fresh(kind, num_streams, index, 32, dtype)(hidden_states)
        hidden_states = add_branch(residual, weights, torch.tanh(branch_input @ weight))
    return reduce_streams(hidden_states), plain


@pytest.mark.parametrize("num_streams", [1, 2, 4])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_begins_as_the_plain_network_to_the_bit(kind: str, num_streams: int, dtype: torch.dtype) -> None:
    streams, plain = run_layers(num_streams, kind, dtype)
    assert streams.dtype == dtype and torch.equal(streams, plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_streams", [2, 3, 4, 5])
@torch.no_grad()
def test_begins_as_the_plain_network_up_to_rounding(kind: str, num_streams: int) -> None:
    streams, plain = run_layers(num_streams, kind, torch.float32)
    error = (streams - plain).abs().max()
    assert error <= 1e-6 * (plain.abs().max() if kind == "manifold" else 1)
    streams, plain = run_layers(num_streams, kind, torch.float64)
    torch.testing.assert_close(streams, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_streams", [2, 3, 4])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_branches_begin_to_read_streams_in_turn(kind: str, num_streams: int) -> None:
    hidden_states = random_streams(num_streams)
    for index in range(2 * num_streams):
        branch_input, residual, weights = fresh(kind, num_streams, index, WIDTH, torch.float64)(hidden_states)
        assert torch.equal(branch_input, hidden_states[:, :, index % num_streams])
        assert torch.equal(residual, hidden_states) and (weights == 1).all()


@pytest.mark.parametrize("num_streams", [2, 3, 4])
@torch.no_grad()
def test_manifold_begins_near_one_hot_and_identity(num_streams: int) -> None:
    for index in range(2 * num_streams):
        connection = fresh("manifold", num_streams, index, WIDTH, torch.float64)
        read, mix, write = connection.coefficients(random_streams(num_streams))
        own, others = index % num_streams, num_streams - 1
        expected = torch.full((num_streams,), 0.1 / others, dtype=torch.float64)
        expected[own] = 0.9
        torch.testing.assert_close(read, expected.expand_as(read), rtol=0, atol=1e-12)
        assert torch.equal(write, torch.ones_like(write))
        expected = torch.full((num_streams, num_streams), 0.01 / others, dtype=torch.float64).fill_diagonal_(0.99)
        torch.testing.assert_close(mix, expected.expand_as(mix), rtol=0, atol=1e-12)


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_sinkhorn_is_doubly_stochastic(spread: float) -> None:
    logits = spread * torch.randn(200, 4, 4, generator=torch.Generator().manual_seed(0))
    mix = sinkhorn(logits)
    assert (mix > 0).all()
    ones = torch.ones(200, 4)
    torch.testing.assert_close(mix.sum(-2), ones, rtol=0, atol=1e-6)
    # Twenty iterations do not bring every matrix of far-apart entries (e**9 : e**-9) all the way.
    torch.testing.assert_close(mix.sum(-1), ones, rtol=0, atol=1e-4 if spread < 2 else 0.5)
    assert (mix.sum(-1) - 1).abs().mean() < 1e-2
    for logit, matrix in zip(logits[:5].double(), mix[:5].double(), strict=True):
        torch.testing.assert_close(matrix, slow_sinkhorn(logit), rtol=0, atol=1e-5)


def test_sinkhorn_survives_extreme_logits() -> None:
    """A column that underflows, permutations far from the identity, and a shift."""
    logits = torch.tensor([[[0.0, -500.0], [0.0, -500.0]], [[0.0, 200.0], [200.0, 0.0]], [[1e4, 1e4], [1e4, 1e4]]])
    logits.requires_grad_()
    mix = sinkhorn(logits)
    half = [[0.5, 0.5], [0.5, 0.5]]
    torch.testing.assert_close(mix.detach(), torch.tensor([half, [[0.0, 1.0], [1.0, 0.0]], half]))
    mix[..., 0, 0].sum().backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()


def loss_of(connection: nn.Module, hidden_states: Tensor) -> Tensor:
    """A number that depends on all that a connection gives."""
    branch_input, residual, weights = connection(hidden_states)
    output = add_branch(residual, weights, torch.sin(branch_input))
    return (output * torch.arange(output.numel(), dtype=output.dtype).reshape(output.shape).cos()).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter_and_are_right(kind: str) -> None:
    connection = perturbed(kind, 3, width=2)
    hidden_states = random_streams(3, width=2)[:1, :2].requires_grad_()
    names, parameters = zip(*connection.named_parameters(), strict=True)

    def loss(streams: Tensor, *values: Tensor) -> Tensor:
        branch_input, residual, weights = torch.func.functional_call(
            connection, dict(zip(names, values, strict=True)), (streams,)
        )
        return add_branch(residual, weights, torch.sin(branch_input))

    assert torch.autograd.gradcheck(loss, (hidden_states, *parameters))
    loss_of(connection, hidden_states).backward()
    for name, parameter in connection.named_parameters():
        assert parameter.grad is not None and (parameter.grad.abs() > 0).any(), name


@pytest.mark.parametrize("kind", KINDS)
def test_equal_streams_do_not_stay_equal(kind: str) -> None:
    """The read of each branch's own stream tells streams apart from the first step on."""
    start = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    connections = [make_connection(WIDTH, 2, kind, index, EPS) for index in range(4)]
    optimizer = torch.optim.SGD([p for connection in connections for p in connection.parameters()], lr=0.1)
    for step in range(2):
        hidden_states = expand_streams(start, 2)
        for connection in connections:
            branch_input, residual, weights = connection(hidden_states)
            hidden_states = add_branch(residual, weights, torch.sin(branch_input))
        difference = (hidden_states[..., 0, :] - hidden_states[..., 1, :]).abs().max()
        assert (difference > 1e-3) == bool(step)
        reduce_streams(hidden_states).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_keeps_streams_and_coefficients_in_float32(kind: str) -> None:
    connection, hidden_states = perturbed(kind, 4).float(), random_streams(4).float()
    expected = connection(hidden_states)
    branch = nn.Linear(WIDTH, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        branch_input, residual, weights = connection(hidden_states)
        branch_output = branch(branch_input)
        output = add_branch(residual, weights, branch_output)
    assert branch_output.dtype == torch.bfloat16 and output.dtype == torch.float32
    for value, reference in zip((branch_input, residual, weights), expected, strict=True):
        assert torch.equal(value, reference)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_streams_round_once(kind: str, dtype: torch.dtype) -> None:
    connection, hidden_states = perturbed(kind, 4).float(), random_streams(4).to(dtype)
    branch_input, residual, weights = connection(hidden_states)
    exact_input, exact_residual, exact_weights = connection(hidden_states.float())
    assert weights.dtype == torch.float32 and torch.equal(weights, exact_weights)
    assert torch.equal(branch_input, exact_input.to(dtype)) and torch.equal(residual, exact_residual.to(dtype))
    assert add_branch(residual, weights, branch_input).dtype == dtype


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_equals_eager(kind: str, autocast: bool) -> None:
    connection, hidden_states = perturbed(kind, 4), random_streams(4)
    torch.compiler.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, actual = loss_of(connection, hidden_states), compiled(connection, hidden_states)
    torch.testing.assert_close(actual, expected)
    parameters = list(connection.parameters())
    gradients = zip(torch.autograd.grad(actual, parameters), torch.autograd.grad(expected, parameters), strict=True)
    for gradient, reference in gradients:
        torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing(kind: str) -> None:
    connection, hidden_states = perturbed(kind, 4), random_streams(4).requires_grad_()
    inputs = [hidden_states, *connection.parameters()]
    expected = torch.autograd.grad(loss_of(connection, hidden_states), inputs)
    actual = torch.autograd.grad(checkpoint(loss_of, connection, hidden_states, use_reentrant=False), inputs)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_one_stream_is_the_plain_residual(kind: str) -> None:
    connection = make_connection(WIDTH, 1, kind, 3, EPS)
    assert not connection.state_dict()
    start = torch.randn(2, 3, WIDTH)
    branch_input, residual, weights = connection(expand_streams(start, 1))
    assert branch_input is start
    output = add_branch(residual, weights, branch_input.sin())
    assert torch.equal(output, start + start.sin()) and reduce_streams(output) is output


def test_streams_are_repeated_and_averaged() -> None:
    start = torch.randn(2, 3, WIDTH)
    streams = expand_streams(start, 4)
    assert streams.shape == (2, 3, 4, WIDTH) and all(torch.equal(streams[:, :, s], start) for s in range(4))
    torch.testing.assert_close(reduce_streams(random_streams(4)), sum(random_streams(4).unbind(2)) / 4)


def test_what_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="hyper_connections='mean' is unknown; choose one of 'static', 'dynamic'"):
        make_connection(WIDTH, 4, "mean", 0, EPS)
    with pytest.raises(ValueError, match="num_residual_streams=0 must be at least 1"):
        make_connection(WIDTH, 0, "static", 0, EPS)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_by_name(kind: str) -> None:
    """Those that are neutral at another value than zero do not decay; wrappers may prefix names."""
    names = [name for name, _ in make_connection(WIDTH, 4, kind, 0, EPS).named_parameters(prefix="module.layers.0.x")]
    assert names and all(map(is_connection_parameter, names))
    assert {name for name in names if not is_undecayed_parameter(name)} == {
        name for name in names if name.endswith(".dynamic_weight")
    }
    for name in ("layers.0.mlp.up_proj.weight", "static_read.weight", "norm.bias"):
        assert not is_connection_parameter(name) and not is_undecayed_parameter(name)


class ConnectedConfig(PretrainedConfig):
    model_type = "connected"


class Connected(PreTrainedModel):
    """A model of transformers that holds one connection of each kind and initialises them as ours does."""

    config_class = ConnectedConfig

    def __init__(self, config: ConnectedConfig) -> None:
        super().__init__(config)
        self.connections = nn.ModuleList([make_connection(WIDTH, 3, kind, 1, EPS) for kind in KINDS])
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if type(module).__name__.endswith("HyperConnection"):
            module.reset_parameters()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_keeps_what_is_there_and_initialises_what_is_missing(dtype: torch.dtype, tmp_path: Path) -> None:
    initial = Connected(ConnectedConfig()).to(dtype).state_dict()
    trained = Connected(ConnectedConfig()).to(dtype)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += torch.randn_like(parameter)
    trained.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    missing = {name for i, name in enumerate(sorted(state)) if i % 2}
    save_file({name: value for name, value in state.items() if name not in missing}, tmp_path / "model.safetensors")
    loaded = Connected.from_pretrained(tmp_path, dtype=dtype).state_dict()
    for name, value in loaded.items():
        expected = initial[name] if name in missing else state[name]
        assert value.dtype == dtype and torch.equal(value, expected), name
