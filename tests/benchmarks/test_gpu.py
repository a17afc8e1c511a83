"""What a GPU runs, as far as a CPU can run it: the loops, the records, and that a failing part costs no other."""

from typing import Any

import pytest
import torch

from transfusion import modeling_transfusion
from transfusion.benchmarks import gpu, ours
from transfusion.benchmarks.flops import Peak
from transfusion.benchmarks.gpu import GpuBench, MaskWatch, MasterStep, device_batches
from transfusion.benchmarks.timing import WallClock
from transfusion.benchmarks.workloads import SIZES, Decoding, Denoising, Training


TINY = SIZES["tiny"]
ROW = Training("row", ((3, (2, 2), 2), (5,)))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> GpuBench:
    """A bench on the CPU, with small workloads and without compilers."""
    for name, value in {
        "DEVICE": "cpu",
        "CudaClock": WallClock,
        "GPU_PACKED_8K": ROW,
        "GPU_ONE_8K": ROW,
        "DENOISING": Denoising("images", 2, 5, 3.0, evaluations=2, grid=(2, 2)),
        "DECODING": Decoding("text", 1, 5, fewer=1, more=3),
        "SIZES": {"0.3B": TINY, "1.2B": TINY},
        "ROUNDS": 2,
        "WARMUP": 1,
    }.items():
        monkeypatch.setattr(gpu, name, value)
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5_000_000)
    model_class = ours.TransfusionForMultimodalGeneration
    monkeypatch.setattr(model_class, "compile_layers", lambda self: None, raising=False)
    monkeypatch.setattr(model_class, "set_attn_implementation", lambda self, name: None)
    return GpuBench(Peak({"bf16": 1e12, "fp32": 1e12}, 1e12), say=lambda line: None)


@pytest.mark.parametrize(
    ("part", "systems"),
    [
        ("training 0.3B", ["ours, autocast", "all kernels"]),
        ("training 1.2B", ["ours, autocast", "all kernels", "ours, bf16 weights"]),
        ("attention", ["ours, sdpa", "ours, flex_attention", "ours, sdpa"]),
        ("denoising", ["ours", "ours, compiled"]),
    ],
)
def test_parts(bench: GpuBench, part: str, systems: list[str]) -> None:
    bench.only = part
    results = [result for found in bench.run("gpu") for result in found]
    assert [result.system for result in results] == systems
    assert all(result.samples for result in results)
    if part.startswith("training"):
        steps = [result for result in results if result.system.startswith("ours")]
        assert all("5 MB at the peak" in result.note and "mask" in result.note for result in steps)
        assert all(result.flops and result.tokens == ROW.tokens for result in steps)


def test_decoding_compares_caches(bench: GpuBench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def write(model: Any, workload: Decoding, tokens: int, **options: Any) -> None:
        asked.append((tokens, options.get("cache_implementation")))

    monkeypatch.setattr(ours, "write", write)
    results = bench.decoding(TINY)
    assert [result.system for result in results] == ["ours, growing cache", "ours, static cache"]
    assert set(asked) == {(tokens, cache) for tokens in (1, 3) for cache in (None, "static")}
    assert results[1].bytes and results[1].place.unit == "token"


def test_a_part_that_fails_leaves_the_others(bench: GpuBench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(size: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(bench, "training", fail)
    monkeypatch.setattr(bench, "attention", fail)
    monkeypatch.setattr(bench, "decoding", fail)
    found = list(bench.run("gpu"))
    assert len(found) == 5
    assert found[0][0].samples is None and found[0][0].note == "OutOfMemoryError: too large"
    assert found[1][0].samples


def test_the_building_of_masks_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "CudaClock", WallClock)
    model = ours.build(ours.make_config(TINY, 64)).eval()
    build = modeling_transfusion.transfusion_mask
    with MaskWatch() as watch:
        model(ours.prompts(1, 5))
    assert len(watch.seconds) == 1 and watch.seconds[0] > 0
    assert modeling_transfusion.transfusion_mask is build


def test_weights_in_bfloat16_follow_their_float32_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    model = ours.build(ours.make_config(TINY, 64)).train().to(torch.bfloat16)
    step = MasterStep(model, gpu.loss_of(model), device_batches(ROW, model.config))
    before = step.masters[0].clone()
    assert torch.isfinite(step())
    assert step.masters[0].dtype == torch.float32 and not torch.equal(before, step.masters[0])
    assert all(torch.equal(w, m.to(w.dtype)) for w, m in zip(step.weights, step.masters, strict=True))
    assert all(weight.grad is None for weight in step.weights)
