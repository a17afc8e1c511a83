"""Recipes: whole trainings with settings that are known to work."""

import argparse
import dataclasses
import logging
import os
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from transformers import TrainingArguments, set_seed

from ..configuration import PRESETS, TransfusionConfig
from ..data import load_emoji, load_glosses, load_tokenizer, load_vae, read_image_folder
from ..data.pictures import CaptionedPicture
from ..image_processing import TransfusionImageProcessor
from ..modeling_transfusion import TransfusionForMultimodalGeneration
from ..processing import TransfusionProcessor
from .collator import TransfusionDataCollator
from .latent_cache import encode_pictures
from .optimizers import MuonAdamW
from .reporting import SampleGridCallback, plot_losses
from .rows import CaptionedPictureRows
from .speed import bf16_is_faster, choose_attention, choose_packing, compile_for_training, sample_lengths
from .trainer import TransfusionTrainer


logger = logging.getLogger(__name__)

RecipeT = TypeVar("RecipeT", bound="Recipe")

ATTENTIONS = ("eager", "sdpa", "flex_attention")
DEMO_MINUTES = 12.0
DEMO_PROMPTS = (
    "a red heart",
    "a pizza",
    "a soccer ball",
    "a green apple",
    "a crescent moon",
    "the flag of Japan",
    "a face with tears of joy",
    "a sunflower",
)


def check_duration(**amounts: float | None) -> None:
    """Raise a `ValueError` where a number of steps, epochs, minutes or rows is given and is not above 0."""
    for name, value in amounts.items():
        if value is not None and not (isinstance(value, int | float) and value > 0):
            raise ValueError(f"{name} is {value!r}; give a number above 0.")


@dataclass(frozen=True)
class Recipe:
    """Settings of every recipe.

    Attributes:
        batch_size: Rows per step, over all processes.
        weight_decay: Of weight matrices.
        max_grad_norm: Longer gradients are scaled down to it.
        warmup: Share of the training in which the learning rate rises; then it falls along a cosine.
        text_dropout: Share of the captions that are hidden, for guidance.
        bf16: Compute in bfloat16; by default where that measures faster.
        packed_length: Lay the rows of a batch one after the other, up to so many tokens, without padding; by default
            all of a batch, where their lengths differ much; 0 never does.
        attention: `"eager"`, `"sdpa"` or `"flex_attention"`; by default what is fastest.
        compile: Compile the layers; by default on GPUs, and in long trainings where there is a C++ compiler.
        num_inference_steps, guidance_scale: Of the sample sheets; by default those of the model.
        seed: Of everything.
    """

    batch_size: int = 64
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup: float = 0.03
    text_dropout: float = 0.1
    bf16: bool | None = None
    packed_length: int | None = None
    attention: str | None = None
    compile: bool | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what no later step would."""
        check_duration(batch_size=self.batch_size)
        if self.attention not in (None, *ATTENTIONS):
            raise ValueError(f"attention is {self.attention!r}; allowed: {', '.join(ATTENTIONS)}.")
        for name in ("caption_first", "text_dropout"):
            if not 0 <= getattr(self, name, 0) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a share, 0 to 1.")

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Add an option for each setting to the command line of a script."""
        for setting in dataclasses.fields(cls):
            kinds = [kind for kind in typing.get_args(setting.type) if kind is not type(None)] or [setting.type]
            kind: Any = {"action": argparse.BooleanOptionalAction} if kinds == [bool] else {"type": kinds[0]}
            parser.add_argument(
                f"--{setting.name}", default=setting.default, help=f"{setting.default} without", **kind
            )

    @classmethod
    def from_options(cls, args: argparse.Namespace) -> Self:
        """The settings that the command line named."""
        return cls(**{setting.name: getattr(args, setting.name) for setting in dataclasses.fields(cls)})


@dataclass(frozen=True)
class DemoRecipe(Recipe):
    """Settings of the demo: the preset `demo` from scratch, on the shipped emoji and definitions.

    Attributes:
        caption_first: Share of the pictures that come after their caption.
        image_size: Side of the pictures in pixels.
        objective: `"flow"` or `"ddpm"`.
        learning_rate, adam_beta2: Of Muon and AdamW.
        ema_decay: Of the averaged weights.
        text_ratio: Definitions per picture in an epoch.
        max_text_tokens: Longer definitions are left out; beside short captions they would be mostly padding.
    """

    caption_first: float = 0.7
    image_size: int = 64
    objective: str = "flow"
    learning_rate: float = 4e-3
    adam_beta2: float = 0.95
    ema_decay: float = 0.999
    text_ratio: float = 0.25
    max_text_tokens: int = 28


