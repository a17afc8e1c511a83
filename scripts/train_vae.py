"""Trains the small image autoencoder that ships with the package.

    python scripts/prepare_data.py five-styles --out five_styles
    python scripts/train_vae.py --data five_styles --out vae --checkpoint vae_checkpoint

A diffusers `AutoencoderDC` (64 x 64 pixels to 16 x 16 x 8 latents) learns the pictures of the training names; PSNR is
measured on the held-out names. A run that was cut off goes on from --checkpoint, bit for bit as if it had not been.
"""

import argparse
import copy
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderDC
from rich.logging import RichHandler
from rich.progress import track
from safetensors.torch import load_file, save_file

from transfusion.data import CaptionedPicture, read_image_folder
from transfusion.data.autoencoder import encode, peak_signal_to_noise, pixels_of, reconstruct, to_model_range


logger = logging.getLogger("train_vae")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="imagefolder made by `prepare_data.py five-styles`")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained autoencoder")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder for the state of the run")
    parser.add_argument("--steps", type=int, default=5_500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--noise", type=float, default=0.2, help="largest noise on unit-variance latents")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints and measurements")
    return parser.parse_args(argv)


def build_autoencoder() -> AutoencoderDC:
    """About 1.6 million parameters: one residual block at 32 x 32 pixels and the rest at 16 x 16."""
    return AutoencoderDC(
        latent_channels=8,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(32, 32, 64),
        decoder_block_out_channels=(32, 32, 128),
        encoder_layers_per_block=(0, 1, 2),
        decoder_layers_per_block=(0, 2, 4),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=1.0,
    ).to(memory_format=torch.channels_last)


def autoencoder_loss(model: AutoencoderDC, pixels: torch.Tensor, noise: float) -> torch.Tensor:
    """Reconstruction through noisy latents, and what keeps the latents easy for a diffusion model.

    Three parts: squared plus 0.1 absolute error; the same of the half-size picture decoded from half-size latents
    (scale equivariance, Skorokhodov et al. 2025, section 4); channels drawn towards zero mean and unit variance.
    """
    with torch.autocast("cpu", torch.bfloat16):
        latents = model.encode(pixels).latent.float()
        spread = latents.detach().std(dim=(0, 2, 3), keepdim=True)
        level = torch.rand(len(pixels), 1, 1, 1) * noise * spread
        decoded = model.decode(latents + level * torch.randn_like(latents)).sample
        small = model.decode(torch.nn.functional.avg_pool2d(latents, 2)).sample
    half = torch.nn.functional.avg_pool2d(pixels, 2)
    moments = latents.mean(dim=(0, 2, 3)).square() + (latents.std(dim=(0, 2, 3)) - 1).square()
    return _distance(decoded, pixels) + 0.25 * _distance(small, half) + 0.01 * moments.mean()


