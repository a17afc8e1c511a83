"""Fine-tuning: a trained model, or a language model, on a folder of captioned pictures."""

import logging
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, TrainerCallback, TrainingArguments, set_seed

from ..autoencoder import load_vae
from ..configuration import PRESETS
from ..data import load_vae as load_shipped_vae
from ..data.pictures import CaptionedPicture
from ..image_processing import TransfusionImageProcessor
from ..modeling_transfusion import TransfusionForMultimodalGeneration
from ..processing import TransfusionProcessor
from .latent_cache import EncodedPictures, encode_pictures
from .recipes import (
    Recipe,
    add_sample_sheets,
    check_duration,
    choose_speed,
    first_captions,
    make_collator,
    save_training,
    training_arguments,
)
from .rows import CaptionedPictureRows
from .trainer import TransfusionTrainer


logger = logging.getLogger(__name__)

FULL_LEARNING_RATE = 3e-4
LORA_LEARNING_RATE = 3e-3
# What the demo found good for pictures, in a model that begins as a language model.
IMAGE_FIELDS = ("patch_size", "patch_codec", "axial_positions", "objective", "timestep_mean")
PATCH_CODEC = ["patch_encoder", "patch_decoder"]


@dataclass(frozen=True)
class FinetuneRecipe(Recipe):
    """Settings of a fine-tuning with AdamW, of all weights or of LoRA adapters.

    Attributes:
        caption_first: Share of the pictures that come after their caption.
        learning_rate: By default 3e-4, and 3e-3 for adapters.
        ema_decay: Of averaged weights; none are kept without it.
        gradient_checkpointing: Compute activations again instead of keeping them: less memory, more time.
        validation_share: Share of the pictures that is held out, to evaluate the losses on.
        lora_rank: Of the adapters (LoRA, arXiv:2106.09685, section 4.1); all weights are trained without.
        lora_alpha: Adapters count lora_alpha / lora_rank.
        lora_targets: The layers with an adapter: names with commas between, or `"all-linear"`.
    """

    batch_size: int = 10
    caption_first: float = 0.7
    learning_rate: float | None = None
    ema_decay: float | None = None
    gradient_checkpointing: bool = False
    validation_share: float = 0.0
    lora_rank: int | None = None
    lora_alpha: float = 16.0
    lora_targets: str = "all-linear"

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        super().__post_init__()
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"lora_rank is {self.lora_rank}; give 1 or more, or leave it out to train all weights.")
        if self.lora_rank is not None and self.ema_decay is not None:
            raise ValueError(f"ema_decay is {self.ema_decay}, but adapters are not averaged; leave out one of them.")
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share is {self.validation_share}; give 0 or more and less than 1.")


def load_start(
    path: str | os.PathLike,
) -> tuple[TransfusionForMultimodalGeneration, TransfusionProcessor]:
    """Model, in float32, and processor of a checkpoint: a folder or a name on the Hub."""
    model = TransfusionForMultimodalGeneration.from_pretrained(path, dtype=torch.float32)
    return model, TransfusionProcessor.from_pretrained(path)


def start_from_text_model(
    path: str | os.PathLike,
    image_size: int = 64,
    vae: str | os.PathLike | None = None,
    freeze_text: bool = False,
    **overrides: Any,
) -> tuple[TransfusionForMultimodalGeneration, TransfusionProcessor]:
    """Make a model, in float32, that begins as a language model, and its processor.

    Its tokenizer is the language model's with the tokens of pictures, and its patch codec is that of the demo.

    Args:
        path: A checkpoint of the Llama family with its tokenizer.
        image_size: Side of the pictures in pixels.
        vae: As for `open_vae`.
        freeze_text: Give pictures weights of their own and train only these.
        overrides: Fields of the config.

    Raises:
        ValueError: A language model that ours cannot represent, a tokenizer without an end of text, no autoencoder.
    """
    tokenizer = AutoTokenizer.from_pretrained(path)
    check_tokenizer(tokenizer)
    autoencoder = open_vae(vae)
    fields = {name: PRESETS["demo"][name] for name in IMAGE_FIELDS} | overrides
    image_processor = TransfusionImageProcessor(size=image_size, patch_size=fields["patch_size"])
    processor = TransfusionProcessor(image_processor, tokenizer, autoencoder)
    fields.setdefault("modality_experts", "all" if freeze_text else None)
    model = TransfusionForMultimodalGeneration.from_text_model(
        path, processor, freeze_text, dtype=torch.float32, **fields
    )
    return model, processor


