"""One SGD step over the twelve ragged rows, started by torchrun; the first process writes what came out."""

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

from tests.tiny import tiny_model
from tests.training.test_trainer import sgd_trainer
from tests.training.tiny_rows import RowList, ragged_rows


class EpochRows(RowList):
    """Notes the epochs it is told."""

    epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


def main(output_dir: str, batch_size: str, accumulation_steps: str) -> None:
    rows = EpochRows(ragged_rows())
    model = tiny_model(objective="flow")
    trainer = sgd_trainer(
        model,
        rows,
        output_dir,
        ema_decay=0.9,
        per_device_train_batch_size=int(batch_size),
        gradient_accumulation_steps=int(accumulation_steps),
        num_train_epochs=2,
    )
    trainer.train()
    evaluated = trainer.evaluate(rows)
    if trainer.is_world_process_zero():
        save_file(model.state_dict(), Path(output_dir, "weights.safetensors"))
        results = {
            "log": trainer.state.log_history,
            "epochs": sorted(set(rows.epochs)),
            "evaluated": evaluated,
        }
        Path(output_dir, "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
