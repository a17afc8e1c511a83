import json
from pathlib import Path

import pytest

from scripts.benchmark import main, parse_args
from transfusion.benchmarks import gate, suites
from transfusion.benchmarks.flops import Peak
from transfusion.benchmarks.workloads import Training


ROW = Training("row", ((3, (2, 2), 2), (5,)))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small workload, no peaks to measure, no limit on the memory of the tests, and a gate that stands open."""
    monkeypatch.setattr(suites, "TRAINING", {"train": (ROW,)})
    monkeypatch.setattr(Peak, "measure", lambda device: Peak({"fp32": 1e11, "bf16": 1e11}, 1e10))
    monkeypatch.setattr("scripts.benchmark.limit_memory", lambda: None)
    monkeypatch.setattr(gate, "run_gate", lambda *args: [gate.Check("all", 0.0)])


def test_it_measures_writes_and_checks(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--suite", "train", "--size", "tiny", "--rounds", "2", "--no-peer"]
    assert main(parse_args([*options, "--out", str(tmp_path / "first")])) == 0
    file = tmp_path / "first" / "benchmark.json"
    record = json.loads(file.read_text())
    assert record["environment"]["torch"] and record["peak"]["read"] == 1e10 and record["gate"][0]["holds"]
    assert [result["system"] for result in record["results"]] == ["ours", "plain", "floor"]
    assert "| ours |" in (tmp_path / "first" / "benchmark.md").read_text()

    record["ratios"], ours = {}, record["results"][0]["samples"]
    ours["values"] = [value / 1000 for value in ours["values"]]
    file.write_text(json.dumps(record))
    assert main(parse_args([*options, "--out", str(tmp_path / "second"), "--check", str(file)])) == 1
    capsys.readouterr()
    assert main(parse_args(["--tables", str(file)])) == 0
    assert capsys.readouterr().out.startswith("**train: row, tiny, fp32, per step**")


def test_no_table_where_the_gate_is_shut(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "run_gate", lambda *args: [gate.Check("cached decoding", 0.5)])
    with pytest.raises(ValueError, match="cached decoding"):
        main(parse_args(["--size", "tiny", "--out", str(tmp_path)]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--suite", "trian"], "--suite trian: choose from train,"),
        (["--size", "S,XL"], "--size XL"),
        (["--dtype", "fp8"], "--dtype fp8"),
        (["--suite", "gpu"], "--suite gpu --device cuda"),
        (["--suite", "train", "--device", "cuda"], "--suite gpu --device cuda"),
    ],
)
def test_options_that_cannot_work(options: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse_args(options)
    assert said in capsys.readouterr().err