def open_vae(name: str | os.PathLike | None) -> Any:
    """An autoencoder of diffusers, or None for `"none"`: pixels are the latents then.

    Args:
        name: A folder or Hub name with the autoencoder in `vae/`; None: the one that ships with the package.

    Raises:
        ValueError: There is none.
    """
    if name is None:
        return load_shipped_vae()
    if name == "none":
        return None
    vae = load_vae(name)
    if vae is None:
        raise ValueError(f"{name} has no folder vae; give the folder or Hub name in which it lies.")
    return vae


def check_tokenizer(tokenizer: Any) -> None:
    """Raise a `ValueError` where rows could not be ended."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no eos_token, with which a model learns to stop; set one, `tokenizer.eos_token = ...`, "
            "and save it."
        )


def split_pictures(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the pictures to train on and of those that are held out, at least one of each if `share` is not 0.

    Raises:
        ValueError: Too few pictures.
    """
    held_out = max(1, round(share * count)) if share else 0
    if held_out >= count:
        raise ValueError(
            f"validation_share={share} of {count} pictures leaves none to train on; give more, or a smaller share."
        )
    order = random.Random(seed).sample(range(count), count)
    return sorted(order[held_out:]), sorted(order[:held_out])


def add_adapters(model: TransfusionForMultimodalGeneration, recipe: FinetuneRecipe) -> Any:
    """A PEFT model of which only LoRA adapters are trained, and the patch codec where it has never been trained.

    A model that was made of a language model, not loaded from a checkpoint, has a new patch codec.

    Raises:
        ValueError: Targets that the model does not have.
    """
    from peft import LoraConfig, get_peft_model

    is_list = recipe.lora_targets != "all-linear"
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        target_modules=recipe.lora_targets.split(",") if is_list else recipe.lora_targets,
        exclude_modules=None if model.name_or_path else f".*({'|'.join(PATCH_CODEC)}).*",
        modules_to_save=None if model.name_or_path else PATCH_CODEC,
    )
    return get_peft_model(model, config)


