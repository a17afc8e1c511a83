import json
from pathlib import Path

import pytest

from transfusion.benchmarks.machine import environment, processor


@pytest.mark.parametrize(
    ("flags", "bf16"), [("fpu avx512_vnni", "emulated"), ("avx512_bf16", "avx512"), ("amx_bf16 avx512_bf16", "amx")]
)
def test_what_the_processor_can_do(tmp_path: Path, flags: str, bf16: str) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: A Chip\nflags\t\t: sse {flags}\n\n")
    found = processor(cpuinfo)
    assert found["name"] == "A Chip" and found["bf16"] == bf16 and "fpu" not in found["flags"]
    assert processor(tmp_path / "absent")["name"]


def test_the_environment_is_json() -> None:
    found = environment("cpu")
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] and found["threads"] >= 1 and "commit" in found
