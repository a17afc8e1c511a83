"""`TransfusionProcessor`: text and pictures -> what the model reads, and what it writes -> text and pictures.

A row is `text <boi> patch ... patch <eoi> text`; each patch position holds the id of `<image>`. No text can become a
control token: only a picture makes `<boi>`, `<image>` and `<eoi>`, only labels bring `<eos>`, only padding `<pad>`.
A picture of a grid that has a size token, as `<boi_4x6>`, begins with that in place of `<boi>`.

Labels are unshifted (the model shifts them) and -100 is not learned. Nothing is learned where the input is `<boi>` or
a patch, so patches and `<eoi>` are left out; `<boi>` itself is learned, for the model decides to draw:

    input_ids   a   red   heart   <boi>   patch   patch   <eoi>   drawn   <eos>
    labels      a   red   heart   <boi>   -100    -100    -100    drawn   <eos>

Shapes: B rows, L tokens, N images of the whole batch in reading order, P patches of all of them, C latent channels,
p patch size, D = C * p * p.
"""

import itertools
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .autoencoder import decode_latents, encode_pixels, load_vae, require_finite, save_vae, spatial_factor
from .image_processing import TransfusionImageProcessor
from .latents import patchify, split_images, unpatchify


IGNORE_INDEX = -100

_CALL_OPTIONS = ("return_labels", "padding", "padding_side", "max_length", "truncation", "images_kwargs")
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


class _Text(NamedTuple):
    """A stretch of text; in `trusted` text, a chat template's own, control tokens count."""

    text: str
    trusted: bool = False


class _Picture(NamedTuple):
    """A picture to encode, or a latent (C, h, w) if `is_latent`."""

    source: Any
    is_latent: bool = False


_Row = list[_Text | _Picture]
_OPEN = _Picture(None)  # a placeholder whose picture is in `images` or `latents`; compared by identity


