"""`train_run`: a whole training, as a `RunSpec` states it."""

import dataclasses
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import AutoTokenizer, ProgressCallback, TrainingArguments, set_seed

from ..configuration import PRESETS
from ..data import load_tokenizer
from ..data.specs import DataSpec
from ..image_processing import TransfusionImageProcessor, load_picture
from ..modeling_transfusion import TransfusionForMultimodalGeneration
from ..processing import TransfusionProcessor
from .assembly import build_rows
from .finetuning import FinetuneRecipe, add_adapters, check_tokenizer, load_start, open_vae, start_from_text_model
from .optimizers import MuonAdamW
from .recipes import add_sample_sheets, make_collator, preset_config, save_training, training_arguments
from .resuming import RUN_FILE
from .signals import SaveOnSignal
from .specs import LengthSpec, ModelSpec, RunSpec, TrainingSpec
from .speed import bf16_is_faster, choose_attention, choose_packing, compile_for_training, sample_lengths
from .trainer import TransfusionTrainer
from .watching import CaptionCallback, RichProgress, TextLossAlert, write_summary


logger = logging.getLogger(__name__)

IMAGE_SIZE = 64
PREPARATION_SECONDS = 6 * 3600  # how long other processes wait while the first encodes the pictures
SCHEDULES = {"cosine": "cosine_with_min_lr", "constant": "constant_with_warmup"}


def start_model(spec: ModelSpec) -> tuple[TransfusionForMultimodalGeneration, TransfusionProcessor]:
    """Model, in float32, and processor to begin with.

    Raises:
        ValueError: A beginning that does not exist or does not fit.
    """
    if spec.checkpoint is not None:
        return load_start(spec.checkpoint)
    image_size = spec.image_size or IMAGE_SIZE
    if spec.text_model is not None:
        return start_from_text_model(spec.text_model, image_size, spec.vae, spec.freeze_text, **spec.config)
    if spec.preset not in PRESETS:
        raise ValueError(f"preset is {spec.preset!r}; known: {', '.join(PRESETS)}.")
    fields = PRESETS[spec.preset] | spec.config
    tokenizer = load_tokenizer() if spec.tokenizer is None else AutoTokenizer.from_pretrained(spec.tokenizer)
    tokenizer.model_max_length = fields["max_position_embeddings"]
    image_processor = TransfusionImageProcessor(size=image_size, patch_size=fields["patch_size"])
    processor = TransfusionProcessor(image_processor, tokenizer, open_vae(spec.vae))
    return TransfusionForMultimodalGeneration(preset_config(processor, spec.preset, **spec.config)), processor


def run_arguments(spec: RunSpec, **options: Any) -> TrainingArguments:
    """Trainer's arguments for `spec`; `options` are added, or replace what is here."""
    training, length, checkpoints = spec.training, spec.length, spec.checkpoints
    fields: dict[str, Any] = {
        "learning_rate": training.learning_rate,
        "adam_beta1": training.betas[0],
        "adam_beta2": training.betas[1],
        "adam_epsilon": training.epsilon,
        "lr_scheduler_type": SCHEDULES[training.schedule],
        "gradient_accumulation_steps": training.accumulation,
        "dataloader_num_workers": training.num_workers,
        "max_steps": -1 if length.max_steps is None else length.max_steps,
        "logging_steps": spec.watch.every,
        "ddp_timeout": PREPARATION_SECONDS,
        "report_to": list(spec.watch.trackers) or "none",
    }
    num_parts = int(os.environ.get("WORLD_SIZE", 1)) * training.accumulation
    if training.batch_size % num_parts:
        raise ValueError(
            f"batch_size is {training.batch_size}; give a multiple of {num_parts}, processes x accumulation."
        )
    fields["per_device_train_batch_size"] = fields["per_device_eval_batch_size"] = training.batch_size // num_parts
    if training.gradient_checkpointing:
        fields["gradient_checkpointing"] = True
    if training.schedule == "cosine":
        fields["lr_scheduler_kwargs"] = {"min_lr_rate": training.final_share}
    if length.num_epochs is not None:
        fields["num_train_epochs"] = length.num_epochs
    if checkpoints.every is not None:
        fields |= {"save_strategy": "steps", "save_steps": checkpoints.every, "save_total_limit": checkpoints.keep}
    if spec.validation is not None:
        fields |= {"eval_strategy": "steps", "eval_steps": spec.watch.sample_every}
    if checkpoints.keep_best:
        fields |= {"metric_for_best_model": "eval_loss", "greater_is_better": False}
    return training_arguments(training, spec.output_dir, **fields, **options)


