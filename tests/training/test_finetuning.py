import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer

from scripts.finetune import main, parse_args
from tests.tiny import tiny_config
from tests.tiny_processor import tiny_processor, tiny_vae
from tests.training.tiny_rows import largest_difference
from tests.workplace import save_language_model
from transfusion import TransfusionForMultimodalGeneration, TransfusionPipeline
from transfusion.data import read_image_folder
from transfusion.training.finetuning import (
    FinetuneRecipe,
    finetune,
    load_start,
    split_pictures,
    start_from_text_model,
)
from transfusion.training.recipes import check_lengths
from transfusion.training.rows import CaptionedPictureRows
from transfusion.training.trainer import TransfusionTrainer


QUICK: dict[str, Any] = {"batch_size": 3, "num_inference_steps": 1, "guidance_scale": 1.0, "learning_rate": 1e-2}


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A saved model with its processor: pictures of 8 x 8 pixels, latents of 2 x 2, one patch."""
    processor = tiny_processor(tiny_vae(), size=8)
    torch.manual_seed(0)
    config = tiny_config(
        objective="flow",
        vocab_size=len(processor.tokenizer),
        latent_channels=4,
        boi_token_id=processor.boi_token_id,
        eoi_token_id=processor.eoi_token_id,
        image_token_id=processor.image_token_id,
        default_image_grid=(1, 1),
    )
    folder = tmp_path / "start"
    TransfusionForMultimodalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run(start: Path, pictures: Path, out: Path, **options: Any) -> Any:
    """A training of four steps."""
    settings = {name: options.pop(name) for name in list(options) if name in FinetuneRecipe.__dataclass_fields__}
    model, processor = load_start(start)
    recipe = FinetuneRecipe(**{**QUICK, **settings})
    options = {"max_steps": 4, **options}
    return finetune(model, processor, read_image_folder(pictures)[0], out, recipe, **options)


def test_the_command_writes_a_model_that_draws(start: Path, picture_folder: Path, tmp_path: Path) -> None:
    """With held-out pictures, averaged weights, bf16 and gradient checkpointing; sheets from before to after."""
    out = tmp_path / "run"
    arguments = ["--model", start, "--data", picture_folder, "--output_dir", out, "--max_steps", 3]
    arguments += ["--validation_share", 0.2, "--ema_decay", 0.5, "--bf16", "--gradient_checkpointing"]
    arguments += ["--num_inference_steps", 2, "--sample_every", 2, "--prompts", "a heart", "--batch_size", 2]
    main(parse_args([str(argument) for argument in arguments]))
    pipeline = TransfusionPipeline.from_pretrained(out)
    assert pipeline("a heart", num_inference_steps=2).images[0].size == (8, 8)
    assert pipeline.model.config.use_cache
    assert sorted(path.stem[-1] for path in (out / "samples").glob("*.png")) == ["0", "2", "3"]
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    evaluated = [entry["step"] for entry in history if "eval_image_loss" in entry]
    assert evaluated == [2, 3]


def test_it_learns(start: Path, picture_folder: Path, tmp_path: Path) -> None:
    """On the very pictures, losses fall."""
    trainer = run(start, picture_folder, tmp_path / "run", max_steps=60, sample_every=1000, bf16=False)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


def test_adapters_load_on_top_of_the_start(start: Path, picture_folder: Path, tmp_path: Path) -> None:
    """They alone are trained and saved; by AutoModel, or by load_adapter, the trained model comes back."""
    before, _ = load_start(start)
    trainer = run(start, picture_folder, tmp_path / "lora", lora_rank=2, bf16=False)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert not (tmp_path / "lora" / "model.safetensors").exists()
    pipeline = TransfusionPipeline.from_pretrained(start)
    pipeline.model.load_adapter(tmp_path / "lora")
    loaded = AutoModel.from_pretrained(tmp_path / "lora")
    AutoProcessor.from_pretrained(tmp_path / "lora").check_model(loaded.config)
    inputs = pipeline.processor(text="noise 1", return_tensors="pt")
    expected = trainer.model.eval()(**inputs).logits
    assert (expected - before(**inputs).logits).abs().max() > 1e-3
    for other in (pipeline.model, loaded):
        torch.testing.assert_close(other(**inputs).logits, expected)


def test_merged_adapters_are_a_whole_model(start: Path, picture_folder: Path, tmp_path: Path) -> None:
    adapters = run(start, picture_folder, tmp_path / "lora", lora_rank=2, lora_targets="q_proj,v_proj", bf16=False)
    options: dict[str, Any] = {"lora_rank": 2, "lora_targets": "q_proj,v_proj", "bf16": False, "merge": True}
    run(start, picture_folder, tmp_path / "merged", **options)
    pipeline = TransfusionPipeline.from_pretrained(tmp_path / "merged")
    inputs = pipeline.processor(text="noise 1", return_tensors="pt")
    expected = adapters.model.eval()(**inputs).logits
    torch.testing.assert_close(pipeline.model(**inputs).logits, expected)
    changed = largest_difference(pipeline.model.state_dict(), load_start(start)[0].state_dict())
    assert changed > 1e-3


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_resumes_exactly(start: Path, picture_folder: Path, tmp_path: Path, lora_rank: int | None) -> None:
    """A training that stopped ends where one that did not ends; checkpoints hold no VAE larger than adapters."""
    options: dict[str, Any] = {"lora_rank": lora_rank, "save_every": 2, "bf16": False}
    whole = run(start, picture_folder, tmp_path / "run", **options)
    assert (tmp_path / "run" / "vae").is_dir()
    assert (tmp_path / "run" / "checkpoint-2" / "vae").exists() == (lora_rank is None)
    expected = {name: value.clone() for name, value in whole.model.state_dict().items()}
    (tmp_path / "run" / "checkpoint-4").rename(tmp_path / "last")
    (tmp_path / "run" / "samples").rename(tmp_path / "samples")
    again = run(start, picture_folder, tmp_path / "run", resume=True, **options)
    assert [path.stem[-1] for path in (tmp_path / "run" / "samples").glob("*.png")] == ["4"]
    assert largest_difference(again.model.state_dict(), expected) == 0


def test_the_command_stops_by_a_signal_and_goes_on(
    start: Path, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no `--save_every`; what comes out is what would have without the signal."""
    arguments = ["--model", start, "--data", picture_folder, "--max_steps", 4, "--batch_size", 2, "--no-bf16"]
    arguments += ["--num_inference_steps", 1, "--ema_decay", 0.5, "--output_dir"]

    def command(*more: Any) -> None:
        main(parse_args([str(argument) for argument in (*arguments, *more)]))

    command(tmp_path / "whole")
    step = TransfusionTrainer.training_step

    def interrupted(trainer: TransfusionTrainer, *args: Any) -> Any:
        if trainer.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *args)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stop:
        patched.setattr(TransfusionTrainer, "training_step", interrupted)
        command(tmp_path / "cut")
    assert stop.value.code == 143 and (tmp_path / "cut" / "checkpoint-2").is_dir()
    command(tmp_path / "cut", "--resume")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut")]
    assert largest_difference(*weights) == 0


