"""Drawing: an image block is denoised against the frozen prefix of its document (paper, section 3).

Shapes: B rows, N images that are drawn, R branches of guidance, K cached positions, n patches of one image, P patches
of all, D patch_dim.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .attention import cached_segments
from .caching import FrozenCache, has_compiled_layers, is_whole_graph
from .context import Context, Document, Grid, hide_text


# Called after each denoising step with (step, timestep, x_t (P, D)); may return other latents.
StepCallback = Callable[[int, Tensor, Tensor], Tensor | None]


@dataclass(frozen=True)
class Drawing:
    """How to draw: the settings that all images of a call share.

    Attributes:
        scheduler: A diffusers scheduler.
        num_inference_steps: Denoising steps.
        guidance_scale: 1 is no guidance.
        callback: Called after each step.
        guidance_interval: Shares of the schedule, 0 for clean and 1 for noise, between which there is guidance
            (Kynkaanniemi et al. 2024, arXiv:2404.07724); a step outside costs one branch.
    """

    scheduler: Any
    num_inference_steps: int
    guidance_scale: float
    callback: StepCallback | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)


class Denoiser:
    """Predicts noise or velocity of images after the documents of a context, which it leaves as they are.

    The documents may be R branches, [all of the first, all of the second]: then each image stands in every branch, is
    encoded once, and has a prediction for each, in the order of the documents.

    Nothing but the noisy patches and the timestep changes from step to step, so all else is made here, once: the mask
    as segments, which the fused kernels compute without reading one, and on a CUDA device a graph of the whole step.
    Layers that are compiled for a CPU take the prefix as tensors and a mask instead: what segments save is less than
    what leaving the graph costs, twice a layer.

    Args:
        context: What stands before the images; its padding is on the left.
        grids: The grid of each of the N images.
    """

    def __init__(self, context: Context, grids: Sequence[Grid]) -> None:
        self.model, self.cache = context.model, context.cache
        config, device = self.model.config, context.attention_mask.device
        self.num_images = len(grids)
        self.branches = len(context.lengths) // len(grids)
        self.sizes = [rows * columns for rows, columns in grids] * self.branches
        is_patch = torch.arange(max(self.sizes), device=device) < torch.tensor(self.sizes, device=device)[:, None]
        self.num_patches = is_patch.shape[1]
        self.inputs: dict[str, Any] = {
            "input_ids": torch.where(is_patch, config.image_token_id, config.eoi_token_id),
            "attention_mask": torch.cat([context.attention_mask, is_patch.long()], dim=1),
            "position_ids": (context.lengths[:, None] + is_patch.cumsum(dim=1) - 1).clamp(min=0),
            "image_grids": torch.tensor(grids, device=device),
        }
        if config._attn_implementation == "sdpa" and has_compiled_layers(self.model) and device.type == "cpu":
            self.cache = FrozenCache(self.cache)
            self.inputs["attention_mask"] = self._dense_mask()
        elif config._attn_implementation != "eager" and not is_whole_graph(self.model):
            hidden = (context.attention_mask == 0).sum(dim=1).tolist()
            length = context.attention_mask.shape[1]
            keys = [(first, length + size) for first, size in zip(hidden, self.sizes, strict=True)]
            is_causal = config.image_attention == "causal"
            self.inputs["attention_mask"] = cached_segments(keys, self.sizes, is_causal)
        self.graph = StepGraph(self._predict) if can_capture(self.model) else self._predict

    def _dense_mask(self) -> Tensor | None:
        """(R * N, 1, 1 or n, K + n), the keys that a patch may look at; None where these are all."""
        visible = self.inputs["attention_mask"].bool()
        if self.model.config.image_attention == "causal":
            length = visible.shape[1]
            square = torch.ones(self.num_patches, length, dtype=torch.bool, device=visible.device)
            return visible[:, None, None] & square.tril(length - self.num_patches)
        return None if visible.all() else visible[:, None, None]

    def __call__(self, x_t: Sequence[Tensor], timestep: Tensor) -> list[Tensor]:
        """The prediction (n, D) for each document, of the N images `x_t` (n, D)."""
        timesteps = timestep.to(x_t[0].device).expand(self.num_images)
        return list(self.graph(torch.cat(list(x_t)), timesteps).split(self.sizes))

    def _predict(self, latent_patches: Tensor, timesteps: Tensor) -> Tensor:
        """(R * P, D) in float32."""
        outputs = self.model(
            **self.inputs,
            past_key_values=self.cache,
            latent_patches=latent_patches,
            timesteps=timesteps,
            patch_repeats=self.branches,
            skip_logits=True,
            use_cache=True,
        )
        self.cache.crop(-self.num_patches)
        return outputs.image_prediction.float()


class StepGraph:
    """A function of tensors as a CUDA graph, so that its kernels run without waiting for Python.

    The first call runs the function, which lets kernels be chosen and compiled; the second records it.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.inputs: list[Tensor] | None = None
        self.recorded: tuple[Any, Tensor] | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function of `inputs`, which are alike in shape in every call."""
        if self.inputs is None:
            self.inputs = [tensor.clone() for tensor in inputs]
            return self.function(*inputs)
        for held, new in zip(self.inputs, inputs, strict=True):
            held.copy_(new)
        if self.recorded is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may go on meanwhile
                output = self.function(*self.inputs)
            self.recorded = graph, output
        graph, output = self.recorded
        graph.replay()
        return output.clone()


def can_capture(model: Any) -> bool:
    """Whether a step of `model` can be recorded: all of it on one CUDA device, without the hooks of offloading,
    compiled in parts alone, as a cache that does not grow in place moves, and without what reads values on the host:
    grids, positions, or outliers of quantized layers.
    """
    hooks = ("_hf_hook", "_diffusers_hook")
    has_hooks = any(hasattr(module, hook) for module in model.modules() for hook in hooks)
    is_dynamic = "dynamic" in model.model.rotary_emb.rope_type
    reads_values = model.config.patch_codec == "unet" or is_dynamic or getattr(model, "is_quantized", False)
    return model.device.type == "cuda" and not (has_hooks or reads_values or is_whole_graph(model))


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
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)  # or it takes the second of equal timesteps for the first
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


@torch.no_grad()
def draw_images(
    model: Any,
    documents: list[Document],
    noise: list[Tensor],
    grids: list[Grid],
    drawing: Drawing,
    generators: list[torch.Generator | None],
    negative_documents: list[Document] | None = None,
    context: Context | None = None,
) -> list[Tensor]:
    """Denoise one image after each document, which ends in a begin-of-image token, from `noise` (n, D) each.

    Guidance (Ho & Salimans 2021): unconditional + scale * (conditional - unconditional), both in one batch; a scale of
    1 leaves the unconditional branch out. `context` is what has run of the documents already, if it has.
    """
    context = Context.read(model, documents) if context is None else context
    predict = Guided(context, documents, grids, drawing, negative_documents)
    sizes = sorted({len(patches) for patches in noise})
    members = [[row for row, patches in enumerate(noise) if len(patches) == size] for size in sizes]
    groups = [SchedulerGroup(drawing, rows, generators, model.device) for rows in members]
    x_t, model_input = list(noise), list(noise)
    for group in groups:
        group.start(x_t)
    shares = (groups[0].scheduler.timesteps / model.config.num_train_timesteps).tolist()
    for step, (timestep, share) in enumerate(zip(groups[0].scheduler.timesteps, shares, strict=True)):
        for group in groups:
            group.scale_input(model_input, x_t, timestep)
        prediction = predict(model_input, timestep, share)
        for group in groups:
            group.step(prediction, timestep, x_t)
        if drawing.callback is not None:
            changed = drawing.callback(step, timestep, torch.cat(x_t))
            x_t = x_t if changed is None else list(changed.split([len(patches) for patches in x_t]))
    return x_t


class Guided:
    """Predictions with guidance, where there is any: each branch's documents are run once, beforehand."""

    def __init__(
        self,
        context: Context,
        documents: list[Document],
        grids: list[Grid],
        drawing: Drawing,
        negative_documents: list[Document] | None,
    ) -> None:
        self.scale = drawing.guidance_scale
        self.low, self.high = drawing.guidance_interval
        is_guided = self.scale != 1.0
        is_alone = not is_guided or drawing.guidance_interval != (0.0, 1.0)
        self.alone = Denoiser(context, grids) if is_alone else None
        self.both: Denoiser | None = None
        if is_guided and negative_documents is not None:
            without = Context.read(context.model, negative_documents)
            self.both = Denoiser(Context.join([context, without]), grids)
        elif is_guided:
            visible = [hide_text(document.input_ids, context.model.config) for document in documents]
            without = Context.read(context.model, documents, visible)
            self.both = Denoiser(Context.join([context, without]), grids)

    def __call__(self, x_t: list[Tensor], timestep: Tensor, share: float) -> list[Tensor]:
        """The prediction (n, D) for each image of `x_t`, at `timestep`, which is this `share` of the schedule."""
        if self.both is None or (self.alone is not None and not self.low <= share <= self.high):
            assert self.alone is not None  # there is one wherever there may be a step without guidance
            return self.alone(x_t, timestep)
        prediction = self.both(x_t, timestep)
        pairs = zip(prediction[: len(x_t)], prediction[len(x_t) :], strict=True)
        return [without + self.scale * (given - without) for given, without in pairs]


def draw_noise(
    grids: list[Grid], generators: list[torch.Generator | None], patch_dim: int, device: Any
) -> list[Tensor]:
    """Standard normal patches (n, D) for each grid, from its row's generator."""
    from diffusers.utils.torch_utils import randn_tensor

    return [
        randn_tensor((rows * columns, patch_dim), generator=generator, device=device, dtype=torch.float32)
        for (rows, columns), generator in zip(grids, generators, strict=True)
    ]
