import pytest
import torch

from transfusion.benchmarks import gate, ours
from transfusion.benchmarks.gate import Check, relative_error, require, run_gate
from transfusion.benchmarks.reference import PlainTransfusion
from transfusion.benchmarks.workloads import SIZES


TINY = SIZES["tiny"]


def test_everything_holds() -> None:
    lines: list[str] = []
    checks = run_gate(TINY, say=lines.append)
    require(checks)
    assert len(lines) == len(checks) == 6 and all("holds" in line for line in lines)


def test_a_broken_model_stops_everything() -> None:
    model = ours.build(ours.make_config(TINY, 605)).eval()
    plain = PlainTransfusion(model.config).take_weights(model.state_dict())
    require(gate.same_as_plain(model, plain) + gate.sampled_as_plain(model, plain))
    with torch.no_grad():
        model.model.norm.weight *= 2
    checks = gate.same_as_plain(model, plain)
    assert not any(check.holds for check in checks)
    with pytest.raises(ValueError, match="No measurement.*training loss"):
        require(checks)


def test_a_broken_cache_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours.build(ours.make_config(TINY, 605)).eval()
    require(gate.cached_as_full(model))
    from transformers import DynamicCache

    monkeypatch.setattr(DynamicCache, "get_seq_length", lambda self, layer_idx=0: 0)  # every token at position 0
    assert not all(check.holds for check in gate.cached_as_full(model))


def test_errors_are_relative_and_nan_does_not_hold() -> None:
    assert relative_error(torch.tensor([100.0, 101.0]), torch.tensor([100.0, 100.0])) == pytest.approx(0.01)
    assert relative_error(torch.ones(2), torch.ones(3)) == float("inf")
    assert not Check("", relative_error(torch.tensor([float("nan")]), torch.ones(1))).holds