@pytest.mark.parametrize("way", ["all", "frozen", "adapters"])
def test_a_language_model_learns_to_draw(picture_folder: Path, tmp_path: Path, way: str) -> None:
    """Its vocabulary grows by the tokens of pictures, and its patch codec is trained in every way."""
    save_language_model(tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llama")
    model, processor = start_from_text_model(tmp_path / "llama", image_size=32, freeze_text=way == "frozen")
    assert model.config.vocab_size == len(tokenizer) + 3
    codec = {name: value.clone() for name, value in model.state_dict().items() if "patch_encoder" in name}
    head = model.lm_head.weight.detach().clone()
    lora = {"lora_rank": 2} if way == "adapters" else {}
    recipe = FinetuneRecipe(**{**QUICK, **lora})
    pictures = read_image_folder(picture_folder)[0]
    finetune(model, processor, pictures, tmp_path / "out", recipe, max_steps=2, merge=bool(lora))
    after = TransfusionPipeline.from_pretrained(tmp_path / "out")
    assert largest_difference(codec, after.model.state_dict()) > 1e-3
    assert torch.equal(after.model.lm_head.weight, head) == (way != "all")
    assert after("noise 1", num_inference_steps=1).images[0].size == (32, 32)


def test_adapters_of_a_language_model_must_be_merged(picture_folder: Path, tmp_path: Path) -> None:
    save_language_model(tmp_path / "llama")
    start = start_from_text_model(tmp_path / "llama")
    with pytest.raises(ValueError, match="merge=True"):
        finetune(*start, read_image_folder(picture_folder)[0], tmp_path / "out", FinetuneRecipe(lora_rank=2), 2)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    save_language_model(tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llama")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="eos_token"):
        start_from_text_model(tmp_path / "llama")
    with pytest.raises(ValueError, match="no folder vae"):
        save_language_model(tmp_path / "other")
        start_from_text_model(tmp_path / "other", vae=tmp_path / "llama")


def test_bad_pictures_are_reported_and_left_out(
    start: Path, picture_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (picture_folder / "3.png").write_bytes(b"no picture")
    with caplog.at_level(logging.WARNING):
        trainer = run(start, picture_folder, tmp_path / "run", max_steps=1)
    assert "3.png" in caplog.text and len(trainer.train_dataset) == 5


def test_wrong_settings_are_refused_before_anything_is_trained(
    start: Path, picture_folder: Path, tmp_path: Path
) -> None:
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("max_steps is None and num_epochs None", {"max_steps": None}),
        ("max_steps is 4 and num_epochs 1", {"num_epochs": 1}),
        ("max_steps is -5; give a number above 0", {"max_steps": -5}),
        ("num_epochs is 0; give", {"max_steps": None, "num_epochs": 0}),
        ("save_every is 0; give", {"save_every": 0}),
        ("sample_every is 0; give", {"sample_every": 0}),
        ("batch_size is 0; give", {"batch_size": 0}),
        ("caption_first is 7; give a share", {"caption_first": 7}),
        ("text_dropout is -1; give a share", {"text_dropout": -1}),
        ("without lora_rank", {"merge": True}),
        ("lora_rank is 0", {"lora_rank": 0}),
        ("adapters are not averaged", {"lora_rank": 2, "ema_decay": 0.9}),
        ("validation_share is 1", {"validation_share": 1}),
        ("leaves none to train on", {"validation_share": 0.95}),
        ("Target modules", {"lora_rank": 2, "lora_targets": "query"}),
    ]
    for message, options in wrong:
        with pytest.raises(ValueError, match=message):
            run(start, picture_folder, tmp_path / "run", **options)
    with pytest.raises(ValueError, match="where the training begins"):
        run(start, picture_folder, start)
    with pytest.raises(ValueError, match="missing is no folder"):
        run(start, tmp_path / "missing", tmp_path / "run")
    with pytest.raises(SystemExit):
        parse_args("--text_model a --data b --output_dir c --max_steps 1 --freeze_text --lora_rank 2".split())


def test_another_processor_is_refused(start: Path, picture_folder: Path, tmp_path: Path) -> None:
    model, _ = load_start(start)
    with pytest.raises(ValueError, match="do not fit"):
        finetune(model, tiny_processor(size=8), read_image_folder(picture_folder)[0], tmp_path / "run", max_steps=1)


def test_rows_that_are_too_long_are_refused() -> None:
    rows = CaptionedPictureRows(*_long_rows())
    length = len(rows[0]["input_ids"])
    check_lengths(rows, tiny_config(max_position_embeddings=length))
    with pytest.raises(ValueError, match=f"long.png and its caption take {length} positions"):
        check_lengths(rows, tiny_config(max_position_embeddings=length - 1))
    with pytest.raises(ValueError, match=f"packed_length={length - 1}; raise it"):
        check_lengths(rows, tiny_config(max_position_embeddings=length), packed_length=length - 1)


def _long_rows() -> tuple:
    from transfusion.data.pictures import CaptionedPicture

    captions = (("a heart",), ("a red heart in a blue sky",))
    names = ("short.png", "long.png")
    pictures = [CaptionedPicture(name, "", text, "", "", "", b"") for name, text in zip(names, captions, strict=True)]
    return pictures[::-1], [torch.zeros(3, 4, 6)] * 2, tiny_processor()


def test_held_out_pictures_are_others_and_at_least_one() -> None:
    train, held_out = split_pictures(10, 0.2, seed=0)
    assert sorted(train + held_out) == list(range(10)) and len(held_out) == 2
    assert split_pictures(10, 0.2, seed=1) != (train, held_out) == split_pictures(10, 0.2, seed=0)
    assert len(split_pictures(3, 0.01, seed=0)[1]) == 1
    assert split_pictures(3, 0.0, seed=0) == ([0, 1, 2], [])


def test_every_setting_is_an_option() -> None:
    args = parse_args(["--model", "a", "--data", "b", "--output_dir", "c", "--num_epochs", "2"])
    assert FinetuneRecipe.from_options(args) == FinetuneRecipe()
