"""A key-value cache that grows in place: transformers' `DynamicCache` copies all of itself for each new token.

Shapes: B rows, h key and value heads, K cached positions, q new ones, d head_dim.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer


# Room beyond what is needed, as a share of it and at least so many positions: a token is then copied twice on average.
SPARE_SHARE, MIN_SPARE = 0.5, 64


class GrowingLayer(DynamicLayer):
    """A layer whose `keys` and `values` (B, h, K, d) are the beginnings of larger tensors.

    Whoever replaces `keys` and `values`, as beam search does to reorder them, loses nothing but the spare room.
    """

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.rooms: list[Tensor] = []
        self.views: list[Tensor] = []  # the keys and values that were made of them last

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append `key_states` and `value_states` (B, h, q, d); return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if torch.is_grad_enabled():  # autograd forbids to write over what it has read
            return super().update(key_states, value_states, *args, **kwargs)
        length, count = self.get_seq_length(), key_states.shape[-2]
        end = length + count
        if not self._has_room(end):
            pairs = ((self.keys, key_states), (self.values, value_states))
            self.rooms = [self._make_room(old, new, end) for old, new in pairs]
        key_room, value_room = self.rooms
        key_room.narrow(2, length, count).copy_(key_states)
        value_room.narrow(2, length, count).copy_(value_states)
        self.views = [key_room.narrow(2, 0, end), value_room.narrow(2, 0, end)]
        self.keys, self.values = self.views
        return self.keys, self.values

    def _has_room(self, length: int) -> bool:
        """Whether the rooms hold what this layer holds now, are long enough, and may be written to."""
        if not self.rooms or self.rooms[0].shape[2] < length:
            return False
        if self.rooms[0].is_inference() and not torch.is_inference_mode_enabled():
            return False  # what inference mode made is read-only outside of it
        held = (self.keys, self.values)
        if all(old is view for old, view in zip(held, self.views, strict=True)):
            return True
        return all(
            room.data_ptr() == old.data_ptr() and room.shape[:2] == old.shape[:2]
            for room, old in zip(self.rooms, held, strict=True)
        )

    @staticmethod
    def _make_room(old: Tensor, new: Tensor, length: int) -> Tensor:
        spare = max(int(SPARE_SHARE * length), MIN_SPARE)
        room = new.new_empty(*new.shape[:-2], length + spare, new.shape[-1])
        if old.numel():
            room[..., : old.shape[-2], :] = old
        return room


class GrowingCache(DynamicCache):
    """A `DynamicCache` of growing layers.

    Whoever keeps `keys` of a layer, crops the cache and goes on sees them change; a deep copy does not.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.layers: list[GrowingLayer] = [GrowingLayer() for _ in range(config.num_hidden_layers)]

    @torch.compiler.disable
    def append(self, key_states: Tensor, value_states: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
        """`update` for the layer of an attention `module`.

        Out of the sight of compilers, which would take the number of the layer, and how full it is, for constants and
        compile each layer anew.
        """
        return self.update(key_states, value_states, module.layer_idx)


class Prefix(NamedTuple):
    """The keys and values (B, h, K, d) of one layer, which stay as they are: whatever comes after them is not kept."""

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Put `key_states` and `value_states` (B, h, q, d) behind them; return all."""
        return torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2)


class FrozenCache:
    """What a cache holds, for many runs after it. Compiled layers get the tensors of their `Prefix`, not the cache.

    So one graph serves all layers, whole: it sees neither the number of a layer nor a cache that changes.
    """

    def __init__(self, cache: DynamicCache) -> None:
        self.prefixes = [Prefix(layer.keys, layer.values) for layer in cache.layers]

    def get_seq_length(self) -> int:
        """K."""
        return self.prefixes[0].keys.shape[2]

    def crop(self, length: int) -> None:
        """Nothing was added."""


def has_compiled_layers(model: Any) -> bool:
    """Whether `compile_layers` was called."""
    return model.model.layers[0]._compiled_call_impl is not None


def is_whole_graph(model: Any) -> bool:
    """Whether the whole of `forward` is compiled, which may have to be one graph: nothing in it may hide then."""
    return hasattr(model.forward, "_torchdynamo_orig_callable") or model._compiled_call_impl is not None


def make_cache(model: Any) -> DynamicCache:
    """An empty cache that `model` fills fast: one that grows in place, wherever the compiler need not see it."""
    return DynamicCache(config=model.config) if is_whole_graph(model) else GrowingCache(model.config)


__all__ = [
    "FrozenCache",
    "GrowingCache",
    "GrowingLayer",
    "Prefix",
    "has_compiled_layers",
    "is_whole_graph",
    "make_cache",
]
