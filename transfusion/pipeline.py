"""`TransfusionPipeline`: text to image and edits of images by diffusers' call, captions, and chats with pictures.

A checkpoint is one folder for transformers and diffusers: transformers' files at the root, and beside them `vae/`,
`scheduler/` and `model_index.json`. diffusers takes a component without a folder of its own from the root.
"""

import copy
import inspect
import json
import math
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    SchedulerMixin,
)
from diffusers.utils import BaseOutput, logging
from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import RemoteEntryNotFoundError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from .autoencoder import VAE_SUBFOLDER, spatial_factor
from .diffusion import check_scheduler, make_scheduler
from .latents import patchify, split_images, unpatchify
from .model_card import CardContents
from .sharing import SharedPipeline, file_times, refuse_unknown, take_hub_options


logger = logging.get_logger(__name__)

# Where to read a checkpoint from.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
CHECKPOINT_FILES = ["*.json", "*.jinja", "*.model", "*.safetensors", "*.txt"]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")

# In `model_index.json`. diffusers takes classes from modules that are imported, and imports none that a file names.
OWN_COMPONENTS = {
    "model": ["transfusion.modeling_transfusion", "TransfusionForMultimodalGeneration"],
    "processor": ["transfusion.processing", "TransfusionProcessor"],
}
# The components of diffusers' own, by their folders and files.
DIFFUSERS_COMPONENTS = {"scheduler": "scheduler_config.json", VAE_SUBFOLDER: "config.json"}

# The default of a component that may be left out. To diffusers only parameters without a default are components: it
# would load a scheduler over the one that `DiffusionPipeline.from_pretrained` is given.
LEFT_OUT: Any = inspect.Parameter.empty


@dataclass
class TransfusionPipelineOutput(BaseOutput):
    """`images`: PIL images, an array (N, H, W, 3) or tensor (N, 3, H, W) in [0, 1], or latents (N, C, h, w)."""

    images: Any


@dataclass
class TransfusionCaptionOutput(BaseOutput):
    """`text`: a caption, or a list for a list of images or several captions of one."""

    text: Any


@dataclass
class TransfusionChatOutput(BaseOutput):
    """An answer; for a list of conversations, a list of each.

    Attributes:
        parts: Its texts and PIL images, in order.
        text: Its texts in one.
        images: Its images.
        message: The answer as a message, to append to the conversation.
    """

    parts: Any
    text: Any
    images: Any
    message: Any


class _Interrupted(Exception):
    """Ends a drawing early, with its patches (P, D)."""

    def __init__(self, latent_patches: Tensor) -> None:
        super().__init__()
        self.latent_patches = latent_patches


def make_chat_output(rows: list[list[Any]], is_one: bool) -> TransfusionChatOutput:
    """The output of answers, each a list of strings and images; of the only one, where `is_one`."""
    answers = []
    for parts in rows:
        content = [{"type": "text" if isinstance(one, str) else "image"} for one in parts]
        content = [{**part, part["type"]: one} for part, one in zip(content, parts, strict=True)]
        texts = [one for one in parts if isinstance(one, str)]
        images = [one for one in parts if not isinstance(one, str)]
        answers.append((parts, "".join(texts).strip(), images, {"role": "assistant", "content": content}))
    return TransfusionChatOutput(*(column[0] if is_one else list(column) for column in zip(*answers, strict=True)))


def read_model_index(folder: str | Path) -> dict[str, Any]:
    """What `model_index.json` holds for the parts that lie in `folder`; a part that is absent is (None, None)."""
    index: dict[str, Any] = {
        "_class_name": "TransfusionPipeline",
        "_diffusers_version": diffusers.__version__,
        **OWN_COMPONENTS,
    }
    for name, file in DIFFUSERS_COMPONENTS.items():
        path = Path(folder, name, file)
        class_name = json.loads(path.read_text(encoding="utf-8"))["_class_name"] if path.is_file() else None
        index[name] = [class_name and "diffusers", class_name]
    return index


def save_pipeline_parts(folder: str | Path, config: Any, scheduler: SchedulerMixin | None = None) -> None:
    """Make a folder that holds a model of `config` and its processor one that diffusers loads too.

    Writes `scheduler/`, by default that of the objective, and `model_index.json`.
    """
    scheduler = default_scheduler(config) if scheduler is None else scheduler
    scheduler.save_pretrained(Path(folder, "scheduler"))
    text = json.dumps(read_model_index(folder), indent=2, sort_keys=True)
    Path(folder, DiffusionPipeline.config_name).write_text(text + "\n", encoding="utf-8")


