"""`TransfusionProcessor`: text and pictures -> what the model reads, and what it writes -> text and pictures.

A row is `text <boi> patch ... patch <eoi> text`; each patch position holds the id of `<image>`. No text can become a
control token: only a picture makes `<boi>`, `<image>` and `<eoi>`, only labels bring `<eos>`, only padding `<pad>`. A
chat template writes control tokens of its own (see `chat.py`); what its messages say stays text there too. Control
tokens are the tokenizer's special tokens. Tokens that were added as words, not special (`<think>` of some chat
models), are words here too, which any text may write.
A picture of a grid that has a size token, as `<boi_4x6>`, begins with that in place of `<boi>`.

Labels are unshifted (the model shifts them) and -100 is not learned. Nothing is learned where the input is `<boi>` or
a patch, so patches and `<eoi>` are left out; `<boi>` itself is learned, for the model decides to draw:

    input_ids   a   red   heart   <boi>   patch   patch   <eoi>   drawn   <eos>
    labels      a   red   heart   <boi>   -100    -100    -100    drawn   <eos>

Shapes: B rows, L tokens, N images of the whole batch in reading order, P patches of all of them, C latent channels,
p patch size, D = C * p * p.
"""

import copy
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.utils import ModelOutput, logging
from transformers.utils.chat_template_utils import _get_template_variables, get_json_schema

from .autoencoder import decode_latents, encode_pixels, load_vae, require_finite, save_vae, spatial_factor
from .chat import (
    CHAT_TEMPLATE,
    ChatTokens,
    check_conversations,
    choose_template,
    mark_chats,
    render_chats,
    tidy_conversation,
)
from .image_processing import TransfusionImageProcessor
from .latents import patchify, split_images, unpatchify
from .layout import Row, Token, cut_row, is_rendered_chat, pad_rows, padded_length, read_rows
from .processing_options import REFUSED_OPTIONS, TransfusionProcessorKwargs, unknown_options
from .sharing import SharedProcessor
from .special_tokens import control_tokens, first_ids, last_ids, longest_row, text_tokens


IGNORE_INDEX = -100

logger = logging.get_logger(__name__)

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class _ProcessorBase(SharedProcessor, ProcessorMixin):
    """transformers' tools ask the direct base of a processor what it inherits."""


