"""`generate` and `generate_images`: writing token by token, and the switch to drawing at begin-of-image (section 3).

Shapes: B rows, L tokens, N images, n patches of one image, P patches of all, D patch_dim, V vocabulary.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer, SuppressTokensLogitsProcessor
from transformers.masking_utils import create_causal_mask
from transformers.utils import ModelOutput

from .configuration import TransfusionConfig
from .denoising import (
    Context,
    Document,
    Drawing,
    Grid,
    StepCallback,
    draw_images,
    draw_noise,
    pad_left,
    read_documents,
)
from .diffusion import check_scheduler, make_scheduler
from .latents import image_block_ids


# (denoising steps, guidance scale) where the caller names none; both stand in the generation config of a checkpoint.
SAMPLING_DEFAULTS = {"ddpm": (50, 3.0), "flow": (30, 3.0)}


@dataclass
class TransfusionImageOutput(ModelOutput):
    """Drawn images: `latent_patches` (P, D) and `image_grids` (N, 2), in the order of the prompts."""

    latent_patches: Tensor | None = None
    image_grids: Tensor | None = None


@dataclass
class TransfusionGenerateOutput(ModelOutput):
    """An interleaved generation.

    Attributes:
        sequences: (B, L) prompts and new tokens, padded on the right; each patch holds the image placeholder.
        images: Per row, the patches (n, D) of each image it drew, in order.
        image_grids: Per row, the (rows, columns) of each.
        prompt_length: Length of the prompts in `sequences`.
    """

    sequences: Tensor | None = None
    images: list[list[Tensor]] | None = None
    image_grids: list[list[Grid]] | None = None
    prompt_length: int | None = None


def list_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, num_rows: int
) -> list[torch.Generator | None]:
    """One generator per row: a single one serves all in turn; a list of another length is a ValueError."""
    if generator is None or isinstance(generator, torch.Generator):
        return [generator] * num_rows
    if len(generator) != num_rows:
        raise ValueError(f"generator is a list of {len(generator)} for {num_rows} images. Give one, or one for each.")
    return list(generator)


def list_grids(image_grids: Any, num_rows: int, config: TransfusionConfig) -> list[Grid | None]:
    """The grid that is named for each row: `image_grids` is one (rows, columns), one for each row, or None."""
    if image_grids is None:
        return [None] * num_rows
    table = torch.as_tensor(image_grids)
    table = table.expand(num_rows, 2) if table.ndim == 1 else table
    if table.shape != (num_rows, 2) or table.is_floating_point() or bool((table < 1).any()):
        raise ValueError(f"image_grids={image_grids} is not (rows, columns), nor {num_rows} of these.")
    for rows, columns in table.tolist():
        if rows * columns + 2 > config.max_position_embeddings:
            raise ValueError(
                f"A grid of ({rows}, {columns}) takes {rows * columns + 2} positions; max_position_embeddings="
                f"{config.max_position_embeddings} allows no more than that. Take a smaller one."
            )
    return [(rows, columns) for rows, columns in table.tolist()]


def check_batch(input_ids: Tensor) -> None:
    """Refuse prompts that are no (B, L) batch, or an empty one."""
    if input_ids.ndim != 2 or input_ids.shape[0] == 0:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}; give a batch (rows, length) of at least one row."
        )


def last_token(document: Document) -> int | None:
    """The last token of `document`, or None where it has none."""
    return int(document.input_ids[-1]) if len(document.input_ids) else None


def grid_after(document: Document, named: Grid | None, config: TransfusionConfig) -> Grid:
    """The grid of the image that begins after `document`: that of the size token in which it ends, or else `named`.

    Without either it is the config's default. A size token of another grid than `named` is a ValueError.
    """
    token = last_token(document)
    begun = None if token is None else config.grid_of_boi(token)
    if begun is not None and named is not None and begun != named:
        raise ValueError(
            f"A prompt ends in the size token {token}, which begins an image of {begun}, and the image to draw is "
            f"one of {named}. Name no other grid, or end the prompt in {config.boi_token_for(named)}."
        )
    assert config.default_image_grid is not None  # the config fills it in
    rows, columns = begun or named or config.default_image_grid
    return rows, columns


def append_boi(document: Document, grid: Grid, config: TransfusionConfig) -> None:
    """End `document` in the begin-of-image token of `grid`, where it does not end in one already."""
    if last_token(document) not in config.boi_token_ids:
        begin = document.input_ids.new_tensor([config.boi_token_for(grid)])
        document.input_ids = torch.cat([document.input_ids, begin])


class _NamedGrids(LogitsProcessor):
    """Begins images of the named grids alone: whatever size the model would begin, the probability goes to these.

    So it draws as often as it wants to; if other sizes were only forbidden, it might write text in their place.
    """

    def __init__(self, grids: list[Grid], config: TransfusionConfig, device: Any) -> None:
        self.begins = torch.tensor(config.boi_token_ids, device=device)
        self.named = torch.tensor([[config.boi_token_for(grid)] for grid in grids], device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Sum the probabilities behind `scores` (B, V) of all begin-of-image tokens, row by row."""
        together = scores[:, self.begins].logsumexp(dim=1, keepdim=True)
        return scores.index_fill(1, self.begins, -math.inf).scatter(1, self.named, together)