def open_rows(
    data: DataSpec,
    processor: TransfusionProcessor,
    spec: RunSpec,
    longest: int,
    device: torch.device,
    num_passes: int | None = None,
) -> torch.utils.data.Dataset:
    """The rows of `data` for `spec`, of up to `longest` positions, with latents kept in the output folder by default.

    A stream goes over its records `num_passes` times, by default without end. Pictures are encoded on `device`.
    """
    cache_dir = str(Path(spec.output_dir, "latents")) if data.cache_dir is None else data.cache_dir
    max_length = longest if data.max_length is None else min(data.max_length, longest)
    data = dataclasses.replace(data, cache_dir=cache_dir, max_length=max_length)
    return build_rows(data, processor, spec.training.seed, num_passes, device)


def choose_run_speed(
    model: TransfusionForMultimodalGeneration,
    training: TrainingSpec,
    rows: Any,
    length: LengthSpec,
    longest: int,
    num_samples: int = 256,
) -> TrainingSpec:
    """Choose packing, attention and compilation where `training` leaves them open, and set up `model`.

    The rows of a stream cannot be looked at beforehand: they are always packed.
    """
    packed_length, is_stream = training.packed_length, isinstance(rows, IterableDataset)
    lengths = [longest] if is_stream else sample_lengths(rows, num_samples)
    if is_stream:
        packed_length = packed_length or longest
    elif packed_length is None and (packed_length := choose_packing(lengths, training.batch_size)) is not None:
        packed_length = max(packed_length, longest)
    choose_attention(model, packed_length or max(lengths), training.attention)
    compile_for_training(model, training.compile, length.max_minutes, length.max_steps)
    return dataclasses.replace(training, packed_length=packed_length or 0)