def finetune(
    model: TransfusionForMultimodalGeneration,
    processor: TransfusionProcessor,
    pictures: Sequence[CaptionedPicture],
    output_dir: str | Path,
    recipe: FinetuneRecipe | None = None,
    max_steps: int | None = None,
    num_epochs: float | None = None,
    sample_every: int = 100,
    save_every: int | None = None,
    prompts: Sequence[str] | None = None,
    resume: bool = False,
    merge: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> TransfusionTrainer:
    """Train `model` on captioned pictures, and save what comes out.

    `output_dir` then holds a whole model that transformers and diffusers load; or, with adapters that are not merged,
    these, for `AutoModel.from_pretrained(output_dir)`, or for `load_adapter` of the model that the training began
    with. The processor, loss curves, sample sheets and the latents of the pictures lie beside them.

    Args:
        model: In float32; from `load_start` or `start_from_text_model`. It is trained in place.
        processor: The model's.
        pictures: For example of `read_image_folder`.
        output_dir: Where everything goes.
        recipe: Settings.
        max_steps: Optimizer steps.
        num_epochs: In place of `max_steps`.
        sample_every: Steps between two sample sheets, and two evaluations of held-out pictures; there is a sheet
            before the first step too.
        save_every: Steps between two checkpoints, of which the last two are kept; by default there are none.
        prompts: Of the sample sheets; by default the captions of the first pictures.
        resume: Go on from the last complete checkpoint in `output_dir`, as if the training had never stopped.
        merge: Add adapters to the weights at the end, and save a whole model.
        callbacks: Trainer's, for example `SaveOnSignal`.

    Returns:
        The trainer, whose `model` has the last weights and whose `state.log_history` has the losses.

    Raises:
        ValueError: Both or neither of `max_steps` and `num_epochs`, a number that is not above 0, pictures or settings
            that cannot be used; with `resume`, no complete checkpoint, or one of a training with other settings.
    """
    recipe = recipe or FinetuneRecipe()
    if (max_steps is None) == (num_epochs is None):
        raise ValueError(f"max_steps is {max_steps} and num_epochs {num_epochs}; give one of them.")
    check_duration(max_steps=max_steps, num_epochs=num_epochs, sample_every=sample_every, save_every=save_every)
    check_start(model, processor, output_dir, recipe, merge)
    set_seed(recipe.seed)
    encoded = encode_pictures(pictures, processor, Path(output_dir, "latents"))
    train_rows, eval_rows = make_rows(encoded, processor, recipe)
    recipe = choose_speed(model, recipe, train_rows, max_steps=max_steps)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    trained = model if recipe.lora_rank is None else add_adapters(model, recipe)
    length = {"num_train_epochs": num_epochs} if max_steps is None else {"max_steps": max_steps}
    evaluation = {} if eval_rows is None else {"eval_strategy": "steps", "eval_steps": sample_every}
    trainer = TransfusionTrainer(
        trained,
        finetune_arguments(recipe, output_dir, save_every, **length, **evaluation),
        make_collator(model, recipe),
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        callbacks=list(callbacks),
        ema_decay=recipe.ema_decay,
    )
    prompts = prompts or first_captions(train_rows.pictures)
    add_sample_sheets(trainer, recipe, processor, prompts, sample_every, at_start=True)
    logger.info("%d pictures, %d parameters to train", len(train_rows), trainer.get_num_trainable_parameters())
    trainer.train(resume_from_checkpoint=resume)
    if merge:
        trainer.model = trained.merge_and_unload()
    save_training(trainer)
    return trainer


def finetune_arguments(
    recipe: FinetuneRecipe, output_dir: str | Path, save_every: int | None, **options: Any
) -> TrainingArguments:
    """Trainer's arguments for `recipe`, with a checkpoint every so many steps; `options` are added."""
    rate = FULL_LEARNING_RATE if recipe.lora_rank is None else LORA_LEARNING_RATE
    options["learning_rate"] = rate if recipe.learning_rate is None else recipe.learning_rate
    if save_every is not None:
        options |= {"save_strategy": "steps", "save_steps": save_every, "save_total_limit": 2}
    return training_arguments(recipe, output_dir, logging_steps=10, **options)


def check_start(
    model: TransfusionForMultimodalGeneration,
    processor: TransfusionProcessor,
    output_dir: str | Path,
    recipe: FinetuneRecipe,
    merge: bool,
) -> None:
    """Raise a `ValueError` for what would go wrong late, or write over the beginning."""
    processor.check_model(model.config)
    check_tokenizer(processor.tokenizer)
    if merge and recipe.lora_rank is None:
        raise ValueError("merge=True without lora_rank: there are no adapters to merge. Give lora_rank, or no merge.")
    if recipe.lora_rank is not None and not merge and not model.name_or_path:
        raise ValueError(
            "The model was not loaded from a checkpoint, on top of which its adapters could be loaded again: set "
            "merge=True, or save the model and begin with that checkpoint."
        )
    if model.name_or_path and Path(model.name_or_path).resolve() == Path(output_dir).resolve():
        raise ValueError(f"output_dir is {output_dir}, where the training begins; give another folder.")


def make_rows(
    encoded: EncodedPictures, processor: TransfusionProcessor, recipe: FinetuneRecipe
) -> tuple[CaptionedPictureRows, CaptionedPictureRows | None]:
    """Rows to train on, and rows of held-out pictures if the recipe wants them."""

    def rows(chosen: list[int]) -> CaptionedPictureRows:
        return CaptionedPictureRows(
            [encoded.pictures[index] for index in chosen],
            [encoded.latents[index] for index in chosen],
            processor,
            caption_first=recipe.caption_first,
            seed=recipe.seed,
        )

    train, held_out = split_pictures(len(encoded.pictures), recipe.validation_share, recipe.seed)
    return rows(train), rows(held_out) if held_out else None


__all__ = [
    "FinetuneRecipe",
    "add_adapters",
    "check_tokenizer",
    "finetune",
    "load_start",
    "open_vae",
    "split_pictures",
    "start_from_text_model",
]
