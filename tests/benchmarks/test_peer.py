from typing import Any

import pytest
import torch
from torch import nn

from transfusion.benchmarks import ours, peer
from transfusion.benchmarks.workloads import IMAGE, SIZES, Decoding, Denoising, Document, Training


TINY = SIZES["tiny"]
needs_peer = pytest.mark.skipif(not peer.is_installed(), reason="pip install transfusion-pytorch")


@pytest.mark.parametrize("document", [(3, (2, 3), 4), (5,), (2, (1, 2), (2, 2), 1), ((2, 2), 3)])
def test_a_row_comes_apart_into_what_it_was_made_of(document: Document) -> None:
    config = ours.make_config(TINY, 64)
    row = ours.make_row(document, 0, config)
    found = peer.items(row, config)
    parts = [len(part) if isinstance(part, torch.Tensor) else tuple(part[1].shape[:2]) for part in found]
    assert tuple(parts) == document
    pictures = [part[1].flatten(0, 1) for part in found if isinstance(part, tuple)]
    if pictures:
        torch.testing.assert_close(torch.cat(pictures), row["latent_patches"])


def test_passes_of_the_transformer_are_counted() -> None:
    module: Any = nn.Module()
    module.transformer = nn.Identity()
    assert peer.count_evaluations(module, lambda: [module.transformer(torch.ones(1)) for _ in range(3)]) == 3
    assert not module.transformer._forward_hooks


@needs_peer
def test_it_learns() -> None:
    module = peer.build(TINY)
    config = ours.make_config(TINY, 64)
    step = peer.training_step(module, Training("tiny", ((3, IMAGE, 2), (5,))), config, bf16=False)
    assert torch.isfinite(step())


@needs_peer
def test_it_writes_as_many_tokens_as_ours() -> None:
    module = peer.build(TINY).eval()
    workload = Decoding("tiny", 1, 5)
    assert peer.write_text_only(module, workload, 7).shape == (1, 7)
    (begin, *written) = peer.write_one(module, workload, 7)[0].tolist()
    assert begin == module.sos_id and len(written) == 12 and max(written) < peer.NUM_TEXT_TOKENS
    assert [len(row[0]) for row in peer.write_many(module, Decoding("tiny", 2, 5), 7)] == [13, 13]


@needs_peer
@pytest.mark.parametrize("many", [False, True])
def test_it_draws_with_as_many_evaluations_as_ours(many: bool) -> None:
    module = peer.build(TINY).eval()
    workload = Denoising("tiny", 1, 5, 1.0, evaluations=4, grid=(2, 2))
    calls = peer.count_evaluations(module, lambda: peer.draw(module, workload, many))
    assert calls == 4 + many  # sample_many runs the prompt by itself