class _NoImageBegin(SuppressTokensLogitsProcessor):
    """Keeps text mode from beginning an image; the interleaved decoder takes it out."""


class InterleavedDecoder:
    """The decoding loop that switches to drawing (paper, section 3); `generate` calls it after its preparations.

    All rows take one token per turn. A row that samples begin-of-image gets its image, denoised after its own
    document; then the clean patches and the end-of-image token join the shared context in one run, in which the other
    rows have hidden padding. These wait with the logits they hold.
    """

    def __init__(
        self,
        drawing: Drawing,
        image_grids: Any,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        streamer: BaseStreamer | None = None,
    ) -> None:
        self.drawing = drawing
        self.image_grids = image_grids
        self.generator = generator
        self.streamer = streamer

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> TransfusionGenerateOutput:
        """Continue `input_ids` (B, L) until all rows stop; a prompt that ends in begin-of-image draws at once.

        The streamer gets what joins the only row: a token, or the placeholders of an image and its end.
        """
        if generation_config.num_beams > 1:
            raise ValueError(f"num_beams={generation_config.num_beams} cannot draw; use 1, or generation_mode='text'.")
        processors = LogitsProcessorList([p for p in logits_processor if not isinstance(p, _NoImageBegin)])
        images = model_kwargs.get("latent_patches"), model_kwargs.get("image_grids")
        documents = read_documents(input_ids, model_kwargs.get("attention_mask"), *images, model.config)
        if self.streamer is not None and len(documents) > 1:
            raise ValueError(f"A streamer takes one row and there are {len(documents)}; generate them one by one.")
        if empty := [row for row, document in enumerate(documents) if len(document.input_ids) == 0]:
            raise ValueError(f"The prompts of rows {empty} are empty; give at least one token that is not masked.")
        prompts = [copy.copy(document) for document in documents]
        visible = [torch.ones_like(document.input_ids, dtype=torch.bool) for document in documents]
        context = Context(model, documents, visible)
        grids = list_grids(self.image_grids, len(documents), model.config)
        if self.image_grids is not None and model.config.size_token_ids:
            processors.append(_NamedGrids([grid for grid in grids if grid], model.config, input_ids.device))
        generators = list_generators(self.generator, len(documents))
        begins = torch.tensor(model.config.boi_token_ids, device=input_ids.device)
        timeline, logits = input_ids, context.logits
        is_live = torch.ones(len(documents), dtype=torch.bool, device=input_ids.device)
        is_drawing = torch.isin(torch.stack([document.input_ids[-1] for document in documents]), begins)
        while True:
            if is_drawing.any():
                after_image = self.draw(model, context, documents, is_drawing, grids, generators)
                logits = torch.where(is_drawing[:, None], after_image, logits)
                if self.streamer is not None:
                    self.streamer.put(documents[0].input_ids[-len(documents[0].images[-1]) - 1 :].cpu())
            if not is_live.any():
                break
            tokens = choose_tokens(processors(timeline, logits), generation_config.do_sample)
            timeline = torch.cat([timeline, tokens[:, None]], dim=1)
            append_tokens(documents, tokens[:, None], is_live[:, None])
            if self.streamer is not None:
                self.streamer.put(tokens.cpu())
            is_drawing = is_live & torch.isin(tokens, begins)
            was_live, is_live = is_live, is_live & ~stopping_criteria(timeline, None)
            if is_live.any() or is_drawing.any():
                logits = context.extend(tokens[:, None], was_live[:, None], [], [])
        if self.streamer is not None:
            self.streamer.end()
        return collect_output(input_ids, prompts, documents, generation_config)

    def draw(
        self,
        model: Any,
        context: Context,
        documents: list[Document],
        is_drawing: Tensor,
        named_grids: list[Grid | None],
        generators: list[torch.Generator | None],
    ) -> Tensor:
        """Draw where `is_drawing`, commit image and end-of-image token; return the logits (B, V) after them."""
        config = model.config
        rows = is_drawing.nonzero().flatten().tolist()
        row_grids = [grid_after(documents[row], named_grids[row], config) for row in rows]
        row_generators = [generators[row] for row in rows]
        noise = draw_noise(row_grids, row_generators, config.patch_dim, model.device)
        images = draw_images(model, [documents[row] for row in rows], noise, row_grids, self.drawing, row_generators)
        written = {
            row: torch.tensor([config.image_token_id] * len(image) + [config.eoi_token_id], device=model.device)
            for row, image in zip(rows, images, strict=True)
        }
        nothing = is_drawing.new_zeros(0, dtype=torch.long)
        blocks = [written.get(row, nothing) for row in range(len(documents))]
        input_ids = pad_left(blocks, config.eoi_token_id)
        is_token = pad_left([torch.ones_like(block) for block in blocks], 0).bool()
        for row, image, grid in zip(rows, images, row_grids, strict=True):
            documents[row].images = [*documents[row].images, image]
            documents[row].grids = [*documents[row].grids, grid]
        append_tokens(documents, input_ids, is_token)
        return context.extend(input_ids, is_token, images, row_grids)


