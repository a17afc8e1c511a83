"""Peak memory of training steps, in a process of its own: what is allocated beyond the built model.

python -m transfusion.benchmarks.memory '{"system": "ours", "size": "S", "workload": "row"}'
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from . import ours, peer, reference
from .workloads import LONG_4K, LONG_8K, ONE_ROW, SIZES, Training


WORKLOADS: dict[str, Training] = {"row": ONE_ROW, "4k": LONG_4K, "8k": LONG_8K}
STEPS = 3
MEGABYTE = 1e6


@dataclass(frozen=True)
class MemoryJob:
    """What one process measures.

    Attributes:
        system: `ours`, `plain` or `peer`.
        size, workload: By name.
        inner: Width of our feed-forward layers.
        bf16: Compute in bfloat16.
        checkpointed: With gradient checkpointing.
    """

    system: str
    size: str
    workload: str
    inner: int | None = None
    bf16: bool = False
    checkpointed: bool = False


def make_step(job: MemoryJob) -> tuple[ours.TrainingStep, int]:
    """The training step of `job`, and the parameters of its model."""
    size, workload = SIZES[job.size], WORKLOADS[job.workload]
    config = ours.make_config(size, workload.longest, job.inner)
    if job.system == "peer":
        module = peer.build(size)
        return peer.training_step(module, workload, config, job.bf16), ours.num_parameters(module)
    if job.system == "plain":
        plain = reference.PlainTransfusion(config)
        return reference.training_step(plain, workload, job.bf16), ours.num_parameters(plain)
    model = ours.for_training(ours.build(config), workload)
    if job.checkpointed:
        model.gradient_checkpointing_enable()
    return ours.training_step(model, workload, job.bf16), ours.num_parameters(model)


def resident(field: str) -> int:
    """Bytes of a line of /proc/self/status: VmHWM, the most so far, or VmRSS, those of now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measure(job: MemoryJob) -> dict[str, float]:
    """Megabytes at the peak of a few steps, beyond what the built model takes."""
    step, parameters = make_step(job)
    built = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of building it
    for _ in range(STEPS):
        step()
    return {"megabytes": (resident("VmHWM") - built) / MEGABYTE, "parameters": parameters}


def measure_apart(job: MemoryJob) -> dict[str, float]:
    """The same in a fresh process.

    Raises:
        RuntimeError: That process failed, as by lack of memory.
    """
    command = [sys.executable, "-m", "transfusion.benchmarks.memory", json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"exit code {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(measure(MemoryJob(**json.loads(sys.argv[1])))))
