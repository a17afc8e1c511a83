"""What the models return.

Shapes: B rows, L positions, V vocabulary, H hidden_size, P patches of all images, D patch_dim.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

from .hyper_connections import reduce_streams


@dataclass
class TransfusionOutput(ModelOutput):
    """What `TransfusionForMultimodalGeneration` returns.

    Attributes:
        loss: `text_loss + image_loss_weight * image_loss` (paper, equation 4), where something is learned.
        text_loss: Mean cross-entropy of the next token, over the tokens that are learned.
        image_loss: Mean squared error of the noise (or velocity), over the elements of the images that are learned.
        logits: (B, L, V), or fewer positions by `logits_to_keep`; None with `skip_logits`.
        image_prediction: (P, D), the predicted noise (`ddpm`) or velocity (`flow`), where there are images and their
            timesteps are known.
        past_key_values: The cache, with `use_cache`.
        hidden_states: On request, what goes into the first layer and comes out of each, (B, L, H); of several residual
            streams their mean.
        attentions: On request, the weights of each layer, (B, heads, L, past + L); eager attention alone has them.
    """

    loss: Tensor | None = None
    text_loss: Tensor | None = None
    image_loss: Tensor | None = None
    logits: Tensor | None = None
    image_prediction: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class TransfusionModelOutput(BaseModelOutputWithPast):
    """What `TransfusionModel` returns: hidden states, the cache, and what the patch decoder needs of the encoder."""

    patch_skips: Any = None

    def __setitem__(self, name: str, value: Any) -> None:
        """Set a field; recorded `hidden_states` become (B, L, H) each, whatever the number of residual streams."""
        if name == "hidden_states":
            value = tuple(None if state is None else reduce_streams(state) for state in value)
        super().__setitem__(name, value)


__all__ = ["TransfusionModelOutput", "TransfusionOutput"]
