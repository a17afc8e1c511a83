"""Weights of their own for patches and for text (Mixture-of-Transformers, arXiv:2411.04996; LMFusion, 2412.15188).

Which module a position takes is known beforehand, so nothing is learned here and nothing is computed twice: the
positions of each kind are gathered, run through their module, and put back.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Modalities(NamedTuple):
    """Where text and patches stand in B rows of L positions, laid end to end.

    Attributes:
        text: (T,) indices of text.
        image: (P,) indices of patches.
        order: (B * L,), where each position comes out when patches are put behind text.
    """

    text: Tensor
    image: Tensor
    order: Tensor


def find_modalities(image_mask: Tensor, num_patches: int) -> Modalities:
    """Sort the positions of `image_mask` (B, L), True at `num_patches` patches, without waiting for the device."""
    is_image = image_mask.flatten()
    image = torch.nonzero_static(is_image, size=num_patches).squeeze(1)
    text = torch.nonzero_static(~is_image, size=len(is_image) - num_patches).squeeze(1)
    return Modalities(text, image, torch.cat([text, image]).argsort())


def by_modality(
    hidden_states: Tensor,
    modalities: Modalities | None,
    text_module: Callable[[Tensor], Tensor],
    image_module: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Run text through `text_module` and patches through `image_module`: (B, L, ...) to (B, L, ...).

    All goes through `text_module` where there are no `modalities`, or no module for patches.
    """
    if modalities is None or image_module is None:
        return text_module(hidden_states)
    if len(modalities.text) == 0:  # as in denoising; some quantized layers die of an empty input
        return image_module(hidden_states)
    positions = hidden_states.flatten(0, 1)
    outputs = [text_module(positions[modalities.text]), image_module(positions[modalities.image])]
    return torch.cat(outputs)[modalities.order].unflatten(0, hidden_states.shape[:2])


__all__ = ["Modalities", "by_modality", "find_modalities"]
