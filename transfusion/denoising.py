"""Drawing: an image block is denoised against the frozen prefix of its document (paper, section 3).

A document is a row of tokens in which each image is a run of `image_token_id`, and the patches of these images in
reading order. Shapes: B rows, L tokens, n patches of one image, P patches of all, D patch_dim, V vocabulary.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .configuration import TransfusionConfig
from .latents import split_images


# Called after each denoising step with (step, timestep, x_t (P, D)); may return other latents.
StepCallback = Callable[[int, Tensor, Tensor], Tensor | None]
Grid = tuple[int, int]


@dataclass
class Document:
    """One row without padding: `input_ids` (L,), and the clean patches (n, D) and grid of each of its images."""

    input_ids: Tensor
    images: list[Tensor] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)


@dataclass(frozen=True)
class Drawing:
    """How to draw: the settings that all images of a call share."""

    scheduler: Any
    num_inference_steps: int
    guidance_scale: float
    callback: StepCallback | None = None


def read_documents(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    latent_patches: Tensor | None,
    image_grids: Tensor | None,
    config: TransfusionConfig,
) -> list[Document]:
    """Cut a padded batch, on either side, into rows without padding, each with its images."""
    visible = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if visible.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(visible.shape)} and input_ids {tuple(input_ids.shape)}; give the same."
        )
    if (latent_patches is None) != (image_grids is None):
        raise ValueError("Of latent_patches and image_grids one is None; give both, as the processor makes them.")
    rows = [ids[seen] for ids, seen in zip(input_ids, visible, strict=True)]
    images = [] if latent_patches is None else list(split_images(latent_patches, image_grids))
    grids = [] if image_grids is None else [(int(r), int(c)) for r, c in image_grids.tolist()]
    documents, start = [], 0
    for ids in rows:
        is_patch = ids == config.image_token_id
        is_first = is_patch & ~torch.cat([is_patch.new_zeros(1), is_patch[:-1]])
        stop = start + int(is_first.sum())
        documents.append(Document(ids, images[start:stop], grids[start:stop]))
        start = stop
    if start != len(images):
        raise ValueError(
            f"The prompts hold {start} runs of image placeholders and {len(images)} images came with them."
        )
    return documents


def pad_left(rows: Sequence[Tensor], value: int) -> Tensor:
    """Stack 1-D `rows` as (B, longest), padded with `value` on the left."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side="left")


class Context:
    """Documents run once: their keys and values, how long they are, and the logits after their last token.

    Documents of different lengths stand flush right, their padding hidden. What is run after them is either kept
    (`extend`) or forgotten (`predict`).
    """

    def __init__(self, model: Any, documents: list[Document], visible: list[Tensor]) -> None:
        """Run `documents`; `visible` says per document which of its tokens may be looked at (L,)."""
        self.model = model
        self.cache: Any = None  # a transformers Cache after the first run
        is_token = pad_left([torch.ones_like(seen) for seen in visible], False).to(model.device)
        self.attention_mask = is_token.new_zeros(len(documents), 0, dtype=torch.long)
        self.lengths = is_token.new_zeros(len(documents), dtype=torch.long)
        self.logits = self.extend(
            pad_left([document.input_ids for document in documents], model.config.eoi_token_id),
            is_token,
            [image for document in documents for image in document.images],
            [grid for document in documents for grid in document.grids],
            is_visible=pad_left(visible, False).to(model.device),
        )

    def extend(
        self,
        input_ids: Tensor,
        is_token: Tensor,
        images: list[Tensor],
        grids: list[Grid],
        is_visible: Tensor | None = None,
    ) -> Tensor:
        """Append `input_ids` (B, q) where `is_token`, with the clean `images` in them; last logits (B, V)."""
        self.attention_mask = torch.cat(
            [self.attention_mask, (is_token if is_visible is None else is_visible).long()], dim=1
        )
        outputs = self._run(input_ids, is_token, self.attention_mask, images, grids, timesteps=None, logits_to_keep=1)
        self.cache = outputs.past_key_values
        self.lengths = self.lengths + is_token.sum(dim=1)
        return outputs.logits[:, -1].float()

    def predict(self, x_t: list[Tensor], grids: list[Grid], timestep: Tensor) -> list[Tensor]:
        """Predict noise or velocity of the images `x_t` (n, D), one after each document, and forget them again.

        The documents may be branches, [all of the first, all of the second]: then each image of `x_t` stands in every
        branch, is encoded once, and has a prediction for each, in the order of the documents.
        """
        config = self.model.config
        branches = len(self.lengths) // len(x_t)
        sizes = [len(patches) for patches in x_t] * branches
        counts = torch.tensor(sizes, device=self.lengths.device)
        is_patch = torch.arange(max(sizes), device=counts.device) < counts[:, None]
        outputs = self._run(
            torch.where(is_patch, config.image_token_id, config.eoi_token_id),
            is_patch,
            torch.cat([self.attention_mask, is_patch.long()], dim=1),
            x_t,
            grids,
            timesteps=timestep.expand(len(x_t)),
            patch_repeats=branches,
            skip_logits=True,
        )
        self.cache.crop(-is_patch.shape[1])
        return list(outputs.image_prediction.float().split(sizes))

    def _run(
        self,
        input_ids: Tensor,
        is_token: Tensor,
        attention_mask: Tensor,
        images: list[Tensor],
        grids: list[Grid],
        **kwargs: Any,
    ) -> Any:
        device = self.model.device
        return self.model(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask,
            position_ids=(self.lengths[:, None] + is_token.cumsum(dim=1) - 1).clamp(min=0),
            past_key_values=self.cache,
            latent_patches=torch.cat(images).to(device) if images else None,
            image_grids=torch.tensor(grids, device=device) if images else None,
            use_cache=True,
            **kwargs,
        )


