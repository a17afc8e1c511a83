"""A training on GPUs by a shipped config of accelerate, started by `accelerate launch`."""

import json
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers.distributed import DistributedConfig

from tests.training.trajectories import run


def main(folder: str, recipe: str) -> None:
    """Train in float32 and write what was logged."""
    plan = DistributedConfig(tp_size=2) if recipe == "tensor_parallel" else None
    state = PartialState()
    share = 8 if plan is not None else 8 // state.num_processes
    decay = None if recipe.startswith("deepspeed") else 0.5
    output_dir = Path(folder, recipe)
    options: dict[str, Any] = {"per_device_train_batch_size": share, "use_cpu": False}
    steps = run(Path(folder, "model"), output_dir, plan, ema_decay=decay, **options)
    if state.is_main_process:
        (output_dir / "steps.json").write_text(json.dumps(steps))


if __name__ == "__main__":
    main(*sys.argv[1:])