def default_scheduler(config: Any) -> SchedulerMixin:
    """The scheduler that samples a model of `config` where none is named."""
    shift = config.timestep_shift if config.objective == "flow" else 1.0  # ddpm draws uniformly
    return make_scheduler(config.objective, shift=shift, num_train_timesteps=config.num_train_timesteps)


def read_scheduler(path: str | Path, **hub: Any) -> SchedulerMixin | None:
    """The scheduler that was saved with a checkpoint, a folder or Hub name; None where none was.

    `hub` are `revision`, `token`, `cache_dir` and the like. Raises an OSError where the Hub cannot be asked.
    """
    name = f"scheduler/{DIFFUSERS_COMPONENTS['scheduler']}"
    file: Any = Path(path, name)
    if not os.path.isdir(path):
        places = {key: hub[key] for key in ("cache_dir", "revision") if key in hub}
        try:
            # The cache knows too what a repository does not have.
            file = try_to_load_from_cache(str(path), name, **places) or hf_hub_download(str(path), name, **hub)
        except RemoteEntryNotFoundError:
            return None
    if not isinstance(file, str | Path) or not os.path.isfile(file):
        return None
    config = json.loads(Path(file).read_text(encoding="utf-8"))
    scheduler_class = getattr(diffusers, config["_class_name"], None)
    if not inspect.isclass(scheduler_class) or not issubclass(scheduler_class, SchedulerMixin):
        raise ValueError(f"scheduler/ of {path} names the class {config['_class_name']!r}; take one of diffusers.")
    return scheduler_class.from_config(config)  # type: ignore[attr-defined]


def require_scheduler(scheduler: Any) -> None:
    """Raise a `ValueError` unless it is a scheduler, not its class or name."""
    if not isinstance(scheduler, SchedulerMixin):
        raise ValueError(
            f"scheduler={scheduler!r}; give one of diffusers, made with `from_config(pipeline.scheduler.config)`."
        )


def list_prompts(prompt: str | Sequence[str], name: str = "prompt") -> list[str]:
    """One or several prompts as a list; ValueError for anything else."""
    prompts = [prompt] if isinstance(prompt, str) or not isinstance(prompt, Sequence) else list(prompt)
    if not prompts or not all(isinstance(one, str) for one in prompts):
        raise ValueError(f"{name}={prompt!r}; give a string, or a list of at least one.")
    return prompts


def changed_latents(returned: Any) -> Any:
    """The latents in what a callback returned, or None; ValueError where that is no dictionary."""
    if not isinstance(returned, Mapping):
        raise ValueError(f"callback_on_step_end returned {returned!r}; return its last argument.")
    return returned.get("latents")


