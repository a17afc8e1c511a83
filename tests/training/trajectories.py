"""Trainings whose every step is compared: by one process, and by several that torchrun started (`main`)."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import ParallelismConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.utils.data import IterableDataset
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.distributed import DistributedConfig

from tests.tiny import tiny_config
from tests.tiny_processor import tiny_processor
from tests.training.tiny_rows import RowList, training_row
from transfusion import TransfusionForMultimodalGeneration
from transfusion.training.collator import TransfusionDataCollator
from transfusion.training.optimizers import MuonAdamW
from transfusion.training.reporting import SampleGridCallback
from transfusion.training.trainer import TransfusionTrainer


RECIPES = Path(__file__).parents[2] / "scripts" / "recipes" / "accelerate"
NUM_STEPS, ROWS_PER_STEP = 4, 8
NUM_ROWS = 27  # the last step has three
QUANTITIES = ("text_loss", "image_loss", "grad_norm", "eval_text_loss", "eval_image_loss")
CASES: dict[str, dict[str, Any]] = {
    "plain": {"objective": "ddpm"},
    "streams": {"objective": "flow", "num_residual_streams": 4, "hyper_connections": "dynamic"},
    "axial": {"objective": "flow", "axial_positions": True, "modality_experts": "all", "tie_word_embeddings": True},
}


def trajectory_rows(count: int = NUM_ROWS, seed: int = 3) -> list[dict[str, Any]]:
    """Rows of 0 to 3 images and 3 to 15 tokens of text."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        parts: list[int | tuple[int, int]] = []
        num_images, *sides = torch.randint(0, 4, (7,), generator=generator).tolist()
        for image in range(num_images):
            parts += torch.randint(3, 90, (int(sides[image]) + 1,), generator=generator).tolist()
            parts.append((sides[image] + 1, sides[image + 3] + 1))
        row = training_row(*parts, *torch.randint(3, 90, (2,), generator=generator).tolist(), 2, seed=number)
        rows.append({name: value.float() if name == "latent_patches" else value for name, value in row.items()})
    return rows


class Stream(IterableDataset):
    """Gives the rows one after the other."""

    def __iter__(self) -> Iterator[Any]:
        return iter(trajectory_rows())


def save_model(folder: Path, case: str) -> None:
    """Write the float32 model that all trainings of a case begin with."""
    torch.manual_seed(0)
    TransfusionForMultimodalGeneration(tiny_config(**CASES[case])).save_pretrained(folder)


def run(
    folder: Path,
    output_dir: Path,
    plan: DistributedConfig | None = None,
    rows: Any = None,
    callbacks: Any = (),
    ema_decay: float | None = 0.5,
    muon: bool = False,
    start: Path | None = None,
    **options: Any,
) -> list[dict[str, float]]:
    """Train the model of `folder` on packed rows, by gradient descent or Muon, and save it; what each step logged."""
    sharding = {} if plan is None else {"distributed_config": plan}
    model = TransfusionForMultimodalGeneration.from_pretrained(folder, **sharding)
    defaults: dict[str, Any] = {
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 2,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "learning_rate": 0.05,
        "max_grad_norm": 0.0,
        "max_steps": NUM_STEPS,
    }
    trainer = TransfusionTrainer(
        model,
        TrainingArguments(output_dir=str(output_dir), **{**defaults, **options}),
        TransfusionDataCollator(model.config, text_dropout=0.3, packed_length=64),
        train_dataset=RowList(trajectory_rows()) if rows is None else rows,
        eval_dataset=RowList(trajectory_rows(5, seed=4)),
        ema_decay=ema_decay,
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=(MuonAdamW, {"model": model, **MUON}) if muon else None,
    )
    trainer.train(None if start is None else str(start))
    trainer.save_model()
    AcceleratorState._reset_state()
    steps: dict[int, dict[str, float]] = {}
    for entry in trainer.state.log_history:
        steps.setdefault(entry["step"], {}).update({name: entry[name] for name in QUANTITIES if name in entry})
    return [steps[step] for step in sorted(steps)]


MUON = {"lr": 1e-3, "weight_decay": 0.1, "dtype": torch.float32}
ADAMW: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1}


def run_halves(
    model: Path, output_dir: Path, start: Path | None = None, batch_size: int = ROWS_PER_STEP, **options: Any
) -> None:
    """Train by AdamW for four steps, with a checkpoint after the second and the last; or go on from one."""
    options |= {"rows": RowList(trajectory_rows(NUM_STEPS * ROWS_PER_STEP)), "start": start, **ADAMW}
    run(model, output_dir, per_device_train_batch_size=batch_size, save_strategy="steps", save_steps=2, **options)


