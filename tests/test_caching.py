import copy

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from tests.tiny import tiny_config
from transfusion.caching import GrowingCache, GrowingLayer


def new_states(length: int, seed: int, rows: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(rows, 3, length, 4, generator=generator) for _ in range(2))
    return keys, values


def both_layers() -> tuple[GrowingLayer, DynamicLayer]:
    return GrowingLayer(), DynamicLayer()


@torch.no_grad()
@pytest.mark.parametrize("seed", range(5))
def test_it_holds_what_a_dynamic_layer_holds(seed: int) -> None:
    layers = both_layers()
    chooser = torch.Generator().manual_seed(seed)
    for turn in range(40):
        length = int(torch.randint(1, 9, (), generator=chooser))
        action = int(torch.randint(0, 6, (), generator=chooser))
        results = [layer.update(*new_states(length, turn, rows=len(layer.keys) if turn else 2)) for layer in layers]
        for layer in layers:
            if action == 0:
                layer.crop(-min(3, layer.get_seq_length() - 1))
            elif action == 1:
                layer.reorder_cache(torch.arange(len(layer.keys)).flip(0))
            elif action == 2 and turn % 8 == 0:
                layer.batch_repeat_interleave(2)
            elif action == 3:
                layer.batch_select_indices(torch.arange(2))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
        assert torch.equal(layers[0].keys, layers[1].keys) and torch.equal(layers[0].values, layers[1].values)
        assert layers[0].get_seq_length() == layers[1].get_seq_length()


@torch.no_grad()
def test_new_tokens_are_written_in_place() -> None:
    layer = GrowingLayer()
    addresses = set()
    for turn in range(300):
        keys, _ = layer.update(*new_states(1, turn))
        addresses.add(keys.data_ptr())
    assert len(addresses) < 8  # a copy each time the room is full, not each time


@torch.no_grad()
def test_a_copy_has_a_room_of_its_own() -> None:
    layer = GrowingLayer()
    layer.update(*new_states(5, 0))
    other = copy.deepcopy(layer)
    layer.update(*new_states(1, 1))
    other.update(*new_states(1, 2))
    assert torch.equal(layer.keys[..., -1:, :], new_states(1, 1)[0])
    assert torch.equal(other.keys[..., -1:, :], new_states(1, 2)[0])


def test_gradients_reach_the_cached_states() -> None:
    layer = GrowingLayer()
    with torch.no_grad():
        layer.update(*new_states(2, 0))
    first, second = new_states(3, 1), new_states(1, 2)
    first[0].requires_grad_()
    layer.update(*first)
    keys, _ = layer.update(*second)
    keys.sum().backward()
    assert torch.equal(first[0].grad, torch.ones_like(first[0]))
    with torch.no_grad():
        layer.update(*new_states(1, 3))
    assert layer.get_seq_length() == 7


def test_a_cache_has_a_layer_for_each_of_the_model() -> None:
    cache = GrowingCache(tiny_config())
    assert [type(layer) for layer in cache.layers] == [GrowingLayer] * 2


def test_what_inference_mode_cached_goes_on_outside_of_it() -> None:
    layers = both_layers()
    for layer in layers:
        with torch.inference_mode():
            layer.update(*new_states(3, 0))
        with torch.no_grad():
            layer.update(*new_states(1, 1))
        with torch.inference_mode():
            layer.update(*new_states(1, 2))
    assert torch.equal(layers[0].keys, layers[1].keys) and torch.equal(layers[0].values, layers[1].values)
