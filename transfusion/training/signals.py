"""Signals that stop a training: it saves at the next step, and its process ends with a code that says so."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback


logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Schedulers send SIGTERM to all processes of a job, and launchers hand on the one that they got.
ECHO_SECONDS = 1.0


class SaveOnSignal(TrainerCallback):
    """On SIGTERM or SIGINT (ctrl-C), saves a checkpoint at the end of the step and ends the process.

    The code is 128 + the signal, as shells have it: 143 after SIGTERM, 130 after SIGINT. Who starts the process again,
    with `resume_from_checkpoint=True`, knows by it that the training is not done. A second signal ends the process at
    once, apart from a SIGTERM within a second. With several processes, all stop after the same step, whichever got the
    signal. An evaluation due at that step is left out, and a signal in the last step changes nothing. Workers that
    load data for our trainer ignore both signals.

    For scripts: in a notebook ctrl-C would end the kernel.

    Raises:
        SystemExit: Out of `train`, when the checkpoint is written.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.has_stopped = False
        self._received = 0.0
        self._handlers: dict[signal.Signals, Any] = {}
        self._group: dist.ProcessGroup | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Install the handlers."""
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("SaveOnSignal is for the main thread, in which Python handles signals; leave it out.")
        self.signal, self.has_stopped = 0, False
        if args.world_size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")
        self._handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_echo = number == signal.SIGTERM and time.monotonic() - self._received < ECHO_SECONDS
        if self.signal and not is_echo:
            os._exit(128 + number)
        if self.signal:
            return
        self.signal, self._received = number, time.monotonic()
        logger.warning(
            "%s: a checkpoint follows at the end of the step; again to stop at once.", signal.strsignal(number)
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop with a checkpoint, if any process got a signal."""
        if self._group is not None:
            received = torch.tensor(self.signal)
            dist.all_reduce(received, dist.ReduceOp.MAX, self._group)
            self.signal = int(received)
        if self.signal and state.global_step < state.max_steps:
            self.has_stopped = control.should_training_stop = control.should_save = True
            control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave out what is due at the end of an epoch, which a stopped one comes to as well."""
        if self.has_stopped:
            control.should_evaluate = control.should_save = False

    def give_back(self) -> None:
        """Let the signals do what they did before the training."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the handlers back; end the process if a signal stopped the training."""
        self.give_back()
        if self.has_stopped:
            logger.warning("Stopped after step %d, with a checkpoint to resume from.", state.global_step)
            raise SystemExit(128 + self.signal)


def ignore_signals(then: Callable[[int], None] | None, worker: int) -> None:
    """Begin a worker of a loader: by `then`, and deaf to signals, which a whole group of processes may get.

    Without its workers a training could not finish the step.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if then is not None:
        then(worker)


__all__ = ["SaveOnSignal", "ignore_signals"]