def train_run(spec: RunSpec, resume: bool = False) -> TransfusionTrainer:
    """Train what `spec` states, and save model, processor, loss curves, sample sheets and a summary.

    Args:
        spec: From `read_spec`, for example.
        resume: Go on from the newest checkpoint in its `output_dir`; with none there, start.

    Returns:
        The trainer, whose `model` has the last weights and whose `state.log_history` has the losses.

    Raises:
        ValueError: Anything that cannot be trained.
        SystemExit: A signal stopped the training, with a checkpoint: see `SaveOnSignal`.
    """
    resume = resume and has_checkpoint(spec.output_dir)
    if resume and spec.training.bf16 is None:
        spec = dataclasses.replace(spec, training=dataclasses.replace(spec.training, bf16=saved_bf16(spec.output_dir)))
    training, length = spec.training, spec.length
    arguments = run_arguments(spec)
    set_seed(training.seed)
    model, processor = start_model(spec.model)
    processor.check_model(model.config)
    check_tokenizer(processor.tokenizer)
    if spec.model.checkpoint and Path(spec.model.checkpoint).resolve() == Path(spec.output_dir).resolve():
        raise ValueError(f"output_dir is {spec.output_dir}, where the training begins; give another folder.")
    longest = model.config.max_position_embeddings
    with arguments.main_process_first(desc="encoding pictures"):
        rows = open_rows(spec.data, processor, spec, longest, arguments.device)
        held_out = spec.validation and open_rows(spec.validation, processor, spec, longest, arguments.device, 1)
    longest = min(spec.data.max_length or longest, longest)
    num_samples = 64 if spec.data.augments else 256  # each of which is encoded then
    training = choose_run_speed(model, training, rows, length, longest, num_samples)
    if training.packed_length:  # evaluations are padded
        fitting = max(1, training.packed_length // longest)
        arguments.per_device_eval_batch_size = min(arguments.per_device_eval_batch_size, fitting)
    trainer = TransfusionTrainer(
        trained_model(model, spec.model),
        arguments,
        make_collator(model, training),
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=processor,
        optimizer_cls_and_kwargs=muon_options(model, training),
        ema_decay=training.ema_decay,
        max_minutes=length.max_minutes,
    )
    add_watchers(trainer, spec, training)
    logger.info("%d parameters to train", trainer.get_num_trainable_parameters())
    trainer.train(resume_from_checkpoint=resume)
    if spec.model.lora is not None and spec.model.lora.merge:
        trainer.model = trainer.model.merge_and_unload()
    save_training(trainer)
    if trainer.is_world_process_zero():
        write_summary(trainer, json.loads(json.dumps(dataclasses.asdict(spec))), spec.watch.prompts)
    return trainer


def add_watchers(trainer: TransfusionTrainer, spec: RunSpec, training: TrainingSpec) -> None:
    """Add what looks at the training and what stops it with a checkpoint."""
    watch, processor = spec.watch, trainer.processing_class
    if not trainer.is_deepspeed_enabled:  # whose checkpoints cannot be resumed
        trainer.add_callback(SaveOnSignal())
    trainer.add_callback(TextLossAlert())
    if sys.stderr.isatty() and spec.length.max_minutes is None and trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(RichProgress())
    if watch.prompts:
        add_sample_sheets(trainer, training, processor, watch.prompts, watch.sample_every)
    if watch.pictures:
        pictures = {name: load_picture(name) for name in watch.pictures}
        trainer.add_callback(CaptionCallback(processor, pictures, watch.sample_every, trainer.averaged_weights))


def trained_model(model: TransfusionForMultimodalGeneration, spec: ModelSpec) -> Any:
    """The model, or adapters on it."""
    if spec.lora is None:
        return model
    if not spec.lora.merge and spec.checkpoint is None:
        raise ValueError("lora without merge needs a checkpoint on top of which adapters are loaded; set merge: true.")
    lora = spec.lora
    return add_adapters(model, FinetuneRecipe(lora_rank=lora.rank, lora_alpha=lora.alpha, lora_targets=lora.targets))


def muon_options(model: TransfusionForMultimodalGeneration, training: TrainingSpec) -> tuple | None:
    """What the trainer makes Muon and AdamW of, once the weights are sharded, or None for its own AdamW."""
    if training.optimizer == "adamw":
        return None
    dtype = torch.bfloat16 if bf16_is_faster() else torch.float32
    options = {"lr": training.learning_rate, "weight_decay": training.weight_decay, "betas": training.betas}
    return MuonAdamW, {"model": model, "dtype": dtype, **options}


def has_checkpoint(output_dir: str | os.PathLike) -> bool:
    """Whether a folder holds a checkpoint, whole or not."""
    return any(Path(output_dir).glob("checkpoint-*"))


def saved_bf16(output_dir: str | os.PathLike) -> bool | None:
    """Whether the newest checkpoint was computed in bfloat16: measured anew, another may be faster."""
    runs = sorted(Path(output_dir).glob(f"checkpoint-*/{RUN_FILE}"), key=lambda file: file.stat().st_mtime)
    try:
        return json.loads(runs[-1].read_text(encoding="utf-8"))["fingerprint"]["bf16"] if runs else None
    except (ValueError, KeyError):
        return None  # a harmed one, which is named when the training looks for the newest that is complete


__all__ = ["choose_run_speed", "muon_options", "open_rows", "run_arguments", "start_model", "train_run"]
