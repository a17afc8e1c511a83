import copy

import pytest
import torch

from tests.tiny import make_batch, tiny_model
from transfusion.modeling_transfusion import TransfusionForMultimodalGeneration
from transfusion.training.optimizers import MuonAdamW, orthogonalize


def take_steps(model: TransfusionForMultimodalGeneration, optimizer: MuonAdamW, count: int, seed: int = 0) -> None:
    batch = make_batch([[5, 6, (2, 2), 7, 2]])
    batch = {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}
    for step in range(count):
        torch.manual_seed(seed + step)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_every_parameter_belongs_to_one_of_the_two() -> None:
    model = tiny_model(axial_positions=True, qk_norm=True).float()
    optimizer = MuonAdamW(model, lr=0.01)
    owned = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())
    matrices = {id(p) for p in optimizer.muon.param_groups[0]["params"]}
    named = {name for name, p in model.named_parameters() if id(p) in matrices}
    assert named == {name for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2}


def test_norms_biases_and_embeddings_do_not_decay() -> None:
    model = tiny_model().float()
    optimizer = MuonAdamW(model, lr=0.01, weight_decay=0.5)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0.5 if parameter.ndim == 2 and "embed_tokens" not in name else 0.0)


@pytest.mark.parametrize("kind", ["static", "dynamic", "manifold"])
def test_residual_streams_learn_by_adamw_and_their_static_part_does_not_decay(kind: str) -> None:
    model = tiny_model(num_residual_streams=2, hyper_connections=kind).float()
    optimizer = MuonAdamW(model, lr=0.01, weight_decay=0.5)
    connections = {name: p for name, p in model.named_parameters() if "_connection." in name}
    decayed = {name for name in connections if name.endswith(".dynamic_weight")}
    assert len(connections) == (12 if kind == "static" else 20)
    decays = {id(p): group["weight_decay"] for group in optimizer.adamw.param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in connections.items()} == {
        name: 0.5 if name in decayed else 0.0 for name in connections
    }


def test_a_step_is_the_step_of_muon_and_of_adamw() -> None:
    model = tiny_model().float().train()
    other = copy.deepcopy(model)
    optimizer = MuonAdamW(model, lr=0.01)
    take_steps(model, optimizer, 2)
    matrices = [p for name, p in other.named_parameters() if ".layers." in name and p.ndim == 2]
    rest = [p for name, p in other.named_parameters() if not (".layers." in name and p.ndim == 2)]
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=0.01, weight_decay=0, betas=(0.9, 0.95), fused=True)
    batch = make_batch([[5, 6, (2, 2), 7, 2]])
    batch = {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}
    for step in range(2):
        torch.manual_seed(step)
        other(**batch, labels=batch["input_ids"]).loss.backward()
        for part in (muon, adamw):
            part.step()
            part.zero_grad()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, other.get_parameter(name), atol=1e-5, rtol=1e-4)


def test_schedulers_reach_both_and_state_comes_back() -> None:
    model = tiny_model().float().train()
    optimizer = MuonAdamW(model, lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    take_steps(model, optimizer, 1)
    scheduler.step()
    assert {group["lr"] for part in (optimizer.muon, optimizer.adamw) for group in part.param_groups} == {0.005}

    twin = copy.deepcopy(model)
    restored = MuonAdamW(twin, lr=0.01)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for network, part in ((model, optimizer), (twin, restored)):
        take_steps(network, part, 2, seed=10)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(name))


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_orthogonalizing_is_the_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    expected = left @ values.diag() @ right
    torch.testing.assert_close(orthogonalize(matrix, torch.float64), expected, atol=1e-12, rtol=1e-10)
    assert 0.3 < values.min() and values.max() < 1.3


def test_nothing_to_orthogonalize_stays_nothing() -> None:
    assert not orthogonalize(torch.zeros(3, 4), torch.float32).any()


def test_bfloat16_turns_a_step_little() -> None:
    """Five steps of the polynomial blow up its rounding; they point the same way."""
    for seed in range(5):
        matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(seed))
        exact, rounded = (orthogonalize(matrix, dtype).float() for dtype in (torch.float32, torch.bfloat16))
        assert torch.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.99
