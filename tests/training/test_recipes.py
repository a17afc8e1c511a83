from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

from scripts.train import main, parse_args
from transfusion.modeling_transfusion import TransfusionForMultimodalGeneration
from transfusion.training.recipes import DemoRecipe, demo_config, demo_processor, train_demo


def test_demo_on_a_folder_of_pictures(picture_folder: Path, tmp_path: Path) -> None:
    """The command writes a model and a processor that load and draw; nothing of it is a pickle."""
    out = tmp_path / "run"
    options = ["--max_steps", "3", "--batch_size", "4", "--num_inference_steps", "2", "--image_size", "32", "--bf16"]
    options += ["--packed_length", "64"]
    main(
        parse_args(["demo", "--output_dir", str(out), "--data", str(picture_folder), "--sample_every", "2", *options])
    )
    pipeline = DiffusionPipeline.from_pretrained(out)
    assert pipeline("noise 3", num_inference_steps=2).images[0].size == (32, 32)
    assert sorted(path.name for path in (out / "samples").glob("*.png")) == ["step_0000002.png", "step_0000003.png"]
    written = [path for path in out.rglob("*") if path.is_file() and "tfevents" not in path.name]
    assert {path.suffix for path in written} <= {".json", ".safetensors", ".png", ".jinja"}


@pytest.mark.slow
def test_demo_on_the_shipped_emoji(tmp_path: Path) -> None:
    trainer = train_demo(tmp_path, DemoRecipe(num_inference_steps=2), max_minutes=0.5)
    assert trainer.state.log_history[-1]["eval_loss"] < 20


def test_config_fits_the_processor() -> None:
    processor = demo_processor(image_size=32)
    config = demo_config(processor)
    processor.check_model(config)
    assert config.default_image_grid == (2, 2)
    assert config.max_position_embeddings == processor.tokenizer.model_max_length == 1024
    assert 4e6 < TransfusionForMultimodalGeneration(config).num_parameters() < 8e6


def test_every_setting_is_an_option() -> None:
    args = parse_args(["demo", "--output_dir", "run"])
    assert DemoRecipe.from_options(args) == DemoRecipe()
    options = ["--learning_rate", "1e-4", "--bf16", "--num_inference_steps", "7", "--guidance_scale", "2"]
    args = parse_args(["demo", "--output_dir", "run", *options])
    assert (args.learning_rate, args.bf16, args.num_inference_steps, args.guidance_scale) == (1e-4, True, 7, 2.0)


def test_length_is_given_once(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        parse_args(["demo", "--output_dir", "run", "--max_steps", "3", "--max_minutes", "3"])
    with pytest.raises(ValueError, match="max_minutes is None and max_steps None"):
        train_demo(tmp_path, max_minutes=None)
    for length in ({"max_minutes": -1}, {"max_minutes": None, "max_steps": 0}, {"max_steps": -5, "max_minutes": None}):
        with pytest.raises(ValueError, match="give a number above 0"):
            train_demo(tmp_path, **length)


def test_captions_that_do_not_fit_are_refused_before_the_training(picture_folder: Path, tmp_path: Path) -> None:
    (picture_folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "' + "word " * 2000 + '"}')
    with pytest.raises(ValueError, match="0.png and its caption take .* max_position_embeddings=1024"):
        train_demo(tmp_path, data=picture_folder, max_minutes=None, max_steps=1)
