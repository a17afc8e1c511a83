"""A training whose second process dies in the third step, started by torchrun, which begins anew; then its twin."""

import os
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from tests.tiny import tiny_model
from tests.training.test_trainer import arguments
from tests.training.tiny_rows import RowList, ragged_rows
from transfusion.training.trainer import TransfusionTrainer


class DieOnce(TrainerCallback):
    """Ends the second process before its third update, the first time."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker
        self.first_step = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step = state.global_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == 1 and state.global_step == 2 and not self.marker.exists():
            self.marker.touch()
            os._exit(1)


def train(output_dir: Path, callbacks: list[TrainerCallback]) -> None:
    """Five steps in a random order of rows, from the last checkpoint if there is one; writes weights and average."""
    args = arguments(
        output_dir,
        max_steps=5,
        save_strategy="steps",
        save_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        ddp_timeout=20,  # now and then gloo looks for a process of the attempt before
    )
    trainer = TransfusionTrainer(
        tiny_model(objective="flow"),
        args,
        train_dataset=RowList(ragged_rows()[:11]),  # three in the third step
        ema_decay=0.5,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=output_dir.exists() and get_last_checkpoint(str(output_dir)) is not None)
    weights = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    with trainer.averaged_weights():
        average = {f"average.{name}": weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        save_file(weights | average, output_dir / "last.safetensors", metadata={"losses": str(losses)})


def main(folder: str) -> None:
    """Train twice."""
    killer = DieOnce(Path(folder, "died"))
    train(Path(folder, "killed"), [killer])
    Path(folder, "died").write_text(str(killer.first_step))
    train(Path(folder, "twin"), [])


if __name__ == "__main__":
    main(*sys.argv[1:])
