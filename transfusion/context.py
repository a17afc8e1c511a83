"""Documents that have been run once: their keys and values, for whatever is written or drawn after them.

A document is a row of tokens in which each image is a run of `image_token_id`, and the patches of these images in
reading order. Shapes: B rows, L tokens, K cached positions, n patches of one image, P patches of all, D patch_dim,
V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .caching import make_cache
from .configuration import TransfusionConfig
from .latents import split_images


Grid = tuple[int, int]


@dataclass
class Document:
    """One row without padding: `input_ids` (L,), and the clean patches (n, D) and grid of each of its images."""

    input_ids: Tensor
    images: list[Tensor] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)


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


def hide_text(input_ids: Tensor, config: TransfusionConfig) -> Tensor:
    """(L,), True at images and their begin and end tokens: what the unconditional branch may look at.

    Training drops text in the same way: hidden by the mask, with every position kept.
    """
    control = (*config.boi_token_ids, config.eoi_token_id, config.image_token_id)
    return torch.isin(input_ids, torch.tensor(control, device=input_ids.device))


class Context:
    """Documents run once: their keys and values, how long they are, and the logits after their last token.

    Attributes:
        cache: Keys and values of K positions.
        attention_mask: (B, K), 0 at padding.
        lengths: (B,), at which position each document goes on.
        logits: (B, V) after the last run.
    """

    def __init__(self, model: Any, cache: Any, attention_mask: Tensor, lengths: Tensor) -> None:
        self.model = model
        self.cache = cache
        self.attention_mask = attention_mask
        self.lengths = lengths
        self.logits: Tensor | None = None

    @classmethod
    def read(cls, model: Any, documents: Sequence[Document], visible: Sequence[Tensor] | None = None) -> "Context":
        """Run `documents`, which then stand flush right.

        `visible` (L,) of each says which of its tokens may be looked at; the others are not run, and leave a gap in
        the positions.

        Raises:
            ValueError: A model that keeps no keys and values, for gradient checkpointing.
        """
        if model.training and model.model.gradient_checkpointing:
            raise ValueError(
                "The model is in training mode with gradient checkpointing, in which its layers keep no keys and "
                "values to go on from; call model.eval() first."
            )
        if visible is None:
            visible = [torch.ones_like(document.input_ids, dtype=torch.bool) for document in documents]
        device = model.device
        lengths = torch.tensor([len(document.input_ids) for document in documents], device=device)
        context = cls(model, make_cache(model), lengths.new_zeros(len(documents), 0), lengths)
        seen = [document.input_ids[shown] for document, shown in zip(documents, visible, strict=True)]
        context._run(
            pad_left(seen, model.config.eoi_token_id),
            pad_left([torch.ones_like(tokens) for tokens in seen], 0).to(device),
            pad_left([shown.nonzero().flatten() for shown in visible], 0).to(device),
            [image for document in documents for image in document.images],
            [grid for document in documents for grid in document.grids],
        )
        return context

    def extend(self, input_ids: Tensor, is_token: Tensor, images: list[Tensor], grids: list[Grid]) -> Tensor:
        """Append `input_ids` (B, q) where `is_token`, with the clean `images` in them; last logits (B, V)."""
        positions = (self.lengths[:, None] + is_token.cumsum(dim=1) - 1).clamp(min=0)
        self.lengths = self.lengths + is_token.sum(dim=1)
        return self._run(input_ids, is_token.long(), positions, images, grids)

    def _run(
        self, input_ids: Tensor, is_token: Tensor, positions: Tensor, images: list[Tensor], grids: list[Grid]
    ) -> Tensor:
        device = self.model.device
        self.attention_mask = torch.cat([self.attention_mask, is_token], dim=1)
        outputs = self.model(
            input_ids=input_ids.to(device),
            attention_mask=self.attention_mask,
            position_ids=positions,
            past_key_values=self.cache,
            latent_patches=torch.cat(images).to(device) if images else None,
            image_grids=torch.tensor(grids, device=device) if images else None,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits = outputs.logits[:, -1].float()
        return self.logits

    def take(self, rows: Sequence[int]) -> "Context":
        """A copy of some rows, flush right, with no padding but on the left."""
        chosen = torch.tensor(rows, device=self.attention_mask.device)
        columns = [self.attention_mask[row].nonzero().flatten() for row in rows]
        places = pad_left(columns, 0)
        is_token = pad_left([torch.ones_like(column) for column in columns], 0)
        cache = make_cache(self.model)
        for index, layer in enumerate(self.cache.layers):
            device = layer.keys.device
            at = chosen.to(device)[:, None], slice(None), places.to(device)
            cache.update(*(states[at].transpose(1, 2) for states in (layer.keys, layer.values)), index)
        return Context(self.model, cache, is_token, self.lengths[chosen])

    @classmethod
    def join(cls, contexts: Sequence["Context"]) -> "Context":
        """All rows of `contexts`, flush right."""
        longest = max(context.attention_mask.shape[1] for context in contexts)
        missing = [longest - context.attention_mask.shape[1] for context in contexts]
        model = contexts[0].model
        cache = make_cache(model)
        for index in range(len(cache.layers)):
            layers = [context.cache.layers[index] for context in contexts]
            keys, values = (
                torch.cat([pad(getattr(layer, name), (0, 0, m, 0)) for layer, m in zip(layers, missing, strict=True)])
                for name in ("keys", "values")
            )
            cache.update(keys, values, index)
        masks = [pad(context.attention_mask, (m, 0)) for context, m in zip(contexts, missing, strict=True)]
        return cls(model, cache, torch.cat(masks), torch.cat([context.lengths for context in contexts]))


__all__ = ["Context", "Document", "Grid", "hide_text", "pad_left", "read_documents"]
