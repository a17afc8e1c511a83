"""One trial with one seed: train on the shapes world, draw, caption, read; a JSON file and a sheet of drawings."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments, set_seed

from ..configuration import TransfusionConfig
from ..data import load_glosses, load_tokenizer, load_vae
from ..data.shapes import parse_caption, shapes_world
from ..evaluation.report import EvaluationSettings, draw, write_captions
from ..evaluation.shapes import caption_following, prompt_following
from ..evaluation.text import text_perplexity
from ..image_processing import TransfusionImageProcessor
from ..modeling_transfusion import TransfusionForMultimodalGeneration
from ..pipeline import TransfusionPipeline
from ..processing import TransfusionProcessor
from ..training.collator import TransfusionDataCollator
from ..training.optimizers import MuonAdamW
from ..training.recipes import DemoRecipe, demo_config, demo_rows, short_texts
from ..training.rows import CaptionedPictureRows
from ..training.trainer import TransfusionTrainer
from .trials import BASE, Trial


@dataclass(frozen=True)
class RunSettings:
    """What all trials share.

    Attributes:
        steps: Of training.
        batch_size: Rows per step.
        num_pictures: Training pictures.
        num_prompts: Held-out scenes that are drawn, and held-out pictures that are captioned.
        num_texts: Held-out definitions that are read.
        num_inference_steps, guidance_scale: Of the drawings.
        learning_rate: Of Muon and AdamW.
        bf16: Train in bfloat16.
    """

    steps: int = 1000
    batch_size: int = 64
    num_pictures: int = 4000
    num_prompts: int = 128
    num_texts: int = 300
    num_inference_steps: int = 20
    guidance_scale: float = 3.0
    learning_rate: float = 4e-3
    bf16: bool = True


def shapes_processor(patch_size: int) -> TransfusionProcessor:
    """The shipped tokenizer and VAE, with pictures of 64 pixels in patches of `patch_size` latent positions."""
    image_processor = TransfusionImageProcessor(size=64, patch_size=patch_size)
    return TransfusionProcessor(image_processor, load_tokenizer(), load_vae())


def shapes_rows(
    settings: RunSettings, processor: TransfusionProcessor, split: str, seed: int, cache_dir: Path
) -> CaptionedPictureRows:
    """The rows of `split`: pictures with their captions on either side, and a fifth of short definitions."""
    num_pictures = settings.num_pictures if split == "train" else settings.num_prompts
    pictures = shapes_world(num_pictures, split=split)
    return demo_rows(DemoRecipe(seed=seed), processor, pictures, load_glosses(split), cache_dir)


def training_arguments(settings: RunSettings, output_dir: Path, seed: int, steps: int) -> TrainingArguments:
    """Trainer's arguments: a cosine over `steps`, nothing saved."""
    recipe = DemoRecipe()
    return TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup,
        max_grad_norm=recipe.max_grad_norm,
        bf16=settings.bf16,
        use_cpu=not torch.accelerator.is_available(),
        seed=seed,
        data_seed=seed,
        logging_steps=50,
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )


def train_language_model(
    config: TransfusionConfig,
    settings: RunSettings,
    processor: TransfusionProcessor,
    steps: int,
    seed: int,
    output_dir: Path,
) -> Qwen3ForCausalLM:
    """A Qwen 3 of the shape of `config`, trained on the definitions alone."""
    set_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=config.tie_word_embeddings,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
    )
    model.set_attn_implementation("eager")
    texts = short_texts(DemoRecipe(), processor, load_glosses("train"))
    rows = [[{"type": "text", "text": text}] for text in texts]
    encoded = processor(text=rows, return_labels=True, padding=False)
    dataset = [{"input_ids": ids, "labels": ids} for ids in encoded["input_ids"]]

    def collate(batch: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(row["input_ids"]) for row in batch]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
        return {
            "input_ids": padded.clamp(min=0),
            "attention_mask": (padded >= 0).long(),
            "labels": padded.masked_fill(padded < 0, -100),
        }

    arguments = training_arguments(settings, output_dir, seed, steps)
    optimizer = MuonAdamW(model, settings.learning_rate)
    Trainer(model, arguments, collate, train_dataset=dataset, optimizers=(optimizer, None)).train()
    return model


def make_model(
    trial: Trial, settings: RunSettings, processor: TransfusionProcessor, seed: int, output_dir: Path
) -> TransfusionForMultimodalGeneration:
    """The untrained model of `trial`, or one that starts from a language model."""
    config = demo_config(processor, **{**BASE, **trial.config})
    set_seed(seed)
    if trial.text_steps == 0:
        model = TransfusionForMultimodalGeneration(config)
    else:
        text_model = train_language_model(config, settings, processor, trial.text_steps, seed, output_dir)
        fields = {name: value for name, value in config.to_diff_dict().items() if name in _OF_IMAGES}
        model = TransfusionForMultimodalGeneration.from_text_model(
            text_model, processor, freeze_text=trial.freeze_text, **fields
        )
    if not torch.cuda.is_available():
        model.set_attn_implementation("eager")
    return model