def demo_processor(image_size: int = 64) -> TransfusionProcessor:
    """The processor of the demo: the tokenizer and the VAE that ship with the package."""
    patch_size = PRESETS["demo"]["patch_size"]
    image_processor = TransfusionImageProcessor(size=image_size, patch_size=patch_size)
    tokenizer = load_tokenizer()
    tokenizer.model_max_length = PRESETS["demo"]["max_position_embeddings"]
    return TransfusionProcessor(image_processor, tokenizer, load_vae())


def preset_config(processor: TransfusionProcessor, preset: str, **overrides: Any) -> TransfusionConfig:
    """A preset with the ids, latents and picture size of `processor`; `overrides` replace fields."""
    side = processor.image_processor.size["height"] // processor.image_processor.block
    fields = dict(
        vocab_size=len(processor.tokenizer),
        pad_token_id=processor.tokenizer.pad_token_id,
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        boi_token_id=processor.boi_token_id,
        eoi_token_id=processor.eoi_token_id,
        image_token_id=processor.image_token_id,
        latent_channels=processor.latent_channels,
        patch_size=processor.image_processor.patch_size,
        size_token_grids=processor.size_token_grids,
        size_token_ids=processor.size_token_ids,
        default_image_grid=(side, side),
    )
    config = TransfusionConfig.from_preset(preset, **{**fields, **overrides})
    processor.check_model(config)
    return config


def demo_config(processor: TransfusionProcessor, **overrides: Any) -> TransfusionConfig:
    """The preset `demo`, likewise."""
    return preset_config(processor, "demo", **overrides)


def demo_rows(
    recipe: DemoRecipe,
    processor: TransfusionProcessor,
    pictures: list[CaptionedPicture],
    texts: list[str],
    cache_dir: str | Path | None = None,
) -> CaptionedPictureRows:
    """Encode `pictures` and mix them with the shorter ones of `texts`."""
    encoded = encode_pictures(pictures, processor, cache_dir)
    return CaptionedPictureRows(
        encoded.pictures,
        encoded.latents,
        processor,
        short_texts(recipe, processor, texts),
        text_ratio=recipe.text_ratio,
        caption_first=recipe.caption_first,
        seed=recipe.seed,
    )


def short_texts(recipe: DemoRecipe, processor: TransfusionProcessor, texts: list[str]) -> list[str]:
    """The `texts` of at most `recipe.max_text_tokens` tokens."""
    lengths = map(len, processor.tokenizer(texts, split_special_tokens=True)["input_ids"])
    return [text for text, length in zip(texts, lengths, strict=True) if length <= recipe.max_text_tokens]


