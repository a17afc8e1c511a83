"""Trains this package's model and `transfusion-pytorch` on the same world of shapes, and compares them.

    pip install transfusion-pytorch==0.20.0
    python scripts/compare_peer.py --out runs/peer --steps 2000 --seeds 0 1 --same_wall_time

Both see the same rows in the same order: pictures of `transfusion.data.shapes` as latents of the shipped VAE, their
captions before or after them, and WordNet definitions, all as ids of the shipped tokenizer. Both have as many
parameters (ours take their width from the other's), AdamW, the same schedule, clipping and averaging of the weights,
and a learning rate chosen by the same short runs. Captions are hidden from a tenth of the rows for guidance, by each
in its own way.

`transfusion-pytorch` runs at its best: with axial positions, which are off by default; pictures drawn by `sample_one`,
as its `sample_many` leaves these positions out; captions written by `sample_many`, as its `sample_one` repeats the
tags of the picture; with its own loss weights or ours, whichever do better. It draws by 15 midpoint steps, each of two
evaluations, ours by 30 Euler steps.

Time is the CPU time of the process: with OMP_NUM_THREADS=1, others on the machine then matter little. With
--same_wall_time the faster of the two is trained once more, for as long as the slower one took.

Everything is written to --out, and what is there already is not made again, so that the same command goes on after an
interruption (other options want another --out): choice-SYSTEM.json, SYSTEM-BUDGET-SEED/ (weights, losses, drawings,
scores), drawings.png (ours, theirs, true), comparison.json and comparison.md. Without seeds only the settings are
chosen; with different seeds, several of these can then share the work.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import itertools
import json
import logging
import math
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from PIL import Image
from rich.logging import RichHandler
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import set_seed

from transfusion import (
    TransfusionConfig,
    TransfusionDataCollator,
    TransfusionForMultimodalGeneration,
    TransfusionPipeline,
    TransfusionProcessor,
)
from transfusion.data import CaptionedPicture, load_glosses
from transfusion.data.shapes import parse_caption, shapes_world
from transfusion.evaluation.frechet import MIN_PICTURES, frechet_distance
from transfusion.evaluation.pages import sheet
from transfusion.evaluation.report import EvaluationSettings, draw, write_captions
from transfusion.evaluation.shapes import caption_following, chance, prompt_following
from transfusion.evaluation.text import text_perplexity
from transfusion.experiments.runs import RunSettings, drawing_sheet, shapes_processor, shapes_rows
from transfusion.experiments.tables import spread
from transfusion.latents import patchify
from transfusion.training.averaging import AveragedWeights
from transfusion.training.latent_cache import encode_pictures
from transfusion.training.recipes import DemoRecipe, demo_config
from transfusion.training.rows import CaptionedPictureRows


logger = logging.getLogger(__name__)

Row = dict[str, Any]
SYSTEMS = ("ours", "peer")
HEADS = 4  # of both
RECIPE = DemoRecipe()  # whose warm-up, clipping, averaging and hidden captions both get
EVALUATIONS = 30  # of the network, for each drawing and branch of guidance
GUIDANCE_SCALES = (3.0, 1.0)  # 1 is none
OWN_LOSS_WEIGHT = 1.0  # the peer's default


# -- what is learned from


class World:
    """The rows, prompts and texts that both systems get."""

    def __init__(self, settings: RunSettings, cache_dir: Path) -> None:
        self.settings, self.cache_dir = settings, cache_dir
        self.processor = shapes_processor(patch_size=4)
        num, texts = settings.num_prompts, load_glosses("held_out")
        self.prompts: dict[str, list[CaptionedPicture]] = {
            split: shapes_world(num, split=split) for split in ("train", "held_out")
        }
        # Settings are chosen, and Frechet distances taken, with pictures that nobody is asked to draw.
        self.others = shapes_world(num, seed=1, split="held_out")
        self.held_out = HeldOut(texts[: settings.num_texts], self.picture_rows(self.prompts["held_out"]))
        self.for_choice = HeldOut(texts[-settings.num_texts :], self.picture_rows(self.others))

    def picture_rows(self, pictures: list[CaptionedPicture]) -> list[Row]:
        """Captions followed by their pictures."""
        encoded = encode_pictures(pictures, self.processor, self.cache_dir)
        return [*CaptionedPictureRows(encoded.pictures, encoded.latents, self.processor, caption_first=1.0)]

    def rows(self, seed: int) -> CaptionedPictureRows:
        """What is learned with `seed`."""
        return shapes_rows(self.settings, self.processor, "train", seed, self.cache_dir)


@dataclass(frozen=True)
class HeldOut:
    """What the held-out losses are taken from."""

    texts: list[str]
    rows: list[Row]


def batches(rows: CaptionedPictureRows, batch_size: int) -> Iterator[list[Row]]:
    """Batches without end, each epoch in a new order that the rows' seed decides."""
    for epoch in itertools.count():
        rows.set_epoch(epoch)
        order = random.Random(f"{rows.seed} {epoch}").sample(range(len(rows)), len(rows))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield [rows[index] for index in order[start : start + batch_size]]