class TransfusionPipeline(SharedPipeline, DiffusionPipeline):
    """Draws pictures from prompts, edits pictures, writes captions of them, and answers with text and pictures.

    Args:
        model: A `TransfusionForMultimodalGeneration`.
        processor: Its `TransfusionProcessor`, which owns the VAE.
        scheduler: A diffusers scheduler; by default that of the model's objective.
        vae: Replaces the processor's; by default the processor keeps its own.

    `pipeline.vae` and `pipeline.processor.vae` are one. Setting `pipeline._interrupt = True` in a callback ends the
    drawing after that step.

    Raises:
        ValueError: A processor, a scheduler or a VAE that does not fit.
    """

    model_cpu_offload_seq = "model->vae"
    # Module by module, `enable_sequential_cpu_offload` would leave no device to see on the VAE, which is small.
    _exclude_from_cpu_offload = ["vae"]
    _optional_components = ["scheduler", "vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        scheduler: SchedulerMixin | None = LEFT_OUT,
        vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC | None = LEFT_OUT,
    ) -> None:
        super().__init__()
        self._all_hooks: list[Any] = []
        self._interrupt = False
        self._num_timesteps = 0
        if vae is not LEFT_OUT and vae is not None:
            if spatial_factor(vae) != processor.image_processor.vae_scale_factor:
                raise ValueError(
                    f"The VAE's factor is {spatial_factor(vae)} and the image processor's vae_scale_factor "
                    f"{processor.image_processor.vae_scale_factor}; give the VAE that the processor was made with."
                )
            processor.vae = vae
        processor.check_model(model.config)
        if scheduler is LEFT_OUT or scheduler is None:
            scheduler = default_scheduler(model.config)
        require_scheduler(scheduler)
        check_scheduler(scheduler, model.config.objective, model.config.num_train_timesteps)
        self.register_modules(model=model, processor=processor, scheduler=scheduler, vae=processor.vae)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scheduler":
            require_scheduler(value)
        super().__setattr__(name, value)

    @property
    def vae(self) -> Any:
        """The processor's autoencoder, or None where pixels are the latents."""
        return self.processor.vae

    @vae.setter
    def vae(self, vae: Any) -> None:
        self.processor.vae = vae

    @property
    def num_timesteps(self) -> int:
        """How many steps the latest drawing has, as callbacks want to know."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the drawing ends after this step."""
        return self._interrupt

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> Any:
        """Load a checkpoint, a folder or Hub name; one without `model_index.json` or `scheduler/` too.

        `kwargs` are those of `DiffusionPipeline.from_pretrained`: `dtype`, `device_map`, a component under its name,
        ... Options of the model alone: `from_pretrained(path, model=AutoModel.from_pretrained(path, ...))`.
        """
        if not isinstance(path, str | os.PathLike):
            raise ValueError(f"path={path!r}; give the folder of a checkpoint, or its name on the Hub.")
        if not os.path.isdir(path):
            hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
            path = snapshot_download(str(path), allow_patterns=CHECKPOINT_FILES, **hub)
        return super().from_pretrained(str(path), **{"use_safetensors": True, **kwargs})

    @classmethod
    def load_config(cls, path: str | Path, **kwargs: Any) -> Any:
        """`model_index.json`, or where a folder has none, what it would hold; classes are those of this package."""
        if os.path.isfile(Path(path, "config.json")) and not os.path.isfile(Path(path, cls.config_name)):
            return read_model_index(path)
        index = super().load_config(path, **kwargs)
        # Saved with code, it names that.
        return {**index, "_class_name": cls.__name__, **OWN_COMPONENTS} if isinstance(index, dict) else index

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        *,
        with_code: bool = False,
        card: CardContents | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save into one folder what transformers and diffusers both load, the VAE once.

        Args:
            save_directory: A folder.
            safe_serialization: Weights are safetensors always; False is answered by a warning.
            variant: Of no use here, as the model lies at the root, where diffusers looks for no variants.
            max_shard_size: Largest file of the model's weights, such as `"5GB"`.
            push_to_hub: Then upload all of it, with a model card.
            with_code: Save the code too, for `trust_remote_code=True` where this package is not installed. There
                `DiffusionPipeline.from_pretrained` must be given `model=` and `processor=`, which transformers'
                Auto classes load from the same place (the card shows it).
            card: Write a model card, with this in it, as for `push_to_hub`.
            kwargs: Options of `push_to_hub`; `repo_id` defaults to the folder's name.

        Raises:
            ValueError: A variant, or an unknown option.
        """
        if variant is not None:
            raise ValueError(
                f"variant={variant!r} cannot be loaded from one folder for two libraries; cast with `.to(dtype)` and "
                "save into a folder of its own."
            )
        if not safe_serialization:
            logger.warning("safe_serialization=False would write pickles; the weights are saved as safetensors.")
        hub, known = take_hub_options(kwargs, save_directory), file_times(save_directory)
        refuse_unknown(kwargs)
        sharding = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        self.model.save_pretrained(save_directory, with_code=with_code, **sharding)
        self.processor.save_pretrained(save_directory, with_code=with_code)
        save_pipeline_parts(save_directory, self.model.config, self.scheduler)
        self._finish_saving(save_directory, known, with_code, push_to_hub, card, hub)

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
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        image: Any = None,
        guidance_interval: tuple[float, float] | None = None,
    ) -> Any:
        """Draw, or with `image` edit.

        Args:
            prompt: One or several; ordinary text, in which no word is a control token.
            negative_prompt: What to be guided away from, one or one for each prompt.
            height, width: In pixels; by default those of `image`, or of the model's pictures.
            num_inference_steps, guidance_scale, guidance_interval: As for `generate_images`, with its defaults.
            num_images_per_prompt: Pictures of each prompt, side by side in the result.
            generator: One, or one for each picture.
            latents: (N, C, h, w) noise to start from.
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict: Return a `TransfusionPipelineOutput`, or a tuple.
            callback_on_step_end: Called as `callback(pipeline, step, timestep, {"latents": (N, C, h, w)})`; what it
                returns under `"latents"` replaces them.
            callback_on_step_end_tensor_inputs: Which of `"latents"` the callback gets.
            image: What each prompt says how to change, or one for each prompt; it stands before both prompts.

        Raises:
            ValueError: An empty prompt list, a size that the patches cannot hold, an unknown output type or tensor for
                the callback, pictures of several sizes where no size is named.
        """
        self.check_inputs(output_type, num_images_per_prompt, callback_on_step_end_tensor_inputs, callback_on_step_end)
        prompts = list_prompts(prompt)
        sources = self.encode_sources(image, len(prompts))
        grid = self.grid_of(height, width, sources)
        inputs = self.encode_prompt(prompts, num_images_per_prompt, grid, sources)
        if negative_prompt is not None:
            negative = list_prompts(negative_prompt, "negative_prompt")
            inputs |= self.encode_negative(negative, len(prompts), num_images_per_prompt, grid, sources)
        num_images = len(prompts) * num_images_per_prompt
        if latents is not None:
            latents = self.to_patches(latents, num_images, grid)
        how: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        how |= {"guidance_interval": guidance_interval, "scheduler": self.scheduler}
        num_steps = self.model.prepare_drawing(**how).num_inference_steps
        self._interrupt, self._num_timesteps = False, self.count_steps(num_steps)
        with self.progress_bar(total=self.num_timesteps) as progress:

            def after_step(step: int, timestep: Tensor, x_t: Tensor) -> Tensor | None:
                progress.update()
                if callback_on_step_end is not None:
                    kept = {name: self.to_latents(x_t, grid) for name in callback_on_step_end_tensor_inputs}
                    if (changed := changed_latents(callback_on_step_end(self, step, timestep, kept))) is not None:
                        x_t = self.to_patches(changed, num_images, grid)
                if self.interrupt:
                    raise _Interrupted(x_t)
                return x_t

            try:
                latent_patches = self.model.generate_images(
                    **inputs,
                    **how,
                    output_image_grids=grid,
                    generator=generator,
                    latents=latents,
                    callback=after_step,
                ).latent_patches
            except _Interrupted as interrupted:
                latent_patches = interrupted.latent_patches
        images = self.decode(latent_patches, torch.tensor([grid] * num_images), output_type)
        self.maybe_free_model_hooks()
        return TransfusionPipelineOutput(images) if return_dict else (images,)

    def check_inputs(
        self,
        output_type: str,
        num_images_per_prompt: int,
        tensor_inputs: Sequence[str],
        callback: Callable[[Any, int, Tensor, dict], dict] | None = None,
    ) -> None:
        """Raise a `ValueError` for arguments of a call that no picture can be drawn with."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r}; allowed: {', '.join(map(repr, OUTPUT_TYPES))}.")
        is_count = isinstance(num_images_per_prompt, int) and not isinstance(num_images_per_prompt, bool)
        if not is_count or num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt={num_images_per_prompt!r}; give an integer of 1 or more.")
        if callback is not None and not callable(callback):
            raise ValueError(
                f"callback_on_step_end={callback!r}; give a function (pipeline, step, timestep, tensors)."
            )
        if not isinstance(tensor_inputs, list | tuple | set):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs={tensor_inputs!r}; give a list of {self._callback_tensor_inputs}."
            )
        if unknown := [name for name in tensor_inputs if name not in self._callback_tensor_inputs]:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs holds {unknown}; allowed: {self._callback_tensor_inputs}."
            )

    @torch.no_grad()
    def caption(
        self, image: Any, prompt: str = "", max_new_tokens: int = 32, **kwargs: Any
    ) -> TransfusionCaptionOutput:
        """Describe `image`, or each of a list of them; `prompt` is how the text begins.

        `kwargs` go to `generate` (`do_sample`, `num_beams`, ...). Raises a ValueError where there is no picture.
        """
        images = list(image) if isinstance(image, list | tuple) else [image]
        if not images or any(one is None for one in images):
            raise ValueError(f"image={image!r}; give a picture, or a list of at least one.")
        rows = [[{"type": "image", "image": one}, {"type": "text", "text": prompt}] for one in images]
        self._onload(self.vae)
        inputs = self.processor(text=rows, return_tensors="pt")
        self._onload(self.model)
        inputs = inputs.to(self.model.device)
        written = self.model.generate(**inputs, generation_mode="text", max_new_tokens=max_new_tokens, **kwargs)
        new = written[:, inputs["input_ids"].shape[1] :]
        texts = [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]
        self.maybe_free_model_hooks()
        is_one = not isinstance(image, list | tuple) and len(texts) == 1
        return TransfusionCaptionOutput(texts[0] if is_one else texts)

    @torch.no_grad()
    def chat(
        self,
        messages: Sequence[Any],
        max_new_tokens: int = 256,
        height: int | None = None,
        width: int | None = None,
        **kwargs: Any,
    ) -> TransfusionChatOutput:
        """Answer a conversation with text and pictures, drawn wherever the model begins one.

        Args:
            messages: Messages `{"role": ..., "content": ...}`, or a list of such conversations. Content is a string
                or a list of parts `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`.
            max_new_tokens: Longest answer; the patches of pictures do not count.
            height, width: Of the pictures, in pixels; otherwise as the model begins them, or its default.
            kwargs: Of `generate` (`num_inference_steps`, `guidance_scale`, `generator`, `do_sample`, ...).

        Raises:
            ValueError: No messages, or what `apply_chat_template` and `generate` refuse.
        """
        if not messages or isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
            raise ValueError(f"messages={messages!r}; give a list of at least one message.")
        is_one = isinstance(messages[0], Mapping)
        if height is not None or width is not None:
            kwargs["output_image_grids"] = self.grid_of(height, width)
        self._onload(self.vae)
        inputs = self.processor.apply_chat_template(
            [messages] if is_one else messages,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        self._onload(self.model)
        generated = self.model.generate(
            **inputs.to(self.model.device),
            generation_mode="interleaved",
            max_new_tokens=max_new_tokens,
            scheduler=self.scheduler,
            **kwargs,
        )
        self._onload(self.vae)
        rows = self.processor.post_process_multimodal_output(generated)
        self.maybe_free_model_hooks()
        return make_chat_output(rows, is_one and len(rows) == 1)

    def _onload(self, module: Any) -> None:
        """Move a module that `enable_model_cpu_offload` keeps on the CPU; its hook would wait for its `forward`."""
        for offload in self._all_hooks:
            if offload.model is module:
                offload.hook.pre_forward(module)

    def encode_sources(self, image: Any, num_prompts: int) -> list[Tensor] | None:
        """The latent (C, h, w) of the picture to edit, for each prompt; None where there is none."""
        if image is None:
            return None
        pictures = list(image) if isinstance(image, list | tuple) else [image]
        if len(pictures) not in (1, num_prompts):
            raise ValueError(
                f"There are {len(pictures)} pictures and {num_prompts} prompts; give one, or one for each prompt."
            )
        self._onload(self.vae)
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
        self._onload(self.model)
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

    def encode_negative(
        self,
        prompts: list[str],
        num_prompts: int,
        repeats: int,
        grid: tuple[int, int],
        sources: list[Tensor] | None,
    ) -> dict[str, Tensor]:
        """`negative_input_ids` and `negative_attention_mask` (N, L) of one for all prompts, or of one for each.

        Their pictures are those of the prompts.
        """
        encoded = self.encode_prompt(prompts * num_prompts if len(prompts) == 1 else prompts, repeats, grid, sources)
        return {f"negative_{name}": encoded[name] for name in ("input_ids", "attention_mask")}

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
        for name, side in (("height", height), ("width", width)):
            if isinstance(side, bool) or not isinstance(side, numbers.Integral):
                raise ValueError(f"{name}={side!r}; give a whole number of pixels.")
        if height < 1 or width < 1 or height % block or width % block:
            nearest = tuple(max(block, round(side / block) * block) for side in (height, width))
            raise ValueError(f"height={height}, width={width} must be multiples of {block}; the nearest is {nearest}.")
        grid, largest = (height // block, width // block), self.model.config.max_position_embeddings - 2
        if grid[0] * grid[1] > largest:
            raise ValueError(
                f"height={height}, width={width} is too large: these are {grid[0] * grid[1]} patches, {block} pixels "
                f"wide, and the model has room for {largest}; a square may have {block * math.isqrt(largest)} pixels."
            )
        return grid

    def count_steps(self, num_inference_steps: int) -> int:
        """Network evaluations that the scheduler takes for `num_inference_steps` (Heun: 2N - 1)."""
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(num_inference_steps)
        return len(scheduler.timesteps)

    def to_patches(self, latents: Tensor, num_images: int, grid: tuple[int, int]) -> Tensor:
        """Flat patches (P, D) of `latents` (N, C, h, w), the inverse of `to_latents`."""
        config = self.model.config
        expected = (num_images, config.latent_channels, *(side * config.patch_size for side in grid))
        if not isinstance(latents, Tensor):
            raise ValueError(f"latents is a {type(latents).__name__}; give a tensor of the shape {expected}.")
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
        self._onload(self.vae)
        pictures = self.processor.decode_images(latent_patches, image_grids)
        if output_type == "pil":
            return pictures
        import numpy as np

        array = np.stack([np.asarray(picture, dtype=np.float32) / 255 for picture in pictures])
        return array if output_type == "np" else torch.from_numpy(array).permute(0, 3, 1, 2)


__all__ = [
    "TransfusionCaptionOutput",
    "TransfusionChatOutput",
    "TransfusionPipeline",
    "TransfusionPipelineOutput",
    "default_scheduler",
    "read_model_index",
    "read_scheduler",
    "save_pipeline_parts",
]
