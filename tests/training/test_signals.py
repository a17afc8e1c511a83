import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.training.resumable import Act, AugmentedRows, differences, outcome, tiny_trainer, trainer_with_best
from transfusion.training import signals
from transfusion.training.signals import SaveOnSignal


def send(number: int) -> Act:
    """Between the batches of the third step, a signal to this process."""
    return Act(3, lambda: os.kill(os.getpid(), number), at_substep=True)


def trained(output_dir: Path, *callbacks: Any, resume: bool = False, **options: Any) -> dict[str, Any]:
    trainer = tiny_trainer(output_dir, callbacks=list(callbacks), save_strategy="no", **options)
    trainer.train(resume_from_checkpoint=resume)
    return outcome(trainer)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_at_the_end_of_the_step(number: int, code: int, tmp_path: Path) -> None:
    """Between batches of a step: the step is finished, and the resumed training ends as one that was left alone."""
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    expected = trained(tmp_path / "whole")
    with pytest.raises(SystemExit) as stop:
        trained(tmp_path / "cut", SaveOnSignal(), send(number))
    assert stop.value.code == code
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["checkpoint-3"]
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert not differences(trained(tmp_path / "cut", SaveOnSignal(), resume=True), expected)


class Note(TrainerCallback):
    """Which steps were evaluated, and which were saved."""

    def __init__(self) -> None:
        self.evaluated: list[int] = []
        self.saved: list[int] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated.append(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved.append(state.global_step)


def test_no_evaluation_delays_the_checkpoint(tmp_path: Path) -> None:
    note = Note()
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1}
    trainer = tiny_trainer(
        tmp_path, callbacks=[SaveOnSignal(), send(signal.SIGTERM), note], eval_rows=AugmentedRows(), **options
    )
    with pytest.raises(SystemExit):
        trainer.train()
    assert note.evaluated == [1, 2]


def test_nothing_is_done_at_the_end_of_an_epoch_that_was_stopped(tmp_path: Path) -> None:
    note = Note()
    options: dict[str, Any] = {"save_strategy": "epoch", "eval_strategy": "epoch", "logging_strategy": "epoch"}
    trainer = tiny_trainer(
        tmp_path, callbacks=[SaveOnSignal(), send(signal.SIGTERM), note], eval_rows=AugmentedRows(), **options
    )
    with pytest.raises(SystemExit):
        trainer.train()
    assert note.evaluated == [2] and note.saved == [2, 3]


def test_the_checkpoint_of_a_signal_stays(tmp_path: Path) -> None:
    """Beside the best one, though the limit is one; and the model is not the best one's."""
    callbacks: list[Any] = [SaveOnSignal(), send(signal.SIGTERM)]
    limit: dict[str, Any] = {"save_total_limit": 1}
    trainer = trainer_with_best(tmp_path / "cut", 1, callbacks=callbacks, **limit)
    with pytest.raises(SystemExit):
        trainer.train()
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {"checkpoint-1", "checkpoint-3"}
    for step, is_same in ((1, False), (3, True)):
        weights = load_file(tmp_path / "cut" / f"checkpoint-{step}" / "model.safetensors")
        found = trainer.model.state_dict()
        assert all(torch.equal(found[name], value) for name, value in weights.items()) == is_same
    whole, resumed = (trainer_with_best(tmp_path / name, 1, **limit) for name in ("whole", "cut"))
    whole.train()
    resumed.train(resume_from_checkpoint=True)
    assert not differences(outcome(resumed), outcome(whole))


def test_handlers_are_given_back_after_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("as any")

    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(RuntimeError, match="as any"):
        trained(tmp_path, SaveOnSignal(), Act(3, fail))
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_a_signal_at_the_last_step_changes_nothing(tmp_path: Path) -> None:
    last = Act(6, lambda: os.kill(os.getpid(), signal.SIGTERM), at_substep=True)
    assert not differences(trained(tmp_path, SaveOnSignal(), last), trained(tmp_path))


def test_handlers_are_for_the_main_thread(tmp_path: Path) -> None:
    errors = []

    def work() -> None:
        with pytest.raises(ValueError, match="for the main thread") as error:
            trained(tmp_path, SaveOnSignal())
        errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors


def stopped_twice(output_dir: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    trained(output_dir, SaveOnSignal(), Act(3, twice, at_substep=True))


def stopped_late(output_dir: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        signals.ECHO_SECONDS = 0.0
        os.kill(os.getpid(), signal.SIGTERM)

    trained(output_dir, SaveOnSignal(), Act(3, twice, at_substep=True))


def stopped_by_an_echo(output_dir: Path) -> None:
    def twice() -> None:
        signals.ECHO_SECONDS = 1e9
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    trained(output_dir, SaveOnSignal(), Act(3, twice, at_substep=True))


def stopped_once(output_dir: Path) -> None:
    trained(output_dir, SaveOnSignal(), send(signal.SIGTERM))


@pytest.mark.parametrize(
    ("work", "code", "left"),
    [
        (stopped_twice, 130, []),
        (stopped_late, 143, []),
        (stopped_by_an_echo, 143, ["checkpoint-3"]),
        (stopped_once, 143, ["checkpoint-3"]),
    ],
)
def test_the_code_of_the_process(work: Callable[[Path], None], code: int, left: list[str], tmp_path: Path) -> None:
    """A second signal ends it at once, unless it is the same SIGTERM that came another way."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.training.resumable"])
    process = context.Process(target=work, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == code
    assert [path.name for path in tmp_path.iterdir()] == left


def stopped_with_workers(output_dir: Path) -> None:
    def to_all() -> None:
        # By another process, as a scheduler does: of their parent, workers take it for the end of their work.
        subprocess.run(["kill", "-TERM", "--", f"-{os.getpid()}"], start_new_session=True, check=True)
        time.sleep(0.5)

    os.setsid()
    trained(output_dir, SaveOnSignal(), Act(3, to_all, at_substep=True), dataloader_num_workers=1)


def test_a_signal_to_the_whole_group_leaves_the_workers_alone(tmp_path: Path) -> None:
    process = get_context("spawn").Process(target=stopped_with_workers, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == 143
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
