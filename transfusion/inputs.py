"""What a batch must look like, and what is learned from it: checks, labels, and images that no text precedes.

Shapes: B rows, L positions, N images of the whole batch in reading order, P patches of all of them, D patch_dim.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .configuration import TransfusionConfig
from .latents import begin_positions, split_images


# How the names begin under which other models take pictures.
PICTURE_NAMES = ("pixel_", "images", "image_embeds", "image_grid", "image_sizes")


def refuse_pictures(kwargs: Mapping[str, Any]) -> None:
    """Raise a ValueError where pictures come under a name that other models take, as `forward` would drop them."""
    names = [name for name, value in kwargs.items() if value is not None]
    if given := [name for name in names if name.startswith(PICTURE_NAMES)]:
        raise ValueError(
            f"{', '.join(given)}: this model does not read this. It takes pictures as latent_patches and image_grids, "
            "which its processor makes of them: processor(text=..., images=...)."
        )


def check_inputs(
    config: TransfusionConfig,
    input_ids: Tensor | None,
    latent_patches: Tensor | None,
    image_grids: Tensor | None,
    timesteps: Tensor | None,
    noise: Tensor | None,
    image_loss_mask: Tensor | None,
) -> None:
    """Refuse inputs that do not fit each other, before any work; see `forward` for what fits.

    Raises:
        ValueError: Naming the value, the limit and the remedy.
    """
    if torch.compiler.is_compiling() or (input_ids is not None and input_ids.is_meta):
        return
    if input_ids is not None and input_ids.numel() == 0:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: the batch is empty. Give at least one token.")
    if latent_patches is None:
        given = {
            "image_grids": image_grids,
            "timesteps": timesteps,
            "noise": noise,
            "image_loss_mask": image_loss_mask,
        }
        if orphans := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{', '.join(orphans)} came without latent_patches. Give the images they belong to.")
        if input_ids is not None and (count := int((input_ids == config.image_token_id).sum())):
            raise ValueError(
                f"input_ids holds {count} image placeholders (id {config.image_token_id}) and there are no images: "
                "give latent_patches and image_grids, as the processor makes them."
            )
        return
    check_patches(config, latent_patches, image_grids, timesteps, noise, image_loss_mask)
    if input_ids is not None:
        check_placeholders(config, input_ids, image_grids)


def check_image_shapes(config: TransfusionConfig, latent_patches: Tensor, image_grids: Tensor | None) -> None:
    """Raise a ValueError unless `latent_patches` is (P, D), and `image_grids` (N, 2) of whole numbers."""
    if latent_patches.ndim == 3:
        raise ValueError(
            f"latent_patches has shape {tuple(latent_patches.shape)}; the patches of all images of a batch lie flat, "
            f"(patches, {config.patch_dim}), as images differ in size: concatenate latent_patches and image_grids of "
            "the rows, or let TransfusionDataCollator do it."
        )
    if latent_patches.ndim != 2 or latent_patches.shape[1] != config.patch_dim:
        raise ValueError(
            f"latent_patches has shape {tuple(latent_patches.shape)}; this model takes (patches, {config.patch_dim}): "
            f"latent_channels={config.latent_channels} times patch_size={config.patch_size} squared. "
            "Take a VAE and a processor with these, or a model with theirs."
        )
    if not isinstance(image_grids, Tensor) or image_grids.ndim != 2 or image_grids.shape[1] != 2:
        shape = tuple(image_grids.shape) if isinstance(image_grids, Tensor) else image_grids
        raise ValueError(
            f"image_grids has shape {shape}; give a tensor (images, 2): rows and columns of patches of each."
        )
    if image_grids.is_floating_point():
        raise ValueError(f"image_grids has dtype {image_grids.dtype}; give whole numbers, as image_grids.long() does.")


def check_patches(
    config: TransfusionConfig,
    latent_patches: Tensor,
    image_grids: Tensor | None,
    timesteps: Tensor | None,
    noise: Tensor | None,
    image_loss_mask: Tensor | None,
) -> None:
    """Check shapes and values of the images by themselves; raise a ValueError that says what to change."""
    check_image_shapes(config, latent_patches, image_grids)
    assert image_grids is not None  # for type checkers
    rows_times_columns = image_grids.prod(dim=1).tolist()
    if bool((image_grids < 1).any()) or sum(rows_times_columns) != latent_patches.shape[0]:
        raise ValueError(
            f"image_grids={image_grids.tolist()} hold {sum(rows_times_columns)} patches and latent_patches "
            f"{latent_patches.shape[0]}; they must be the same, and every image needs a row and a column."
        )
    if (largest := max(rows_times_columns, default=0)) + 2 > config.max_position_embeddings:
        raise ValueError(
            f"An image of {largest} patches takes {largest + 2} positions; max_position_embeddings="
            f"{config.max_position_embeddings} allows no more than that. Take a smaller picture or larger patches."
        )
    num_images = image_grids.shape[0]
    per_image = {"timesteps": timesteps, "image_loss_mask": image_loss_mask}
    for name, value in per_image.items():
        if value is not None and tuple(value.shape) != (num_images,):
            raise ValueError(f"{name} has shape {tuple(value.shape)}; give one value for each of {num_images} images.")
    if image_loss_mask is not None and image_loss_mask.dtype != torch.bool:
        raise ValueError(f"image_loss_mask has dtype {image_loss_mask.dtype}; give torch.bool, as mask.bool() does.")
    if noise is not None and noise.shape != latent_patches.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}; latent_patches has {tuple(latent_patches.shape)}.")
    for name, value in {"latent_patches": latent_patches, "noise": noise}.items():
        if value is not None and not torch.isfinite(value).all():
            raise ValueError(f"{name} holds NaN or infinity. Look for a broken picture or an overflow in the VAE.")


def check_placeholders(config: TransfusionConfig, input_ids: Tensor, image_grids: Tensor) -> None:
    """Check that each run of placeholders in `input_ids` (B, L) has the length of its image, and the grid of the size
    token that begins it, if one does; ValueError otherwise.
    """
    is_patch = input_ids == config.image_token_id
    is_first = is_patch & ~F.pad(is_patch, (1, 0))[:, :-1]
    runs = torch.bincount(is_first.flatten().cumsum(dim=0)[is_patch.flatten()])[1:]
    expected = image_grids.prod(dim=1)
    if not torch.equal(runs, expected):
        raise ValueError(
            f"input_ids holds {len(runs)} runs of image placeholders, of lengths {runs.tolist()}; image_grids hold "
            f"{len(expected)} images, of {expected.tolist()} patches. Give each image as many placeholders as "
            "patches, in reading order, and at least one other token between two images."
        )
    if config.size_token_ids:
        _check_size_tokens(config, input_ids, image_grids)


def _check_size_tokens(config: TransfusionConfig, input_ids: Tensor, image_grids: Tensor) -> None:
    is_patch = input_ids == config.image_token_id
    is_before = ~is_patch & F.pad(is_patch, (0, 1))[:, 1:]
    begins_row = is_patch[:, 0].tolist()  # a row that goes on from a cache may begin with patches
    if any(begins_row):
        return
    for token, grid in zip(input_ids[is_before].tolist(), image_grids.tolist(), strict=True):
        named = config.grid_of_boi(token)
        if named is not None and named != tuple(grid):
            raise ValueError(
                f"The begin-of-image token {token} stands for a grid of {named}, and its image has {tuple(grid)}; "
                f"give the token {config.boi_token_for((grid[0], grid[1]))}."
            )


def drop_cached_images(
    config: TransfusionConfig, input_ids: Tensor, latent_patches: Tensor, image_grids: Tensor, past_length: int
) -> tuple[Tensor | None, Tensor | None]:
    """Of all images of `input_ids` (B, L), those beyond its first `past_length` positions, whose keys are cached.

    So a chat may be continued with all that a processor makes of it. Where only the new images came, they stay.

    Raises:
        ValueError: The cache ends within an image.
    """
    is_patch = input_ids == config.image_token_id
    if (is_patch[:, past_length - 1] & is_patch[:, past_length]).any():
        raise ValueError(
            f"past_key_values end at position {past_length}, within an image; crop them to where it begins, or leave "
            "them out."
        )
    starts = (is_patch & ~F.pad(is_patch, (1, 0))[:, :-1]).nonzero()[:, 1].tolist()
    if len(starts) != len(image_grids):
        return latent_patches, image_grids
    new = [index for index, start in enumerate(starts) if start >= past_length]
    if not new:
        return None, None
    images = split_images(latent_patches, image_grids)
    return torch.cat([images[index] for index in new]), image_grids[new]


def check_documents(
    config: TransfusionConfig, document_ids: Tensor, input_ids: Tensor | None, past_key_values: Any
) -> None:
    """Raise a ValueError unless `document_ids` number the positions of `input_ids` (B, L), and cut no image."""
    if past_key_values is not None and past_key_values.get_seq_length() > 0:
        raise ValueError("document_ids came with past_key_values; several documents to a row are for training alone.")
    if input_ids is None or torch.compiler.is_compiling():
        return
    if document_ids.shape != input_ids.shape:
        raise ValueError(
            f"document_ids has shape {tuple(document_ids.shape)} and input_ids {tuple(input_ids.shape)}; give the "
            "number of each position's document."
        )
    is_patch = input_ids == config.image_token_id
    is_border = document_ids[:, 1:] != document_ids[:, :-1]
    if (is_border & is_patch[:, 1:] & is_patch[:, :-1]).any():
        raise ValueError("document_ids change within an image; a document ends where its image does, or later.")


def images_without_prior_text(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    config: TransfusionConfig,
    document_ids: Tensor | None = None,
) -> Tensor:
    """(N,) in reading order: True for an image before which its document in `input_ids` (B, L) has no text.

    A document is a row, or one of those that `document_ids` (B, L) tell apart.

    Training noises such an image up to `config.noise_limit` of the schedule, since the text after it describes it
    (paper, section 4.3.4). Control tokens, the begin-of-sequence token and padding are no text.
    """
    image_mask = input_ids == config.image_token_id
    is_text = ~image_mask
    for token_id in (*config.boi_token_ids, config.eoi_token_id, config.bos_token_id):
        if token_id is not None:
            is_text &= input_ids != token_id
    if attention_mask is not None:
        is_text &= attention_mask.bool()
    is_first_patch = image_mask & ~F.pad(image_mask, (1, 0))[:, :-1]
    num_texts = is_text.cumsum(dim=1)
    if document_ids is not None:
        begins = begin_positions(document_ids)
        num_texts = num_texts - (num_texts - is_text.long()).gather(1, begins)
    return (num_texts == 0)[is_first_patch]


def learned_labels(
    input_ids: Tensor | None, labels: Tensor, config: TransfusionConfig, document_ids: Tensor | None = None
) -> Tensor:
    """The next-token targets (B, L - 1) of `input_ids` (B, L): `labels` shifted, -100 where nothing is learned.

    Nothing is learned where the input is a patch or a begin-of-image token (paper, footnote 8), and a patch is no
    target. So begin-of-image is learned, which lets the model decide to draw, and end-of-image is not. All of
    `boi_token_ids` are begin-of-image tokens. The first token of the next of several documents in a row is no target.

        input    a    red  <boi> patch patch <eoi> heart <eos>
        target   red  <boi> .    .     .     heart <eos>
    """
    if document_ids is not None:
        labels = F.pad(labels[:, 1:].masked_fill(document_ids[:, 1:] != document_ids[:, :-1], -100), (1, 0))
    if input_ids is None:  # with inputs_embeds, `labels` alone say what is learned
        return labels[:, 1:]
    inputs, targets = input_ids[:, :-1], labels[:, 1:]
    unlearned = (inputs == config.image_token_id) | (targets == config.image_token_id)
    for boi_token_id in config.boi_token_ids:
        unlearned |= inputs == boi_token_id
    return targets.masked_fill(unlearned, -100)


__all__ = [
    "check_documents",
    "check_image_shapes",
    "check_inputs",
    "check_patches",
    "check_placeholders",
    "drop_cached_images",
    "images_without_prior_text",
    "learned_labels",
    "refuse_pictures",
]