# What a config adds to that of a language model.
_OF_IMAGES = frozenset(("axial_positions", "modality_experts", "objective", "timestep_mean"))


def score(
    pipeline: TransfusionPipeline, settings: RunSettings, seed: int, sheet: Path | None = None
) -> dict[str, float]:
    """Draw held-out scenes, caption held-out pictures, read held-out definitions."""
    pictures = shapes_world(settings.num_prompts, split="held_out")
    prompts = [picture.captions[0] for picture in pictures]
    scenes = [parse_caption(prompt) for prompt in prompts]
    evaluation = EvaluationSettings(
        batch_size=64,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        seed=1000 * seed,
    )
    drawings = draw(pipeline, prompts, evaluation)
    if sheet is not None:
        drawing_sheet(drawings).save(sheet)
    captions = write_captions(pipeline, [picture.image for picture in pictures], evaluation)
    texts = load_glosses("held_out")[: settings.num_texts]
    return {
        **{f"drawn_{name}": value for name, value in prompt_following(drawings, scenes).items()},
        **{f"captioned_{name}": value for name, value in caption_following(captions, scenes).items()},
        "perplexity": text_perplexity(pipeline.model, pipeline.processor, texts),
    }


def drawing_sheet(drawings: Sequence[Image.Image], columns: int = 16) -> Image.Image:
    """All drawings, edge to edge, so that they can be cut out and measured again."""
    side = drawings[0].width
    page = Image.new("RGB", (columns * side, -(-len(drawings) // columns) * side), "white")
    for index, drawing in enumerate(drawings):
        page.paste(drawing, (index % columns * side, index // columns * side))
    return page


def make_trainer(
    trial: Trial, settings: RunSettings, processor: TransfusionProcessor, seed: int, folder: Path
) -> TransfusionTrainer:
    """The trainer of a run. Rows, their order and their noise depend on `settings` and `seed` alone."""
    model = make_model(trial, settings, processor, seed, folder / "trainer")
    cache = folder / "latents"
    return TransfusionTrainer(
        model,
        training_arguments(settings, folder / "trainer", seed, settings.steps),
        TransfusionDataCollator(model.config),
        train_dataset=shapes_rows(settings, processor, "train", seed, cache),
        eval_dataset=shapes_rows(settings, processor, "held_out", 0, cache),
        processing_class=processor,
        optimizers=(MuonAdamW(model, settings.learning_rate), None),
        ema_decay=DemoRecipe().ema_decay,
    )


def run_trial(trial: Trial, seed: int, settings: RunSettings, output_dir: str | Path) -> dict[str, Any]:
    """Train and score `trial`, unless its JSON file in `output_dir` says that this was done with the same settings.

    Returns:
        What the file holds: scores, held-out losses, parameters, seconds.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{trial.name.replace(' ', '_').replace(',', '')}-{seed}"
    file = folder / f"{stem}.json"
    if file.exists():
        return read_result(file, trial, settings)
    processor = shapes_processor(trial.config.get("patch_size", 4))
    trainer = make_trainer(trial, settings, processor, seed, folder)
    model = trainer.model
    start = time.process_time(), time.perf_counter()
    trainer.train()
    cpu_seconds, seconds = time.process_time() - start[0], time.perf_counter() - start[1]
    losses = trainer.evaluate()
    with trainer.averaged_weights():
        model.eval()
        scores = score(TransfusionPipeline(model, processor), settings, seed, folder / f"{stem}.png")
    result = {
        "trial": trial.name,
        "seed": seed,
        "parameters": model.num_parameters(),
        "cpu_seconds": cpu_seconds,
        "seconds": seconds,
        "text_loss": losses["eval_text_loss"],
        "image_loss": losses["eval_image_loss"],
        **scores,
        **made_with(trial, settings),
    }
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(result, indent=2) + "\n")
    part.replace(file)
    return result


def made_with(trial: Trial, settings: RunSettings) -> dict[str, Any]:
    """What a result depends on, beside its seed, in JSON's types."""
    fields = {"config": trial.config, "text_steps": trial.text_steps, "freeze_text": trial.freeze_text}
    return json.loads(json.dumps({**fields, "base": BASE, "settings": asdict(settings)}))


def read_result(file: Path, trial: Trial, settings: RunSettings) -> dict[str, Any]:
    """The result in `file`; ValueError where another trial or other settings have made it."""
    result = json.loads(file.read_text())
    for name, value in made_with(trial, settings).items():
        if result[name] != value:
            raise ValueError(
                f"{file} was made with {name}={result[name]}, and this run has {value}; take another folder, or "
                "delete the file."
            )
    return result


__all__ = [
    "RunSettings",
    "drawing_sheet",
    "make_model",
    "make_trainer",
    "run_trial",
    "score",
    "shapes_processor",
    "shapes_rows",
    "training_arguments",
]
