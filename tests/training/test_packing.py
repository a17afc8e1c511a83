import random
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import tiny_config, tiny_model
from tests.training.tiny_rows import ragged_rows
from transfusion.training.collator import TransfusionDataCollator
from transfusion.training.packing import first_fit


CAPACITY = 24


def batches(text_dropout: float = 0.0, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Twelve ragged rows, padded and packed."""
    padded, packed = (
        TransfusionDataCollator(tiny_config(), text_dropout, packed_length=length, **options)(ragged_rows())
        for length in (None, CAPACITY)
    )
    return padded, packed


def set_attention(model: Any, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA attends by segments where these are long; "segments" has it so for the short rows of tests too."""
    model.set_attn_implementation("sdpa" if attention == "segments" else attention)
    if attention == "segments":
        monkeypatch.setattr("transfusion.attention.PAIRS_PER_KEY", {"single": 0, "half": 0})


def test_first_fit_keeps_to_the_capacity_and_to_its_bound() -> None:
    chooser = random.Random(0)
    for _ in range(200):
        capacity = chooser.randint(5, 60)
        lengths = [chooser.randint(1, capacity) for _ in range(chooser.randint(1, 40))]
        bins = first_fit(lengths, capacity)
        assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
        filled = [sum(lengths[index] for index in members) for members in bins]
        assert max(filled) <= capacity
        # Dosa 2007: at most 11/9 of the best, and 6/9; no two bins could be one.
        assert 9 * len(bins) <= 11 * -(-sum(lengths) // capacity) + 6 or max(lengths) > capacity / 3
        assert all(first + second > capacity for i, first in enumerate(filled) for second in filled[:i])


def test_a_row_that_fits_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match="Row 1 has 9 tokens and packed_length is 8"):
        first_fit([8, 9], 8)
    with pytest.raises(ValueError, match="packed_length is 0"):
        TransfusionDataCollator(tiny_config(), packed_length=0)


def test_packing_leaves_out_padding_and_keeps_every_token() -> None:
    padded, packed = batches()
    assert "attention_mask" not in packed
    assert packed["input_ids"].shape[1] <= CAPACITY
    assert len(packed["input_ids"]) < len(padded["input_ids"])
    for row, mask in enumerate(padded["attention_mask"].bool()):
        is_here = packed["document_ids"] == row
        assert is_here.any(dim=1).sum() == 1  # no document is cut
        for name in ("input_ids", "labels"):
            assert torch.equal(packed[name][is_here], padded[name][row][mask])
        assert packed["position_ids"][is_here].tolist() == list(range(int(mask.sum())))
    is_padding = packed["document_ids"] == -1
    assert (packed["labels"][is_padding] == -100).all()
    assert (packed["input_ids"][is_padding] == tiny_config().pad_token_id).all()


@pytest.mark.parametrize("attention", ["segments", "sdpa", "eager"])
@pytest.mark.parametrize("text_dropout", [0.0, 1.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_attention": "causal"},
        {"image_rope": "2d", "axial_positions": True, "modality_experts": "all", "num_residual_streams": 2},
        {"patch_codec": "unet"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "plain",
)
def test_losses_and_gradients_are_those_of_padded_rows(
    options: dict[str, Any], text_dropout: float, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(objective="flow", **options)
    set_attention(model, attention, monkeypatch)
    results = []
    for batch in batches(text_dropout):
        model.zero_grad()
        output = model(**batch, use_cache=False)
        output.loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((output, gradients))
    (padded, expected), (packed, ours) = results
    assert torch.allclose(packed.text_loss, padded.text_loss, atol=1e-12)
    assert torch.allclose(packed.image_loss, padded.image_loss, atol=1e-12)
    for name, gradient in expected.items():
        assert gradient is not None and torch.allclose(ours[name], gradient, atol=1e-11), name


def logits_of(model: Any, batch: dict[str, Any], row: int) -> Tensor:
    """Of one document, wherever it lies."""
    logits = model(**batch, use_cache=False).logits
    if "document_ids" in batch:
        return logits[batch["document_ids"] == row]
    return logits[row][batch["attention_mask"][row].bool()]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["segments", "sdpa", "eager"])
def test_documents_do_not_see_each_other(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(objective="flow")
    set_attention(model, attention, monkeypatch)
    padded, packed = batches()
    for row in range(12):
        assert torch.allclose(logits_of(model, packed, row), logits_of(model, padded, row), atol=1e-12)
    changed = dict(packed, input_ids=packed["input_ids"].clone())
    first = packed["document_ids"][0, 0]
    is_text = (packed["document_ids"] == first) & (packed["input_ids"] < 90)
    changed["input_ids"][is_text] = 60
    others = packed["document_ids"] != first
    before, after = (model(**batch, use_cache=False).logits for batch in (packed, changed))
    assert torch.equal(before[others], after[others])
    assert not torch.allclose(before[~others], after[~others])


def test_positions_and_noise_levels_are_found_from_the_documents() -> None:
    model = tiny_model(objective="flow", timestep_density="uniform")
    _, packed = batches()
    given = {name: value for name, value in packed.items() if name != "position_ids"}
    assert torch.equal(model(**given).loss, model(**packed).loss)
    grids, ids = packed["image_grids"], packed["input_ids"]
    torch.manual_seed(0)
    is_capped = torch.stack([model.draw_timesteps(grids, ids, None, packed["document_ids"]) for _ in range(40)])
    is_capped = (is_capped <= 500).all(dim=0)
    expected = []
    for row, documents in zip(ids.tolist(), packed["document_ids"].tolist(), strict=True):
        for place, token in enumerate(row):
            if token == 99 and row[place - 1] != 99:
                start = documents.index(documents[place])
                expected.append(not any(token < 97 and token > 2 for token in row[start:place]))
    assert is_capped.tolist() == expected


def test_first_tokens_of_documents_are_no_targets() -> None:
    padded, packed = batches()
    model = tiny_model(objective="flow")
    learned = dict(packed, labels=packed["input_ids"].masked_fill(packed["document_ids"] < 0, -100))
    counted = model(**learned).text_loss
    per_row = dict(padded, labels=torch.where(padded["attention_mask"].bool(), padded["input_ids"], -100))
    assert torch.allclose(counted, model(**per_row).text_loss, atol=1e-12)


def test_documents_that_cannot_be_are_refused() -> None:
    model = tiny_model()
    _, packed = batches()
    with pytest.raises(ValueError, match=r"document_ids has shape \(1, 3\)"):
        model(**dict(packed, document_ids=torch.zeros(1, 3)))
    cut = packed["document_ids"].clone()
    place = (packed["input_ids"][0] == 99).nonzero()[1]
    cut[0, place:] = 50
    with pytest.raises(ValueError, match="change within an image"):
        model(**dict(packed, document_ids=cut))
    cache = model(input_ids=torch.tensor([[5, 6]]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="training alone"):
        model(input_ids=torch.tensor([[5]]), document_ids=torch.tensor([[0]]), past_key_values=cache)


def test_sample_names_move_with_their_rows() -> None:
    _, packed = batches(with_sample_ids=True)
    order = []
    for row in packed["document_ids"].tolist():
        order += [document for place, document in enumerate(row) if document >= 0 and document not in row[:place]]
    assert packed["sample_ids"] == [f"sample-{document}" for document in order]


@pytest.mark.parametrize("attention", ["segments", "eager", "sdpa"])
def test_packed_rows_train_under_autocast(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are rotated in float32 and values are bfloat16, with a cache or without."""
    model = tiny_model(objective="flow").float()
    set_attention(model, attention, monkeypatch)
    _, packed = batches()
    packed |= {name: packed[name].float() for name in ("latent_patches", "noise")}
    exact = model(**packed, use_cache=False).loss
    for use_cache in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**packed, use_cache=use_cache).loss
        loss.backward()
        torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)


def test_shifted_labels_go_with_documents() -> None:
    model = tiny_model(objective="flow")
    _, packed = batches()
    borders = packed["document_ids"][:, 1:] != packed["document_ids"][:, :-1]
    shifted = torch.nn.functional.pad(packed["labels"][:, 1:].masked_fill(borders, -100), (0, 1), value=-100)
    assert torch.equal(model(**packed, shift_labels=shifted).text_loss, model(**packed).text_loss)


def test_padding_of_packed_rows_is_no_image() -> None:
    config = tiny_config(image_token_id=0, pad_token_id=99)
    rows = [{"input_ids": [5, 97, 0, 0, 98], "labels": [5, 97, 0, 0, 98], "image_grids": [[1, 2]]} for _ in range(3)]
    rows = [{**row, "latent_patches": torch.zeros(2, 12)} for row in rows]
    packed = TransfusionDataCollator(config, 0.0, packed_length=10)(rows)
    assert packed["input_ids"].tolist()[1] == [5, 97, 0, 0, 98] + [99] * 5


def test_documents_that_only_positions_tell_apart_are_learned_alike() -> None:
    model = tiny_model(objective="flow", timestep_density="uniform")
    _, packed = batches()
    packed["labels"] = packed["input_ids"].masked_fill(packed["document_ids"] < 0, -100)
    packed = {name: value for name, value in packed.items() if name != "timesteps"}
    losses = []
    for batch in (packed, {name: value for name, value in packed.items() if name != "document_ids"}):
        torch.manual_seed(0)
        losses.append(model(**batch).loss)
    assert torch.equal(*losses)
