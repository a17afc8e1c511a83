"""Latents to patch vectors and back, and where the patches of each image lie.

Shapes: C channels, H and W sides of a latent, p patch size, N images of the whole batch in reading order,
P patches of all of them, D = C * p * p, B rows of token ids, L positions.
"""

import torch
from einops import rearrange
from torch import Tensor


def patchify(latents: Tensor, patch_size: int) -> Tensor:
    """Cut latents into patch vectors, row by row (paper, section 3: left to right, top to bottom).

    Args:
        latents: (C, H, W) or (B, C, H, W).
        patch_size: Side of a patch, in latent positions.

    Returns:
        (rows * columns, C * p * p) or (B, rows * columns, C * p * p); a vector is laid out (channel, row in patch,
        column in patch).

    Raises:
        ValueError: The latents have another number of axes, or a side that patches do not fill.
    """
    if latents.dim() not in (3, 4):
        raise ValueError(f"latents have shape {tuple(latents.shape)}; give (C, H, W) or (B, C, H, W).")
    for name, side in zip(("height", "width"), latents.shape[-2:], strict=True):
        if side % patch_size:
            raise ValueError(
                f"The latent {name} is {side}, which is no multiple of patch_size={patch_size}; crop or resize the "
                f"image so that it is, for example to {max(side // patch_size, 1) * patch_size}."
            )
    return rearrange(latents, "... c (h p) (w q) -> ... (h w) (c p q)", p=patch_size, q=patch_size)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Put patch vectors together again, the inverse of `patchify`.

    Args:
        patches: (rows * columns, C * p * p) or (B, rows * columns, C * p * p).
        grid: (rows, columns) of patches.
        patch_size: Side of a patch, in latent positions.

    Returns:
        (C, rows * p, columns * p) or (B, C, rows * p, columns * p).

    Raises:
        ValueError: The patches have another number of axes, do not fill the grid, or have a length that is no
            multiple of p * p.
    """
    rows, columns = grid
    if patches.dim() not in (2, 3):
        raise ValueError(
            f"patches have shape {tuple(patches.shape)}; give (rows * columns, C * p * p), or that with a batch axis."
        )
    if patches.shape[-2] != rows * columns:
        raise ValueError(
            f"{patches.shape[-2]} patches do not fill the grid {rows} x {columns} = {rows * columns}; "
            "give the grid of this image, as `split_images` cuts it out."
        )
    if patches.shape[-1] % patch_size**2:
        raise ValueError(
            f"A patch vector has length {patches.shape[-1]}, which is no multiple of patch_size**2 = {patch_size**2}; "
            "give the patch size that the patches were made with."
        )
    return rearrange(patches, "... (h w) (c p q) -> ... c (h p) (w q)", h=rows, w=columns, p=patch_size, q=patch_size)


def split_images(latent_patches: Tensor, image_grids: Tensor) -> list[Tensor]:
    """Cut the patches of all images into one tensor per image.

    Args:
        latent_patches: (P, D).
        image_grids: (N, 2), rows and columns of patches of each image. It is read on the host.

    Returns:
        N views of `latent_patches`, (rows * columns, D) each.

    Raises:
        ValueError: `image_grids` has another shape, a grid is empty, or the grids do not sum to P.
    """
    _check_grids(image_grids)
    sizes = []
    for rows, columns in image_grids.tolist():
        if rows < 1 or columns < 1:
            raise ValueError(f"image_grids holds the grid {rows} x {columns}; an image has at least 1 x 1 patches.")
        sizes.append(rows * columns)
    if sum(sizes) != latent_patches.shape[0]:
        raise ValueError(
            f"image_grids {image_grids.tolist()} describe {sum(sizes)} patches, but latent_patches hold "
            f"{latent_patches.shape[0]}; give one (rows, columns) for each image of the batch, in reading order."
        )
    return list(latent_patches.split(sizes))


def patch_image_index(image_grids: Tensor, num_patches: int) -> Tensor:
    """Which image each patch belongs to, without waiting for the device.

    Args:
        image_grids: (N, 2), rows and columns of patches of each image.
        num_patches: P, which the grids must sum to; nothing checks this here, since it would stall the device.

    Returns:
        (P,) long, indices below N in rising order.

    Raises:
        ValueError: `image_grids` has another shape.
    """
    _check_grids(image_grids)
    images = torch.arange(image_grids.shape[0], device=image_grids.device)
    return images.repeat_interleave(image_grids.prod(-1), output_size=num_patches)


def patch_coordinates(image_grids: Tensor, image_index: Tensor) -> Tensor:
    """(P, 2): row and column of each flat patch in its image, without a host sync.

    Args:
        image_grids: (N, 2), rows and columns of each image.
        image_index: (P,), which image each patch belongs to, as `patch_image_index` gives it.
    """
    counts = image_grids.prod(dim=1)
    starts = counts.cumsum(dim=0) - counts
    place = torch.arange(len(image_index), device=image_index.device) - starts[image_index]
    columns = image_grids[image_index, 1]
    return torch.stack([place // columns, place % columns], dim=1)


def image_block_ids(input_ids: Tensor, image_token_id: int) -> Tensor:
    """Number the image blocks of each row: the runs of `image_token_id` in `input_ids` (B, L).

    Returns:
        (B, L) long: -1 at text, else the index of the block within its row (0, 1, ...).
    """
    is_patch = input_ids == image_token_id
    is_first = is_patch.clone()
    is_first[:, 1:] &= ~is_patch[:, :-1]
    return (is_first.cumsum(dim=1) - 1).masked_fill(~is_patch, -1)


def begin_positions(document_ids: Tensor) -> Tensor:
    """(B, L), where in its row the document of each position begins."""
    places = torch.arange(document_ids.shape[1], device=document_ids.device)
    is_first = torch.ones_like(document_ids, dtype=torch.bool)
    is_first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(is_first, places, 0).cummax(dim=1).values


def count_positions(inputs_embeds: Tensor, past_length: int | Tensor, document_ids: Tensor | None) -> Tensor:
    """Positions (1, L) or (B, L) of `inputs_embeds` (B, L, H), after a cache or from the begin of each document."""
    positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + past_length
    return positions if document_ids is None else positions - begin_positions(document_ids)


def patch_places(image_mask: Tensor, num_patches: int) -> Tensor:
    """(P,): where the `num_patches` patches stand in the rows of `image_mask` (B, L) laid end to end.

    As `nonzero`, without waiting for the device; nothing checks here that there are as many.
    """
    return torch.nonzero_static(image_mask.flatten(), size=num_patches).squeeze(1)


def grid_coordinates(grid: tuple[int, int]) -> Tensor:
    """(row, column) of each patch of a `grid` of (rows, columns), in reading order: (rows * columns, 2) long."""
    rows, columns = grid
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns))


def _check_grids(image_grids: Tensor) -> None:
    if image_grids.dim() != 2 or image_grids.shape[-1] != 2:
        raise ValueError(
            f"image_grids has shape {tuple(image_grids.shape)}; give (N, 2), the rows and columns of patches of each "
            "image."
        )


__all__ = [
    "begin_positions",
    "count_positions",
    "grid_coordinates",
    "image_block_ids",
    "patch_coordinates",
    "patch_image_index",
    "patch_places",
    "patchify",
    "split_images",
    "unpatchify",
]
