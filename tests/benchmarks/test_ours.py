import pytest
import torch

from transfusion.benchmarks import ours
from transfusion.benchmarks.workloads import SIZES, Decoding, Denoising, Interleaving, Training, num_tokens


TINY = SIZES["tiny"]
WORKLOAD = Training("tiny", ((3, (2, 2), 2), (5,)))


@pytest.mark.parametrize(("name", "millions"), [("S", 5.1), ("M", 26.1)])
def test_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = ours.TransfusionForMultimodalGeneration(ours.make_config(SIZES[name], 307))
    assert ours.num_parameters(model) / 1e6 == pytest.approx(millions, abs=0.05)


def test_feed_forward_layers_widen_to_the_number_of_parameters() -> None:
    inner = ours.matching_inner(TINY, 100_000)
    assert inner > TINY.inner
    found = ours.num_parameters(ours.build(ours.make_config(TINY, 64, inner)))
    assert abs(found - 100_000) <= TINY.layers * 3 * TINY.width * 4  # half of a step of 8


def test_rows_are_the_documents() -> None:
    config = ours.make_config(TINY, 64)
    row = ours.make_row((3, (2, 3), 4), 0, config)
    assert len(row["input_ids"]) == num_tokens((3, (2, 3), 4))
    assert row["latent_patches"].shape == (6, config.patch_dim) and row["image_grids"].tolist() == [[2, 3]]
    assert ((row["labels"] == -100) == (row["input_ids"] == config.image_token_id)).all()
    assert "latent_patches" not in ours.make_row((5,), 0, config)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_learns_from_batches_that_take_turns(bf16: bool) -> None:
    model = ours.for_training(ours.build(ours.make_config(TINY, 64)))
    step = ours.training_step(model, WORKLOAD, bf16)
    before = model.lm_head.weight.clone()
    losses = {round(float(step()), 6) for _ in range(2)}
    assert len(losses) == 2 and not torch.equal(before, model.lm_head.weight)
    assert model.lm_head.weight.grad is None


def test_text_has_as_many_tokens_as_asked() -> None:
    model = ours.build(ours.make_config(TINY, 64)).eval()
    written = ours.write(model, Decoding("tiny", 2, 5), 7)
    assert written.shape == (2, 12)
    assert not torch.isin(written, torch.tensor([2, *range(512, 515)])).any()


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 2), (3.0, 4)])
def test_images_take_the_evaluations_that_are_named(guidance: float, rows: int) -> None:
    model = ours.build(ours.make_config(TINY, 64)).eval()
    sizes = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: sizes.append(output.shape[:2]))
    patches = ours.draw(model, Denoising("tiny", 2, 8, guidance, evaluations=4, grid=(2, 3)))
    assert patches.shape == (12, model.config.patch_dim)
    assert sum(count for count, length in sizes if length == 6) == 4 * rows  # beside the prompt, eight and one long


def test_an_image_and_text_in_one_call() -> None:
    model = ours.build(ours.make_config(TINY, 64)).eval()
    output = ours.interleave(model, Interleaving("tiny", 5, 4, evaluations=2, grid=(2, 2)))
    assert [len(images) for images in output.images] == [1]
    assert (output.sequences[0] == model.config.image_token_id).sum() == 4
    assert output.sequences.shape[1] == 5 + 1 + 4 + 1 + 4
