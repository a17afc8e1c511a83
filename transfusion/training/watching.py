"""What a training shows while it runs: progress, captions, what goes wrong slowly, and a summary at the end."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from ..pipeline import TransfusionPipeline
from ..processing import TransfusionProcessor
from .speed import not_compiling


logger = logging.getLogger(__name__)

# A text loss this much above its lowest is not noise: pictures push out what was known of text.
COLLAPSE = 1.15
SMOOTHED = 5


class TextLossAlert(TrainerCallback):
    """Warns where the text loss, over a few logs, has risen far above its lowest, and stays silent until it falls."""

    def __init__(self, rise: float = COLLAPSE, window: int = SMOOTHED) -> None:
        self.rise, self.window = rise, window
        self.recent: list[float] = []
        self.lowest = float("inf")
        self.is_high = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Look at the text loss, if it was logged."""
        if logs is None or not logs.get("text_loss"):
            return
        self.recent = [*self.recent, logs["text_loss"]][-self.window :]
        if len(self.recent) < self.window:
            return
        mean = sum(self.recent) / self.window
        self.lowest = min(self.lowest, mean)
        was_high, self.is_high = self.is_high, mean > self.rise * self.lowest
        if self.is_high and not was_high and state.is_world_process_zero:
            logger.warning(
                "text_loss is %.3f over the last %d logs and was %.3f: it collapses, as it may where pictures are "
                "added to a language model. Add text to the data, lower learning_rate, or freeze_text.",
                mean,
                self.window,
                self.lowest,
            )


class RichProgress(TrainerCallback):
    """A bar with both losses and the speed, in place of Trainer's, for a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self.bar = Progress(
            TextColumn("step"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[found]}"),
            console=console,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar, in the first process."""
        if state.is_world_process_zero:
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step, found="")
            self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move it."""
        if self.bar.tasks:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show what was logged of the losses, or of an evaluation."""
        names = ("text_loss", "image_loss", "tokens_per_second", "eval_loss")
        found = ", ".join(f"{name} {_figure(value)}" for name, value in (logs or {}).items() if name in names)
        if self.bar.tasks and found:
            self.bar.update(self.task, found=found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave it as it is."""
        self.bar.stop()


class CaptionCallback(TrainerCallback):
    """Captions the same pictures again and again, into `output_dir/samples/captions.md`.

    Args:
        processor: The model's.
        pictures: What to caption, by name.
        every: Steps between two times; once more at the end.
        weights: Gives a context in which the model has the weights to write with: `trainer.averaged_weights`.
    """

    def __init__(
        self,
        processor: TransfusionProcessor,
        pictures: Mapping[str, Image.Image],
        every: int,
        weights: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        if every < 1 or not pictures:
            raise ValueError(f"every is {every} with {len(pictures)} pictures; give at least 1 of both.")
        self.processor, self.pictures, self.every, self.weights = processor, dict(pictures), every, weights

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Caption, if it is time."""
        if state.global_step % self.every == 0:
            self._caption(args, state, kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Caption with the last weights."""
        if state.global_step % self.every:
            self._caption(args, state, kwargs["model"])

    def _caption(self, args: Any, state: Any, model: Any) -> None:
        was_training = model.training
        model.eval()
        try:
            with self.weights(), not_compiling():
                pipeline = TransfusionPipeline(model, self.processor)
                captions = pipeline.caption(list(self.pictures.values()), do_sample=False).text
        finally:
            model.train(was_training)
        if not state.is_world_process_zero:
            return  # but it took part, for a model that is sharded
        file = Path(args.output_dir, "samples", "captions.md")
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [f"| {name} | {caption} |" for name, caption in zip(self.pictures, captions, strict=True)]
        table = "\n".join(
            [f"## Step {state.global_step}", "", "| picture | caption |", "| --- | --- |", *rows, "", ""]
        )
        with file.open("a", encoding="utf-8") as text:
            text.write(table)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def write_summary(trainer: Any, settings: dict[str, Any], prompts: Sequence[str] = ()) -> Path:
    """Write `summary.md` into the output folder: what was trained, how it went, and where to look."""
    import yaml

    state, folder = trainer.state, Path(trainer.args.output_dir)
    logs = [entry for entry in state.log_history if "text_loss" in entry]
    evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
    lines = ["# Training", "", f"{state.global_step} steps, {state.epoch or 0:.2f} epochs.", ""]
    names = ("text_loss", "image_loss", "grad_norm", "tokens_per_second", "mfu", "peak_memory_gb")
    if logs:
        lines += ["| | first log | last log |", "| --- | ---: | ---: |"]
        shown = [name for name in names if name in logs[-1]]
        lines += [f"| {name} | {_figure(logs[0].get(name))} | {_figure(logs[-1][name])} |" for name in shown]
        lines.append("")
    if evaluations:
        last = evaluations[-1]
        losses = [f"{name} {last[name]:.4g}" for name in ("eval_loss", "eval_text_loss", "eval_image_loss")]
        lines += [f"Held out, step {last['step']}: {', '.join(losses)}.", ""]
    lines += ["![losses](losses.png)", ""]
    if sheets := sorted((folder / "samples").glob("step_*.png")):
        lines += [f"![drawings](samples/{sheets[-1].name})", "", *[f"* {prompt}" for prompt in prompts], ""]
    lines += ["```yaml", yaml.safe_dump(settings, sort_keys=False).rstrip(), "```", ""]
    file = folder / "summary.md"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


__all__ = [
    "CaptionCallback",
    "RichProgress",
    "TextLossAlert",
    "write_summary",
]
