"""A short training with all that is random in one, for tests that stop it and go on."""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from tests.tiny import tiny_config, tiny_model
from tests.training.tiny_rows import RowList, ragged_rows
from transfusion.modeling_transfusion import TransfusionForMultimodalGeneration
from transfusion.training import checkpoints
from transfusion.training.checkpoints import find_complete
from transfusion.training.collator import TransfusionDataCollator
from transfusion.training.optimizers import MuonAdamW
from transfusion.training.rows import SeededRows
from transfusion.training.trainer import TransfusionTrainer


# 12 rows in batches of 2, 4 batches a step: steps of 4 and 2 batches, 2 steps an epoch.
STEPS_PER_EPOCH, NUM_STEPS = 2, 6


class AugmentedRows(SeededRows):
    """Rows whose pictures are changed at random, by a seed of the row and the epoch."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        chooser = self.chooser(index)
        row = {**ragged_rows()[index], "sample_seed": chooser.getrandbits(63)}
        if "latent_patches" in row:
            row["latent_patches"] = row["latent_patches"].float() * (1 + chooser.random())
        return row


def tiny_trainer(
    output_dir: Path,
    muon: bool = False,
    ema_decay: float | None = 0.9,
    rows: Any = None,
    eval_rows: Any = None,
    callbacks: list[TrainerCallback] | None = None,
    model: Any = None,
    max_minutes: float | None = None,
    **options: Any,
) -> TransfusionTrainer:
    """Six steps with dropout, hidden texts, noise, accumulation, an average, and logs that straddle checkpoints."""
    torch.manual_seed(0)
    if model is None:
        model = TransfusionForMultimodalGeneration(tiny_config(objective="flow", attention_dropout=0.1))
        model.set_attn_implementation("eager")
    defaults: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "logging_steps": 3}
    defaults |= {"max_steps": NUM_STEPS, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    defaults |= {"disable_tqdm": True, "use_cpu": True, "report_to": "none", "weight_decay": 0.01}
    optimizer = MuonAdamW(model, lr=1e-2, weight_decay=0.01, dtype=torch.float32) if muon else None
    return TransfusionTrainer(
        model,
        TrainingArguments(output_dir=str(output_dir), **{**defaults, **options}),
        TransfusionDataCollator(model.config, text_dropout=0.3),
        train_dataset=AugmentedRows() if rows is None else rows,
        eval_dataset=eval_rows,
        optimizers=(optimizer, None),
        callbacks=callbacks,
        ema_decay=ema_decay,
        max_minutes=max_minutes,
    )


BEST: dict[str, Any] = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "ema_decay": None}
BEST |= {"metric_for_best_model": "eval_loss", "greater_is_better": False}


def trainer_with_best(output_dir: Path, best: int, **options: Any) -> TransfusionTrainer:
    """One whose evaluations, one a step, find the weights of step `best` the best ones."""
    trainer = tiny_trainer(output_dir, **BEST | options, eval_rows=AugmentedRows())

    def evaluate(*args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {"eval_loss": float(abs(trainer.state.global_step - best))}
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics

    setattr(trainer, "_evaluate", evaluate)  # noqa: B010
    return trainer


def plain_model() -> TransfusionForMultimodalGeneration:
    """Without dropout, in float64."""
    return tiny_model(objective="flow")


# With SGD: AdamW makes much of the rounding of gradients near 0.
PLAIN: dict[str, Any] = {"optim": "sgd", "lr_scheduler_type": "linear"}


def outcome(trainer: TransfusionTrainer) -> dict[str, Any]:
    """All that a resumed training must share with one that never stopped: tensors by name, and what was logged."""
    found: dict[str, Any] = {f"model.{name}": value.clone() for name, value in trainer.model.state_dict().items()}
    with trainer.averaged_weights():
        found |= {f"average.{name}": value.clone() for name, value in trainer.model.state_dict().items()}
    optimizer = trainer._own_optimizer()
    for part, inner in getattr(optimizer, "parts", {"all": optimizer}).items():
        for number, state in inner.state_dict()["state"].items():
            found |= {f"{part}.{number}.{key}": value for key, value in state.items()}
    names = ("step", "epoch", "loss", "text_loss", "image_loss", "grad_norm", "learning_rate")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return found | {"log": [{name: entry[name] for name in names} for entry in logs]}


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Names of what is not the same, bit for bit."""
    assert first.keys() == second.keys()
    return [name for name in first if not _same(first[name], second[name])]


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    return first == second


class Act(TrainerCallback):
    """Calls `action` when a step, or with `at_substep` the first of its batches, is done."""

    def __init__(self, step: int, action: Callable[[], Any], at_substep: bool = False) -> None:
        self.step, self.action, self.at_substep = step, action, at_substep

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and not self.at_substep:
            self.action()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1 and self.at_substep:
            self.at_substep = False
            self.step = 0
            self.action()


class KillAt:
    """Counts the steps and what is done to files, and kills this process by SIGKILL at one of them."""

    def __init__(self, event: int) -> None:
        self.left = event

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> TrainerCallback:
        """Count each file that is synced, each folder that is renamed or removed, and (what is returned) steps."""
        for owner, name in ((os, "fsync"), (Path, "rename"), (checkpoints.shutil, "rmtree")):
            original = getattr(owner, name)

            def counted(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
                self.count()
                return _original(*args, **kwargs)

            setattr(owner, name, counted)
        return CountSteps(self)


class CountSteps(TrainerCallback):
    def __init__(self, killer: KillAt) -> None:
        self.killer = killer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.killer.count()


def run(output_dir: Path, result: Path | None = None, kill_at: int = 0, **options: Any) -> None:
    """Train, or go on where a checkpoint is, in a process of its own; save the outcome's tensors to `result`."""
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    trainer = tiny_trainer(output_dir, callbacks=[KillAt(kill_at).install()] if kill_at else None, **options)
    trainer.train(resume_from_checkpoint=find_complete(output_dir) is not None)
    if result is not None:
        found = outcome(trainer)
        found["log"] = torch.tensor([list(entry.values()) for entry in found["log"]], dtype=torch.float64)
        save_file(found, result)


def random_events(count: int, largest: int, seed: int) -> list[int]:
    """At which event to kill, `count` times."""
    return [random.Random(f"{seed} {number}").randint(1, largest) for number in range(count)]


__all__ = [
    "NUM_STEPS",
    "PLAIN",
    "STEPS_PER_EPOCH",
    "Act",
    "AugmentedRows",
    "KillAt",
    "RowList",
    "differences",
    "outcome",
    "plain_model",
    "random_events",
    "run",
    "tiny_trainer",
    "trainer_with_best",
]
