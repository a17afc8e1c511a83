import math
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.tiny import tiny_model
from tests.training.test_trainer import arguments
from tests.training.tiny_rows import RowList, ragged_rows
from transfusion.training.budget import RESOLUTION, TimeBudget
from transfusion.training.trainer import TransfusionTrainer


SECONDS = 2.0


class SlowSteps(TrainerCallback):
    """Makes every step take some time; notes the time, the budget's fraction and the learning rate after each."""

    def __init__(self, pause: float) -> None:
        self.pause = pause
        self.start = 0.0
        self.steps: list[tuple[float, float, float]] = []
        self.budget: TimeBudget | None = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.monotonic()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(self.pause)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        assert self.budget is not None
        rate = kwargs["lr_scheduler"].get_last_lr()[0]
        self.steps.append((time.monotonic() - self.start, self.budget.fraction, rate))


def timed_trainer(tmp_path: Path, slow: SlowSteps, **options: Any) -> TransfusionTrainer:
    defaults: dict[str, Any] = {"lr_scheduler_type": "cosine", "warmup_steps": 0.2, "learning_rate": 1e-3}
    args = arguments(tmp_path, per_device_train_batch_size=12, logging_steps=1000, **{**defaults, **options})
    trainer = TransfusionTrainer(
        tiny_model(), args, train_dataset=RowList(ragged_rows()), callbacks=[slow], max_minutes=SECONDS / 60
    )
    slow.budget = trainer._budget
    return trainer


def cosine(fraction: float) -> float:
    if fraction < 0.2:
        return fraction / 0.2
    return 0.5 * (1 + math.cos(math.pi * (fraction - 0.2) / 0.8))


@pytest.mark.parametrize("pause", [0.02, 0.2])
def test_learning_rate_follows_the_clock(pause: float, tmp_path: Path) -> None:
    slow = SlowSteps(pause)
    trainer = timed_trainer(tmp_path, slow)
    trainer.train()
    assert [fraction < 1 for _, fraction, _ in slow.steps] == [True] * (len(slow.steps) - 1) + [False]
    for elapsed, fraction, rate in slow.steps:
        assert fraction * SECONDS <= elapsed  # it was read a little before
        assert rate == pytest.approx(cosine(round(fraction * RESOLUTION) / RESOLUTION) * 1e-3, abs=1e-9)
    last = trainer.state.log_history[-1]
    assert trainer.state.log_history[0]["loss"] > 0  # the steps since the last log are logged
    assert last["train_steps_per_second"] * last["train_runtime"] == pytest.approx(len(slow.steps), rel=0.05)
    assert last["train_samples_per_second"] == pytest.approx(12 * last["train_steps_per_second"], rel=0.05)


def test_resumed_training_has_the_rest_of_the_time(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 10}
    slow, again = SlowSteps(0.05), SlowSteps(0.05)
    timed_trainer(tmp_path, slow, **options).train()
    timed_trainer(tmp_path, again, **options).train(str(tmp_path / "checkpoint-10"))
    spent = slow.steps[9][1] * SECONDS
    for elapsed, fraction, _ in again.steps[:-1]:
        assert spent - 0.5 < fraction * SECONDS - elapsed < spent + 1e-3
    assert again.steps[-1][1] == 1.0
    assert (tmp_path / f"checkpoint-{10 + len(again.steps)}").is_dir()


def test_progress_bar_ends_where_the_training_does(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    slow = SlowSteps(0.1)
    timed_trainer(tmp_path, slow, disable_tqdm=False).train()
    assert f"{len(slow.steps)}/{len(slow.steps)} [" in capsys.readouterr().err
