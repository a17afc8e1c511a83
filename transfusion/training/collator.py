"""`TransfusionDataCollator`: rows -> a padded batch, with noise, noise levels and text dropout drawn per sample.

Shapes: B rows, L positions, N_i images and P_i patches of one row, N and P those of the batch, D patch_dim.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig

from ..configuration import TransfusionConfig
from ..context import hide_text
from ..diffusion import noise_process_of
from ..inputs import check_inputs, images_without_prior_text
from ..latents import patch_image_index
from .packing import pack


IGNORE_INDEX = -100
_LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class _Sample:
    """A checked row, and what was drawn for it."""

    name: str
    input_ids: Tensor  # (L_i,)
    labels: Tensor  # (L_i,)
    latent_patches: Tensor  # (P_i, D)
    image_grids: Tensor  # (N_i, 2)
    image_loss_mask: Tensor  # (N_i,)
    dropout_draw: Tensor  # (1,), uniform
    timestep_draw: Tensor  # (N_i,), uniform
    noise: Tensor  # (P_i, D)


@dataclass
class TransfusionDataCollator:
    """Makes a right-padded, or packed, training batch of rows.

    A row is a dict:

        input_ids, labels: (L_i,), labels unshifted with -100 where nothing is learned, as the processor makes them.
        latent_patches, image_grids: (P_i, D) and (N_i, 2), where the row has images.
        image_loss_mask: (N_i,), False for an image that is context only; by default all are learned.
        sample_seed: Seeds all that is drawn for the row, so that it does not depend on the batch the row falls in, nor
            on the worker that makes it. Without one the seed comes from the global generator.
        sample_id: A name for error messages.

    The batch holds what `forward` takes: `input_ids`, `attention_mask`, `labels`, and where there are images
    `latent_patches`, `image_grids`, `image_loss_mask`, `timesteps`, `noise`. With `packed_length` rows are laid one
    after the other, without padding between them, and `position_ids` and `document_ids` take the place of
    `attention_mask`; the losses are the same.

    With probability `text_dropout` a row loses the text ahead of its last learned image, as classifier-free guidance
    needs it (Ho & Salimans 2021): hidden by the mask, with every position kept, and neither it nor what it would
    predict is learned. An image that no text precedes is noised up to `config.noise_limit` (paper, section 4.3.4);
    dropped text still counts as text there.

    Args:
        config: The model's.
        text_dropout: Probability per row.
        packed_length: Pack the rows of a batch, first fit by length, into rows of at most so many tokens.
        with_sample_ids: Add the list `sample_ids`, which `TransfusionTrainer` takes out again.
    """

    config: TransfusionConfig
    text_dropout: float = 0.1
    packed_length: int | None = None
    with_sample_ids: bool = False

    def __post_init__(self) -> None:
        """Check what was given."""
        if not isinstance(self.config, PreTrainedConfig):
            raise ValueError(f"config is a {type(self.config).__name__}; give model.config.")
        if not 0 <= self.text_dropout <= 1:
            raise ValueError(f"text_dropout is {self.text_dropout}; give a probability, 0 to 1.")
        if self.packed_length is not None and self.packed_length < 1:
            raise ValueError(f"packed_length is {self.packed_length}; give a number of tokens, or None.")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate `rows`.

        Raises:
            ValueError: A row that lacks something or whose images do not fit its tokens or are not finite, by name.
        """
        samples = [self._read(row, index) for index, row in enumerate(rows)]
        batch: dict[str, Any] = {
            "input_ids": pad_rows([sample.input_ids for sample in samples], self._pad_token_id()),
            "attention_mask": pad_rows([torch.ones_like(sample.input_ids) for sample in samples], 0),
            "labels": pad_rows([sample.labels for sample in samples], IGNORE_INDEX),
        }
        with_images = [sample for sample in samples if len(sample.image_grids)]
        if with_images:
            for name in ("latent_patches", "image_grids", "image_loss_mask", "noise"):
                batch[name] = torch.cat([getattr(sample, name) for sample in with_images])
            capped = images_without_prior_text(batch["input_ids"], batch["attention_mask"], self.config)
            uniform = torch.cat([sample.timestep_draw for sample in with_images])
            batch["timesteps"] = noise_process_of(self.config).timestep_from_uniform(uniform, capped)
            self._drop_text(batch, torch.cat([sample.dropout_draw for sample in samples]) < self.text_dropout)
        if self.with_sample_ids:
            batch["sample_ids"] = [sample.name for sample in samples]
        if self.packed_length is None:
            return batch
        assert self.config.image_token_id is not None  # the config fills it in
        return pack(batch, self.packed_length, self.config.image_token_id, self._pad_token_id())

    def _read(self, row: Mapping[str, Any], index: int) -> _Sample:
        """Check a row by itself and draw for it."""
        name = str(row.get("sample_id", f"row {index} of the batch"))
        if missing := [key for key in ("input_ids", "labels") if key not in row]:
            raise ValueError(f"Sample {name} lacks {' and '.join(missing)}; make rows with return_labels=True.")
        input_ids, labels = torch.as_tensor(row["input_ids"]), torch.as_tensor(row["labels"])
        if input_ids.shape != labels.shape or input_ids.dim() != 1:
            raise ValueError(
                f"Sample {name} has input_ids of shape {tuple(input_ids.shape)} and labels of shape "
                f"{tuple(labels.shape)}; both must be (length,)."
            )
        patches, grids, loss_mask = self._images(row)
        try:
            images = (None, None, None, None, None) if grids is None else (patches, grids, None, None, loss_mask)
            check_inputs(self.config, input_ids[None], *images)
        except ValueError as error:
            raise ValueError(f"Sample {name}: {error}") from error
        if grids is None:
            patches, grids, loss_mask = torch.zeros(0, self.config.patch_dim), torch.zeros(0, 2), torch.zeros(0)
        drawn = draw(row.get("sample_seed"), len(grids), patches)
        return _Sample(name, input_ids, labels, patches, grids, loss_mask, *drawn)

    def _images(self, row: Mapping[str, Any]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Patches, grids and loss mask of a row; no grids where it has no images."""
        if row.get("latent_patches") is None:
            return torch.zeros(0), None, torch.zeros(0)
        patches, grids = torch.as_tensor(row["latent_patches"]), torch.as_tensor(row["image_grids"]).view(-1, 2)
        loss_mask = row.get("image_loss_mask")
        loss_mask = torch.ones(len(grids)) if loss_mask is None else torch.as_tensor(loss_mask)
        return patches, grids, loss_mask.bool()

    def _pad_token_id(self) -> int:
        """The id under padding, which nothing looks at: `<pad>`, or `<eos>` as is the custom where there is none."""
        eos = self.config.eos_token_id
        pad_token_id = self.config.pad_token_id
        if pad_token_id is None:
            pad_token_id = eos[0] if isinstance(eos, list) else eos
        if pad_token_id is None:
            raise ValueError("The config has neither pad_token_id nor eos_token_id; set one, rows are padded with it.")
        return pad_token_id

    def _drop_text(self, batch: dict[str, Any], dropped: Tensor) -> None:
        """Hide the text of the rows where `dropped` (B,), in place."""
        hidden = droppable_text(batch["input_ids"], batch["image_grids"], batch["image_loss_mask"], self.config)
        hidden &= dropped[:, None] & batch["attention_mask"].bool()
        batch["attention_mask"] = batch["attention_mask"].masked_fill(hidden, 0)
        batch["labels"] = batch["labels"].masked_fill(hidden | pad(hidden, (1, 0))[:, :-1], IGNORE_INDEX)


def pad_rows(rows: list[Tensor], value: int) -> Tensor:
    """Stack 1-D `rows` as (B, longest), padded with `value` on the right."""
    return pad_sequence(rows, batch_first=True, padding_value=value)


def draw(sample_seed: int | None, num_images: int, latent_patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw for one sample: uniform numbers (1,) for text dropout and (N_i,) for noise levels, and noise (P_i, D)."""
    if num_images == 0:
        return torch.ones(1), torch.ones(0), latent_patches
    if sample_seed is None:
        sample_seed = int(torch.randint(_LARGEST_SEED, ()))
    generator = torch.Generator().manual_seed(sample_seed)
    return (
        torch.rand(1, generator=generator),
        torch.rand(num_images, generator=generator),
        torch.randn(latent_patches.shape, generator=generator, dtype=latent_patches.dtype),
    )


def droppable_text(
    input_ids: Tensor, image_grids: Tensor, image_loss_mask: Tensor, config: TransfusionConfig
) -> Tensor:
    """(B, L), True at the text ahead of each row's last learned image, in rows that have any.

    What is hidden is what sampling hides from its unconditional branch (`hide_text`).
    """
    is_patch = input_ids == config.image_token_id
    patch_is_learned = image_loss_mask[patch_image_index(image_grids, int(is_patch.sum()))]
    is_learned = torch.zeros_like(is_patch).masked_scatter(is_patch, patch_is_learned)
    positions = torch.arange(input_ids.shape[1])
    last_learned = torch.where(is_learned, positions, -1).amax(dim=1, keepdim=True)
    ahead = (positions < last_learned) & ~hide_text(input_ids, config)
    has_text = (ahead & (input_ids != _as_id(config.bos_token_id))).any(dim=1, keepdim=True)
    return ahead & has_text


def _as_id(token_id: int | None) -> int:
    return -1 if token_id is None else token_id


__all__ = ["IGNORE_INDEX", "TransfusionDataCollator", "draw", "droppable_text", "pad_rows"]