def _distance(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    difference = decoded.float() - pixels
    return difference.square().mean() + 0.1 * difference.abs().mean()


def draw_batch(pixels: torch.Tensor, batch_size: int, step: int) -> torch.Tensor:
    """The batch of a step, in [-1, 1], each picture mirrored or not; seeds the global generator with the step."""
    torch.manual_seed(step)
    batch = pixels[torch.randint(len(pixels), (batch_size,))]
    mirrored = torch.rand(batch_size, 1, 1, 1) < 0.5
    return to_model_range(torch.where(mirrored, batch.flip(-1), batch)).contiguous(memory_format=torch.channels_last)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up of 200 steps, then a cosine down to 1 % of the peak."""
    progress = torch.tensor(torch.pi * step / args.steps)
    return args.learning_rate * min(1.0, (step + 1) / 200) * (0.01 + 0.99 * 0.5 * (1 + float(progress.cos())))


def update_average(average: AutoencoderDC, model: AutoencoderDC, step: int) -> None:
    """Moves the averaged weights towards the model's, faster in the first steps."""
    decay = min(0.999, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def report(vae: AutoencoderDC, held_out: torch.Tensor, styles: list[str]) -> dict[str, float]:
    """Mean PSNR in dB over held-out names: of all styles, of each style, and with noise 0.1 on the latents."""
    psnr = peak_signal_to_noise(held_out, reconstruct(vae, held_out))
    noisy = peak_signal_to_noise(held_out, reconstruct(vae, held_out, noise_std=0.1))
    values = {"all": psnr.mean().item(), "all, noise 0.1": noisy.mean().item()}
    for style in sorted(set(styles)):
        values[style] = psnr[[index for index, name in enumerate(styles) if name == style]].mean().item()
    return {name: round(value, 2) for name, value in values.items()}


def export(vae: AutoencoderDC, train: torch.Tensor, out: Path) -> None:
    """Measures the scaling factor on about 2,000 training pictures and saves the weights in half precision."""
    vae.register_to_config(scaling_factor=1.0)
    vae.register_to_config(scaling_factor=1.0 / encode(vae, train[:: max(1, len(train) // 2000)]).std().item())
    stored = copy.deepcopy(vae)
    stored.half().save_pretrained(out)


def load_pixels(folder: Path, split: str) -> tuple[torch.Tensor, list[str]]:
    """The pictures of a split as uint8 (N, 3, H, W), and the style of each."""
    pictures: list[CaptionedPicture] = read_image_folder(folder, split)[0]
    return pixels_of([picture.image for picture in pictures]), [picture.style for picture in pictures]


@dataclass
class Run:
    """What a checkpoint holds: the model, its averaged weights and the optimizer."""

    model: AutoencoderDC
    average: AutoencoderDC
    optimizer: torch.optim.AdamW

    @classmethod
    def start(cls) -> "Run":
        """A run at step 0, initialized from seed 0."""
        torch.manual_seed(0)
        model = build_autoencoder()
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
        return cls(model, copy.deepcopy(model).eval(), optimizer)

    def advance(self, pixels: torch.Tensor, steps: range, args: argparse.Namespace) -> float:
        """Takes the steps and returns the last one's loss."""
        for step in track(steps, f"to step {steps.stop}"):
            self.optimizer.param_groups[0]["lr"] = learning_rate(step, args)
            loss = autoencoder_loss(self.model, draw_batch(pixels, args.batch_size, step), args.noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            update_average(self.average, self.model, step)
        return loss.item()

    def save(self, folder: Path) -> None:
        """Writes the run as one safetensors file, replaced at once."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        part = folder / "state.part"
        save_file({name: value.contiguous() for name, value in tensors.items()}, part)
        part.replace(folder / "state.safetensors")

    def load(self, folder: Path) -> int:
        """Restores a saved run and returns its step, 0 where there is none."""
        file = folder / "state.safetensors"
        if not file.exists():
            return 0
        parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
        for name, value in load_file(file).items():
            part, _, key = name.partition(".")
            parts[part][key] = value
        self.model.load_state_dict(parts["model"])
        self.average.load_state_dict(parts["average"])
        states: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in parts["optimizer"].items():
            index, _, name = key.partition(".")
            states.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})
        return int(states[0]["step"])


def main(args: argparse.Namespace) -> None:
    """Trains to the last step; at each checkpoint measures and writes the averaged autoencoder."""
    torch.set_num_threads(args.threads)
    train, _ = load_pixels(args.data, "train")
    held_out, styles = load_pixels(args.data, "held_out")
    run = Run.start()
    step = run.load(args.checkpoint)
    logger.info("%d pictures, %d parameters, from step %d", len(train), run.model.num_parameters(), step)
    while step < args.steps:
        began, steps = time.monotonic(), range(step, min(step + args.save_every, args.steps))
        loss = run.advance(train, steps, args)
        rate = len(steps) * args.batch_size / (time.monotonic() - began)
        step = steps.stop
        run.save(args.checkpoint)
        export(run.average, train, args.out)
        thinned = slice(None) if step == args.steps else slice(None, None, 4)
        psnr = report(run.average, held_out[thinned], styles[thinned])
        logger.info("step %d loss %.4f %.0f img/s PSNR %s", step, loss, rate, psnr)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    main(parse_args())