# -- the two systems


class System(Protocol):
    """What training and scoring need of a system. `module` and `pipeline` share their weights."""

    module: nn.Module
    pipeline: Any  # called as TransfusionPipeline is; has `caption` too

    def loss(self, rows: list[Row]) -> Tensor:
        """The training loss of a batch."""

    def perplexity(self, texts: list[str]) -> float:
        """Of the tokens of texts without the first, with the end."""

    def velocity_error(self, rows: list[Row]) -> float:
        """Mean squared error of the predicted velocity of one picture each, at evenly spread noise levels."""


def noise_levels(count: int) -> Tensor:
    """(count,) evenly spread over 0 to 1, in random order."""
    return ((torch.arange(count) + 0.5) / count)[torch.randperm(count, generator=torch.Generator().manual_seed(0))]


class Ours:
    """A model of this package."""

    def __init__(self, config: TransfusionConfig, processor: TransfusionProcessor) -> None:
        self.module = TransfusionForMultimodalGeneration(config)
        self.module.set_attn_implementation("eager")  # as in the demo: faster for short rows on a CPU
        self.processor = processor
        self.pipeline: Any = TransfusionPipeline(self.module, processor)
        self.pipeline.set_progress_bar_config(disable=True)
        self.collate = TransfusionDataCollator(config, RECIPE.text_dropout)

    def loss(self, rows: list[Row]) -> Tensor:
        """The training loss of a batch."""
        return self.module(**self.collate(rows), skip_logits=True, use_cache=False).loss

    def perplexity(self, texts: list[str]) -> float:
        """Of the tokens of texts without the first, with the end."""
        return text_perplexity(self.module, self.processor, texts)

    @torch.no_grad()
    def velocity_error(self, rows: list[Row]) -> float:
        """Mean squared error of the velocity at evenly spread noise levels."""
        batch = TransfusionDataCollator(self.module.config, text_dropout=0.0)(rows)
        batch["timesteps"] = noise_levels(len(rows)) * self.module.config.num_train_timesteps
        return float(self.module(**batch, skip_logits=True).image_loss)


def peer_items(row: Row, processor: TransfusionProcessor) -> list[Any]:
    """A row as the peer takes it, which adds begin, end and tags itself: text ids, a picture (rows, columns, D)."""
    ids = row["input_ids"]
    control = [processor.boi_token_id, processor.eoi_token_id, processor.image_token_id]
    text = ids[~torch.isin(ids, torch.tensor([*control, processor.tokenizer.eos_token_id]))]
    if "latent_patches" not in row:
        return [text]
    picture = (0, row["latent_patches"].view(*row["image_grids"][0].tolist(), -1))
    return [picture, text] if ids[0] == processor.boi_token_id else [text, picture]


@dataclass(frozen=True)
class PeerSize:
    """Width and number of layers of the peer."""

    width: int
    layers: int


