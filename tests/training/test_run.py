"""Whole trainings as files state them, on a few pictures."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModel

from transfusion import TransfusionPipeline
from transfusion.training.run import run_arguments, start_model, train_run
from transfusion.training.specs import ModelSpec, parse_spec


ROOT = Path(__file__).parents[2]
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def entries_of(folder: Path, pictures: Path, **changes: Any) -> dict[str, Any]:
    """A training of a few steps."""
    return {
        "output_dir": str(folder),
        "model": {"preset": "demo", "image_size": 16, "config": TINY},
        "data": {"sources": [{"kind": "imagefolder", "path": str(pictures)}]},
        "length": {"max_steps": 4},
        "training": {"batch_size": 2, "bf16": False},
        "watch": {"every": 1, "sample_every": 4},
        "checkpoints": {"every": 2},
        **changes,
    }


def test_a_file_trains_a_model_that_draws_and_says_how_it_went(picture_folder: Path, tmp_path: Path) -> None:
    picture = sorted(picture_folder.glob("*.png"))[0]
    entries = entries_of(tmp_path / "out", picture_folder)
    entries["watch"] |= {"prompts": ["a red heart"], "pictures": [str(picture)]}
    entries["training"] |= {"num_inference_steps": 2, "ema_decay": 0.9}
    entries["validation"] = entries["data"]
    trainer = train_run(parse_spec(entries))
    out = tmp_path / "out"
    assert trainer.state.global_step == 4
    summary = (out / "summary.md").read_text()
    assert "4 steps" in summary and "tokens_per_second" in summary and "preset: demo" in summary
    assert picture.name in (out / "samples" / "captions.md").read_text()
    assert (out / "samples" / "step_0000004.png").exists() and (out / "losses.png").exists()
    logged = set().union(*trainer.state.log_history)
    assert {"text_loss", "image_loss", "grad_norm", "mfu", "peak_memory_gb", "eval_text_loss"} <= logged
    assert any(name.startswith("image_loss_at_") for name in logged)
    images = TransfusionPipeline.from_pretrained(out)("a red heart", num_inference_steps=2).images
    assert images[0].size == (16, 16)
    assert not [file for file in out.rglob("*") if file.suffix in (".pt", ".pth", ".bin", ".pkl")]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_training_that_goes_on_ends_as_one_that_never_stopped(
    optimizer: str, picture_folder: Path, tmp_path: Path
) -> None:
    def run(folder: str, steps: int, resume: bool = False) -> Any:
        entries = entries_of(tmp_path / folder, picture_folder, length={"max_steps": steps})
        entries["training"] |= {"optimizer": optimizer, "schedule": "constant"}
        return train_run(parse_spec(entries), resume)

    whole = run("whole", 4)
    run("parts", 2)
    resumed = run("parts", 4, resume=True)
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_adapters_are_trained_on_a_checkpoint(picture_folder: Path, tmp_path: Path) -> None:
    train_run(parse_spec(entries_of(tmp_path / "start", picture_folder, checkpoints={"every": None})))
    model = {"checkpoint": str(tmp_path / "start"), "lora": {"rank": 2}}
    trainer = train_run(parse_spec(entries_of(tmp_path / "lora", picture_folder, model=model)))
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 2
    assert AutoModel.from_pretrained(tmp_path / "lora").config.hidden_size == 32
    assert trainer.get_num_trainable_parameters() < 10_000


def test_beginnings_that_do_not_fit_are_refused(picture_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="preset is 'none'; known: "):
        start_model(ModelSpec(preset="none"))
    entries = entries_of(tmp_path / "x", picture_folder)
    entries["model"] |= {"lora": {"rank": 2}}
    with pytest.raises(ValueError, match="lora without merge needs a checkpoint"):
        train_run(parse_spec(entries))


def test_pixels_can_be_the_latents() -> None:
    model, processor = start_model(ModelSpec(preset="demo", vae="none", image_size=16, config=TINY))
    assert processor.vae is None and model.config.latent_channels == 3


def test_the_rate_falls_to_its_final_share(picture_folder: Path, tmp_path: Path) -> None:
    entries = entries_of(tmp_path, picture_folder)
    entries["training"] |= {"final_share": 0.05, "learning_rate": "1e-3", "accumulation": 2, "batch_size": 8}
    arguments = run_arguments(parse_spec(entries))
    assert arguments.lr_scheduler_kwargs == {"min_lr_rate": 0.05} and arguments.learning_rate == 1e-3
    assert arguments.gradient_accumulation_steps * arguments.per_device_train_batch_size == 8
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1e-3)
    from transformers import get_scheduler

    schedule = get_scheduler(
        arguments.lr_scheduler_type, optimizer, 2, 10, scheduler_specific_kwargs=arguments.lr_scheduler_kwargs
    )
    for _ in range(10):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr()[0] == pytest.approx(5e-5)


def test_batches_that_cannot_be_shared_are_refused(picture_folder: Path, tmp_path: Path) -> None:
    entries = entries_of(tmp_path, picture_folder)
    entries["training"] |= {"accumulation": 4, "batch_size": 6}
    with pytest.raises(ValueError, match="batch_size is 6; give a multiple of 4"):
        run_arguments(parse_spec(entries))


def test_trackio_gets_losses_and_drawings(
    picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own: trackio reads where to write when it is imported."""
    entries = entries_of(tmp_path / "out", picture_folder)
    entries["watch"] |= {"prompts": ["a red heart"], "trackers": ["trackio"]}
    entries["training"] |= {"num_inference_steps": 2}
    entries["checkpoints"] = {"every": None}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(entries))
    variables = {**os.environ, "TRACKIO_DIR": str(tmp_path / "tracked"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "transfusion.cli", "train", str(file)]
    subprocess.run(command, check=True, env=variables, cwd=ROOT, capture_output=True, timeout=300)
    [database] = (tmp_path / "tracked").glob("*.db")
    with contextlib.closing(sqlite3.connect(database)) as connection:
        logged = " ".join(str(row) for row in connection.execute("select * from metrics"))
    assert "text_loss" in logged and "trackio.image" in logged
    assert list((tmp_path / "tracked").rglob("*.png"))


def test_a_stream_is_trained_on_and_evaluated_once_through(picture_folder: Path, tmp_path: Path) -> None:
    stream = {"sources": [{"kind": "stream", "path": str(picture_folder)}]}
    entries = entries_of(tmp_path / "out", picture_folder, data=stream, validation=stream)
    trainer = train_run(parse_spec(entries))
    assert trainer.state.global_step == 4
    assert any("eval_loss" in entry for entry in trainer.state.log_history)
