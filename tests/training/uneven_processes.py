"""Trainings over numbers of rows that processes cannot share evenly, started by torchrun or called alone.

In each the global batch is of six rows. The first process writes weights and what the evaluation says.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils.data import IterableDataset

from tests.tiny import tiny_model
from tests.training.test_trainer import sgd_trainer
from tests.training.tiny_rows import RowList, ragged_rows


GLOBAL_BATCH = 6


class Stream(IterableDataset):
    """The first rows, one after the other."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        return iter(ragged_rows()[: self.count])


def dataset(case: str) -> Any:
    """`7` or `stream 7`: so many rows, by index or in a stream."""
    count = int(case.split()[-1])
    return Stream(count) if case.startswith("stream") else RowList(ragged_rows()[:count])


CASES = ("11", "7", "1", "stream 11", "stream 7")


def run(case: str, folder: Path, num_processes: int) -> dict[str, Any]:
    """Two epochs in a random order, if the rows are known, and an evaluation."""
    model, rows = tiny_model(objective="flow"), dataset(case)
    size = GLOBAL_BATCH // num_processes
    steps = {"max_steps": 4} if case.startswith("stream") else {"num_train_epochs": 2}
    trainer = sgd_trainer(
        model,
        rows,
        folder,
        train_sampling_strategy="random",
        per_device_train_batch_size=size,
        per_device_eval_batch_size=size,
        accelerator_config={"dispatch_batches": True, "split_batches": True},
        **steps,
    )
    trainer.train()
    evaluated = trainer.evaluate(rows)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        save_file(model.state_dict(), folder / f"{case}-{num_processes}.safetensors")
    return {"losses": losses, "eval_loss": evaluated["eval_loss"]}


def main(folder: str, num_processes: str) -> None:
    results = {case: run(case, Path(folder), int(num_processes)) for case in CASES}
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        Path(folder, "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
