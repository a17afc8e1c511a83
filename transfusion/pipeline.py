"""`TransfusionPipeline`: text to image and edits of images by diffusers' call, and captions."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from .diffusion import check_scheduler, make_scheduler
from .latents import patchify, split_images, unpatchify


# Where to read a checkpoint from, which must be the same for each of its parts.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token", "trust_remote_code")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class TransfusionPipelineOutput(BaseOutput):
    """`images`: PIL images, an array (N, H, W, 3) or tensor (N, 3, H, W) in [0, 1], or latents (N, C, h, w)."""

    images: Any


@dataclass
class TransfusionCaptionOutput(BaseOutput):
    """`text`: a caption, or a list for a list of images or several captions of one."""

    text: Any


def list_prompts(prompt: str | Sequence[str]) -> list[str]:
    """One or several prompts as a list; ValueError for anything else."""
    prompts = [prompt] if isinstance(prompt, str) or not isinstance(prompt, Sequence) else list(prompt)
    if not prompts or not all(isinstance(one, str) for one in prompts):
        raise ValueError(f"prompt={prompt!r}; give a string, or a list of at least one.")
    return prompts


class TransfusionPipeline(DiffusionPipeline):
    """Draws pictures from prompts, edits pictures, and writes captions of them.

    Args:
        model: A `TransfusionForMultimodalGeneration`.
        processor: Its `TransfusionProcessor`, which owns the VAE.
        scheduler: A diffusers scheduler; by default that of the model's objective.

    Raises:
        ValueError: A processor or a scheduler that does not fit the model.
    """

    def __init__(self, model: Any, processor: Any, scheduler: SchedulerMixin | None = None) -> None:
        super().__init__()
        processor.check_model(model.config)
        objective = model.config.objective
        if scheduler is None:
            shift = model.config.timestep_shift if objective == "flow" else 1.0
            scheduler = make_scheduler(objective, shift=shift, num_train_timesteps=model.config.num_train_timesteps)
        check_scheduler(scheduler, objective)
        self.register_modules(model=model, processor=processor, scheduler=scheduler)

    @classmethod
    def from_pretrained(cls, path: str | Path, scheduler: SchedulerMixin | None = None, **kwargs: Any) -> Any:
        """Load model and processor from `path`, a folder or Hub name, and the scheduler from its `scheduler/`.

        `kwargs` go to `AutoModel.from_pretrained` (`dtype`, `device_map`, ...).
        """
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        model = AutoModel.from_pretrained(path, **kwargs)
        processor = AutoProcessor.from_pretrained(path, **hub)
        return cls(model, processor, scheduler or cls._load_scheduler(path, model.config.objective, **hub))

    def to(self, *args: Any, **kwargs: Any) -> "TransfusionPipeline":
        """Move or cast the model as diffusers does; the VAE goes along to its device and keeps its dtype."""
        super().to(*args, **kwargs)
        if self.processor.vae is not None:
            self.processor.vae.to(self.model.device)
        return self

    @staticmethod
    def _load_scheduler(path: str | Path, objective: str, **hub: Any) -> SchedulerMixin | None:
        try:
            # Every scheduler's file has one name.
            config = DDIMScheduler.load_config(path, subfolder="scheduler", **hub)
        except OSError:  # saved without a pipeline: the objective's default will do
            return None
        return type(make_scheduler(objective, config["_class_name"])).from_config(config)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save model, processor with its VAE, and `scheduler/` into one folder; `kwargs` go to the model."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
        self.scheduler.save_pretrained(Path(save_directory, "scheduler"))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict], dict] | None = None,
        image: Any = None,
    ) -> Any:
        """Draw, or with `image` edit.

        Args:
            prompt: One or several; ordinary text, in which no word is a control token.
            negative_prompt: What to be guided away from, one or one for each prompt.
            height, width: In pixels; by default those of `image`, or of the model's pictures.
            num_inference_steps, guidance_scale: By default those of the generation config.
            num_images_per_prompt: Pictures of each prompt, side by side in the result.
            generator: One, or one for each picture.
            latents: (N, C, h, w) noise to start from.
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict: Return a `TransfusionPipelineOutput`, or a tuple.
            callback_on_step_end: Called as `callback(pipeline, step, timestep, {"latents": (N, C, h, w)})`; what it
                returns under `"latents"` replaces them.
            image: The picture that each prompt says how to change, or one for each prompt. It stands before the
                prompt, and before the negative prompt too.

        Raises:
            ValueError: An empty prompt list, a size that the patches cannot hold, an unknown output type, pictures of
                several sizes where no size is named.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r}; allowed: {', '.join(map(repr, OUTPUT_TYPES))}.")
        if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt={num_images_per_prompt!r}; give an integer of 1 or more.")
        prompts = list_prompts(prompt)
        sources = self.encode_sources(image, len(prompts))
        grid = self.grid_of(height, width, sources)
        inputs = self.encode_prompt(prompts, num_images_per_prompt, grid, sources)
        num_images = inputs["input_ids"].shape[0]
        if negative_prompt is not None:
            negative = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
            encoded = self.encode_prompt(negative, num_images_per_prompt, grid, sources)
            inputs |= {f"negative_{name}": encoded[name] for name in ("input_ids", "attention_mask")}
        if latents is not None:
            latents = self.to_patches(latents, num_images, grid)
        num_inference_steps = self.model.prepare_drawing(num_inference_steps).num_inference_steps
        with self.progress_bar(total=self.count_steps(num_inference_steps)) as progress:

            def after_step(step: int, timestep: Tensor, x_t: Tensor) -> Tensor | None:
                progress.update()
                if callback_on_step_end is None:
                    return None
                kept = {"latents": self.to_latents(x_t, grid)}
                changed = callback_on_step_end(self, step, timestep, kept).get("latents", kept["latents"])
                return self.to_patches(changed, num_images, grid)

            drawn = self.model.generate_images(
                **inputs,
                output_image_grids=grid,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                scheduler=self.scheduler,
                generator=generator,
                latents=latents,
                callback=after_step,
            )
        images = self.decode(drawn.latent_patches, drawn.image_grids, output_type)
        return TransfusionPipelineOutput(images) if return_dict else (images,)

    @torch.no_grad()
    def caption(
        self, image: Any, prompt: str = "", max_new_tokens: int = 32, **kwargs: Any
    ) -> TransfusionCaptionOutput:
        """Describe `image`, or each of a list of them; `prompt` is how the text begins.

        `kwargs` go to `generate` (`do_sample`, `num_beams`, ...).
        """
        images = list(image) if isinstance(image, list | tuple) else [image]
        rows = [[{"type": "image", "image": one}, {"type": "text", "text": prompt}] for one in images]
        inputs = self.processor(text=rows, return_tensors="pt").to(self.model.device)
        written = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **kwargs)
        new = written[:, inputs["input_ids"].shape[1] :]
        texts = [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]
        is_one = not isinstance(image, list | tuple) and len(texts) == 1
        return TransfusionCaptionOutput(texts[0] if is_one else texts)

    def encode_sources(self, image: Any, num_prompts: int) -> list[Tensor] | None:
        """The latent (C, h, w) of the picture to edit, for each prompt; None where there is none."""
        if image is None:
            return None
        pictures = list(image) if isinstance(image, list | tuple) else [image]
        if len(pictures) not in (1, num_prompts):
            raise ValueError(
                f"There are {len(pictures)} pictures and {num_prompts} prompts; give one, or one for each prompt."
            )
        latents = self.processor.encode_images(self.processor.image_processor(pictures)["pixel_values"])
        return latents if len(latents) == num_prompts else latents * num_prompts

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        repeats: int = 1,
        grid: tuple[int, int] | None = None,
        sources: list[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Each prompt as the model reads it, `repeats` times, on the model's device.

        Args:
            prompt: One or several.
            repeats: Rows of each.
            grid: What is drawn after them, which chooses the begin-of-image token; by default the model's.
            sources: The latent of the picture before each prompt.

        Returns:
            `input_ids` and `attention_mask` (N, L), and with `sources` `latent_patches` and `image_grids`.
        """
        prompts = list_prompts(prompt)
        if sources is not None and len(sources) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts came with {len(sources)} pictures; give as many.")
        begin = self.processor.boi_token_for(grid or self.model.config.default_image_grid)
        latents = [None] * len(prompts) if sources is None else sources
        pairs = zip(prompts, latents, strict=True)
        encoded = [row for one, latent in pairs for row in [self.encode_row(one, latent)] * repeats]
        rows = [torch.tensor([*row["input_ids"], begin], device=self.model.device) for row in encoded]
        pad = {"batch_first": True, "padding_value": 0, "padding_side": "left"}
        masks = [torch.ones_like(row) for row in rows]
        inputs = {
            "input_ids": torch.nn.utils.rnn.pad_sequence(rows, **pad),
            "attention_mask": torch.nn.utils.rnn.pad_sequence(masks, **pad),
        }
        if sources is not None:
            for name in ("latent_patches", "image_grids"):
                inputs[name] = torch.cat([row[name] for row in encoded]).to(self.model.device)
        return inputs

    def encode_row(self, prompt: str, source: Tensor | None) -> dict[str, Any]:
        """The ids of a prompt, and of the picture before it if there is one; no ids of nothing."""
        parts = [] if source is None else [{"type": "image"}]
        # White space beside a picture is stripped in training too.
        if text := prompt.strip():
            parts.append({"type": "text", "text": text})
        if not parts:
            return {"input_ids": []}
        row = self.processor(text=parts, latents=None if source is None else [source])
        return {**row, "input_ids": row["input_ids"][0]}

    def grid_of(self, height: int | None, width: int | None, sources: list[Tensor] | None = None) -> tuple[int, int]:
        """(rows, columns) of patches of a picture of `height` by `width` pixels, by default those of `sources`."""
        block = self.processor.image_processor.block
        rows, columns = self.model.config.default_image_grid
        if sources is not None and (height is None or width is None):
            sizes = sorted({tuple(latent.shape[1:]) for latent in sources})
            if len(sizes) > 1:
                raise ValueError(
                    f"The pictures have the latent sizes {sizes}; name height and width, or edit them one by one."
                )
            rows, columns = (side // self.processor.image_processor.patch_size for side in sizes[0])
        height, width = rows * block if height is None else height, columns * block if width is None else width
        if height < 1 or width < 1 or height % block or width % block:
            nearest = tuple(max(block, round(side / block) * block) for side in (height, width))
            raise ValueError(f"height={height}, width={width} must be multiples of {block}; the nearest is {nearest}.")
        return height // block, width // block

    def count_steps(self, num_inference_steps: int) -> int:
        """Network evaluations that the scheduler takes for `num_inference_steps` (Heun: 2N - 1)."""
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(num_inference_steps)
        return len(scheduler.timesteps)

    def to_patches(self, latents: Tensor, num_images: int, grid: tuple[int, int]) -> Tensor:
        """Flat patches (P, D) of `latents` (N, C, h, w), the inverse of `to_latents`."""
        config = self.model.config
        expected = (num_images, config.latent_channels, *(side * config.patch_size for side in grid))
        if tuple(latents.shape) != expected:
            raise ValueError(f"latents has shape {tuple(latents.shape)}; these prompts and sizes take {expected}.")
        return patchify(latents, config.patch_size).flatten(0, 1)

    def to_latents(self, latent_patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """(N, C, h, w) from the flat patches (P, D) of pictures of one grid."""
        patches = latent_patches.unflatten(0, (-1, grid[0] * grid[1]))
        return unpatchify(patches, grid, self.model.config.patch_size)

    def decode(self, latent_patches: Tensor, image_grids: Tensor, output_type: str) -> Any:
        """Turn flat patches (P, D) into what `output_type` names."""
        if output_type == "latent":
            grid = (int(image_grids[0, 0]), int(image_grids[0, 1]))
            return self.to_latents(torch.cat(list(split_images(latent_patches, image_grids))), grid)
        pictures = self.processor.decode_images(latent_patches, image_grids)
        if output_type == "pil":
            return pictures
        import numpy as np

        array = np.stack([np.asarray(picture, dtype=np.float32) / 255 for picture in pictures])
        return array if output_type == "np" else torch.from_numpy(array).permute(0, 3, 1, 2)


__all__ = ["TransfusionCaptionOutput", "TransfusionPipeline", "TransfusionPipelineOutput"]
