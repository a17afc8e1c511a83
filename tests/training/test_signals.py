import os
import signal
import threading
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from tests.training.resumable import Act, differences, outcome, tiny_trainer
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


def test_no_evaluation_delays_the_checkpoint(tmp_path: Path) -> None:
    evaluated: list[int] = []

    class Note(Act):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            evaluated.append(state.global_step)

    trainer = tiny_trainer(tmp_path, callbacks=[SaveOnSignal(), send(signal.SIGTERM), Note(0, print)])
    trainer.eval_dataset = trainer.train_dataset
    trainer.args.eval_strategy, trainer.state.eval_steps, trainer.args.eval_steps = "steps", 1, 1
    with pytest.raises(SystemExit):
        trainer.train()
    assert evaluated == [1, 2]


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
def test_the_code_of_the_process(work: Any, code: int, left: list[str], tmp_path: Path) -> None:
    """A second signal ends it at once, unless it is the same SIGTERM that came another way."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.training.resumable"])
    process = context.Process(target=work, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == code
    assert [path.name for path in tmp_path.iterdir()] == left
