"""`generate` and `generate_images`: transformers' generation of text, and the ways to draw with it (section 3).

Shapes: B rows, L tokens, K begin-of-image tokens, N images, n patches of one image, P patches of all, D patch_dim,
V vocabulary.
"""

import copy
import math
from collections.abc import Sequence
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
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask

from .caching import make_cache
from .configuration import TransfusionConfig
from .context import Document, Grid, read_documents
from .denoising import Drawing, StepCallback, draw_images, draw_noise
from .diffusion import check_scheduler, make_scheduler
from .generation_options import (
    GENERATION_MODES,
    NOT_FOR_IMAGES,
    NOT_READ,
    NOT_WHILE_DRAWING,
    SAMPLING_DEFAULTS,
    check_count,
    check_guidance,
    refuse_forced_tokens,
    refuse_foreign_names,
    refuse_options,
)
from .inputs import check_image_shapes, drop_cached_images
from .interleaving import (
    InterleavedDecoder,
    TransfusionGenerateOutput,
    TransfusionImageOutput,
    TransfusionStreamer,
    append_boi,
    check_batch,
    check_room,
    grid_after,
    list_generators,
    list_grids,
)
from .latents import image_block_ids, unpatchify


class _ImageGate(LogitsProcessor):
    """Keeps patches and end-of-image from being sampled, and begin-of-image where no image may begin.

    A patch is no token, and the decoder itself closes an image. It runs after all that a caller may add, which cannot
    outbid it then, and before the candidates are cut down (top-k and so on), so that one is left to sample.
    """

    supports_continuous_batching = True

    def __init__(self, config: TransfusionConfig) -> None:
        self.unwritten = torch.tensor([config.image_token_id, config.eoi_token_id])
        self.begins = torch.tensor(config.boi_token_ids)
        self.open: Tensor | None = None  # (B, K), which begin-of-image tokens a row may write; None is none of them

    def place(self, device: Any) -> None:
        """Move to where the scores will be."""
        self.unwritten, self.begins = self.unwritten.to(device), self.begins.to(device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Set the scores (B, V) of what may not be sampled to minus infinity."""
        scores = scores.index_fill(1, self.unwritten, -math.inf)
        if self.open is None:
            return scores.index_fill(1, self.begins, -math.inf)
        return scores.index_copy(1, self.begins, scores[:, self.begins].masked_fill(~self.open, -math.inf))


class _SomeTokenLeft(LogitsProcessor):
    """Says so where the constraints of a caller allow only tokens that cannot be sampled."""

    supports_continuous_batching = True

    def __init__(self, num_beams: int) -> None:
        self.num_beams = num_beams

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Check that each row (with beams, one of its beams) of `scores` (B, V) has a token left."""
        is_dead = scores.isneginf().all(dim=1).view(-1, self.num_beams).all(dim=1)
        if is_dead.any():
            raise ValueError(
                f"The constraints leave rows {is_dead.nonzero().flatten().tolist()} no token that can be sampled; "
                "patches and end-of-image tokens never are, and begin-of-image tokens only where an image may begin. "
                "Allow another token."
            )
        return scores


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
        guidance_interval: tuple[float, float] | None = None,
    ) -> Drawing:
        """Fill what the caller left open from `generation_config`, then from the model's, and check it.

        `scheduler` is a diffusers scheduler, the name of one, or None for the objective's default.
        """
        default_steps, default_scale = SAMPLING_DEFAULTS[self.config.objective]
        steps = self._setting("num_inference_steps", num_inference_steps, generation_config, default_steps)
        scale = self._setting("guidance_scale", guidance_scale, generation_config, default_scale)
        interval = self._setting("guidance_interval", guidance_interval, generation_config, (0.0, 1.0))
        check_count("num_inference_steps", steps, 1)
        scale, interval = check_guidance(scale, interval)
        if scheduler is None or isinstance(scheduler, str):
            shift = self.config.timestep_shift if self.config.objective == "flow" else 1.0  # ddpm draws uniformly
            scheduler = make_scheduler(
                self.config.objective, scheduler, shift=shift, num_train_timesteps=self.config.num_train_timesteps
            )
        check_scheduler(scheduler, self.config.objective, self.config.num_train_timesteps)
        return Drawing(scheduler, int(steps), scale, callback, interval)

    def _setting(self, name: str, given: Any, generation_config: GenerationConfig | None, default: Any) -> Any:
        """`given`, or else `name` of `generation_config`, or of the model's, or else the `default`."""
        for config in (generation_config, self.generation_config):
            if given is None and config is not None:
                given = getattr(config, name, None)  # absent where the config is of another model
        return default if given is None else given

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
        generation_config: GenerationConfig | None = None,
        guidance_interval: tuple[float, float] | None = None,
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
            generation_config: Steps and guidance where they are not given; by default the model's.
            guidance_interval: (low, high) shares of the schedule, 0 clean and 1 noise, between which there is guidance
                (Kynkaanniemi et al. 2024); a step outside costs half. By default everywhere.

        Raises:
            ValueError: An empty batch, an impossible grid or one that a prompt's size token contradicts, a prompt that
                leaves no room for its image in `max_position_embeddings`, a scheduler of another objective, lists of
                wrong lengths.
        """
        documents, grids = self._read_prompts(
            input_ids, attention_mask, latent_patches, image_grids, output_image_grids
        )
        drawing = self.prepare_drawing(
            num_inference_steps, guidance_scale, scheduler, callback, generation_config, guidance_interval
        )
        generators = list_generators(generator, len(documents))
        noise = self._initial_noise(latents, grids, generators)
        negative_documents = None
        if negative_input_ids is not None:
            negative_documents = self._read_negatives(
                negative_input_ids, negative_attention_mask, latent_patches, image_grids, grids
            )
        drawn = draw_images(self, documents, noise, grids, drawing, generators, negative_documents)
        return TransfusionImageOutput(torch.cat(drawn), torch.tensor(grids, device=self.device))

    def _read_prompts(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        latent_patches: Tensor | None,
        image_grids: Any,
        output_image_grids: Any,
    ) -> tuple[list[Document], list[Grid]]:
        """The prompts, each ending in begin-of-image, and the grid of what is drawn after each."""
        check_batch(input_ids)
        if latent_patches is not None and image_grids is not None:
            check_image_shapes(self.config, latent_patches, image_grids)
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
        self._begin_images(documents, grids)
        return documents, grids

    def _begin_images(self, documents: list[Document], grids: list[Grid]) -> None:
        for document, grid in zip(documents, grids, strict=True):
            append_boi(document, grid, self.config)
            check_room(document, grid, self.config)

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
            grid_after(document, grid, self.config)  # refuses a size token of another grid
        self._begin_images(documents, drawn_grids)
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
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *,
        generation_mode: str | None = None,
        image_grids: Any = None,
        output_image_grids: Any = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        scheduler: Any = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        max_images: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts: transformers' `generate`, with images.

        The arguments of `generate_images` mean the same here. Patches and end-of-image tokens are never sampled.

        Args:
            inputs: (B, L) prompts, or `input_ids`.
            generation_config, logits_processor, stopping_criteria: As in transformers.
            generation_mode: `"text"` returns what transformers returns; images can only be in the prompt
                (`latent_patches`, `image_grids`). `"image"` draws one image after each prompt and returns the scaled
                latents, (B * num_return_sequences, C, H, W) in float32; it also takes `negative_input_ids`,
                `negative_attention_mask`, `latents` and `callback`. It chooses no token, so `max_new_tokens` and the
                settings of sampling are not read. `"interleaved"` draws whenever begin-of-image is chosen, by greedy
                decoding or sampling, and always returns a `TransfusionGenerateOutput`. By default that of the
                generation config, given or the model's, or else `"text"`.
            image_grids, output_image_grids: Where the config has size tokens, the model chooses the grid of each image
                in interleaved mode by the token it begins it with, unless one is named here.
            num_inference_steps, guidance_scale, guidance_interval, scheduler: How to draw.
            generator: One for all images, or one for each returned row.
            max_images: In interleaved mode, how many images a row may draw; after these it writes on without.
            kwargs: Everything else that transformers takes. Beside `past_key_values` come all images of the prompts,
                or those alone that are not in the cache.

        In interleaved mode patches and end-of-image tokens do not count in `max_new_tokens`, and an image that was
        begun is always finished and closed, also where begin-of-image is the last token or `max_time` is over. No
        image is begun that would not fit in `max_position_embeddings`. A streamer gets the text as ids, without the
        tokens of images, and if it has `put_image(latent_patches, grid)`, as `TransfusionStreamer` has, each image.

        Raises:
            ValueError: An unknown mode, drawing arguments in text mode, an option that cannot work with images, a
                named grid that the size token at the end of a prompt contradicts, images of different grids in image
                mode, a name of another library.
        """
        mode = self._setting("generation_mode", generation_mode, generation_config, "text")
        if mode not in GENERATION_MODES:
            raise ValueError(f"generation_mode={mode!r}; allowed: {', '.join(map(repr, GENERATION_MODES))}.")
        kwargs = {name: value for name, value in kwargs.items() if name not in NOT_READ}
        has_images = self._check_inputs(inputs, image_grids, kwargs)
        prompt_grids = {"image_grids": image_grids} if has_images else {}
        how: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        how |= {"guidance_interval": guidance_interval, "scheduler": scheduler}
        drawing: dict[str, Any] = {**how, "generator": generator}
        custom = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
        if mode == "text":
            named = {"image_grids": None if has_images else image_grids, "output_image_grids": output_image_grids}
            self._refuse_drawing({**named, **drawing, "max_images": max_images}, kwargs)
            if has_images:
                self._refuse_assistant_of_text(kwargs.get("assistant_model"))
                kwargs |= self._new_images(inputs, image_grids, **kwargs)
            # Embeddings first: transformers reads the batch size off the first tensor, and patches lie flat.
            embedded = {name: kwargs.pop(name) for name in ("inputs_embeds",) if name in kwargs}
            return super().generate(inputs, generation_config, **custom, **embedded, **kwargs)
        if mode == "image":
            refuse_options("image", {**custom, "max_images": max_images, **kwargs}, NOT_FOR_IMAGES)
            arguments = {"image_grids": image_grids, **drawing, **kwargs}
            return self._generate_latents(inputs, generation_config, output_image_grids, **arguments)
        self._refuse_in_interleaved(generation_config, kwargs, max_images)
        gate = _ImageGate(self.config)
        grids = image_grids if not has_images and output_image_grids is None else output_image_grids
        settings = self.prepare_drawing(**how, generation_config=generation_config)
        decoder = InterleavedDecoder(settings, grids, generator, gate, kwargs.pop("streamer", None), max_images)
        custom["logits_processor"] = LogitsProcessorList([*(logits_processor or []), gate])
        return super().generate(inputs, generation_config, **custom, custom_generate=decoder, **prompt_grids, **kwargs)

    def _check_inputs(self, inputs: Tensor | None, image_grids: Any, kwargs: dict[str, Any]) -> bool:
        """Refuse what does not fit in any mode; say whether there are images in the prompts."""
        refuse_foreign_names(kwargs)
        for name, ids in (("inputs", inputs), ("input_ids", kwargs.get("input_ids"))):
            if ids is not None and not isinstance(ids, Tensor):
                raise ValueError(
                    f"{name} is a {type(ids).__name__}; give ids, **processor(text=..., return_tensors='pt')."
                )
        if (length := kwargs.get("max_new_tokens")) is not None:
            check_count("max_new_tokens", length, 1)
        latent_patches = kwargs.get("latent_patches")
        if latent_patches is None:
            return False
        if all(prompts is None for prompts in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))):
            raise ValueError(
                "latent_patches came without input_ids, as the processor gives them for pictures without a text; "
                'give processor(text="<image>", images=...).'
            )
        if image_grids is not None:
            check_image_shapes(self.config, latent_patches, image_grids)
        return True

    def _new_images(
        self,
        inputs: Tensor | None,
        image_grids: Any,
        latent_patches: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The images of the prompts that are not in the cache yet: `latent_patches` and `image_grids`."""
        images = latent_patches, image_grids
        input_ids = inputs if input_ids is None else input_ids
        if past_key_values is not None and input_ids is not None and image_grids is not None:
            length, past_length = input_ids.shape[1], int(past_key_values.get_seq_length())
            # Ids that are shorter than their mask are the new ones alone.
            is_whole = attention_mask is None or attention_mask.shape[1] == length
            if is_whole and 0 < past_length < length:
                images = drop_cached_images(self.config, input_ids, *images, past_length)
        return dict(zip(("latent_patches", "image_grids"), images, strict=True))

    def _refuse_drawing(self, arguments: dict[str, Any], kwargs: dict[str, Any]) -> None:
        """Refuse arguments that only drawing reads."""
        for name in ("negative_input_ids", "negative_attention_mask", "latents", "callback"):
            arguments[name] = kwargs.get(name)
        if given := [name for name, value in arguments.items() if value is not None]:
            raise ValueError(
                f"{', '.join(given)} cannot work in text mode; use generation_mode='interleaved', or 'image'."
            )

    def _refuse_assistant_of_text(self, assistant: Any) -> None:
        """Refuse a model that cannot read the images of the prompt."""
        kind = getattr(getattr(assistant, "config", None), "model_type", self.config.model_type)
        if kind != self.config.model_type:
            raise ValueError(
                f"assistant_model is a {kind} model, which cannot read the images of the prompt; give one of "
                f"{self.config.model_type}, or prompts of text."
            )

    def _refuse_in_interleaved(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any], max_images: int | None
    ) -> None:
        """Refuse what the interleaved loop would not do, of the call's options and of the generation config's."""
        if max_images is not None:
            check_count("max_images", max_images, 0)
        config, inputs = self._prepare_generation_config(generation_config, **kwargs)
        refuse_options("interleaved", {**config.to_dict(), **kwargs}, NOT_WHILE_DRAWING)
        if (method := config.get_generation_mode()) not in ("greedy_search", "sample"):
            raise ValueError(f"{method.value} cannot draw: interleaved generation is greedy or samples.")
        # Under FSDP and DeepSpeed all processes have to run the model equally often, and each draws when it wants to.
        if self._extract_generation_mode_kwargs(None, {}, None, None, None).get("synced_gpus"):
            raise ValueError(
                "The model is sharded over several processes, which cannot draw at times of their own. Use "
                "generation_mode='image' with batches of one size, or gather the model."
            )
        taken = {"input_ids", "attention_mask", "latent_patches", "tokenizer", "streamer", "prefix_allowed_tokens_fn"}
        taken |= set(NOT_WHILE_DRAWING)
        if unread := [name for name, value in inputs.items() if value is not None and name not in taken]:
            raise ValueError(f"{', '.join(unread)}: generation_mode='interleaved' does not read this; leave it out.")

    def _generate_latents(
        self,
        inputs: Tensor | None,
        generation_config: GenerationConfig | None,
        output_image_grids: Any,
        image_grids: Any = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        latent_patches: Tensor | None = None,
        negative_input_ids: Tensor | None = None,
        negative_attention_mask: Tensor | None = None,
        num_return_sequences: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The image mode: one image after each prompt, as scaled latents (B * num_return_sequences, C, H, W)."""
        input_ids = inputs if input_ids is None else input_ids
        if input_ids is None:
            raise ValueError("generation_mode='image' came without prompts; give input_ids (rows, length).")
        check_batch(input_ids)
        config = GenerationConfig() if generation_config is None else generation_config
        refuse_options("image", config.to_dict(), NOT_FOR_IMAGES)
        if kwargs.pop("return_dict_in_generate", None) or config.return_dict_in_generate:
            raise ValueError(
                "return_dict_in_generate=True: generation_mode='image' returns a tensor (B, C, H, W) of latents. "
                "Leave it out, or call generate_images, which returns an object with patches and grids."
            )
        names = ("num_inference_steps", "guidance_scale", "guidance_interval", "scheduler", "generator", "latents")
        drawing = {name: kwargs.pop(name, None) for name in (*names, "callback")}
        if unknown := [name for name, value in kwargs.items() if value is not None and name not in config.to_dict()]:
            raise ValueError(f"{', '.join(unknown)}: generation_mode='image' does not read this; leave it out.")
        if attention_mask is None:  # as transformers does for text: padding is hidden
            prepared = copy.copy(self.generation_config)
            self._prepare_special_tokens(prepared, False, device=input_ids.device, batch_size=len(input_ids))
            attention_mask = self._prepare_attention_mask_for_generation(input_ids, prepared, {})
        copies = config.num_return_sequences if num_return_sequences is None else num_return_sequences
        copies = 1 if copies is None else copies
        check_count("num_return_sequences", copies, 1)
        has_images = latent_patches is not None
        input_ids, prompts = self._expand_inputs_for_generation(
            copies,
            input_ids=input_ids,
            attention_mask=attention_mask,
            latent_patches=latent_patches,
            image_grids=image_grids if has_images else None,
        )
        negatives = {"negative_input_ids": negative_input_ids, "negative_attention_mask": negative_attention_mask}
        repeated = {
            name: None if rows is None else rows.repeat_interleave(copies, dim=0) for name, rows in negatives.items()
        }
        prompts["image_grids"] = prompts["image_grids"] if has_images else image_grids
        prompts["output_image_grids"] = output_image_grids
        _, grids = self._read_prompts(input_ids, **prompts)
        if len(set(grids)) > 1:
            raise ValueError(
                f"The images to draw have the grids {sorted(set(grids))}, which fit in no one tensor; name one grid "
                "for all in output_image_grids, or call generate_images, which returns patches of any grids."
            )
        drawn = self.generate_images(input_ids, **prompts, **repeated, **drawing, generation_config=generation_config)
        assert drawn.latent_patches is not None
        patches = drawn.latent_patches.view(len(grids), -1, self.config.patch_dim)
        return unpatchify(patches, grids[0], self.config.patch_size)

    def heal_tokens(self, input_ids: Tensor, tokenizer: Any = None) -> Tensor:
        """transformers' `heal_tokens`, which writes prompts anew from their text; it would lose images."""
        if (input_ids == self.config.image_token_id).any():
            raise ValueError("token_healing=True would lose the images of the prompt; leave it out.")
        return super().heal_tokens(input_ids, tokenizer)

    def _extract_generation_mode_kwargs(
        self, custom_generate: Any, kwargs: dict[str, Any], *args: Any, **named: Any
    ) -> dict[str, Any]:
        # transformers loses the tokenizer, which stop strings need, where the decoding loop is not its own.
        tokenizer = kwargs.get("tokenizer")
        mode_kwargs = super()._extract_generation_mode_kwargs(custom_generate, kwargs, *args, **named)
        return mode_kwargs if tokenizer is None else mode_kwargs | {"tokenizer": tokenizer}

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        is_given = model_kwargs.get("past_key_values") is not None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        is_plain = generation_config.cache_implementation in (None, "dynamic")
        if not is_given and is_plain and isinstance(model_kwargs.get("past_key_values"), DynamicCache):
            model_kwargs["past_key_values"] = make_cache(self)

    def _get_logits_processor(
        self,
        generation_config: GenerationConfig,
        *args: Any,
        logits_processor: LogitsProcessorList | None = None,
        device: Any = None,
        model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> LogitsProcessorList:
        custom = list(logits_processor or [])
        gate = next((processor for processor in custom if isinstance(processor, _ImageGate)), None)
        closed = [self.config.image_token_id, self.config.eoi_token_id]
        if gate is None:  # no interleaved decoder brought its own
            custom.append(gate := _ImageGate(self.config))
            closed += self.config.boi_token_ids
        gate.place(self.device if device is None else device)
        refuse_forced_tokens(generation_config, closed)
        if generation_config.prefill_chunk_size is not None and (model_kwargs or {}).get("latent_patches") is not None:
            raise ValueError(
                f"prefill_chunk_size={generation_config.prefill_chunk_size} would cut through the images of the "
                "prompt; leave it out."
            )
        # The guidance scale is that of images; transformers would guide text with it.
        generation_config = copy.copy(generation_config)
        generation_config.guidance_scale = None
        named = {"logits_processor": LogitsProcessorList(custom), "device": device, "model_kwargs": model_kwargs}
        processors = super()._get_logits_processor(generation_config, *args, **named, **kwargs)
        if len(custom) > 1 or kwargs.get("prefix_allowed_tokens_fn") is not None:
            processors.append(_SomeTokenLeft(generation_config.num_beams or 1))
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
        cache, has_images = kwargs.get("past_key_values"), kwargs.get("latent_patches") is not None
        if has_images and use_cache and not is_first_iteration and cache is not None:
            # The first forward of an assistant is not announced as the first, but its cache is empty.
            is_first_iteration = has_images = bool(cache.get_seq_length() == 0)
        if has_images:
            is_embedded = inputs_embeds is not None and is_first_iteration
            kwargs["token_type_ids"] = self.model.get_image_mask(
                None if is_embedded else input_ids, inputs_embeds
            ).long()
        else:
            kwargs |= {"latent_patches": None, "image_grids": None}
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            **kwargs,
        )
        model_inputs.pop("token_type_ids", None)  # its work is done in create_masks_for_generate
        return model_inputs

    @staticmethod
    def create_masks_for_generate(
        config: TransfusionConfig, inputs_embeds: Tensor, token_type_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """The 4-D mask for caches of fixed size, with image blocks where `token_type_ids` (B, L) is 1."""
        is_plain = token_type_ids is None or config.image_attention == "causal"
        blocks = None if is_plain else image_block_ids(token_type_ids, 1)
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


__all__ = [
    "SAMPLING_DEFAULTS",
    "TransfusionGenerateOutput",
    "TransfusionGenerationMixin",
    "TransfusionImageOutput",
    "TransfusionStreamer",
]
