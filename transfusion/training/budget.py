"""Training for a given time: the learning rate follows the clock, so that it has decayed when the time is up."""

import logging
import time
from typing import Any

import torch
from accelerate.utils import broadcast
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_utils import SaveStrategy


logger = logging.getLogger(__name__)

# Scheduler steps into which the budget is divided.
RESOLUTION = 10_000
_REPORT_AT = 0.05


class TimeBudget(TrainerCallback):
    """Puts the learning-rate scheduler, made for `RESOLUTION` steps, where the clock is, and stops at the end.

    All processes follow the first one's clock. A resumed training goes on with the time that was left.

    Args:
        minutes: From the beginning of `train`.
    """

    def __init__(self, minutes: float) -> None:
        if not minutes > 0:
            raise ValueError(f"max_minutes is {minutes}; give a number above 0.")
        self.seconds = minutes * 60
        self.fraction = 0.0
        self.start = 0.0
        self.first_step = 0
        self.has_reported = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock, at the position of a restored scheduler."""
        self.fraction = kwargs["lr_scheduler"].last_epoch / RESOLUTION
        self.start = time.monotonic() - self.fraction * self.seconds
        self.first_step, self.first_fraction = state.global_step, self.fraction

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the clock; the scheduler's own step comes next and counts one on."""
        elapsed = torch.tensor([time.monotonic() - self.start], device=args.device)
        self.fraction = min(broadcast(elapsed).item() / self.seconds, 1.0)
        kwargs["lr_scheduler"].last_epoch = round(self.fraction * RESOLUTION) - 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop when the time is up, with a checkpoint where others are written too."""
        if self.fraction >= _REPORT_AT and not self.has_reported:
            self.has_reported = True
            rate = (state.global_step - self.first_step) / (time.monotonic() - self.start)
            logger.info("%.3g steps per second: about %d steps", rate, self.expected_steps(state.global_step))
        if self.fraction >= 1.0:
            control.should_training_stop = control.should_log = True
            control.should_save |= args.save_strategy == SaveStrategy.STEPS

    def expected_steps(self, step: int) -> int:
        """How many steps there will have been, judged by the pace up to `step`."""
        gone = max(self.fraction - self.first_fraction, 1 / RESOLUTION)
        return max(step, self.first_step + round((step - self.first_step) * (1 - self.first_fraction) / gone))


class BudgetProgressCallback(ProgressCallback):
    """Trainer's progress bar, with the expected number of steps at its end."""

    def __init__(self, budget: TimeBudget) -> None:
        super().__init__()
        self.budget = budget

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Correct the number of steps."""
        if state.is_world_process_zero:
            self.training_bar.total = self.budget.expected_steps(state.global_step)
        super().on_step_end(args, state, control, **kwargs)


__all__ = ["RESOLUTION", "BudgetProgressCallback", "TimeBudget"]