class Peer:
    """A model of `transfusion-pytorch`."""

    def __init__(self, size: PeerSize, flow_loss_weight: float, processor: TransfusionProcessor) -> None:
        # By name: installed for this comparison only, and unknown to type checkers.
        importlib.import_module("loguru").logger.disable("transfusion_pytorch")
        side = processor.image_processor.size["height"] // processor.image_processor.block
        self.processor, self.grid = processor, (side, side)
        self.module = importlib.import_module("transfusion_pytorch").Transfusion(
            num_text_tokens=len(processor.tokenizer),
            transformer={"dim": size.width, "depth": size.layers, "heads": HEADS, "dim_head": size.width // HEADS},
            dim_latent=processor.patch_dim,
            add_pos_emb=True,
            modality_num_dim=2,
            modality_default_shape=self.grid,
            flow_loss_weight=flow_loss_weight,
            prob_uncond=RECIPE.text_dropout,
            modality_processing="flat",  # its default chooses by measuring times, which changes the random numbers
        )
        self.pipeline = PeerPipeline(self)

    def loss(self, rows: list[Row]) -> Tensor:
        """The training loss of a batch."""
        return self.module([peer_items(row, self.processor) for row in rows])

    @torch.no_grad()
    def perplexity(self, texts: list[str]) -> float:
        """Of the tokens of texts without the first, with the end."""
        total, count = 0.0, 0
        for start in range(0, len(texts), 32):
            rows = [self.text_ids(text) for text in texts[start : start + 32]]
            ids = nn.utils.rnn.pad_sequence(
                [torch.tensor([self.module.sos_id, *row, self.module.eos_id]) for row in rows], True, -100
            )
            logits = self.module(ids[:, :-1].clamp(min=0), return_loss=False)
            # From the second token of the text on, as for ours.
            total += float(F.cross_entropy(logits[:, 1:].flatten(0, 1), ids[:, 2:].flatten(), reduction="sum"))
            count += sum(map(len, rows))
        return math.exp(total / count)

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text, as in a row."""
        return self.processor(text=[{"type": "text", "text": text}])["input_ids"][0]

    @torch.no_grad()
    def velocity_error(self, rows: list[Row]) -> float:
        """Mean squared error of the velocity at evenly spread noise levels."""
        samples = [peer_items(row, self.processor) for row in rows]
        times = noise_levels(len(rows))[:, None]
        _, losses = self.module(samples, times=times, return_breakdown=True)
        # The peer divides the sum by all positions: [sos], text, [meta] "4" "," "4" [som], patches, [eom], [eos].
        tags = 2 + 3 + len(",".join(map(str, self.grid)))
        positions = sum(len(text) + tags + math.prod(self.grid) for text, _ in samples)
        return float(losses.flow[0]) * positions / (len(rows) * math.prod(self.grid) * self.processor.patch_dim)


class PeerPipeline:
    """Draws and captions with a `Peer`, called as `TransfusionPipeline` is."""

    def __init__(self, peer: Peer) -> None:
        self.peer, self.processor = peer, peer.processor

    def __call__(
        self, prompt: Sequence[str], num_inference_steps: int, guidance_scale: float, generator: Sequence[Any]
    ) -> SimpleNamespace:
        """Draw, with as many network evaluations as ours take for `num_inference_steps` Euler steps."""
        patches = [
            self.draw(text, num_inference_steps, guidance_scale, one)
            for text, one in zip(prompt, generator, strict=True)
        ]
        grids = torch.tensor([self.peer.grid] * len(patches))
        return SimpleNamespace(images=self.processor.decode_images(torch.cat(patches), grids))

    def draw(self, prompt: str, evaluations: int, guidance_scale: float, generator: torch.Generator) -> Tensor:
        """(patches, patch_dim) of one picture."""
        size = (math.prod(self.peer.grid), self.processor.patch_dim)
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar for each picture
            sample = self.peer.module.sample_one(
                [torch.tensor(self.peer.text_ids(prompt))],
                cache_kv=True,
                force_modality_at_start=(0, self.peer.grid),
                init_modality_noise=torch.randn(size, generator=generator),
                modality_steps=evaluations // 2 + 1,  # the points of a midpoint rule, two evaluations between each two
                cfg_scale=guidance_scale,
                max_length=1,  # the picture, and no text after it
            )
        return next(part.tensor for part in sample if not isinstance(part, Tensor)).reshape(size)

    def caption(self, image: Sequence[Image.Image], max_new_tokens: int, do_sample: bool) -> SimpleNamespace:
        """Write captions, without sampling."""
        assert not do_sample
        pixels = [self.processor.image_processor(one)["pixel_values"][0] for one in image]
        latents = self.processor.encode_images(pixels)
        patches = [patchify(latent, self.processor.image_processor.patch_size) for latent in latents]
        with contextlib.redirect_stderr(io.StringIO()):
            samples = self.peer.module.sample_many(
                [(0, one.view(*self.peer.grid, -1)) for one in patches],
                max_length=max_new_tokens,
                text_temperature=0.0,
                modality_steps=2,  # where it draws again instead of ending: nobody looks at it
                cfg_scale=1.0,
            )
        return SimpleNamespace(text=[self.text_after_picture(sample) for sample in samples])

    def text_after_picture(self, sample: Sequence[Any]) -> str:
        """The words of the first text that follows a picture."""
        place = next(index for index, part in enumerate(sample) if not isinstance(part, Tensor))
        ids = [token for token in sample[place + 1].tolist() if token < len(self.processor.tokenizer)]
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def num_parameters(module: nn.Module) -> int:
    """All of them, embeddings included, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def config_of_size(processor: TransfusionProcessor, parameters: int, layers: int) -> TransfusionConfig:
    """The demo's config with this many parameters, and feed-forward layers about three times as wide as the others."""

    def config(width: int, inner: int) -> TransfusionConfig:
        sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
        return demo_config(processor, **sizes, num_attention_heads=HEADS)

    found = []
    for width in range(64, 1025, 32):
        with torch.device("meta"):
            least = num_parameters(TransfusionForMultimodalGeneration(config(width, 8)))
        inner = 8 + 8 * round((parameters - least) / (layers * 3 * width * 8))
        if inner < 8:
            break
        found.append((abs(math.log(inner / width / 3)), width, inner))
    _, width, inner = min(found)
    return config(width, inner)


def weight_like_ours(world: World) -> float:
    """The peer's `flow_loss_weight` that weighs pictures against texts as the paper's equation 4 does, on average.

    The peer divides both sums by the number of all positions, we each by its own number: tokens, latent elements.
    """
    rows = [*world.rows(seed=0)]
    tokens = sum(int((row["labels"][1:] != -100).sum()) for row in rows)
    elements = sum(row["latent_patches"].numel() for row in rows if "latent_patches" in row)
    return demo_config(world.processor).image_loss_weight * tokens / elements


# -- training and scoring


@dataclass(frozen=True)
class Choice:
    """Settings that short runs decide."""

    learning_rate: float
    flow_loss_weight: float = OWN_LOSS_WEIGHT  # the peer's


class Bench:
    """Builds, trains and scores systems in the same way."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.settings = RunSettings(args.steps, args.batch_size, args.num_pictures, args.num_prompts)
        self.world = World(self.settings, args.out / "latents")
        self.size = PeerSize(args.peer_width, args.layers)
        counted = num_parameters(Peer(self.size, OWN_LOSS_WEIGHT, self.world.processor).module)
        self.config = config_of_size(self.world.processor, counted, args.layers)

    def build(self, name: str, choice: Choice, seed: int) -> System:
        """A system with fresh weights."""
        set_seed(seed)
        if name == "ours":
            return Ours(self.config, self.world.processor)
        return Peer(self.size, choice.flow_loss_weight, self.world.processor)

    def train(self, system: System, choice: Choice, seed: int, steps: int | None, seconds: float | None) -> dict:
        """Train for `steps`, or for `seconds` of CPU time, leave the averaged weights, and say how it went."""
        parameters = list(system.module.parameters())
        optimizer = torch.optim.AdamW(
            parameters, choice.learning_rate, (0.9, RECIPE.adam_beta2), weight_decay=RECIPE.weight_decay, fused=True
        )
        average = AveragedWeights(system.module, RECIPE.ema_decay)
        losses: list[float] = []
        system.module.train()
        learned = self.world.rows(seed)
        start = time.process_time()
        for step, rows in enumerate(batches(learned, self.settings.batch_size)):
            spent = time.process_time() - start
            progress = step / steps if steps is not None else spent / float(seconds or 0)
            if progress >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = choice.learning_rate * schedule(progress)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bf16):
                loss = system.loss(rows)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, RECIPE.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            average.update(system.module)
            losses.append(float(loss.detach()))
            if step % 100 == 0:
                logger.info("step %d (%.0f %%), loss %.3f, %.0f s", step, 100 * progress, losses[-1], spent)
        load_average(system.module, average)
        return {"steps": len(losses), "seconds": time.process_time() - start, "losses": thinned(losses)}

    def choose(self, name: str) -> Choice:
        """The settings with the least loss on held-out rows after short runs: the paper's, text + 5 * pictures."""
        file = self.args.out / f"choice-{name}.json"
        if not file.exists():
            weights = [OWN_LOSS_WEIGHT]
            if name == "peer":
                weights.append(round(weight_like_ours(self.world), 4))
            tried = []
            for rate, weight in itertools.product(self.args.learning_rates, weights):
                choice = Choice(rate, weight)
                logger.info("%s: trying %s", name, choice)
                system = self.build(name, choice, seed=0)
                self.train(system, choice, 0, self.args.choice_steps, None)
                text, picture = self.losses(system, self.world.for_choice)
                total = text + self.config.image_loss_weight * picture
                tried.append({"choice": asdict(choice), "text": text, "picture": picture, "total": total})
            write_json(file, {"steps": self.args.choice_steps, "tried": sorted(tried, key=lambda one: one["total"])})
        return Choice(**json.loads(file.read_text())["tried"][0]["choice"])

    def losses(self, system: System, held_out: HeldOut) -> tuple[float, float]:
        """Of texts, per token, and of the velocity in pictures, per latent element, with the same random numbers."""
        system.module.eval()
        set_seed(0)
        return math.log(system.perplexity(held_out.texts)), system.velocity_error(4 * held_out.rows)

    def run(self, name: str, budget: str, seed: int, steps: int | None, seconds: float | None) -> dict:
        """Train and score, or read what an earlier call found."""
        folder = self.args.out / f"{name}-{budget}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "scores.json").exists():
            choice = self.choose(name)
            system = self.build(name, choice, seed)
            logger.info("%s: %s, %d parameters", folder.name, choice, num_parameters(system.module))
            if (folder / "training.json").exists():
                load_model(system.module, folder / "weights.safetensors")
            else:
                record = self.train(system, choice, seed, steps, seconds)
                save_model(system.module, str(folder / "weights.safetensors"))
                size = {"parameters": num_parameters(system.module), "choice": asdict(choice)}
                write_json(folder / "training.json", record | size)
            write_json(folder / "scores.json", self.score(system, folder))
        training, scores = (json.loads((folder / file).read_text()) for file in ("training.json", "scores.json"))
        return training | {"scores": scores, "system": name, "budget": budget, "seed": seed}

    def score(self, system: System, folder: Path) -> dict[str, float]:
        """All scores, by names that begin with a split where they have one; the drawings go to `folder`."""
        text, picture = self.losses(system, self.world.held_out)
        scores = {"perplexity": math.exp(text), "velocity error": picture}
        real = [picture.image for picture in self.world.others]
        for split, pictures in self.world.prompts.items():
            prompts = [picture.captions[0] for picture in pictures]
            scenes = [parse_caption(prompt) for prompt in prompts]
            for scale in GUIDANCE_SCALES:
                evaluation = EvaluationSettings(num_inference_steps=EVALUATIONS, guidance_scale=scale)
                start = time.process_time()
                drawings = draw(system.pipeline, prompts, evaluation)
                scores[f"seconds per drawing, guidance {scale:g}"] = (time.process_time() - start) / len(drawings)
                drawing_sheet(drawings).save(folder / f"{split}-{scale:g}.png")
                found = prompt_following(drawings, scenes)
                scores |= {f"{split}: drawn {name}, guidance {scale:g}": value for name, value in found.items()}
                if split == "held_out":
                    scores[f"Frechet distance, guidance {scale:g}"] = frechet_distance(real, drawings)
            captions = write_captions(system.pipeline, [picture.image for picture in pictures], evaluation)
            found = caption_following(captions, scenes)
            scores |= {f"{split}: captioned {name}": value for name, value in found.items()}
        return scores


def schedule(progress: float) -> float:
    """The learning rate's factor: up in a line, then down along half a cosine to 0."""
    warmup = RECIPE.warmup
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def load_average(module: nn.Module, average: AveragedWeights) -> None:
    """Give `module` its averaged weights."""
    with torch.no_grad():
        for parameter, averaged in zip(module.parameters(), average.weights.values(), strict=True):
            parameter.copy_(averaged)


def thinned(losses: list[float], count: int = 200) -> list[float]:
    """At most `count` means of consecutive losses."""
    size = max(1, -(-len(losses) // count))
    return [round(statistics.fmean(losses[start : start + size]), 4) for start in range(0, len(losses), size)]


# -- the report


def cut(page: Image.Image, index: int) -> Image.Image:
    """A drawing from a `drawing_sheet`."""
    side = page.width // 16
    left, top = index % 16 * side, index // 16 * side
    return page.crop((left, top, left + side, top + side))


def drawings_page(out: Path, world: World, seed: int, num_shown: int = 6) -> Image.Image:
    """Prompts of each split with the drawings of both systems after equal steps, and the true pictures."""
    rows = []
    for split, pictures in world.prompts.items():
        pages = [Image.open(out / f"{name}-steps-{seed}" / f"{split}-{GUIDANCE_SCALES[0]:g}.png") for name in SYSTEMS]
        for index, picture in enumerate(pictures[:num_shown]):
            shown = [*(cut(page, index) for page in pages), picture.image]
            rows.append((f"{split.replace('_', ' ')}: {picture.captions[0]}", shown))
    return sheet(rows, ["ours", "peer", "true"], columns=2)


def table(runs: Sequence[dict], floors: dict[str, float]) -> str:
    """A Markdown table: a line for each score, a column for each system and budget, mean and spread over seeds."""
    groups: dict[str, list[dict]] = {}
    for run in runs:
        groups.setdefault(f"{run['system']}, same {run['budget']}", []).append(run)
    lines = [f"| | {' | '.join(groups)} | floor |", f"| --- |{' ---: |' * (len(groups) + 1)}"]
    for name in ("parameters", "steps", "seconds"):
        cells = [f"{statistics.fmean(run[name] for run in group):,.0f}" for group in groups.values()]
        lines.append(f"| {name} | {' | '.join(cells)} | |")
    for name in runs[0]["scores"]:
        form = "percent" if ": " in name else "number"
        cells = [spread([run["scores"][name] for run in group], form) for group in groups.values()]
        floor = floors.get(name.partition(", guidance")[0])
        cells.append("" if floor is None else f"{100 * floor:.0f} %" if form == "percent" else f"{floor:.1f}")
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def floors_of(world: World) -> dict[str, float]:
    """What answers that do not listen would score, and the Frechet distance of the true pictures."""
    real, true = ([picture.image for picture in group] for group in (world.others, world.prompts["held_out"]))
    floors = {"Frechet distance": frechet_distance(real, true)}
    for split, pictures in world.prompts.items():
        found = chance([parse_caption(picture.captions[0]) for picture in pictures])
        for verb in ("drawn", "captioned"):
            floors |= {f"{split}: {verb} {name}": value for name, value in found.items()}
    return floors


def environment() -> dict[str, str]:
    """What the figures were measured with."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "transfusion-pytorch")}
    command = shlex.join(["python", *sys.argv])
    return versions | {"threads": str(torch.get_num_threads()), "machine": platform.machine(), "command": command}


def write_json(file: Path, content: Any) -> None:
    """Write as a whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    part.replace(file)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything")
    parser.add_argument("--steps", type=int, default=2000, help="of each training; 2000 without")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1], help="0 1 without")
    parser.add_argument("--same_wall_time", action="store_true", help="train the faster one for the slower one's time")
    parser.add_argument("--batch_size", type=int, default=RunSettings.batch_size)
    parser.add_argument("--peer_width", type=int, default=128, help="ours follows from it; 128 without")
    parser.add_argument("--layers", type=int, default=4, help="of both; 4 without")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3])
    parser.add_argument("--choice_steps", type=int, default=300, help="of each short run; 300 without")
    parser.add_argument("--num_pictures", type=int, default=RunSettings.num_pictures, help="to train on")
    parser.add_argument("--num_prompts", type=int, default=RunSettings.num_prompts, help="of each split")
    args = parser.parse_args(argv)
    if args.num_prompts < MIN_PICTURES:
        parser.error(f"--num_prompts {args.num_prompts}: a Frechet distance needs at least {MIN_PICTURES}")
    if args.peer_width < 32 or args.peer_width % 32:
        parser.error(f"--peer_width {args.peer_width}: give a multiple of 32, for an even width of {HEADS} heads")
    return args