class TransfusionProcessor(_ProcessorBase):
    """Owns the tokenizer, the image processor and the VAE.

    Args:
        image_processor: A `TransfusionImageProcessor`; its `vae_scale_factor` is set from the VAE.
        tokenizer: A fast tokenizer. `<boi>`, `<eoi>` and `<image>` are added, in this order, unless it has them or
            names its own `boi_token`, `eoi_token`, `image_token`.
        vae: A diffusers `AutoencoderKL`, `AutoencoderTiny` or `AutoencoderDC`, kept by reference and saved in `vae/`.
            None: pixels are the latents.
        chat_template: A Jinja template for `apply_chat_template`. None takes the tokenizer's own, if that places
            pictures, or else the shipped one, `CHAT_TEMPLATE`.
        size_token_grids: Grids (rows, columns) of patches, each of which gets a begin-of-image token of its own,
            `<boi_4x6>` for (4, 6), added behind the others. So a model can choose the size of what it draws.

    Raises:
        ValueError: A VAE of another class, or one that the image processor was not made for; image tokens that share
            an id; size tokens for what is no grid, or twice for one.
    """

    valid_processor_kwargs = TransfusionProcessorKwargs

    def __init__(
        self,
        image_processor: TransfusionImageProcessor,
        tokenizer: Any,
        vae: Any = None,
        chat_template: str | dict[str, str] | None = None,
        size_token_grids: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        # transformers' pipelines pad prompts by it, and go on behind them; it is saved only where init_kwargs has it.
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
        self.vae = vae
        self.size_token_grids = None if size_token_grids is None else _read_grids(size_token_grids)
        factor = 1 if vae is None else spatial_factor(vae)
        if image_processor.vae_scale_factor not in (1, factor):
            raise ValueError(
                f"The image processor's vae_scale_factor is {image_processor.vae_scale_factor}, but that of "
                f"{'pixels (vae=None)' if vae is None else 'the VAE'} is {factor}; give the VAE it was made for."
            )
        image_processor.vae_scale_factor = factor
        image_processor.check()
        tokens = [self.boi_token, self.eoi_token, self.image_token, *map(_size_token, self.size_token_grids or ())]
        missing = [token for token in tokens if token not in tokenizer.all_special_tokens]
        tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
        ids = tokenizer.convert_tokens_to_ids(tokens)
        if len(set(ids)) != len(tokens):
            raise ValueError(f"The image tokens {tokens} have the ids {ids}; the tokenizer must give each its own.")
        if chat_template is None:
            own = tokenizer.chat_template
            places_images = isinstance(own, str) and ("image_token" in own or self.image_token in own)
            self.chat_template = own if places_images else CHAT_TEMPLATE

    @property
    def boi_token(self) -> str:
        """The begin-of-image token."""
        return self.tokenizer.special_tokens_map.get("boi_token", "<boi>")

    @property
    def boi_token_id(self) -> int:
        """Id of the begin-of-image token."""
        return self.tokenizer.convert_tokens_to_ids(self.boi_token)

    @property
    def size_token_ids(self) -> list[int] | None:
        """Ids of the size tokens, in the order of `size_token_grids`; None where there are none."""
        if self.size_token_grids is None:
            return None
        return self.tokenizer.convert_tokens_to_ids([_size_token(grid) for grid in self.size_token_grids])

    @property
    def boi_token_ids(self) -> list[int]:
        """Ids of all begin-of-image tokens, `<boi>` and the size tokens."""
        return [self.boi_token_id, *(self.size_token_ids or ())]

    def boi_token_for(self, grid: tuple[int, int]) -> int:
        """Id of the token that begins a picture of `grid` (rows, columns): its size token, or else `<boi>`."""
        tokens = zip(self.size_token_grids or (), self.size_token_ids or (), strict=True)
        return dict(tokens).get(grid, self.boi_token_id)

    @property
    def eoi_token(self) -> str:
        """The end-of-image token."""
        return self.tokenizer.special_tokens_map.get("eoi_token", "<eoi>")

    @property
    def eoi_token_id(self) -> int:
        """Id of the end-of-image token."""
        return self.tokenizer.convert_tokens_to_ids(self.eoi_token)

    @property
    def image_token(self) -> str:
        """The placeholder of a picture in a string, and of each of its patches in ids."""
        return self.tokenizer.special_tokens_map.get("image_token", "<image>")

    @property
    def image_token_id(self) -> int:
        """Id of every patch."""
        return self.tokenizer.convert_tokens_to_ids(self.image_token)

    @property
    def latent_channels(self) -> int:
        """C: the VAE's latent channels, 3 where pixels are the latents."""
        return 3 if self.vae is None else self.vae.config.latent_channels

    @property
    def patch_dim(self) -> int:
        """D: length of a patch vector."""
        return self.latent_channels * self.image_processor.patch_size**2

    @property
    def model_input_names(self) -> list[str]:
        """What the processor makes for `forward`."""
        return ["input_ids", "attention_mask", "latent_patches", "image_grids"]

    def check_model(self, config: Any) -> None:
        """Raise a `ValueError` where a model of this config cannot read what the processor makes."""
        expected = {
            "latent_channels": self.latent_channels,
            "patch_size": self.image_processor.patch_size,
            "boi_token_id": self.boi_token_id,
            "eoi_token_id": self.eoi_token_id,
            "image_token_id": self.image_token_id,
        }
        wrong = [
            f"{name} is {getattr(config, name)} in the config and {value} in the processor"
            for name, value in expected.items()
            if getattr(config, name) != value
        ]
        theirs = sorted(zip(map(tuple, config.size_token_grids or ()), config.size_token_ids or (), strict=True))
        ours = sorted(zip(self.size_token_grids or (), self.size_token_ids or (), strict=True))
        if theirs != ours:
            wrong.append(f"size tokens (grid, id) are {theirs} in the config and {ours} in the processor")
        if config.vocab_size < len(self.tokenizer):
            wrong.append(f"vocab_size is {config.vocab_size} and the tokenizer has {len(self.tokenizer)} tokens")
        if wrong:
            raise ValueError(f"Model and processor do not fit: {'; '.join(wrong)}. Make one from the other's values.")

    def __call__(self, images: Any = None, text: Any = None, latents: Any = None, **kwargs: Any) -> BatchFeature:
        """Encode one row or a batch of rows.

        Args:
            images: A picture, a list of them in reading order, or one list per row. Pictures are local paths, bytes,
                PIL images, arrays or tensors; an array of four axes is a list of them.
            text: A string, or a list of parts `{"type": "text", "text": ...}` and `{"type": "image"}`, the picture
                under `"image"` or taken from `images`; or a list of such rows. In a string that has pictures
                `<image>` marks their places; in a string without, and in parts, it is ordinary text. White space
                beside a picture is stripped. What `apply_chat_template` returned keeps its control tokens, and its
                messages' pictures unless `images` brings all of them again. None: only the pictures are encoded.
            latents: Scaled latents (C, h, w), as `encode_images` makes them, in place of `images`.
            kwargs: Options, flat or in `text_kwargs`, `images_kwargs` and `common_kwargs`; what the tokenizer was
                made with (`padding`, `max_length`) is the default:

                - `return_labels`: Append `<eos>` and return `labels` (see the module's docstring).
                - `padding`: True or `"longest"` (the default), `"max_length"`, or False.
                - `padding_side`: By default right with labels, and for prompts that of the tokenizer, which is left
                  unless `from_pretrained` is told otherwise or it is set later.
                - `pad_to_multiple_of`: Pad further, to a multiple.
                - `max_length`: Longest row, in tokens; a longer one is refused.
                - `truncation`: Cut longer rows on the right instead, without `max_length` to the tokenizer's
                  `model_max_length`; they lose their `<eos>`. A row of which a picture would be cut is still refused.
                - `add_special_tokens`: False leaves the tokenizer's `<bos>` out.
                - `return_mm_token_type_ids`: Return `mm_token_type_ids` (B, L), 1 for patches and 0 elsewhere.
                - `return_tensors`: `"pt"`, `"np"`, or None for lists of ids.
                - Options of the image processor, for this call.

        Returns:
            `input_ids` and `attention_mask` (B, L), `labels` (B, L) if asked for; and where there are pictures
            `latent_patches` (P, D) float32 and `image_grids` (N, 2), (rows, columns) of patches.

        Raises:
            ValueError: An empty batch or row, pictures and placeholders that do not match, a row that is too long, a
                picture or a latent that cannot be used, an option that does not exist.
        """
        options = self._options(kwargs)
        if options["return_labels"] not in (True, False):
            raise ValueError(
                f"return_labels is {options['return_labels']!r}; allowed: True and False, and 'assistant' in "
                "apply_chat_template alone."
            )
        rows = read_rows(text, images, latents, self.image_token)
        self._warn_of_spelled_tokens(text, images is not None or latents is not None)
        if text is None:
            return BatchFeature(self._images(rows, options)[0], tensor_type=options["return_tensors"])
        return self._encode(rows, options)

    def _warn_of_spelled_tokens(self, text: Any, has_pictures: bool) -> None:
        """Say that strings are ordinary text, where some look as if they were meant not to be."""
        control = set(control_tokens(self.tokenizer).values()) - ({self.image_token} if has_pictures else set())
        strings = [text] if isinstance(text, str) else text or ()
        plain = [row for row in strings if isinstance(row, str) and not is_rendered_chat(row)]
        if found := sorted(token for token in control if any(token in row for row in plain)):
            logger.warning_once(
                f"A string spells the control tokens {found}. In a string they are ordinary text: give pictures in "
                "`images`, or parts, and a chat as messages to apply_chat_template, of which the result is passed as "
                "it is."
            )

    def _options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What a call was given, by name; the image processor's own under `images_kwargs`."""
        kwargs = dict(kwargs)
        for name in ("videos", "audio"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{name} is given; {type(self).__name__} reads text and images.")
        if unknown := sorted(unknown_options(kwargs)):
            raise ValueError(f"{', '.join(unknown)}: not an option of {type(self).__name__}; see its `__call__`.")
        # What the tokenizer says now, not what it was made with.
        init = {name: value for name, value in self.tokenizer.init_kwargs.items() if name != "padding_side"}
        labels = {"return_labels": kwargs.pop("return_labels", False), "return_assistant_tokens_mask": False}
        try:
            merged = self._merge_kwargs(TransfusionProcessorKwargs, tokenizer_init_kwargs=init, **kwargs)
        except (StrictDataclassError, TypeError) as error:
            raise ValueError(f"An option has a wrong value: {error}") from error
        text = merged["text_kwargs"]
        if refused := [name for name in REFUSED_OPTIONS if text.get(name)]:
            raise ValueError(f"{', '.join(refused)}: not possible for rows of text and pictures; leave it out.")
        if text.get("truncation") not in (None, False, "do_not_truncate") and text.get("max_length") is None:
            text["max_length"] = longest_row(self.tokenizer)
        images = {name: value for name, value in merged["images_kwargs"].items() if name != "return_tensors"}
        # An option of texts in transformers 5.17, then one of the processor.
        shared = {"return_mm_token_type_ids": merged.get("return_mm_token_type_ids", False)}
        return {"return_tensors": None, **shared, **text, **labels, "images_kwargs": images}

    def _encode(self, rows: list[Row], options: dict[str, Any]) -> BatchFeature:
        """Rows -> what the model reads."""
        images, sides = self._images(rows, options)
        grids = iter(sides)
        bos = first_ids(self.tokenizer) if options.get("add_special_tokens") in (None, True) else []
        eos = last_ids(self.tokenizer) if options["return_labels"] is True else []
        tokens = [self._row_tokens(row, grids, bos) for row in rows]
        tokens = [row if [row[-1][0]] == eos else row + [(token, False) for token in eos] for row in tokens]
        image_ids = (self.image_token_id, self.eoi_token_id)
        tokens = [cut_row(row, index, options, image_ids) for index, row in enumerate(tokens)]
        data = self._pad(tokens, options) | images
        return BatchFeature(data, tensor_type=options["return_tensors"])

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render messages, and with `tokenize` encode them as `__call__` does.

        The template's own control tokens count; those in the messages are ordinary text. In the shipped template a
        turn is its role, a line break, the content and `<eos>`. The role is ordinary text too, and what makes it a
        role is that it stands at the start or behind an `<eos>`, which no message can write.

        Args:
            conversation: A list of messages `{"role": ..., "content": ...}`, or a list of such lists. Content is a
                string or a list of parts as in `__call__`; a picture is under `"image"`, its file under `"path"` or
                `"url"`, or its file's bytes under `"base64"` or in a `data:` URL. Nothing is fetched.
            chat_template: A template, or the name of one, instead of the processor's.
            tools, documents: For templates that know them.
            add_generation_prompt: End with the beginning of an assistant's turn.
            continue_final_message: Leave the last turn open.
            return_assistant_tokens_mask: With `tokenize` and `return_dict`, return `assistant_masks` (B, L), 1 where
                the assistant wrote, as the template's generation blocks say.
            tokenize: Return ids. Without it, a string or a list of them, of which `__call__` makes the same ids: it
                remembers what in it is a control token. Whatever is made of it (`prompt + "x"`) is ordinary text.
            return_tensors: As in `__call__`.
            return_dict: With `tokenize`, return all that `__call__` does, not the ids alone.
            processor_kwargs: Options of `__call__`, which only count with `tokenize`, and `images` for image parts
                that have no picture of their own. `return_labels="assistant"` learns the assistant's turns alone.
            kwargs: Variables of the template; others are taken for options of `__call__`.

        Raises:
            ValueError: No messages; a picture that is not a local one; roles, tools, documents or variables that hold
                control tokens or would make some; a template that alters the messages' text or does not mark the
                assistant's.
        """
        if not conversation:
            raise ValueError(f"The conversation is {conversation!r}; give at least one message.")
        if add_generation_prompt and continue_final_message:
            raise ValueError("add_generation_prompt and continue_final_message exclude each other; give one of them.")
        template = choose_template(self.chat_template, chat_template)
        for name in ("sanitize_control_tokens", "load_audio_from_video"):  # always so, and never
            kwargs.pop(name, None)
        variables = {name: kwargs.pop(name) for name in kwargs.keys() & _get_template_variables(template)}
        given = {"return_tensors": None if return_tensors == "auto" else return_tensors, **kwargs}
        given |= processor_kwargs or {}
        images = given.pop("images", None)
        options = self._options(given) | {"return_assistant_tokens_mask": return_assistant_tokens_mask}
        marks_assistant = return_assistant_tokens_mask or options["return_labels"] == "assistant"
        if marks_assistant and (continue_final_message or not _GENERATION_BLOCK.search(template)):
            raise ValueError(
                "return_assistant_tokens_mask and return_labels='assistant' need a chat template with a generation "
                "block, and no continue_final_message."
            )
        is_batched = check_conversations(conversation)
        conversations = conversation if is_batched else [conversation]
        chats = mark_chats(list(map(tidy_conversation, conversations)), is_batched, images, needs_pictures=tokenize)
        tools = tools and [tool if isinstance(tool, Mapping) else get_json_schema(tool) for tool in tools]
        tokens = ChatTokens(
            self.tokenizer.special_tokens_map, [*control_tokens(self.tokenizer).values()], self.image_token
        )
        flags = {
            "chat_template": template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "return_assistant_tokens_mask": marks_assistant,
        }
        prompts = render_chats(chats, {"tools": tools, "documents": documents}, variables, flags, tokens)
        if not tokenize:
            return prompts if is_batched else prompts[0]
        out = self._encode([prompt.row for prompt in prompts], options)
        return out if return_dict else out["input_ids"]

    def _images(self, rows: list[Row], options: dict[str, Any]) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
        """What the model reads of the pictures, and the grid of each."""
        side = self.image_processor.patch_size
        latents = self._latents(rows, options["images_kwargs"])
        grids = [(latent.shape[1] // side, latent.shape[2] // side) for latent in latents]
        if not latents:
            return {}, grids
        patches = torch.cat([patchify(latent, side) for latent in latents])
        return {"latent_patches": patches, "image_grids": torch.tensor(grids)}, grids

    def _latents(self, rows: list[Row], images_kwargs: dict[str, Any]) -> list[Tensor]:
        """Scaled float32 latents (C, h, w) of all pictures, on the CPU."""
        parts = [part for row in rows for part in row if part.is_image]
        sources = [part.content for part in parts if part.kind == "picture"]
        pixels = self.image_processor(sources, **images_kwargs)["pixel_values"] if sources else []
        encoded = iter(self.encode_images(pixels))
        return [next(encoded).cpu() if part.kind == "picture" else self._given(part.content) for part in parts]

    def _given(self, latent: Any) -> Tensor:
        """Check a latent that a caller gives in place of a picture."""
        latent = torch.as_tensor(latent)
        shape, side = tuple(latent.shape), self.image_processor.patch_size
        if len(shape) != 3 or shape[0] != self.latent_channels or 0 in shape or shape[1] % side or shape[2] % side:
            raise ValueError(
                f"A latent has shape {shape}; it must be ({self.latent_channels}, h, w), h and w multiples of the "
                f"patch size {side}. Make latents with this processor's encode_images."
            )
        return require_finite(latent.detach().cpu().float(), "A given latent")

    def _row_tokens(self, row: Row, grids: Iterator[tuple[int, int]], bos: list[int]) -> list[Token]:
        """Tokens of a row; `grids` yields the grid of each picture."""
        tokens: list[Token] = []
        for part in row:
            if part.kind == "text":
                tokens += text_tokens(self.tokenizer, part)
                continue
            written = any(part.written)
            if part.kind == "control":
                ids = [self.tokenizer.convert_tokens_to_ids(part.content)]
            else:
                grid = next(grids)
                ids = [self.boi_token_for(grid), *[self.image_token_id] * (grid[0] * grid[1]), self.eoi_token_id]
            tokens += [(token, written) for token in ids]
        begins = [token for token, _ in tokens[:1]] == bos  # a chat template may have written it
        return tokens if begins else [(token, False) for token in bos] + tokens

    def _pad(self, rows: list[list[Token]], options: dict[str, Any]) -> dict[str, Any]:
        """Rows of tokens -> padded `input_ids`, `attention_mask`, and what else of their shape is asked for."""
        labels = options["return_labels"]
        side = options.get("padding_side") or ("right" if labels else self.tokenizer.padding_side)
        length = padded_length([len(row) for row in rows], options)
        pad_token_id = self.tokenizer.pad_token_id
        if pad_token_id is None and any(len(row) < length for row in rows):
            raise ValueError("The rows need padding, but the tokenizer has no pad_token; set it.")
        ids = [[token for token, _ in row] for row in rows]
        columns = {"input_ids": (ids, pad_token_id)}
        if options.get("return_attention_mask") is not False:
            columns["attention_mask"] = ([[1] * len(row) for row in ids], 0)
        if labels:
            columns["labels"] = (self._labels(rows, labels), IGNORE_INDEX)
        if options["return_assistant_tokens_mask"]:
            columns["assistant_masks"] = ([[int(written) for _, written in row] for row in rows], 0)
        if options["return_mm_token_type_ids"]:
            columns["mm_token_type_ids"] = ([[int(i == self.image_token_id) for i in row] for row in ids], 0)
        return {name: pad_rows(values, length, side, fill) for name, (values, fill) in columns.items()}

    def _labels(self, rows: list[list[Token]], labels: bool | str) -> list[list[int]]:
        unlearned = (self.image_token_id, self.eoi_token_id)
        return [
            [
                token if token not in unlearned and (written or labels is True) else IGNORE_INDEX
                for token, written in row
            ]
            for row in rows
        ]

    def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """The tokenizer's `decode`: ids -> text."""
        return super().decode(_require_ids(token_ids), *args, **kwargs)

    def batch_decode(self, sequences: Any, *args: Any, **kwargs: Any) -> list[str]:
        """The tokenizer's `batch_decode`: rows of ids -> texts."""
        return super().batch_decode(_require_ids(sequences), *args, **kwargs)

    @torch.no_grad()
    def encode_images(self, pixel_values: Sequence[Any], generator: torch.Generator | None = None) -> list[Tensor]:
        """Encode normalised pixels into the latents that the model sees.

        Args:
            pixel_values: Arrays or tensors (3, H, W), as the image processor makes them; sizes may differ.
            generator: Sample an `AutoencoderKL`'s distribution with it; None takes its mode.

        Returns:
            Scaled float32 latents (C, h, w), on the VAE's device.

        Raises:
            ValueError: A side that the VAE would round off, or a latent that is not finite.
        """
        factor = self.image_processor.vae_scale_factor
        if isinstance(pixel_values, Image.Image) or not all(isinstance(v, Tensor | np.ndarray) for v in pixel_values):
            raise ValueError(
                f"pixel_values is {type(pixel_values).__name__}, not arrays or tensors alone. Make pixels of pictures "
                "first, processor.image_processor(pictures)['pixel_values'], or call processor(images=pictures)."
            )
        pixels = [torch.as_tensor(value) for value in pixel_values]
        for value in pixels:
            if value.dim() != 3 or value.shape[0] != 3 or value.shape[1] % factor or value.shape[2] % factor:
                raise ValueError(
                    f"pixel_values holds the shape {tuple(value.shape)}; it must be (3, H, W), H and W multiples of "
                    f"{factor}, the VAE's factor."
                )
        if self.vae is None or not pixels:
            return [require_finite(value.float(), "A picture") for value in pixels]
        return encode_pixels(self.vae, pixels, generator)

    @torch.no_grad()
    def decode_images(self, latent_patches: Tensor, image_grids: Any) -> list[Image.Image]:
        """Turn patches into pictures.

        Args:
            latent_patches: (P, D).
            image_grids: (N, 2), or a list of (rows, columns).

        Returns:
            N pictures.

        Raises:
            ValueError: Patches of another length, not finite, or not filling the grids.
        """
        if not isinstance(latent_patches, Tensor):
            raise ValueError(
                f"latent_patches is a {type(latent_patches).__name__}; give one tensor (P, {self.patch_dim}), such as "
                "torch.cat of a list. Interleaved outputs go to post_process_multimodal_output."
            )
        if latent_patches.shape[-1] != self.patch_dim:
            raise ValueError(
                f"latent_patches have length {latent_patches.shape[-1]}; this processor's have {self.patch_dim}, "
                f"{self.latent_channels} channels of {self.image_processor.patch_size} x "
                f"{self.image_processor.patch_size}. Take the processor that was saved with the model."
            )
        grids = torch.as_tensor(image_grids).view(-1, 2)
        patches = split_images(require_finite(latent_patches.float(), "latent_patches"), grids)
        latents = [
            unpatchify(patch, (rows, columns), self.image_processor.patch_size)
            for patch, (rows, columns) in zip(patches, grids.tolist(), strict=True)
        ]
        return self.decode_latents(latents)

    @torch.no_grad()
    def decode_latents(self, latents: Any) -> list[Image.Image]:
        """Turn scaled latents into pictures.

        Args:
            latents: (N, C, h, w), or a list of (C, h, w) of any sizes.

        Returns:
            N pictures.

        Raises:
            ValueError: Latents of another shape, or not finite.
        """
        scaled = [require_finite(torch.as_tensor(latent).float(), "latents") for latent in latents]
        for latent in scaled:
            if latent.dim() != 3 or latent.shape[0] != self.latent_channels:
                raise ValueError(
                    f"A latent has shape {tuple(latent.shape)}; it must be ({self.latent_channels}, h, w), as this "
                    "processor's encode_images makes it."
                )
        pixels = scaled if self.vae is None else decode_latents(self.vae, scaled)
        return [self.image_processor.to_picture(value) for value in pixels]

    def post_process_multimodal_output(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Turn what `generate` returns into text and pictures.

        Args:
            generated_outputs: The output object of `generation_mode="interleaved"`, ids (B, L), or scaled latents
                (B, C, h, w), which `generation_mode="image"` generates.
            skip_special_tokens: Leave control tokens out of the text.
            generation_mode: That of `generate`. With `"interleaved"` ids give lists too.
            kwargs: Options of the tokenizer's `decode`.

        Returns:
            Of an output object per row a list of strings and pictures in order, what is new after the prompt. Of ids
            one string per row, as transformers' pipelines expect. Of latents one picture per row.

        Raises:
            ValueError: Placeholders and images that do not match, another mode, or outputs that are not the mode's.
        """
        if generation_mode not in (None, "text", "image", "interleaved"):
            raise ValueError(f"generation_mode is {generation_mode!r}; allowed: 'text', 'image', 'interleaved', None.")
        is_array = isinstance(generated_outputs, Tensor | np.ndarray)
        is_latents = is_array and generated_outputs.ndim == 4
        if generation_mode == "image" or (is_latents and generation_mode is None):
            if not is_latents:
                raise ValueError(
                    "generation_mode='image' decodes latents (B, C, h, w), which generate(generation_mode='image') "
                    "returns; leave the mode out for ids and interleaved outputs."
                )
            return self.decode_latents(generated_outputs)
        if is_array:
            texts = self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
            return texts if generation_mode != "interleaved" else [[text] for text in texts]
        images = list(itertools.chain.from_iterable(generated_outputs.images))
        grids = list(itertools.chain.from_iterable(generated_outputs.image_grids))
        pictures = iter(self.decode_images(torch.cat(images), grids) if images else [])
        new_ids = generated_outputs.sequences[:, generated_outputs.prompt_length :].tolist()
        placeholder = self.image_token_id
        rows = []
        for index, (ids, row_images) in enumerate(zip(new_ids, generated_outputs.images, strict=True)):
            runs = [(drawn, list(run)) for drawn, run in itertools.groupby(ids, lambda i: i == placeholder)]
            if (count := sum(drawn for drawn, _ in runs)) != len(row_images):
                raise ValueError(
                    f"Row {index} has {count} image blocks and {len(row_images)} images; give all of them."
                )
            options = {"skip_special_tokens": skip_special_tokens, **kwargs}
            row = [next(pictures) if drawn else self.decode(run, **options) for drawn, run in runs]
            rows.append([part for part in row if part != ""])
        return rows

    def save_parts(self, folder: str | os.PathLike) -> None:
        """Save the VAE in `vae/`, as safetensors."""
        if self.vae is not None:
            save_vae(self.vae, folder)

    def to_dict(self) -> dict[str, Any]:
        """What `processor_config.json` holds."""
        bare = copy.copy(self)
        del bare.vae  # transformers copies deeply whatever it finds
        if self.size_token_grids is None:
            del bare.size_token_grids
        return super(TransfusionProcessor, bare).to_dict()

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """How many patches pictures of these sizes (height, width) have; transformers' hook for inference servers."""
        if image_sizes is None:
            return MultiModalData()
        grids = [self.image_processor.patch_grid(*size, **kwargs) for size in image_sizes]
        counts = [rows * columns for rows, columns in grids]
        return MultiModalData(num_image_tokens=counts, num_image_patches=counts)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        """Add the VAE to what `from_pretrained` makes a processor of."""
        vae = kwargs.pop("vae", None)
        parts = super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)
        if vae is None:
            options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
            vae = load_vae(pretrained_model_name_or_path, kwargs.get("subfolder", ""), **options)
        if vae is None and (factor := parts[0].vae_scale_factor) != 1:
            raise ValueError(
                f"{pretrained_model_name_or_path} has no folder vae/, but its image processor is made for a VAE (its "
                f"vae_scale_factor is {factor}). Save the processor again with its VAE, or pass it: "
                "from_pretrained(path, vae=...)."
            )
        return [*parts, vae]

    @classmethod
    def from_args_and_dict(cls, args: list[Any], processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """transformers' last step of `from_pretrained`; keeps the padding side that was saved or asked for."""
        _, tokenizer, _ = args
        side = tokenizer.init_kwargs.get("padding_side", "left")
        made = super().from_args_and_dict(args, processor_dict, **kwargs)
        tokenizer.padding_side = side
        return made


def _require_ids(value: Any) -> Any:
    """Return ids, or raise a `ValueError` for what else `generate` returns."""
    for item in value if isinstance(value, list | tuple) else [value]:
        if isinstance(item, ModelOutput) or (isinstance(item, Tensor | np.ndarray) and "float" in str(item.dtype)):
            raise ValueError(
                f"A {type(item).__name__} of no ids cannot be decoded to text; latents and interleaved outputs go to "
                "post_process_multimodal_output."
            )
    return value


def _read_grids(grids: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Grids that may get a size token, each once."""
    for grid in grids:
        if not isinstance(grid, tuple | list) or len(grid) != 2 or not all(type(s) is int and s > 0 for s in grid):
            raise ValueError(f"size_token_grids holds {grid!r}; give (rows, columns), two positive integers.")
    listed = [(rows, columns) for rows, columns in grids]
    if len(set(listed)) != len(listed):
        raise ValueError(f"size_token_grids is {listed}; name each grid once.")
    return listed


def _size_token(grid: tuple[int, int]) -> str:
    return f"<boi_{grid[0]}x{grid[1]}>"


__all__ = [
    "CHAT_TEMPLATE",
    "IGNORE_INDEX",
    "TransfusionImageProcessor",
    "TransfusionProcessor",
    "TransfusionProcessorKwargs",
]