class SchedulerGroup:
    """One diffusers scheduler for the rows whose images have equally many patches.

    Every group goes through the same timesteps. A scheduler draws noise for a list of generators row by row, so that
    a row gets what it would get alone.
    """

    def __init__(
        self, drawing: Drawing, rows: list[int], generators: list[torch.Generator | None], device: Any
    ) -> None:
        self.rows = rows
        self.scheduler = copy.deepcopy(drawing.scheduler)
        step_parameters = inspect.signature(self.scheduler.step).parameters
        chosen = [generators[row] for row in rows]
        self.step_kwargs: dict[str, Any] = {"return_dict": False}
        if "generator" in step_parameters and chosen[0] is not None:
            self.step_kwargs["generator"] = chosen
        if type(self.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
            # The flow Euler scheduler would end at sigma 0.001 and then at 0; N equal steps end at 1/N and then at 0.
            sigmas = np.linspace(1.0, 1.0 / drawing.num_inference_steps, drawing.num_inference_steps)
            self.scheduler.set_timesteps(sigmas=sigmas.tolist(), device=device)
        else:
            self.scheduler.set_timesteps(drawing.num_inference_steps, device=device)
        # Flow schedulers take samples as they are; those over sigmas (Euler for ddpm) want them scaled.
        self.scales_input = hasattr(self.scheduler, "scale_model_input")

    def start(self, x_t: list[Tensor]) -> None:
        """Bring the unit noise of this group in `x_t` to the scheduler's first noise level."""
        if self.scales_input:
            for row in self.rows:
                x_t[row] = x_t[row] * self.scheduler.init_noise_sigma

    def scale_input(self, model_input: list[Tensor], x_t: list[Tensor], timestep: Tensor) -> None:
        """Write what the model is to see of this group's `x_t` into `model_input`."""
        for row in self.rows:
            model_input[row] = self.scheduler.scale_model_input(x_t[row], timestep) if self.scales_input else x_t[row]

    def step(self, prediction: list[Tensor], timestep: Tensor, x_t: list[Tensor]) -> None:
        """Replace the rows of this group in `x_t` by those one step cleaner."""
        samples = torch.stack([x_t[row] for row in self.rows])
        predictions = torch.stack([prediction[row] for row in self.rows])
        stepped = self.scheduler.step(predictions, timestep, samples, **self.step_kwargs)[0]
        for row, sample in zip(self.rows, stepped, strict=True):
            x_t[row] = sample


def hide_text(input_ids: Tensor, config: TransfusionConfig) -> Tensor:
    """(L,), True at images and their begin and end tokens: what the unconditional branch may look at.

    Training drops text in the same way: hidden by the mask, with every position kept.
    """
    control = (*config.boi_token_ids, config.eoi_token_id, config.image_token_id)
    return torch.isin(input_ids, torch.tensor(control, device=input_ids.device))


@torch.no_grad()
def draw_images(
    model: Any,
    documents: list[Document],
    noise: list[Tensor],
    grids: list[Grid],
    drawing: Drawing,
    generators: list[torch.Generator | None],
    negative_documents: list[Document] | None = None,
) -> list[Tensor]:
    """Denoise one image after each document, which ends in a begin-of-image token, from `noise` (n, D) each.

    Guidance (Ho & Salimans 2021): unconditional + scale * (conditional - unconditional), both in one batch; a scale of
    1 leaves the unconditional branch out.
    """
    visible = [torch.ones_like(document.input_ids, dtype=torch.bool) for document in documents]
    is_guided = drawing.guidance_scale != 1.0
    if is_guided and negative_documents is not None:
        visible += [torch.ones_like(document.input_ids, dtype=torch.bool) for document in negative_documents]
        documents = documents + negative_documents
    elif is_guided:
        visible += [hide_text(document.input_ids, model.config) for document in documents]
        documents = documents + documents
    context = Context(model, documents, visible)

    sizes = sorted({len(patches) for patches in noise})
    members = [[row for row, patches in enumerate(noise) if len(patches) == size] for size in sizes]
    groups = [SchedulerGroup(drawing, rows, generators, model.device) for rows in members]
    x_t, model_input = list(noise), list(noise)
    for group in groups:
        group.start(x_t)
    for step, timestep in enumerate(groups[0].scheduler.timesteps):
        for group in groups:
            group.scale_input(model_input, x_t, timestep)
        prediction = context.predict(model_input, grids, timestep)
        if is_guided:
            pairs = zip(prediction[: len(x_t)], prediction[len(x_t) :], strict=True)
            prediction = [without + drawing.guidance_scale * (given - without) for given, without in pairs]
        for group in groups:
            group.step(prediction, timestep, x_t)
        if drawing.callback is not None:
            changed = drawing.callback(step, timestep, torch.cat(x_t))
            x_t = x_t if changed is None else list(changed.split([len(patches) for patches in x_t]))
    return x_t


def draw_noise(
    grids: list[Grid], generators: list[torch.Generator | None], patch_dim: int, device: Any
) -> list[Tensor]:
    """Standard normal patches (n, D) for each grid, from its row's generator."""
    from diffusers.utils.torch_utils import randn_tensor

    return [
        randn_tensor((rows * columns, patch_dim), generator=generator, device=device, dtype=torch.float32)
        for (rows, columns), generator in zip(grids, generators, strict=True)
    ]
