import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from safetensors import safe_open
from safetensors.torch import load_file

from tests.tiny_processor import tiny_processor
from tests.training.test_reporting import small_model
from tests.training.trajectories import (
    CASES,
    NUM_STEPS,
    PROMPTS,
    QUANTITIES,
    ROWS_PER_STEP,
    SHEET_PLANS,
    run,
    run_halves,
    save_model,
)
from transfusion import TransfusionForMultimodalGeneration
from transfusion.training.reporting import draw_pictures, picture_grid


ROOT = Path(__file__).parents[2]


def torchrun(num_processes: int, script: str, *args: Any, **options: Any) -> None:
    """Run a script of the tests in several processes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    command += [f"--{name}={value}" for name, value in options.items()]
    command += [str(ROOT / "tests" / "training" / script), *map(str, args)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-10_000:]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the models of all cases, and of what two and four processes logged and saved."""
    folder = tmp_path_factory.mktemp("trajectories")
    for case in CASES:
        save_model(folder / case, case)
    small_model().save_pretrained(folder / "sheet")
    torchrun(2, "trajectories.py", folder)
    torchrun(4, "trajectories.py", folder)
    return folder


def assert_same_trajectory(actual: list[dict[str, float]], expected: list[dict[str, float]], name: str = "") -> None:
    assert len(actual) == len(expected) == NUM_STEPS
    for step, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one == pytest.approx(other, rel=1e-6), (name, step)


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_trajectories_are_equal(together: Path, case: str, tmp_path: Path) -> None:
    """Losses and gradient norms of every step, of the average in evaluation, and the weights that are saved."""
    single = run(together / case, tmp_path / "single", per_device_train_batch_size=ROWS_PER_STEP)
    assert set(single[1]) == set(QUANTITIES)
    accumulated = run(together / case, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_same_trajectory(accumulated, single)
    weights = load_file(tmp_path / "single" / "model.safetensors")
    results: dict[str, Any] = {}
    for num_processes in (2, 4):
        results |= json.loads((together / f"results-{num_processes}.json").read_text()).get(case, {})
    assert {"ddp", "fsdp", "tp", "accelerate-fsdp"} <= set(results)
    for name, steps in results.items():
        if name.startswith(("bf16", "muon")):
            continue
        assert_same_trajectory(steps, single, name)
        saved = load_file(together / f"{case}-{name}" / "model.safetensors")
        if name.startswith(("fsdp", "tp")):  # transformers writes tied weights twice where it has sharded them
            saved = {key: tensor for key, tensor in saved.items() if key in weights}
        torch.testing.assert_close(saved, weights, rtol=1e-5, atol=1e-7)


@pytest.mark.distributed
def test_muon_orthogonalises_whole_matrices(together: Path, tmp_path: Path) -> None:
    single = run(together / "streams", tmp_path, per_device_train_batch_size=ROWS_PER_STEP, muon=True)
    results = json.loads((together / "results-2.json").read_text())["streams"]
    for name in ("muon-fsdp", "muon-tp", "muon-accelerate-fsdp"):
        assert_same_trajectory(results[name], single, name)


@pytest.mark.distributed
def test_a_sharded_state_is_taken_up_by_any_number_of_processes(together: Path) -> None:
    """AdamW under FSDP2, saved on 2 processes after two steps of four: bitwise on 2, to 1e-6 on 1 and 4."""
    run_halves(together / "streams", together / "halves-single", together / "halves-fsdp" / "checkpoint-2")
    files = ("model.safetensors", "optimizer.safetensors", "ema/model.safetensors")
    for name in ("resumed", "ddp", "tp", "single", "fsdp4", "fsdp-tp"):
        is_bitwise = name in ("resumed", "ddp")  # the same sums in the same order
        for file in files:
            folders = (together / f"halves-{kind}" / "checkpoint-4" for kind in (name, "fsdp"))
            actual, expected = (load_file(folder / file) for folder in folders)
            torch.testing.assert_close(actual, expected, rtol=0, atol=0 if is_bitwise else 1e-6)
    begin, end = (load_file(together / "halves-fsdp" / f"checkpoint-{step}" / files[0]) for step in (2, 4))
    assert all((begin[name] - end[name]).abs().max() > 1e-4 for name in begin)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["ddp", "fsdp", "accelerate-fsdp"])
def test_bfloat16_computes_with_float32_weights(together: Path, name: str) -> None:
    """The first step's losses are not rounded to bfloat16 (8 bits), nor are timesteps; the weights stay float32."""
    results = json.loads((together / "results-2.json").read_text())["streams"]
    for quantity in ("text_loss", "image_loss", "grad_norm"):
        exact, rounded = (results[kind][0][quantity] for kind in ("ddp", f"bf16-{name}"))
        assert rounded != exact and rounded == pytest.approx(exact, rel=5e-4), quantity
    saved, exact = (load_file(together / f"streams-{kind}" / "model.safetensors") for kind in (f"bf16-{name}", "ddp"))
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    torch.testing.assert_close({key: saved[key] for key in exact}, exact, rtol=0, atol=2e-3)
    assert any((weight != weight.bfloat16().float()).any() for weight in saved.values())


@pytest.mark.distributed
@pytest.mark.parametrize("name", SHEET_PLANS)
def test_sheets_are_drawn_by_all_processes(together: Path, name: str) -> None:
    model = TransfusionForMultimodalGeneration.from_pretrained(together / "sheet")
    for step, prompts in ((1, PROMPTS), (2, PROMPTS[:1])):
        pictures = draw_pictures(model, tiny_processor(), prompts, num_inference_steps=2)
        with Image.open(together / f"sheet-{name}" / "samples" / f"step_000000{step}.png") as sheet:
            difference = ImageChops.difference(sheet, picture_grid(pictures, prompts))
        assert np.asarray(difference).max() <= 1  # a level, where a float lies between two


@pytest.mark.slow  # now and then gloo does not connect anew, and the next attempt waits for its time-out
@pytest.mark.distributed
def test_a_worker_that_dies_is_replaced_on_the_same_trajectory(tmp_path: Path) -> None:
    """By torchrun and the last checkpoint: losses, weights and average are bit by bit those of an undisturbed twin."""
    torchrun(2, "restarting.py", tmp_path, max_restarts=6)
    assert (tmp_path / "died").read_text() in ("1", "2"), "the step from which it went on"
    killed, twin = (safe_open(tmp_path / name / "last.safetensors", "pt") for name in ("killed", "twin"))
    assert killed.metadata() == twin.metadata() and len(json.loads(killed.metadata()["losses"])) == 5
    for name in twin.keys():
        assert torch.equal(killed.get_tensor(name), twin.get_tensor(name)), name
