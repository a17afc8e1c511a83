"""Every suite, whole, at width 16 and without a peer: what it measures, and that it says so."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from transfusion.benchmarks import ours, peer, suites
from transfusion.benchmarks.memory import MemoryJob
from transfusion.benchmarks.reference import PlainTransfusion
from transfusion.benchmarks.results import Result
from transfusion.benchmarks.suites import Bench, CodecAlone, Options
from transfusion.benchmarks.workloads import SIZES, Decoding, Denoising, Interleaving, Training


TINY = SIZES["tiny"]
ROW = Training("row", ((3, (2, 2), 2), (5,)))
TEXT = Decoding("text", 2, 5, fewer=1, more=3)
IMAGE = Denoising("image", 2, 5, 3.0, evaluations=2, grid=(2, 2))
BOTH = Interleaving("both", 5, 2, evaluations=2, grid=(2, 2))
OPTIONS = Options((TINY,), rounds=2, warmup=1, with_peer=False)


@pytest.fixture(autouse=True)
def small_workloads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "TRAINING", {"train": (ROW,)})
    monkeypatch.setattr(suites, "ONE_ROW", ROW)
    monkeypatch.setattr(suites, "DECODING", (TEXT,))
    monkeypatch.setattr(suites, "DENOISING", (IMAGE, replace(IMAGE, name="not guided", guidance=1.0)))
    monkeypatch.setattr(suites, "INTERLEAVING", (BOTH,))


def run(suite: str, **options: Any) -> list[Result]:
    found: Iterator[list[Result]] = Bench(replace(OPTIONS, **options)).run(suite)
    return [result for results in found for result in results]


def systems(results: list[Result]) -> list[str]:
    return [result.system for result in results]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training(dtype: str) -> None:
    results = run("train", dtypes=(dtype,))
    assert systems(results) == ["ours", "plain", "floor"]
    for result in results:
        assert result.samples and len(result.samples.values) == 2 and min(result.samples.values) > 0
        assert result.place.dtype == dtype and result.place.unit == "step"
        assert result.tokens == ROW.tokens == 18 and result.flops
    assert results[0].parameters == results[1].parameters


def test_decoding() -> None:
    results = run("decode")
    assert systems(results) == ["ours", "ours", "plain", "plain"]
    call, token = results[:2]
    assert call.place.unit.startswith("call of 3 tokens") and call.tokens == 6
    assert token.place.unit == "token" and token.tokens == 2 and token.bytes and token.flops
    assert call.samples and len(call.samples.values) == 2


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_denoising(dtype: str) -> None:
    results = run("denoise", dtypes=(dtype,))
    assert systems(results) == ["ours", "plain", "floor"] * 2
    guided, alone = results[0], results[3]
    assert (
        guided.place.unit == "evaluation"
        and guided.flops
        and alone.flops
        and alone.flops < guided.flops < 2 * alone.flops
    )
    assert all(result.samples and not result.note for result in results)


def test_interleaving_streams_and_codecs() -> None:
    assert systems(run("interleaved")) == ["ours"]
    assert systems(run("streams")) == [f"ours, {name}" for name in suites.STREAMS]
    alone = [f"ours, {name} codec{part}" for name in ("linear", "unet") for part in ("", " alone")]
    assert systems(run("codec")) == alone


def test_the_codec_alone_has_its_gradients_and_keeps_none() -> None:
    model = ours.build(ours.make_config(TINY, 64, patch_codec="unet"))
    seen = []
    weight = model.model.patch_encoder.conv_in.weight
    weight.register_hook(lambda gradient: seen.append(gradient.shape))
    CodecAlone(model, ROW, bf16=False)()
    assert seen == [weight.shape] and weight.grad is None


@pytest.mark.parametrize("suite", ["train", "denoise"])
def test_compiled_layers(suite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the minutes of a compiler: what is compiled is asked for it."""
    asked: list[str] = []

    def compile_plain(plain: PlainTransfusion) -> PlainTransfusion:
        asked.append("plain")
        return plain

    model_class = ours.TransfusionForMultimodalGeneration
    monkeypatch.setattr(model_class, "compile_layers", lambda self: asked.append("ours"), raising=False)
    monkeypatch.setattr(suites.reference, "compile_layers", compile_plain)
    results = run(suite, compiled=True, rounds=1, workloads="guided" if suite == "denoise" else "")
    assert {"ours, compiled", "plain, compiled"} <= set(systems(results))
    assert sorted(set(asked)) == ["ours", "plain"]


def test_only_workloads_that_are_named() -> None:
    assert {result.place.workload for result in run("denoise", workloads="not", rounds=1)} == {"not guided"}
    assert not run("train", workloads="elsewhere")


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(job: MemoryJob) -> dict[str, float]:
        if job.checkpointed:
            raise RuntimeError("no room")
        return {"megabytes": 100.0, "parameters": 7}

    monkeypatch.setattr(suites, "measure_apart", measure)
    results = run("memory", workloads="4 rows")
    assert systems(results) == ["ours", "ours, checkpointed", "plain"]
    assert [result.samples and result.samples.values for result in results] == [[100.0], None, [100.0]]
    assert results[1].note == "no room" and results[0].place.unit == "MB" and results[0].parameters == 7


def test_startup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites.startup, "IMPORTS", {"ours, the package": "pass"})
    results = run("startup")
    assert systems(results) == ["ours, the package", "ours, from_pretrained"]
    assert [result.place.unit for result in results] == ["import", "load"]


@pytest.mark.skipif(not peer.is_installed(), reason="pip install transfusion-pytorch")
@pytest.mark.parametrize("suite", ["train", "decode", "denoise", "interleaved"])
def test_with_the_peer(suite: str) -> None:
    results = run(suite, with_peer=True, rounds=1)
    found = systems(results)
    assert any(name.startswith("peer") for name in found) and "ours, same parameters" in found
    assert all(result.samples for result in results)
