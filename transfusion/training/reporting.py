"""What a training shows: drawn pictures while it runs, and the loss curves when it is done."""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather, pad_across_processes
from PIL import Image, ImageDraw, ImageFont
from transformers import PreTrainedModel, TrainerCallback

from ..processing import TransfusionProcessor
from .speed import not_compiling


_TITLE_HEIGHT = 16
_MARGIN = 4
_TITLE_SIZE = 10


def draw_pictures(
    model: PreTrainedModel,
    processor: TransfusionProcessor,
    prompts: Sequence[str],
    seed: int = 0,
    **options: Any,
) -> list[Image.Image]:
    """Draw one picture after each prompt; the noise of the n-th depends on `seed` and n alone.

    Args:
        model: Draws in evaluation mode and is put back into the mode it was in.
        processor: The model's.
        prompts: Captions.
        seed: Of all noise.
        options: Of `generate_images`.
    """
    drawn = _draw(model, processor, dict(enumerate(prompts)), seed, options)
    return processor.decode_images(drawn.latent_patches, drawn.image_grids)


def draw_together(
    model: PreTrainedModel,
    processor: TransfusionProcessor,
    prompts: Sequence[str],
    seed: int = 0,
    **options: Any,
) -> list[Image.Image]:
    """`draw_pictures` by all processes, each its share of the prompts, whether the model is whole in them or sharded.

    Every process has to call this. The first one gets all pictures, the others none.
    """
    state = PartialState()
    size = model.tp_size or 1  # tensor-parallel processes draw the same pictures
    rank, num_ranks = state.process_index // size, state.num_processes // size
    shares = [range(first, len(prompts), num_ranks) for first in range(num_ranks)]
    numbers = shares[rank] or range(1)  # no process may be waited for
    drawn = _draw(model, processor, {number: prompts[number] for number in numbers}, seed, options)
    grids, patches = (
        gather(pad_across_processes(tensor)[None].contiguous()).cpu()[::size]
        for tensor in (drawn.image_grids, drawn.latent_patches)
    )
    if not state.is_main_process:
        return []
    pictures: dict[int, Image.Image] = {}
    for share, share_grids, share_patches in zip(shares, grids, patches, strict=True):
        if share:
            share_grids = share_grids[: len(share)]
            decoded = processor.decode_images(share_patches[: share_grids.prod(dim=1).sum()], share_grids)
            pictures |= dict(zip(share, decoded, strict=True))
    return [pictures[number] for number in range(len(prompts))]


def _draw(
    model: PreTrainedModel,
    processor: TransfusionProcessor,
    prompts: dict[int, str],
    seed: int,
    options: dict[str, Any],
) -> Any:
    """Draw after prompts, by number."""
    inputs = processor(text=list(prompts.values()), return_tensors="pt").to(model.device)
    generators = [torch.Generator(model.device).manual_seed(seed + number) for number in prompts]
    was_training = model.training
    model.eval()
    try:
        return model.generate_images(inputs["input_ids"], inputs["attention_mask"], generator=generators, **options)
    finally:
        model.train(was_training)


def picture_grid(
    pictures: Sequence[Image.Image], titles: Sequence[str], columns: int = 8, side: int = 96
) -> Image.Image:
    """A sheet of pictures, row by row, each scaled to `side` pixels with its title below."""
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    width, height = side + _MARGIN, side + _TITLE_HEIGHT + _MARGIN
    sheet = Image.new("RGB", (columns * width + _MARGIN, rows * height + _MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_TITLE_SIZE)
    for number, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        left, top = _MARGIN + number % columns * width, _MARGIN + number // columns * height
        sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (left, top))
        pen.text((left, top + side), _fitted(title, font, side), fill="black", font=font)
    return sheet


def _fitted(title: str, font: Any, width: int) -> str:
    """The title, cut where it is wider than `width` pixels."""
    if font.getlength(title) <= width:
        return title
    while title and font.getlength(title + "…") > width:
        title = title[:-1]
    return title + "…"


class SampleGridCallback(TrainerCallback):
    """Draws the same prompts from the same noise, again and again, into `output_dir/samples/` and to trackers.

    Args:
        processor: The model's.
        prompts: Captions.
        every: Steps between two sheets; one more is drawn at the end.
        weights: Gives a context in which the model has the weights to draw with: `trainer.averaged_weights`.
        seed: Of the noise.
        at_start: Draw a sheet before the first step too.
        options: Of `generate_images`, such as hold for every prompt.
    """

    def __init__(
        self,
        processor: TransfusionProcessor,
        prompts: Sequence[str],
        every: int,
        weights: Callable[[], AbstractContextManager[None]] = nullcontext,
        seed: int = 0,
        at_start: bool = False,
        **options: Any,
    ) -> None:
        if every < 1 or not prompts:
            raise ValueError(f"every is {every} with {len(prompts)} prompts; give at least 1 of both.")
        self.processor = processor
        self.prompts = list(prompts)
        self.every = every
        self.weights = weights
        self.seed = seed
        self.at_start = at_start
        self.options = options
        self._writer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw, if wanted."""
        if self.at_start and state.global_step == 0:
            self._draw(args, state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw, if it is time."""
        if state.global_step % self.every == 0:
            self._draw(args, state, kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw with the last weights."""
        if state.global_step % self.every:
            self._draw(args, state, kwargs["model"])
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _draw(self, args: Any, state: Any, model: PreTrainedModel) -> None:
        with self.weights(), not_compiling():
            pictures = draw_together(model, self.processor, self.prompts, self.seed, **self.options)
        if not state.is_world_process_zero:
            return
        sheet = picture_grid(pictures, self.prompts)
        folder = Path(args.output_dir, "samples")
        folder.mkdir(parents=True, exist_ok=True)
        sheet.save(folder / f"step_{state.global_step:07d}.png")
        if "tensorboard" in args.report_to:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(folder))
            self._writer.add_image("samples", np.asarray(sheet), state.global_step, dataformats="HWC")
        if "trackio" in args.report_to:
            import trackio

            trackio.log({"samples": trackio.Image(np.asarray(sheet))}, step=state.global_step)


def plot_losses(log_history: Sequence[dict[str, Any]], file: str | os.PathLike) -> None:
    """Draw the loss curves of `trainer.state.log_history` as a picture: text and image, training and evaluation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("text_loss", "image_loss"), strict=True):
        for key, label in ((name, "training"), (f"eval_{name}", "evaluation")):
            points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker=".")
                axes.legend()
        axes.set(title=name.replace("_", " "), xlabel="step", yscale="log")
    figure.savefig(file)


__all__ = ["SampleGridCallback", "draw_pictures", "draw_together", "picture_grid", "plot_losses"]