class TransfusionProcessor(ProcessorMixin):
    """Owns the tokenizer, the image processor and the VAE.

    Args:
        image_processor: A `TransfusionImageProcessor`; its `vae_scale_factor` is set from the VAE.
        tokenizer: A fast tokenizer. `<boi>`, `<eoi>` and `<image>` are added, in this order, unless it has them or
            names its own `boi_token`, `eoi_token`, `image_token`.
        vae: A diffusers `AutoencoderKL`, `AutoencoderTiny` or `AutoencoderDC`, kept by reference and saved in `vae/`.
            None: pixels are the latents.
        chat_template: A Jinja template for `apply_chat_template`.
        size_token_grids: Grids (rows, columns) of patches, each of which gets a begin-of-image token of its own,
            `<boi_4x6>` for (4, 6), added behind the others. So a model can choose the size of what it draws.

    Raises:
        ValueError: A VAE of another class, or one that the image processor was not made for; image tokens that share
            an id; size tokens for what is no grid, or twice for one.
    """

    # A slot keeps the VAE out of `__dict__`, which transformers deep-copies whenever it prints or saves a processor.
    __slots__ = ("size_token_grids", "vae")

    def __init__(
        self,
        image_processor: TransfusionImageProcessor,
        tokenizer: Any,
        vae: Any = None,
        chat_template: str | dict[str, str] | None = None,
        size_token_grids: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
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

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        latents: Any = None,
        return_labels: bool = False,
        padding: bool | str = True,
        padding_side: str | None = None,
        max_length: int | None = None,
        truncation: bool = False,
        return_tensors: str | None = None,
        images_kwargs: dict[str, Any] | None = None,
    ) -> BatchFeature:
        """Encode one row or a batch of rows.

        Args:
            images: A picture, a list of them in reading order, or one list per row. Pictures are local paths, bytes,
                PIL images, arrays or tensors.
            text: A string, or a list of parts `{"type": "text", "text": ...}` and `{"type": "image"}`, the picture
                under `"image"` or taken from `images`; or a list of such rows. In a string that has pictures
                `<image>` marks their places; in a string without, and in parts, it is ordinary text. White space
                beside a picture is stripped.
            latents: Scaled latents (C, h, w), as `encode_images` makes them, in place of `images`.
            return_labels: Append `<eos>` and return `labels` (see the module's docstring).
            padding: True or `"longest"`, `"max_length"`, or False.
            padding_side: By default left for prompts and right with labels.
            max_length: Longest row, in tokens; a longer one is refused.
            truncation: Cut longer rows on the right instead; they lose their `<eos>`. A row of which a picture would
                be cut is still refused.
            return_tensors: `"pt"`, `"np"`, or None for lists of ids.
            images_kwargs: Options of the image processor, for this call.

        Returns:
            `input_ids` and `attention_mask` (B, L), `labels` (B, L) if asked for; and where there are pictures
            `latent_patches` (P, D) float32 and `image_grids` (N, 2), (rows, columns) of patches.

        Raises:
            ValueError: An empty batch or row, pictures and placeholders that do not match, a row that is too long, a
                picture or a latent that cannot be used.
        """
        rows = self._layout(text, images, latents)
        latents = self._latents(rows, images_kwargs or {})
        patches = [patchify(latent, self.image_processor.patch_size) for latent in latents]
        sides = [[side // self.image_processor.patch_size for side in latent.shape[1:]] for latent in latents]
        grids = iter([(rows, columns) for rows, columns in sides])
        bos, eos = self._bos(), self._eos() if return_labels else []
        all_ids = [self._row_ids(row, grids, bos) + eos for row in rows]
        all_ids = [self._cut(ids, index, max_length, truncation) for index, ids in enumerate(all_ids)]
        side = padding_side or ("right" if return_labels else "left")
        data = self._pad(all_ids, padding, side, max_length, return_labels)
        if patches:
            data |= {"latent_patches": torch.cat(patches), "image_grids": torch.tensor(sides)}
        return BatchFeature(data, tensor_type=return_tensors)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render messages, and with `tokenize` encode them as `__call__` does.

        The template's own control tokens count; those in the messages are ordinary text.

        Args:
            conversation: A list of messages `{"role": ..., "content": ...}`, or a list of such lists. Content is a
                string or a list of parts as in `__call__`; a picture is under `"image"`, or its file under `"path"`.
            chat_template: A template, or the name of one, instead of the processor's.
            tokenize: Return ids, not a string.
            return_tensors: As in `__call__`.
            return_dict: With `tokenize`, return all that `__call__` does, not the ids alone.
            processor_kwargs: With `tokenize`, options of `__call__`.
            kwargs: `add_generation_prompt`, `continue_final_message` and variables of the template.

        Raises:
            ValueError: A picture that is not a local one, a control token in a role or variable, or a template that
                alters the messages' text.
        """
        if not tokenize:
            return super().apply_chat_template(conversation, chat_template=chat_template, **kwargs)
        options = {name: kwargs.pop(name) for name in _CALL_OPTIONS if name in kwargs} | (processor_kwargs or {})
        kwargs.pop("sanitize_control_tokens", None)  # always so here
        self._refuse_control_tokens(kwargs)
        # Random marks are rendered in place of the messages' texts and then replaced by them, so that no message can
        # pass for a part of the template.
        mark = secrets.token_hex(16)
        texts: list[str] = []
        conversations = [conversation] if isinstance(conversation[0], Mapping) else conversation
        pictures: list[list[Any]] = [[] for _ in conversations]
        marked = [
            [self._mark_message(message, mark, texts, found) for message in messages]
            for messages, found in zip(conversations, pictures, strict=True)
        ]
        prompts = super().apply_chat_template(marked, chat_template=chat_template, **kwargs)
        rows = [self._unmark(prompt, mark, texts) for prompt in prompts]
        out = self(text=rows, images=pictures, **{"return_tensors": return_tensors, **options})
        return out if return_dict else out["input_ids"]

    def _mark_message(self, message: Mapping, mark: str, texts: list[str], pictures: list[Any]) -> dict[str, Any]:
        """Copy a message, with marks for its texts; collect the texts and pictures."""
        self._refuse_control_tokens({key: value for key, value in message.items() if key != "content"})

        def marked(text: str) -> str:
            texts.append(text)
            return f"{mark}:{len(texts) - 1};" if text else ""  # templates ask whether a text is empty

        content = message.get("content") or ""
        if isinstance(content, str):
            return {**message, "content": marked(content)}
        parts = []
        for part in content:
            if part.get("type") == "image" and "path" in part:
                part = {"type": "image", "image": part["path"]}
            segment = _parse_part(part)
            if isinstance(segment, _Text):
                parts.append({"type": "text", "text": marked(segment.text)})
            elif segment is _OPEN:
                raise ValueError(
                    f"An image part of a message has the keys {sorted(part)}; give the picture under 'image' or its "
                    "file under 'path'. URLs are not fetched."
                )
            else:
                pictures.append(segment.source)
                parts.append({"type": "image"})
        return {**message, "content": parts}

    def _unmark(self, prompt: str, mark: str, texts: list[str]) -> _Row:
        """Cut a rendered prompt into the template's text, the messages' texts and open placeholders."""
        row: _Row = []
        for index, piece in enumerate(re.split(rf"{mark}:(\d+);", prompt)):
            if index % 2:
                row.append(_Text(texts[int(piece)]))
            elif any(mark[start : start + 8] in piece.lower() for start in range(len(mark) - 7)):
                raise ValueError("The chat template alters the text of a message; use one that prints it as it is.")
            else:
                row += self._split(piece, trusted=True)
        return row

    def _refuse_control_tokens(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if found := [token for token in self._control_tokens().values() if token in str(value)]:
                raise ValueError(
                    f"{name!r} of a chat holds the control tokens {found}; only the content of messages may, where "
                    "they are ordinary text."
                )

    def _layout(self, text: Any, images: Any, latents: Any) -> list[_Row]:
        """Rows of texts and pictures, every placeholder filled, neighbouring texts joined."""
        if images is not None and latents is not None:
            raise ValueError("Both images and latents are given; give the one or the other.")
        if not isinstance(text, str | list | tuple) or not text:
            raise ValueError(f"text is {text!r}; give a string or a list of parts, not empty, or a list of such rows.")
        batch = [text] if isinstance(text, str) or isinstance(text[0], Mapping) else text
        given, nested = _as_groups(images if latents is None else latents, len(batch))
        rows = [self._parse_row(row, index, bool(given[index * nested])) for index, row in enumerate(batch)]
        for index, pictures in enumerate(given):
            group = [rows[index]] if nested else rows
            places = sum(part is _OPEN for row in group for part in row)
            if places != len(pictures):
                raise ValueError(
                    f"There are {places} image placeholders and {len(pictures)} pictures"
                    f"{f' in row {index}' if nested else ''}; give one picture for each {self.image_token} in a "
                    "string and each image part that has none of its own."
                )
        supply = (_Picture(picture, latents is not None) for pictures in given for picture in pictures)
        rows = [_join([next(supply) if part is _OPEN else part for part in row]) for row in rows]
        if [] in rows:
            raise ValueError(f"Row {rows.index([])} has neither text nor a picture; every row needs one.")
        return rows

    def _parse_row(self, row: Any, index: int, has_pictures: bool) -> _Row:
        if isinstance(row, str):
            return self._split(row) if has_pictures else [_Text(row)]
        if isinstance(row, list | tuple):
            return [_parse_part(part) for part in row]
        raise ValueError(f"Row {index} of text is a {type(row).__name__}; give a string or a list of parts.")

    def _split(self, text: str, trusted: bool = False) -> _Row:
        """Cut a string at its placeholders."""
        first, *others = text.split(self.image_token)
        return [_Text(first, trusted), *(part for other in others for part in (_OPEN, _Text(other, trusted)))]

    def _latents(self, rows: list[_Row], images_kwargs: dict[str, Any]) -> list[Tensor]:
        """Scaled float32 latents (C, h, w) of all pictures, on the CPU."""
        pictures = [part for row in rows for part in row if isinstance(part, _Picture)]
        sources = [picture.source for picture in pictures if not picture.is_latent]
        pixels = self.image_processor(sources, **images_kwargs)["pixel_values"] if sources else []
        encoded = iter(self.encode_images(pixels))
        return [self._given(part.source) if part.is_latent else next(encoded).cpu() for part in pictures]

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

    def _row_ids(self, row: _Row, grids: Iterator[tuple[int, int]], bos: list[int]) -> list[int]:
        """Token ids of a row; `grids` yields the grid of each picture."""
        ids: list[int] = []
        for part in row:
            if isinstance(part, _Text):
                ids += self._text_ids(part)
            else:
                rows, columns = next(grids)
                patches = [self.image_token_id] * (rows * columns)
                ids += [self.boi_token_for((rows, columns)), *patches, self.eoi_token_id]
        return ids if ids[:1] == bos else bos + ids  # a chat template may have written it

    def _text_ids(self, part: _Text) -> list[int]:
        options = {"add_special_tokens": False, "split_special_tokens": not part.trusted, "verbose": False}
        ids = self.tokenizer(part.text, **options)["input_ids"]
        control = self._control_tokens()
        if not part.trusted and (found := [control[token_id] for token_id in ids if token_id in control]):
            raise ValueError(
                f"The tokenizer makes the control tokens {found} from ordinary text; take a byte-level one, in whose "
                "vocabulary no word spells a control token."
            )
        return ids

    def _control_tokens(self) -> dict[int, str]:
        """The tokens that a text can never become, by id. An unknown word is no control token."""
        tokenizer = self.tokenizer
        tokens = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        tokens |= zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
        return {token_id: token for token_id, token in tokens.items() if token_id != tokenizer.unk_token_id}

    def _bos(self) -> list[int]:
        """`<bos>`, if the tokenizer itself begins texts with it."""
        first = self.tokenizer("")["input_ids"][:1]
        return first if first == [self.tokenizer.bos_token_id] else []

    def _eos(self) -> list[int]:
        if self.tokenizer.eos_token_id is None:
            raise ValueError("return_labels=True ends rows with <eos>, but the tokenizer has no eos_token; set it.")
        return [self.tokenizer.eos_token_id]

    def _cut(self, ids: list[int], index: int, max_length: int | None, truncation: bool) -> list[int]:
        """Hold a row to `max_length`, without losing a patch."""
        if max_length is None or len(ids) <= max_length:
            return ids
        if not truncation:
            raise ValueError(
                f"Row {index} has {len(ids)} tokens and max_length is {max_length}; shorten it, raise max_length, or "
                "pass truncation=True to cut its text."
            )
        if {self.image_token_id, self.eoi_token_id} & set(ids[max_length:]):
            raise ValueError(
                f"Row {index} has {len(ids)} tokens, and cutting it to max_length={max_length} would cut a picture; "
                "raise max_length, or use a smaller picture or less text before it."
            )
        return ids[:max_length]

    def _pad(
        self, all_ids: list[list[int]], padding: bool | str, side: str, max_length: int | None, return_labels: bool
    ) -> dict[str, Any]:
        """Rows of ids -> padded `input_ids`, `attention_mask` and `labels`."""
        longest = max(map(len, all_ids))
        length = {True: longest, "longest": longest, "max_length": max_length, False: 0}.get(padding)
        if length is None or side not in ("left", "right"):
            raise ValueError(
                f"padding is {padding!r}, padding_side {side!r}, max_length {max_length!r}; allowed: True, 'longest', "
                "False, or 'max_length' with a max_length; and 'left' or 'right'."
            )
        pad_token_id = self.tokenizer.pad_token_id
        if pad_token_id is None and any(len(ids) < length for ids in all_ids):
            raise ValueError("The rows need padding, but the tokenizer has no pad_token; set it.")

        def padded(rows: list[list[int]], value: int) -> list[list[int]]:
            fills = [[value] * (length - len(row)) for row in rows]
            return [fill + row if side == "left" else row + fill for row, fill in zip(rows, fills, strict=True)]

        data = {
            "input_ids": padded(all_ids, pad_token_id),
            "attention_mask": padded([[1] * len(ids) for ids in all_ids], 0),
        }
        if return_labels:
            unlearned = (self.image_token_id, self.eoi_token_id)
            labels = [[IGNORE_INDEX if token in unlearned else token for token in ids] for ids in all_ids]
            data["labels"] = padded(labels, IGNORE_INDEX)
        return data

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
        pixels = [torch.as_tensor(value) for value in pixel_values]
        for value in pixels:
            if value.dim() != 3 or value.shape[0] != 3 or value.shape[1] % factor or value.shape[2] % factor:
                raise ValueError(
                    f"pixel_values holds the shape {tuple(value.shape)}; it must be (3, H, W), H and W multiples of "
                    f"{factor}, the VAE's factor."
                )
        if self.vae is None:
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
        pixels = latents if self.vae is None else decode_latents(self.vae, latents)
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
            generated_outputs: The output object of `generation_mode="interleaved"`, or ids (B, L).
            skip_special_tokens: Leave control tokens out of the text.
            generation_mode: `"text"`: ids give one string per row, as transformers' pipelines expect.
            kwargs: Options of the tokenizer's `decode`.

        Returns:
            Per row a list of strings and pictures in order: of an output object what is new after the prompt, of ids
            all their text as one string.

        Raises:
            ValueError: Placeholders and images that do not match.
        """
        if isinstance(generated_outputs, Tensor | np.ndarray):
            texts = self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
            return texts if generation_mode == "text" else [[text] for text in texts]
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

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Save tokenizer, settings and chat template, and the VAE in `vae/` as safetensors.

        Args:
            save_directory: A folder.
            push_to_hub: Then upload all of it.
            kwargs: Options of `push_to_hub`; `repo_id` defaults to the folder's name.
        """
        files = super().save_pretrained(save_directory)
        if self.vae is not None:
            save_vae(self.vae, save_directory)
        if push_to_hub:
            name = os.path.basename(os.path.abspath(save_directory))
            self.push_to_hub(kwargs.pop("repo_id", name), **kwargs)
        return files

    def to_dict(self) -> dict[str, Any]:
        """What `processor_config.json` holds."""
        sizes = {} if self.size_token_grids is None else {"size_token_grids": self.size_token_grids}
        return {**super().to_dict(), **sizes}

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        """Add the VAE to what `from_pretrained` makes a processor of."""
        parts = super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)
        options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        return [*parts, load_vae(pretrained_model_name_or_path, kwargs.get("subfolder", ""), **options)]


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


def _parse_part(part: Any) -> _Text | _Picture:
    if isinstance(part, _Text | _Picture):  # made by `apply_chat_template`; no data can be of these classes
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return _Text(part["text"])
    if kind == "image":
        return _OPEN if part.get("image") is None else _Picture(part["image"])
    raise ValueError(
        f"A part of a row is {part!r}; give {{'type': 'text', 'text': ...}}, or {{'type': 'image'}} with the picture "
        "under 'image' or in `images`."
    )


def _as_groups(pictures: Any, num_rows: int) -> tuple[list[list[Any]], bool]:
    """Lists of pictures, and whether there is one for each row or a single one for the whole batch."""
    if pictures is None:
        return [[]], False
    if not isinstance(pictures, list | tuple):
        return [[pictures]], False
    if not any(isinstance(picture, list | tuple) for picture in pictures):
        return [list(pictures)], False
    if len(pictures) != num_rows or not all(isinstance(picture, list | tuple) for picture in pictures):
        raise ValueError(
            f"There are {num_rows} rows of text and {len(pictures)} entries in the nested pictures; give a list for "
            "each row, empty where it has none."
        )
    return [list(row) for row in pictures], True


def _join(row: _Row) -> _Row:
    """Join neighbouring texts, strip white space beside pictures, and drop what is empty."""
    joined: _Row = []
    for part in row:
        if isinstance(part, _Text) and not part.text:
            continue
        last = joined[-1] if joined else None
        if isinstance(part, _Text) and isinstance(last, _Text) and part.trusted == last.trusted:
            joined[-1] = _Text(last.text + part.text, part.trusted)
        else:
            joined.append(part)
    for index, part in enumerate(joined):
        if isinstance(part, _Text):
            text = part.text
            if index > 0 and isinstance(joined[index - 1], _Picture):
                text = text.lstrip()
            if index + 1 < len(joined) and isinstance(joined[index + 1], _Picture):
                text = text.rstrip()
            joined[index] = part._replace(text=text)
    return [part for part in joined if isinstance(part, _Picture) or part.text]


__all__ = ["IGNORE_INDEX", "TransfusionImageProcessor", "TransfusionProcessor"]
