import io
import logging

import pytest
from rich.console import Console
from transformers import TrainerState

from transfusion.training.watching import RichProgress, TextLossAlert


def test_a_collapse_of_the_text_loss_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    alert, state = TextLossAlert(window=2), TrainerState(is_world_process_zero=True)
    with caplog.at_level(logging.WARNING):
        for loss in (3.0, 3.0, 2.0, 2.0, 2.2, 2.2):
            alert.on_log(None, state, None, logs={"text_loss": loss})
        assert not caplog.records
        for loss in (2.6, 2.6, 2.7):
            alert.on_log(None, state, None, logs={"text_loss": loss})
        assert len(caplog.records) == 1 and "was 2.000: it collapses" in caplog.text
        for loss in (2.0, 2.0, 2.9, 2.9):
            alert.on_log(None, state, None, logs={"text_loss": loss})
        assert len(caplog.records) == 2
    alert.on_log(None, state, None, logs={"eval_loss": 9.0})


def test_the_bar_shows_steps_and_losses() -> None:
    written = io.StringIO()
    bar = RichProgress(Console(file=written, force_terminal=True, width=160))
    state = TrainerState(is_world_process_zero=True, max_steps=10)
    bar.on_train_begin(None, state, None)
    state.global_step = 4
    bar.on_step_end(None, state, None)
    bar.on_log(None, state, None, logs={"text_loss": 2.5, "image_loss": 0.25, "epoch": 1.0})
    bar.on_log(None, state, None, logs={"epoch": 1.0})
    bar.on_train_end(None, state, None)
    assert "4/10" in written.getvalue() and "text_loss 2.5, image_loss 0.25" in written.getvalue()
    silent = RichProgress(Console(file=io.StringIO(), force_terminal=True))
    other = TrainerState(is_world_process_zero=False, max_steps=10)
    silent.on_train_begin(None, other, None)
    silent.on_step_end(None, other, None)
    silent.on_log(None, other, None, logs={"text_loss": 1.0})
    assert not silent.bar.tasks
