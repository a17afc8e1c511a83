"""transformers' `pipeline` for what only this model does: `text-to-image` and `interleaved-generation`.

>>> from transformers import pipeline
>>> pipeline("text-to-image", model=path)("a red heart")  # a PIL image
>>> pipeline("interleaved-generation", model=path)("a red heart")  # a list of strings and PIL images
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForMultimodalLM, GenerationConfig
from transformers.pipelines import PIPELINE_REGISTRY, Pipeline
from transformers.utils.chat_template_utils import Chat


# Arguments of a call that go to `TransfusionPipeline`.
DRAWING_ARGUMENTS = (
    "generator",
    "guidance_interval",
    "guidance_scale",
    "height",
    "image",
    "negative_prompt",
    "num_images_per_prompt",
    "num_inference_steps",
    "output_type",
    "width",
)


class _TransfusionTask(Pipeline):
    """What the tasks share: a processor whose VAE moves along, the checkpoint's scheduler, and saving without code."""

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from .pipeline import read_scheduler

        super().__init__(*args, **kwargs)
        if self.processor.vae is not None:
            self.processor.vae.to(self.device)
        path = self.model.name_or_path
        commit = getattr(self.model.config, "_commit_hash", None)  # absent where the model is of a folder
        self.noise_scheduler = read_scheduler(path, revision=commit) if path else None

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse an empty list, at which transformers would fail."""
        if isinstance(inputs, list | tuple) and not inputs:
            raise ValueError(f"inputs={inputs!r}; give one, or a list of at least one.")
        return super().__call__(inputs, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save a checkpoint for both libraries; transformers would save the parts of the processor and our code."""
        from .pipeline import save_pipeline_parts

        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
        save_pipeline_parts(os.fspath(save_directory), self.model.config, self.noise_scheduler)


class TextToImagePipeline(_TransfusionTask):
    """`pipeline("text-to-image", model=path)`: a prompt -> a PIL image; several -> a list of them.

    Draws as `TransfusionPipeline` does, with the scheduler that was saved beside the model.

    Args of a call:
        inputs: A prompt, a list of prompts, or a data set of them.
        num_inference_steps, guidance_scale, guidance_interval, negative_prompt, height, width, output_type, image,
            generator: As in `TransfusionPipeline`; `image`, which is to be changed, and `generator` are one for all.
        num_images_per_prompt: More than 1 gives a list for each prompt.
        batch_size: Prompts that are drawn together.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from .pipeline import TransfusionPipeline

        super().__init__(*args, **kwargs)
        self.drawing = TransfusionPipeline(self.model, self.processor, self.noise_scheduler)
        self.drawing.set_progress_bar_config(disable=True)

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict, dict, dict]:
        if unknown := sorted(set(kwargs) - set(DRAWING_ARGUMENTS)):
            raise ValueError(f"text-to-image does not take {unknown}; allowed: {', '.join(DRAWING_ARGUMENTS)}.")
        return {}, kwargs, {}

    def preprocess(self, input_: Any, **kwargs: Any) -> dict[str, Any]:
        """Take a prompt."""
        if not isinstance(input_, str):
            raise ValueError(f"A prompt is {input_!r}; give a string, or a list of strings.")
        return {"prompt": input_}

    def _forward(self, input_tensors: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        prompts = input_tensors["prompt"]
        prompts = [prompts] if isinstance(prompts, str) else prompts
        images = self.drawing(prompts, **kwargs).images
        count = len(images) // len(prompts)
        return {"drawn": [{"images": images[start : start + count]} for start in range(0, len(images), count)]}

    def postprocess(self, model_outputs: dict[str, Any], **kwargs: Any) -> Any:
        """The image of a prompt, or the list of its images."""
        drawn = model_outputs["drawn"]
        images = (drawn[0] if isinstance(drawn, list) else drawn)["images"]
        return images[0] if len(images) == 1 else images


class InterleavedGenerationPipeline(_TransfusionTask):
    """`pipeline("interleaved-generation", model=path)`: a prompt or a chat -> its continuation with pictures.

    Draws with the scheduler that was saved beside the model, unless a call names another.

    Args of a call:
        inputs: A prompt, which is ordinary text; `{"text": ..., "images": [...]}`, where `<image>` marks the places
            of the pictures; a chat, a list of messages; or a list or data set of these.
        batch_size: Prompts that are continued together.
        kwargs: Of `generate` (`max_new_tokens`, `num_inference_steps`, `guidance_scale`, `generator`, ...).

    Returns:
        The new strings and PIL images in order, a list for each input.
    """

    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=256)  # as that of any-to-any

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict, dict, dict]:
        return {}, kwargs, {}

    def preprocess(self, input_: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Encode a prompt or a chat."""
        if isinstance(input_, Chat):
            options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
            return self._encoded(self.processor.apply_chat_template(input_.messages, return_tensors="pt", **options))
        given = {"text": input_} if isinstance(input_, str) else input_
        if not isinstance(given, Mapping) or set(given) - {"text", "images"}:
            raise ValueError(f"The input is {input_!r}; give a prompt, a dict of text and images, or messages.")
        return self._encoded(self.processor(**given, return_tensors="pt"))

    def _encoded(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs with the entries of pictures, if only of none: those of a batch must have the same."""
        none = {"latent_patches": torch.zeros(0, self.processor.patch_dim), "image_grids": torch.zeros(0, 2).long()}
        return {**none, **inputs}

    def _forward(self, input_tensors: dict[str, Tensor], **kwargs: Any) -> dict[str, Any]:
        if not len(input_tensors["image_grids"]):
            input_tensors = {name: input_tensors[name] for name in ("input_ids", "attention_mask")}
        if hasattr(self, "_prepare_generate_kwargs"):
            options = self._prepare_generate_kwargs(kwargs)
        else:  # older transformers
            options = {"generation_config": self.generation_config, **kwargs}
        options = {"scheduler": self.noise_scheduler, **options, "generation_mode": "interleaved"}
        generated = self.model.generate(**input_tensors, **options)
        rows = self.processor.post_process_multimodal_output(generated)
        return {"written": [{"parts": row} for row in rows]}

    def postprocess(self, model_outputs: dict[str, Any], **kwargs: Any) -> list[Any]:
        """The parts of the continuation."""
        written = model_outputs["written"]
        return (written[0] if isinstance(written, list) else written)["parts"]


def register_tasks() -> None:
    """Enter both tasks into transformers' registry."""
    for task, pipeline_class in (
        ("text-to-image", TextToImagePipeline),
        ("interleaved-generation", InterleavedGenerationPipeline),
    ):
        PIPELINE_REGISTRY.register_pipeline(
            task, pipeline_class=pipeline_class, pt_model=AutoModelForMultimodalLM, type="multimodal"
        )


__all__ = ["InterleavedGenerationPipeline", "TextToImagePipeline", "register_tasks"]
