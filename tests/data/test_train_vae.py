import io
from pathlib import Path

import torch
from diffusers import AutoencoderDC
from PIL import Image

from scripts.train_vae import Run, autoencoder_loss, draw_batch, learning_rate, main, parse_args
from transfusion.data import load_emoji
from transfusion.data.autoencoder import pixels_of
from transfusion.data.emoji_builder import write_image_folder


PIXELS = pixels_of([picture.image for picture in load_emoji("train")[:8]])
ARGS = parse_args(["--data", "d", "--out", "o", "--checkpoint", "c", "--steps", "1000", "--batch-size", "2"])


def test_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, first, second = Run.start(), Run.start(), Run.start()
    expected = whole.advance(PIXELS, range(4), ARGS)
    first.advance(PIXELS, range(2), ARGS)
    first.save(tmp_path)
    torch.manual_seed(1234)
    assert second.load(tmp_path) == 2
    assert second.advance(PIXELS, range(2, 4), ARGS) == expected
    for one, other in ((whole.model, second.model), (whole.average, second.average)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert Run.start().load(tmp_path / "none") == 0


def test_batches_depend_on_the_step_only() -> None:
    assert torch.equal(draw_batch(PIXELS, 4, 7), draw_batch(PIXELS, 4, 7))
    assert not torch.equal(draw_batch(PIXELS, 4, 7), draw_batch(PIXELS, 4, 8))


def test_learning_rate_warms_up_and_falls_to_a_hundredth() -> None:
    args = parse_args(["--data", "d", "--out", "o", "--checkpoint", "c", "--steps", "1000", "--learning-rate", "1"])
    rates = [learning_rate(step, args) for step in range(1001)]
    assert rates[0] < 0.01 and max(rates) > 0.89 and abs(rates[-1] - 0.01) < 1e-6
    assert rates[200:] == sorted(rates[200:], reverse=True)


def test_loss_falls() -> None:
    run = Run.start()
    pixels = draw_batch(PIXELS, 8, 0)
    before = autoencoder_loss(run.model, pixels, 0.2).item()
    run.advance(PIXELS, range(8), ARGS)
    assert autoencoder_loss(run.model, pixels, 0.2).item() < before


def test_program_writes_an_autoencoder_of_unit_variance(tmp_path: Path) -> None:
    def webp(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", lossless=True)
        return buffer.getvalue()

    rows = [
        ({"file_name": f"{number}.webp", "text": "x", "style": "s", "split": split}, webp(picture.image))
        for split in ("train", "held_out")
        for number, picture in enumerate(load_emoji(split)[:4], start=0 if split == "train" else 4)
    ]
    write_image_folder(rows, tmp_path / "data")
    paths = ["--data", tmp_path / "data", "--out", tmp_path / "vae", "--checkpoint", tmp_path / "state"]
    main(parse_args([*map(str, paths), "--steps", "1", "--batch-size", "2"]))
    vae = AutoencoderDC.from_pretrained(tmp_path / "vae")
    latents = vae.encode(draw_batch(PIXELS, 4, 0)).latent * vae.config.scaling_factor
    assert vae.dtype == torch.float32 and 0.5 < latents.std().item() < 2
