import shutil
import sys
from pathlib import Path

import pytest

from transfusion.benchmarks import peer
from transfusion.benchmarks.memory import MemoryJob, make_step, measure_apart, resident


pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")


def test_a_process_of_its_own_says_its_peak() -> None:
    found = measure_apart(MemoryJob("ours", "tiny", "row"))
    assert 1 < found["megabytes"] < 500 and found["parameters"] > 10_000


def test_a_process_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="exit code 1"):
        measure_apart(MemoryJob("ours", "tiny", "row"))


@pytest.mark.parametrize(
    "job", [MemoryJob("plain", "tiny", "row"), MemoryJob("ours", "tiny", "row", checkpointed=True)]
)
def test_systems(job: MemoryJob) -> None:
    step, parameters = make_step(job)
    assert parameters > 10_000 and step.module.training
    assert getattr(step.module, "is_gradient_checkpointing", False) == job.checkpointed


def test_resident_memory_grows_with_what_is_allocated() -> None:
    before = resident("VmRSS")
    data = bytearray(2**28)
    data[:: 2**12] = b"x" * 2**16  # each page is written
    assert resident("VmRSS") - before > 2**27
    assert resident("VmHWM") >= resident("VmRSS") > 2**20


@pytest.mark.skipif(not peer.is_installed(), reason="pip install transfusion-pytorch")
def test_the_peer() -> None:
    step, parameters = make_step(MemoryJob("peer", "tiny", "row"))
    assert parameters > 10_000 and step.module.training