@contextmanager
def launched(recipe: str, *options: str) -> Iterator[None]:
    """Let accelerate read what its launcher makes of a config file, and use it on CPUs, where it would not."""
    arguments = launch_command_parser().parse_args(["--config_file", str(RECIPES / recipe), *options, "script.py"])
    launch_environment = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    prefixes = ("ACCELERATE_", "FSDP_", "PARALLELISM_")
    chosen = {name: value for name, value in launch_environment.items() if name.startswith(prefixes)}
    before, make_state = dict(os.environ), AcceleratorState.__init__

    def make_fsdp_state(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        make_state(self, *args, **kwargs)
        if fsdp_plugin is not None:
            if kwargs["mixed_precision"] not in (None, "no"):
                fsdp_plugin.set_mixed_precision(kwargs["mixed_precision"])
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP

    os.environ.update(chosen)
    AcceleratorState.__init__ = make_fsdp_state
    try:
        yield
    finally:
        AcceleratorState.__init__ = make_state
        for name in chosen:
            os.environ.pop(name)
        os.environ.update(before)


def run_together(folder: Path, case: str, num_processes: int) -> dict[str, list[dict[str, float]]]:
    """Trainings of a case in all ways that divide it among so many processes."""
    model, share = folder / case, ROWS_PER_STEP // num_processes
    results = {}

    def add(name: str, plan: DistributedConfig | None = None, batch_size: int = share, **options: Any) -> None:
        output_dir = folder / f"{case}-{name}"
        results[name] = run(model, output_dir, plan, per_device_train_batch_size=batch_size, **options)

    if num_processes == 2:
        add("ddp")
        add("ddp-accumulated", None, 2, gradient_accumulation_steps=2)
        add("ddp-stream", rows=Stream())
        add("fsdp", DistributedConfig(fsdp_size=2))
        add("fsdp-accumulated", DistributedConfig(fsdp_size=2), 2, gradient_accumulation_steps=2)
        add("tp", DistributedConfig(tp_size=2), ROWS_PER_STEP)
        with launched("fsdp2.yaml", "--num_processes", "2", "--mixed_precision", "no"):
            add("accelerate-fsdp", gradient_checkpointing=True)
        if case == "streams":
            add("bf16-ddp", bf16=True)
            add("bf16-fsdp", DistributedConfig(fsdp_size=2), bf16=True)
            with launched("fsdp2.yaml", "--num_processes", "2"):
                add("bf16-accelerate-fsdp")
            add("muon-fsdp", DistributedConfig(fsdp_size=2), muon=True)
            add("muon-tp", DistributedConfig(tp_size=2), ROWS_PER_STEP, muon=True)
            with launched("fsdp2.yaml", "--num_processes", "2", "--mixed_precision", "no"):
                add("muon-accelerate-fsdp", muon=True)
    else:
        add("ddp4")
        add("fsdp-tp", DistributedConfig(fsdp_size=2, tp_size=2), ROWS_PER_STEP // 2)
        with launched("hsdp.yaml", *HSDP_4, "--mixed_precision", "no"):
            add("accelerate-hsdp")
    return results


HSDP_4 = ["--num_machines", "1", "--num_processes", "4", "--parallelism_config_dp_shard_size", "2"]


PROMPTS = ["a red heart", "a blue sky", "a red sky"]
SHEET_PLANS = {
    "ddp": None,
    "fsdp": DistributedConfig(fsdp_size=2),
    "tp": DistributedConfig(tp_size=2),
}


def draw_sheets(folder: Path) -> None:
    """Sheets of pictures, drawn by two processes: more prompts than these, and fewer."""
    for name, plan in SHEET_PLANS.items():
        sharding = {} if plan is None else {"distributed_config": plan}
        model = TransfusionForMultimodalGeneration.from_pretrained(folder / "sheet", **sharding)
        arguments = TrainingArguments(str(folder / f"sheet-{name}"), use_cpu=True, report_to="none")
        for step, prompts in ((1, PROMPTS), (2, PROMPTS[:1])):
            state = TrainerState(global_step=step, is_world_process_zero=arguments.process_index == 0)
            callback = SampleGridCallback(tiny_processor(), prompts, 1, num_inference_steps=2)
            callback.on_step_end(arguments, state, TrainerControl(), model=model)


def run_halves_together(folder: Path, num_processes: int) -> None:
    """Trainings that are saved halfway, and that go on from there."""
    model, saved = folder / "streams", folder / "halves-fsdp" / "checkpoint-2"
    if num_processes == 2:
        with launched("fsdp2.yaml", "--num_processes", "2", "--mixed_precision", "no"):
            run_halves(model, saved.parent, batch_size=4)
            run_halves(model, folder / "halves-resumed", saved, batch_size=4)
        run_halves(model, folder / "halves-ddp", saved, batch_size=4)
        run_halves(model, folder / "halves-tp", saved, plan=DistributedConfig(tp_size=2))
    else:
        run_halves(model, folder / "halves-fsdp4", saved, batch_size=2, plan=DistributedConfig(fsdp_size=4))
        plan = DistributedConfig(fsdp_size=2, tp_size=2)
        run_halves(model, folder / "halves-fsdp-tp", saved, batch_size=4, plan=plan)


def main(folder: str) -> None:
    """Run all cases in all ways."""
    # accelerate lets tensor-parallel models through on accelerators alone.
    ParallelismConfig._validate_accelerator = lambda self, accelerator: None
    torch.distributed.init_process_group("gloo")
    num_processes = torch.distributed.get_world_size()
    cases = CASES if num_processes == 2 else ("streams",)
    results = {case: run_together(Path(folder), case, num_processes) for case in cases}
    run_halves_together(Path(folder), num_processes)
    if num_processes == 2:
        draw_sheets(Path(folder))
    if torch.distributed.get_rank() == 0:
        Path(folder, f"results-{num_processes}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
