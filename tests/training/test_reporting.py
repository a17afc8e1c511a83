from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny_processor import picture, tiny_processor
from tests.training.test_trainer import arguments
from tests.training.tiny_rows import RowList
from transfusion.configuration import TransfusionConfig
from transfusion.modeling_transfusion import TransfusionForMultimodalGeneration
from transfusion.training.reporting import SampleGridCallback, draw_pictures, picture_grid, plot_losses
from transfusion.training.trainer import TransfusionTrainer


PROMPTS = ["a red heart", "a blue sky"]


def small_model() -> TransfusionForMultimodalGeneration:
    """A model that fits the tiny processor without a VAE."""
    processor = tiny_processor()
    torch.manual_seed(0)
    config = TransfusionConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        latent_channels=3,
        patch_size=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        boi_token_id=processor.boi_token_id,
        eoi_token_id=processor.eoi_token_id,
        image_token_id=processor.image_token_id,
        default_image_grid=(3, 4),
        objective="flow",
    )
    return TransfusionForMultimodalGeneration(config)


def test_drawn_pictures_are_repeatable_and_leave_the_mode() -> None:
    model, processor = small_model().train(), tiny_processor()
    first = draw_pictures(model, processor, PROMPTS, num_inference_steps=2)
    assert model.training and [image.size for image in first] == [(8, 6), (8, 6)]
    torch.randn(3)
    assert first == draw_pictures(model, processor, PROMPTS, num_inference_steps=2)
    assert first != draw_pictures(model, processor, PROMPTS, seed=5, num_inference_steps=2)
    twice = draw_pictures(model, processor, PROMPTS[:1] * 2, num_inference_steps=2)
    assert twice[0] == first[0] and twice[0] != twice[1]


@pytest.mark.parametrize(("count", "columns", "size"), [(3, 8, (304, 120)), (5, 2, (204, 352))])
def test_grid_shows_every_picture(count: int, columns: int, size: tuple[int, int]) -> None:
    pictures = [Image.new("RGB", (64, 64), (10 * number, 0, 200)) for number in range(count)]
    sheet = picture_grid(pictures, [f"picture {number}" for number in range(count)], columns=columns)
    assert sheet.size == size
    for number in range(count):
        column, row = number % columns, number // columns
        assert sheet.getpixel((4 + 100 * column + 48, 4 + 116 * row + 48)) == (10 * number, 0, 200)
        title = sheet.crop((4 + 100 * column, 4 + 116 * row + 96, 100 + 100 * column, 116 + 116 * row))
        assert np.asarray(title.convert("L")).min() < 128


def test_long_titles_stay_under_their_picture() -> None:
    sheet = picture_grid([picture(0)] * 2, ["an endless title " * 9, ""], side=50)
    assert sheet.crop((54, 60, 108, 74)).convert("L").getextrema() == (255, 255)


def test_sample_sheets_are_written(tmp_path: Path) -> None:
    processor, model = tiny_processor(), small_model()
    out = processor(text="a red heart<image>", latents=[torch.zeros(3, 6, 8)], return_labels=True, return_tensors="pt")
    row = {"input_ids": out["input_ids"][0], "labels": out["labels"][0]}
    row |= {"latent_patches": out["latent_patches"], "image_grids": out["image_grids"]}
    args = arguments(tmp_path, max_steps=5, learning_rate=1e-2, report_to=["tensorboard"])
    trainer = TransfusionTrainer(model, args, train_dataset=RowList([row] * 4), ema_decay=0.9)
    callback = SampleGridCallback(processor, PROMPTS, 2, trainer.averaged_weights, num_inference_steps=2)
    trainer.add_callback(callback)
    trainer.train()
    sheets = sorted((tmp_path / "samples").glob("*.png"))
    assert [sheet.name for sheet in sheets] == [f"step_000000{step}.png" for step in (2, 4, 5)]
    with trainer.averaged_weights():
        expected = picture_grid(draw_pictures(model, processor, PROMPTS, num_inference_steps=2), PROMPTS)
    assert Image.open(sheets[-1]).tobytes() == expected.tobytes()
    assert expected != picture_grid(draw_pictures(model, processor, PROMPTS, num_inference_steps=2), PROMPTS)
    assert tensorboard_images(tmp_path / "samples") == [2, 4, 5]
    plot_losses(trainer.state.log_history, tmp_path / "losses.png")
    with Image.open(tmp_path / "losses.png") as curves:
        assert curves.size == (900, 350)


def tensorboard_images(folder: Path) -> list[int]:
    """The steps at which a TensorBoard file has sample sheets."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [image.step for image in events.Images("samples")]


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="every is 0 with 1 prompts"):
        SampleGridCallback(tiny_processor(), ["a"], 0)
    with pytest.raises(ValueError, match="every is 5 with 0 prompts"):
        SampleGridCallback(tiny_processor(), [], 5)
