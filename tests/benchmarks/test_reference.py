import pytest
import torch

from transfusion.benchmarks import ours
from transfusion.benchmarks.reference import PlainTransfusion, training_mask, training_step
from transfusion.benchmarks.workloads import MIXED, SIZES, Training
from transfusion.latents import image_block_ids


TINY = SIZES["tiny"]


def test_it_computes_what_the_model_computes_in_float64() -> None:
    model = ours.build(ours.make_config(TINY, 605)).double()
    plain = PlainTransfusion(model.config).take_weights(model.state_dict()).double()
    torch.testing.assert_close(
        plain.cos, model.model.rotary_emb(torch.zeros(1), torch.arange(605)[None])[0][0].double()
    )
    rows = ours.make_rows(MIXED, model.config)
    batch = ours.make_collator(model.config, text_dropout=0.5)([row | {"sample_seed": 1} for row in rows])
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    outputs = model(**batch, skip_logits=True, use_cache=False)
    assert plain.loss(batch).item() == pytest.approx(outputs.loss.item(), rel=1e-6)  # both end in float32
    torch.testing.assert_close(plain.predictions(batch)[2], outputs.image_prediction, rtol=1e-5, atol=1e-6)


def test_the_mask_is_the_rule_written_as_loops() -> None:
    config = ours.make_config(TINY, 64)
    batch = ours.make_collator(config, text_dropout=0.0)(ours.make_rows([(2, (1, 2), (2, 2), 1), (3,)], config))
    mask = training_mask(batch, config)[:, 0]
    blocks = image_block_ids((batch["input_ids"] == config.image_token_id).long(), 1)
    for row, query, key in torch.cartesian_prod(torch.arange(2), *[torch.arange(mask.shape[-1])] * 2).tolist():
        same = blocks[row, query] >= 0 and blocks[row, query] == blocks[row, key]
        seen = bool(batch["attention_mask"][row, key])
        assert mask[row, query, key] == ((bool(key <= query or same) and seen) or query == key)


def test_packed_documents_do_not_see_each_other() -> None:
    config = ours.make_config(TINY, 64)
    ids = torch.tensor([[5, 6, 7, 8, 0]])
    batch = {"input_ids": ids, "document_ids": torch.tensor([[0, 0, 1, 1, -1]])}
    expected = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2), torch.ones(1, 1)).tril().bool()
    assert (training_mask(batch, config)[0, 0] == expected).all()


@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_learns(bf16: bool) -> None:
    torch.manual_seed(0)
    plain = PlainTransfusion(ours.make_config(TINY, 64))
    step = training_step(plain, Training("tiny", ((3, (2, 2), 2), (5,))), bf16)
    before = plain.patch_in.weight.clone()
    assert torch.isfinite(step()) and not torch.equal(before, plain.patch_in.weight)