def main(args: argparse.Namespace) -> None:
    """Trains, scores and reports."""
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    choices = {name: asdict(bench.choose(name)) for name in SYSTEMS}
    runs = []
    for seed in args.seeds:
        pair = [bench.run(name, "steps", seed, args.steps, None) for name in SYSTEMS]
        if args.same_wall_time:
            faster, slower = sorted(pair, key=lambda run: run["seconds"])
            again = bench.run(faster["system"], "time", seed, None, slower["seconds"])
            pair += [again, slower | {"budget": "time"}]
        runs += pair
    if not runs:
        return
    drawings_page(args.out, bench.world, args.seeds[0]).save(args.out / "drawings.png")
    report = table(runs, floors_of(bench.world))
    used = ("steps", "batch_size", "num_pictures", "num_prompts", "num_texts", "bf16")
    settings = {
        **environment(),
        **{name: value for name, value in asdict(bench.settings).items() if name in used},
        "evaluations_per_drawing": EVALUATIONS,
        "guidance_scales": GUIDANCE_SCALES,
        "choices": choices,
    }
    write_json(args.out / "comparison.json", {"settings": settings, "runs": runs})
    (args.out / "comparison.md").write_text(f"{report}\n```json\n{json.dumps(settings, indent=2)}\n```\n")
    print(report)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    main(parse_args())