def choose_tokens(scores: Tensor, do_sample: bool) -> Tensor:
    """(B,) tokens from processed scores (B, V): sampled, or the best."""
    return torch.multinomial(scores.softmax(dim=-1), 1).squeeze(1) if do_sample else scores.argmax(dim=-1)


def append_tokens(documents: list[Document], input_ids: Tensor, is_token: Tensor) -> None:
    """Append the tokens of each row of `input_ids` (B, q) where `is_token` to its document."""
    for document, ids, chosen in zip(documents, input_ids, is_token, strict=True):
        document.input_ids = torch.cat([document.input_ids, ids[chosen].to(document.input_ids.device)])


def collect_output(
    input_ids: Tensor, prompts: list[Document], documents: list[Document], generation_config: GenerationConfig
) -> TransfusionGenerateOutput:
    """Put what `documents` hold beyond their `prompts` behind `input_ids` (B, L)."""
    pairs = list(zip(prompts, documents, strict=True))
    new = [document.input_ids[len(prompt.input_ids) :] for prompt, document in pairs]
    pad_token = generation_config._pad_token_tensor
    padding_value = 0 if pad_token is None else int(pad_token)
    new_ids = torch.nn.utils.rnn.pad_sequence(new, batch_first=True, padding_value=padding_value)
    return TransfusionGenerateOutput(
        sequences=torch.cat([input_ids, new_ids], dim=1),
        images=[document.images[len(prompt.images) :] for prompt, document in pairs],
        image_grids=[document.grids[len(prompt.grids) :] for prompt, document in pairs],
        prompt_length=input_ids.shape[1],
    )