def training_arguments(recipe: Recipe, output_dir: str | Path, **options: Any) -> TrainingArguments:
    """Trainer's arguments for `recipe`; `options` are added, or replace what is here."""
    num_processes = int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
    if recipe.batch_size % num_processes:
        raise ValueError(f"batch_size={recipe.batch_size} cannot be shared by {num_processes} processes evenly.")
    batch_size = recipe.batch_size // num_processes
    fields: dict[str, Any] = dict(
        output_dir=str(output_dir),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup,
        max_grad_norm=recipe.max_grad_norm,
        weight_decay=recipe.weight_decay,
        bf16=bf16_is_faster() if recipe.bf16 is None else recipe.bf16,
        use_cpu=not torch.accelerator.is_available(),  # without it, bf16 is refused
        seed=recipe.seed,
        data_seed=recipe.seed,
        logging_steps=50,
        report_to=["tensorboard"],
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    return TrainingArguments(**{**fields, **options})


def check_lengths(rows: CaptionedPictureRows, config: TransfusionConfig, packed_length: int | None = None) -> None:
    """Raise a `ValueError` where a picture and its caption are longer than rows, or packed ones, may be."""
    length, name = rows.longest()
    if packed_length is not None and length > packed_length:
        raise ValueError(
            f"{name} and its caption take {length} positions, and packed_length={packed_length}; raise it, as no "
            "picture is cut."
        )
    if length > config.max_position_embeddings:
        raise ValueError(
            f"{name} and its caption take {length} positions, and the model has max_position_embeddings="
            f"{config.max_position_embeddings}. Take smaller pictures (size of the image processor) or shorter "
            "captions."
        )


def make_collator(model: TransfusionForMultimodalGeneration, recipe: Recipe) -> TransfusionDataCollator:
    """The collator of `recipe`."""
    return TransfusionDataCollator(model.config, recipe.text_dropout, recipe.packed_length or None)


def choose_speed(
    model: TransfusionForMultimodalGeneration,
    recipe: RecipeT,
    rows: CaptionedPictureRows,
    max_minutes: float | None = None,
    max_steps: int | None = None,
) -> RecipeT:
    """Choose packing, attention and compilation, where `recipe` leaves them open, and set up `model`.

    Returns:
        `recipe` with what was chosen.

    Raises:
        ValueError: A picture and its caption are longer than rows, or packed ones, may be.
    """
    longest = rows.longest()[0]
    packed_length = recipe.packed_length
    if packed_length is None:
        packed_length = choose_packing([*sample_lengths(rows), longest], recipe.batch_size)
    recipe = dataclasses.replace(recipe, packed_length=packed_length or 0)
    check_lengths(rows, model.config, packed_length or None)
    choose_attention(model, packed_length or longest, recipe.attention)
    compile_for_training(model, recipe.compile, max_minutes, max_steps)
    return recipe


def first_captions(pictures: Sequence[CaptionedPicture]) -> list[str]:
    """Prompts for a sample sheet: what a few pictures show."""
    return [picture.captions[0] for picture in pictures[:8]]


def add_sample_sheets(
    trainer: TransfusionTrainer,
    recipe: Recipe,
    processor: TransfusionProcessor,
    prompts: Sequence[str],
    every: int,
    at_start: bool = False,
) -> None:
    """Let `trainer` draw `prompts` every so many steps, with the settings of `recipe`."""
    sheets = SampleGridCallback(
        processor,
        prompts,
        every,
        trainer.averaged_weights,
        recipe.seed,
        at_start,
        num_inference_steps=recipe.num_inference_steps,
        guidance_scale=recipe.guidance_scale,
    )
    trainer.add_callback(sheets)


def save_training(trainer: TransfusionTrainer) -> None:
    """Save model and processor, as transformers and diffusers load them, with state and loss curves."""
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        plot_losses(trainer.state.log_history, Path(trainer.args.output_dir, "losses.png"))


def train_demo(
    output_dir: str | Path,
    recipe: DemoRecipe | None = None,
    data: str | Path | None = None,
    max_minutes: float | None = DEMO_MINUTES,
    max_steps: int | None = None,
    sample_every: int = 500,
) -> TransfusionTrainer:
    """Train the preset `demo` from scratch and save model, processor, loss curves and sample sheets.

    Args:
        output_dir: Where everything goes: safetensors, JSON, PNG, and TensorBoard's files.
        recipe: Settings.
        data: An imagefolder with metadata.jsonl in place of the shipped emoji.
        max_minutes: Time for the training; the learning rate follows the clock.
        max_steps: In place of `max_minutes`.
        sample_every: Steps between two sample sheets.

    Returns:
        The trainer, whose `model` has the last weights and whose `state.log_history` has the losses.

    Raises:
        ValueError: Both or neither of `max_minutes` and `max_steps`, or data that cannot be used.
    """
    if (max_minutes is None) == (max_steps is None):
        raise ValueError(f"max_minutes is {max_minutes} and max_steps {max_steps}; give one of them.")
    check_duration(max_minutes=max_minutes, max_steps=max_steps, sample_every=sample_every)
    recipe = recipe or DemoRecipe()
    set_seed(recipe.seed)
    processor = demo_processor(recipe.image_size)
    cache = Path(output_dir, "latents")
    pictures = load_emoji("train") if data is None else read_image_folder(data)[0]
    train_rows = demo_rows(recipe, processor, pictures, load_glosses("train"), cache)
    held_out = None
    if data is None:
        held_out = demo_rows(recipe, processor, load_emoji("held_out"), load_glosses("held_out"), cache)
    model = TransfusionForMultimodalGeneration(demo_config(processor, objective=recipe.objective))
    recipe = choose_speed(model, recipe, train_rows, max_minutes, max_steps)
    dtype = torch.bfloat16 if bf16_is_faster() else torch.float32
    betas = (0.9, recipe.adam_beta2)
    optimizer = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay, "betas": betas, "dtype": dtype}
    trainer = TransfusionTrainer(
        model,
        training_arguments(recipe, output_dir, max_steps=-1 if max_steps is None else max_steps),
        make_collator(model, recipe),
        train_dataset=train_rows,
        eval_dataset=held_out,
        processing_class=processor,
        optimizer_cls_and_kwargs=(MuonAdamW, {"model": model, **optimizer}),  # made once the weights are sharded
        ema_decay=recipe.ema_decay,
        max_minutes=max_minutes,
    )
    prompts = DEMO_PROMPTS if data is None else first_captions(pictures)
    add_sample_sheets(trainer, recipe, processor, prompts, sample_every)
    logger.info("%d rows an epoch, %d parameters", len(train_rows), model.num_parameters())
    trainer.train()
    if held_out is not None:
        trainer.evaluate()
    save_training(trainer)
    return trainer


__all__ = [
    "DEMO_MINUTES",
    "DEMO_PROMPTS",
    "DemoRecipe",
    "Recipe",
    "add_sample_sheets",
    "check_duration",
    "check_lengths",
    "choose_speed",
    "demo_config",
    "demo_processor",
    "demo_rows",
    "first_captions",
    "make_collator",
    "preset_config",
    "save_training",
    "short_texts",
    "train_demo",
    "training_arguments",
]
