from collections.abc import Callable
from typing import Any

import pytest
import torch

from transfusion.benchmarks import flops, ours
from transfusion.benchmarks.flops import (
    Peak,
    decoding_bytes,
    decoding_flops,
    denoising_flops,
    layer_parameters,
    num_text_targets,
    training_flops,
    visible_pairs,
)
from transfusion.benchmarks.reference import PlainTransfusion, training_mask
from transfusion.benchmarks.workloads import PATCH_DIM, SIZES, VOCABULARY, Document
from transfusion.inputs import learned_labels


TINY = SIZES["tiny"]
DOCUMENTS: list[Document] = [(3, (2, 3), 4), (5,), (2, (1, 2), (2, 2), 1)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_pairs_are_those_that_a_mask_allows(document: Document) -> None:
    config = ours.make_config(TINY, 64)
    batch = ours.make_collator(config, text_dropout=0.0)(ours.make_rows([document], config))
    assert visible_pairs(document) == int(training_mask(batch, config).sum())


@pytest.mark.parametrize("document", DOCUMENTS)
def test_text_targets_are_those_that_the_model_learns(document: Document) -> None:
    config = ours.make_config(TINY, 64)
    batch = ours.make_collator(config, text_dropout=0.0)(ours.make_rows([document], config))
    learned = learned_labels(batch["input_ids"], batch["labels"], config)
    assert num_text_targets(document) == int((learned != -100).sum())


def test_parameters_of_a_layer_are_those_of_its_products() -> None:
    plain = PlainTransfusion(ours.make_config(TINY, 64))
    matrices = sum(weight.numel() for weight in plain.layers[0].parameters() if weight.dim() == 2)
    assert layer_parameters(TINY) == matrices


def test_training_counts_each_product_at_the_rows_it_runs_on() -> None:
    document: Document = (3, (2, 3), 4)
    per_token = TINY.layers * layer_parameters(TINY)
    forward = 2 * (
        16 * per_token + 8 * 16 * VOCABULARY + 6 * 2 * 16 * PATCH_DIM + (256 + 16) * 16
    ) + 4 * TINY.layers * 16 * visible_pairs(document)
    assert training_flops(TINY, [document]) == 3 * forward
    assert training_flops(TINY, [document] * 2) == 6 * forward


def test_torch_counts_the_same_products() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    plain = PlainTransfusion(ours.make_config(TINY, 64)).eval()
    ids = ours.prompts(1, 12)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        cache = plain.make_cache(1, 13)
        hidden = plain.run(plain.embed_tokens(ids), cache, 0, causal=True)
        before = counter.get_total_flops()
        plain.lm_head(plain.run(hidden[:, :1], cache, 12))
    # It does not count what fused attention on a CPU does: none here.
    assert decoding_flops(TINY, 0, 1) == counter.get_total_flops() - before
    assert decoding_flops(TINY, 13, 1) - decoding_flops(TINY, 0, 1) == 2 * TINY.layers * 16 * (13 + 13)
    assert decoding_flops(TINY, 13, 3) == 3 * decoding_flops(TINY, 13, 1)


def test_an_evaluation_looks_at_the_prefix_and_the_whole_image() -> None:
    one = denoising_flops(TINY, [10], patches=4)
    products = 4 * (TINY.layers * layer_parameters(TINY) + 2 * 16 * PATCH_DIM)
    assert one == 2 * products + 4 * TINY.layers * 16 * 4 * 14
    assert denoising_flops(TINY, [10, 1], 4) == 2 * one - 4 * TINY.layers * 16 * 4 * 9


def test_bytes_of_a_token_are_weights_once_and_the_cache_of_each_row() -> None:
    weights = TINY.layers * layer_parameters(TINY) + 16 * VOCABULARY
    assert decoding_bytes(TINY, 0, 8, itemsize=4) == 4 * weights
    assert decoding_bytes(TINY, 5, 8, itemsize=2) == 2 * (weights + 8 * 5 * 2 * TINY.layers * 16)


def test_the_faster_half_of_the_calls_counts() -> None:
    calls: list[int] = []
    assert 0 < flops.best_seconds(lambda: calls.append(sum(range(20_000))), "cpu", seconds=0.0) < 1
    assert len(calls) == 5


def test_peaks_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_a_second(call: Callable[[], Any], device: str) -> float:
        call()
        return 0.5

    monkeypatch.setattr(flops, "best_seconds", half_a_second)
    peak = Peak.measure("cpu")
    assert peak.matmul == {"fp32": 4 * 2048**3, "bf16": 4 * 2048**3} and peak.read == 2 * 2**28
    assert Peak(**peak.to_dict()) == peak