class TransfusionGenerationMixin(GenerationMixin):
    """`generate` and `generate_images` of a Transfusion model."""

    output_modalities = ("image", "text")

    @staticmethod
    def default_generation_config(config: TransfusionConfig) -> GenerationConfig:
        """The generation config of a new model: its ids, and steps and guidance for its objective."""
        num_inference_steps, guidance_scale = SAMPLING_DEFAULTS[config.objective]
        return GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )

    def prepare_drawing(
        self,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        scheduler: Any = None,
        callback: StepCallback | None = None,
        generation_config: GenerationConfig | None = None,
    ) -> Drawing:
        """Fill what the caller left open from `generation_config`, then from the model's, and check it.

        `scheduler` is a diffusers scheduler, the name of one, or None for the objective's default.
        """
        default_steps, default_scale = SAMPLING_DEFAULTS[self.config.objective]
        for config in (generation_config, self.generation_config):
            if config is not None and num_inference_steps is None:
                num_inference_steps = getattr(config, "num_inference_steps", None)
            if config is not None and guidance_scale is None:
                guidance_scale = config.guidance_scale
        num_inference_steps = default_steps if num_inference_steps is None else num_inference_steps
        guidance_scale = default_scale if guidance_scale is None else guidance_scale
        if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps!r}; give an integer of 1 or more.")
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale={guidance_scale!r}; give a finite number, 1 for no guidance.")
        if scheduler is None or isinstance(scheduler, str):
            shift = self.config.timestep_shift if self.config.objective == "flow" else 1.0  # ddpm draws uniformly
            scheduler = make_scheduler(
                self.config.objective, scheduler, shift=shift, num_train_timesteps=self.config.num_train_timesteps
            )
        check_scheduler(scheduler, self.config.objective)
        return Drawing(scheduler, num_inference_steps, float(guidance_scale), callback)

    @torch.no_grad()
    def generate_images(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_grids: Any = None,
        latent_patches: Tensor | None = None,
        output_image_grids: Any = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        scheduler: Any = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        negative_input_ids: Tensor | None = None,
        negative_attention_mask: Tensor | None = None,
        latents: Tensor | None = None,
        callback: StepCallback | None = None,
    ) -> TransfusionImageOutput:
        """Draw one image after each prompt.

        Args:
            input_ids: (B, L) prompts, padded on either side; a begin-of-image token is appended where it is absent.
            attention_mask: (B, L), 0 at padding.
            image_grids: (rows, columns) of patches to draw, or one for each prompt; otherwise that of the size token
                in which a prompt ends, or the config's default.
                Where the prompts hold images, `image_grids` are theirs, as the processor gives them, and
                `output_image_grids` says what to draw.
            latent_patches: (P, D), the images of the prompts.
            output_image_grids: What to draw, where `image_grids` are those of the prompts.
            num_inference_steps: Denoising steps; by default those of the generation config.
            guidance_scale: 1 is no guidance; by default that of the generation config.
            scheduler: A diffusers scheduler or its class name; by default that of the objective.
            generator: One, or one for each prompt: a batch then gives what single calls give.
            negative_input_ids, negative_attention_mask: What to be guided away from; by default the prompts without
                their text. Where they hold images, these are the images of the prompts.
            latents: (P, D) noise to start from.
            callback: Called after each step with (step, timestep, noisy patches); may return others.

        Raises:
            ValueError: An empty batch, an impossible grid or one that a prompt's size token contradicts, a scheduler
                of another objective, lists of wrong lengths.
        """
        check_batch(input_ids)
        documents = read_documents(
            input_ids, attention_mask, latent_patches, image_grids if latent_patches is not None else None, self.config
        )
        if latent_patches is None and image_grids is not None and output_image_grids is not None:
            raise ValueError(
                f"image_grids={image_grids} and output_image_grids={output_image_grids} came without latent_patches; "
                "without images in the prompts give one of them."
            )
        drawn_grids = image_grids if latent_patches is None and output_image_grids is None else output_image_grids
        named = list_grids(drawn_grids, len(documents), self.config)
        grids = [grid_after(document, grid, self.config) for document, grid in zip(documents, named, strict=True)]
        drawing = self.prepare_drawing(num_inference_steps, guidance_scale, scheduler, callback)
        generators = list_generators(generator, len(documents))
        noise = self._initial_noise(latents, grids, generators)
        negative_documents = None
        if negative_input_ids is not None:
            negative_documents = self._read_negatives(
                negative_input_ids, negative_attention_mask, latent_patches, image_grids, grids
            )
        for document, grid in zip(documents, grids, strict=True):
            append_boi(document, grid, self.config)
        drawn = draw_images(self, documents, noise, grids, drawing, generators, negative_documents)
        return TransfusionImageOutput(torch.cat(drawn), torch.tensor(grids, device=self.device))

    def _read_negatives(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        latent_patches: Tensor | None,
        image_grids: Any,
        drawn_grids: list[Grid],
    ) -> list[Document]:
        check_batch(input_ids)
        if latent_patches is None or not (input_ids == self.config.image_token_id).any():
            latent_patches = image_grids = None
        documents = read_documents(input_ids, attention_mask, latent_patches, image_grids, self.config)
        if len(documents) != len(drawn_grids):
            raise ValueError(f"{len(documents)} negative prompts came with {len(drawn_grids)} prompts; give as many.")
        for document, grid in zip(documents, drawn_grids, strict=True):
            append_boi(document, grid_after(document, grid, self.config), self.config)
        return documents

    def _initial_noise(
        self, latents: Tensor | None, grids: list[Grid], generators: list[torch.Generator | None]
    ) -> list[Tensor]:
        if latents is None:
            return draw_noise(grids, generators, self.config.patch_dim, self.device)
        expected = (sum(rows * columns for rows, columns in grids), self.config.patch_dim)
        if tuple(latents.shape) != expected:
            raise ValueError(f"latents has shape {tuple(latents.shape)}; these grids take {expected}.")
        return list(latents.to(self.device, torch.float32).split([rows * columns for rows, columns in grids]))

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_mode: str = "text",
        image_grids: Any = None,
        output_image_grids: Any = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        scheduler: Any = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts: transformers' `generate`, with images.

        `"text"` returns what transformers returns; images can only be in the prompt (`latent_patches`, `image_grids`).
        `"interleaved"` draws whenever begin-of-image is sampled, by greedy decoding or sampling, and always returns a
        `TransfusionGenerateOutput`. The drawing arguments are those of `generate_images`. Patches do not count in
        `max_new_tokens`; an image that was begun is always finished and closed by its end-of-image token.
        Where the config has size tokens, the model chooses the grid of each image by the one it begins it with,
        unless `image_grids` names one (`output_image_grids`, where the prompts hold images).

        Raises:
            ValueError: An unknown mode, drawing arguments in text mode, beams in interleaved mode, a named grid that
                the size token at the end of a prompt contradicts.
        """
        has_images = kwargs.get("latent_patches") is not None
        prompt_grids = {"image_grids": image_grids} if has_images else {}
        if generation_mode == "text":
            drawing_arguments = {
                "output_image_grids": output_image_grids,
                "image_grids": None if has_images else image_grids,
                "num_inference_steps": num_inference_steps,
                "guidance_scale": guidance_scale,
                "scheduler": scheduler,
                "generator": generator,
            }
            if given := [name for name, value in drawing_arguments.items() if value is not None]:
                raise ValueError(f"{', '.join(given)} cannot work in text mode; use generation_mode='interleaved'.")
            # Embeddings first: transformers reads the batch size off the first tensor, and patches lie flat.
            embedded = {name: kwargs.pop(name) for name in ("inputs_embeds",) if name in kwargs}
            return super().generate(inputs, **embedded, **prompt_grids, **kwargs)
        if generation_mode != "interleaved":
            raise ValueError(
                f"generation_mode={generation_mode!r}; allowed: 'text', 'interleaved'. To draw: generate_images."
            )
        drawn_grids = image_grids if not has_images and output_image_grids is None else output_image_grids
        drawing = self.prepare_drawing(
            num_inference_steps, guidance_scale, scheduler, generation_config=kwargs.get("generation_config")
        )
        writer = InterleavedDecoder(drawing, drawn_grids, generator, kwargs.get("streamer"))
        return super().generate(inputs, custom_generate=writer, **prompt_grids, **kwargs)

    def _extract_generation_mode_kwargs(
        self, custom_generate: Any, kwargs: dict[str, Any], *args: Any, **named: Any
    ) -> dict[str, Any]:
        # transformers loses the tokenizer, which stop strings need, where the decoding loop is not its own.
        tokenizer = kwargs.get("tokenizer")
        mode_kwargs = super()._extract_generation_mode_kwargs(custom_generate, kwargs, *args, **named)
        return mode_kwargs if tokenizer is None else mode_kwargs | {"tokenizer": tokenizer}

    def _get_logits_processor(
        self, generation_config: GenerationConfig, *args: Any, **kwargs: Any
    ) -> LogitsProcessorList:
        # The guidance scale is that of images; transformers would guide text with it.
        generation_config = copy.copy(generation_config)
        generation_config.guidance_scale = None
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        # A patch is no token, and the decoder itself closes an image.
        unwritten = [self.config.image_token_id, self.config.eoi_token_id]
        processors.append(SuppressTokensLogitsProcessor(unwritten, device=kwargs["device"]))
        processors.append(_NoImageBegin(list(self.config.boi_token_ids), device=kwargs["device"]))
        return processors

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Give the images of the prompt to the first forward alone, or to each without a cache."""
        if use_cache and not is_first_iteration:
            kwargs |= {"latent_patches": None, "image_grids": None}
        elif kwargs.get("latent_patches") is not None:
            is_embedded = inputs_embeds is not None and is_first_iteration
            kwargs["mm_token_type_ids"] = self.model.get_image_mask(
                None if is_embedded else input_ids, inputs_embeds
            ).long()
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            **kwargs,
        )
        model_inputs.pop("mm_token_type_ids", None)  # its work is done in create_masks_for_generate
        return model_inputs

    @staticmethod
    def create_masks_for_generate(
        config: TransfusionConfig, inputs_embeds: Tensor, mm_token_type_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """The 4-D mask for caches of fixed size, with image blocks where `mm_token_type_ids` (B, L) is 1."""
        is_plain = mm_token_type_ids is None or config.image_attention == "causal"
        blocks = None if is_plain else image_block_ids(mm_token_type_ids, 1)
        return create_causal_mask(
            config,
            inputs_embeds,
            kwargs["attention_mask"],
            kwargs["past_key_values"],
            block_sequence_ids=blocks,
        )

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        # Patches lie flat over the batch: transformers would repeat patch by patch instead of row by row.
        latent_patches, image_grids = kwargs.pop("latent_patches", None), kwargs.pop("image_grids", None)
        if latent_patches is not None and expand_size > 1:
            rows = input_ids
            if (inputs_embeds := kwargs.get("inputs_embeds")) is not None:
                is_patch = self.model.get_image_mask(None, inputs_embeds)
                rows = torch.where(is_patch, self.config.image_token_id, self.config.eoi_token_id)
            documents = read_documents(rows, None, latent_patches, image_grids, self.config)
            repeated = [document for document in documents for _ in range(expand_size)]
            latent_patches = torch.cat([image for document in repeated for image in document.images])
            image_grids = image_grids.new_tensor([grid for document in repeated for grid in document.grids])
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, kwargs | {"latent_patches": latent_patches, "image_grids": image_grids}


__all__ = ["SAMPLING_DEFAULTS", "TransfusionGenerateOutput", "TransfusionGenerationMixin", "TransfusionImageOutput"]
