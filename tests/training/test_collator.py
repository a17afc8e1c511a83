from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.tiny import tiny_config, tiny_model
from tests.training.tiny_rows import RowList, ragged_rows, training_row
from transfusion.context import hide_text
from transfusion.inputs import learned_labels
from transfusion.training.collator import TransfusionDataCollator


BOS, BOI, EOI, PATCH = 1, 97, 98, 99


def collate(rows: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    objective = options.pop("objective", "ddpm")
    return TransfusionDataCollator(tiny_config(objective=objective), **options)(rows)


def per_sample(batch: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, tuple]:
    """What a batch holds of each sample, by its name and without its padding."""
    out, image, patch = {}, 0, 0
    for index, row in enumerate(rows):
        grids = row.get("image_grids", torch.zeros(0, 2, dtype=torch.long))
        length, patches = len(row["input_ids"]), int(grids.prod(-1).sum())
        out[row["sample_id"]] = (
            batch["attention_mask"][index, :length].tolist(),
            batch["labels"][index, :length].tolist(),
            batch["timesteps"][image : image + len(grids)].tolist(),
            batch["noise"][patch : patch + patches].tolist(),
        )
        image, patch = image + len(grids), patch + patches
    return out


def slow_dropout(row: dict[str, Any], begins: tuple[int, ...] = (BOI,)) -> tuple[list[int], list[int]]:
    """Mask and labels of a row whose text is dropped, one token at a time."""
    ids, mask, labels = row["input_ids"].tolist(), [], row["labels"].tolist()
    image_of, image = [], -1
    for token in ids:
        image += token in begins
        image_of.append(image if token == PATCH else None)
    loss_mask = row.get("image_loss_mask")
    learned = [i for i, n in enumerate(image_of) if n is not None and (loss_mask is None or loss_mask[n])]
    end = max(learned, default=-1)
    ahead = [i < end and token not in (*begins, EOI, PATCH) for i, token in enumerate(ids)]
    if not any(is_ahead and token != BOS for is_ahead, token in zip(ahead, ids, strict=True)):
        ahead = [False] * len(ids)
    for position in range(len(ids)):
        mask.append(0 if ahead[position] else 1)
        if ahead[position] or (position > 0 and ahead[position - 1]):
            labels[position] = -100
    return mask, labels


def test_batch_is_padded_on_the_right() -> None:
    rows = ragged_rows()
    batch = collate(rows, text_dropout=0.0)
    longest = max(len(row["input_ids"]) for row in rows)
    for index, row in enumerate(rows):
        fill = longest - len(row["input_ids"])
        assert batch["input_ids"][index].tolist() == row["input_ids"].tolist() + [0] * fill
        assert batch["attention_mask"][index].tolist() == [1] * len(row["input_ids"]) + [0] * fill
        assert batch["labels"][index].tolist() == row["labels"].tolist() + [-100] * fill
    assert torch.equal(
        batch["latent_patches"], torch.cat([r["latent_patches"] for r in rows if "latent_patches" in r])
    )
    assert batch["image_grids"].shape == (11, 2) and batch["image_loss_mask"].sum() == 10
    assert batch["noise"].shape == batch["latent_patches"].shape
    assert batch["noise"].dtype == batch["latent_patches"].dtype


def test_a_batch_goes_through_the_model(objective: str) -> None:
    batch = collate(ragged_rows(), objective=objective, text_dropout=0.5)
    out = tiny_model(objective=objective)(**batch)
    assert torch.isfinite(out.loss)


def test_draws_depend_on_the_sample_alone(objective: str) -> None:
    rows = ragged_rows()
    collator = TransfusionDataCollator(tiny_config(objective=objective), text_dropout=0.5)
    together = per_sample(collator(rows), rows)
    backwards = per_sample(collator(rows[::-1]), rows[::-1])
    assert together == backwards
    for row in rows:
        if "latent_patches" in row:
            assert per_sample(collator([row]), [row]) == {row["sample_id"]: together[row["sample_id"]]}


def test_draws_do_not_depend_on_workers() -> None:
    rows = ragged_rows()
    collator = TransfusionDataCollator(tiny_config(), text_dropout=0.5)
    batches = [
        list(DataLoader(RowList(rows), batch_size=3, collate_fn=collator, num_workers=workers)) for workers in (0, 2)
    ]
    for alone, worker in zip(*batches, strict=True):
        assert alone.keys() == worker.keys()
        assert all(torch.equal(alone[name], worker[name]) for name in alone)


def test_draws_of_different_seeds_differ() -> None:
    first, second = (collate([training_row(5, (2, 3), 2, seed=7, sample_seed=seed)]) for seed in (1, 2))
    assert not torch.equal(first["noise"], second["noise"]) and first["timesteps"] != second["timesteps"]


def test_rows_without_a_seed_use_the_global_generator() -> None:
    row = training_row(5, (2, 3), 2)
    del row["sample_seed"]
    noises = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        noises.append(collate([row, row])["noise"])
    assert torch.equal(noises[0], noises[1]) and not torch.equal(noises[0], noises[2])
    assert not torch.equal(noises[0][:6], noises[0][6:])


DROPOUT_ROWS = [
    *ragged_rows(),
    training_row(5, (1, 2), 6, 7, (2, 2), 8, 2, image_loss_mask=torch.tensor([True, False])),
    training_row(5, (1, 2), 6, 7, (2, 2), 8, 2, image_loss_mask=torch.tensor([False, False])),
    training_row((1, 2), 6, 7, (2, 2), 8, 9, 2),
    training_row(BOS, (1, 2), 6, 2),
    training_row(BOS, 5, 6, (1, 2), 6, 2),
]


@pytest.mark.parametrize("row", DROPOUT_ROWS)
def test_dropped_text_equals_the_rule_token_by_token(row: dict[str, Any]) -> None:
    # A text row beside it, so that the batch has images and padding.
    batch = collate([row, training_row(5, (4, 5), 2, seed=1)], text_dropout=1.0)
    length = len(row["input_ids"])
    mask, labels = slow_dropout(row)
    assert batch["attention_mask"][0, :length].tolist() == mask
    assert batch["labels"][0, :length].tolist() == labels
    assert batch["attention_mask"][0, length:].sum() == 0 and (batch["labels"][0, length:] == -100).all()


SIZED = {"size_token_grids": [(1, 2), (2, 2)], "size_token_ids": [95, 96]}


def with_size_tokens(row: dict[str, Any]) -> dict[str, Any]:
    """`row` as a processor with these size tokens makes it."""
    grids = [tuple(grid) for grid in row.get("image_grids", torch.zeros(0, 2)).tolist()]
    begins = [tiny_config(**SIZED).boi_token_for(grid) for grid in grids]
    ids = row["input_ids"].clone()
    ids[ids == BOI] = torch.tensor(begins, dtype=torch.long)
    return {**row, "input_ids": ids, "labels": torch.where(row["labels"] == BOI, ids, row["labels"])}


@pytest.mark.parametrize("row", DROPOUT_ROWS)
def test_size_tokens_are_never_dropped(row: dict[str, Any]) -> None:
    row = with_size_tokens(row)
    collator = TransfusionDataCollator(tiny_config(**SIZED), text_dropout=1.0)
    batch = collator([row, training_row(5, (4, 5), 2, seed=1)])
    length = len(row["input_ids"])
    mask, labels = slow_dropout(row, (95, 96, BOI))
    assert batch["attention_mask"][0, :length].tolist() == mask
    assert batch["labels"][0, :length].tolist() == labels
    if "latent_patches" in row:
        plain = TransfusionDataCollator(tiny_config(**SIZED))([{**row, "sample_seed": 3}])["timesteps"]
        ids = torch.where(torch.isin(row["input_ids"], torch.tensor([95, 96])), BOI, row["input_ids"])
        assert torch.equal(plain, collate([{**row, "input_ids": ids, "sample_seed": 3}])["timesteps"])


MIXED_ROWS = [
    *ragged_rows(),
    training_row((1, 2), 5, (2, 2), (3, 1), 6, 7, (1, 1), 8, 2, seed=20),
    training_row((2, 2), (1, 2), (2, 1), 2, seed=21, image_loss_mask=torch.tensor([False, True, False])),
    training_row(5, 6, (1, 4), 7, (4, 1), 8, (1, 2), 2, seed=22, image_loss_mask=torch.tensor([False, False, True])),
]


@pytest.mark.parametrize("overrides", [{}, SIZED, {"image_rope": "2d", "axial_positions": True}])
def test_losses_of_a_mixed_batch_are_the_weighted_means_of_its_rows(objective: str, overrides: dict) -> None:
    """Texts alone, and up to four images in a row in any order, of many sizes: each row as it would be alone."""
    model = tiny_model(objective=objective, **overrides)
    collator = TransfusionDataCollator(model.config, text_dropout=0.3)
    rows = [with_size_tokens(row) for row in MIXED_ROWS] if "size_token_ids" in overrides else MIXED_ROWS
    text, image = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for row in rows:
        alone = collator([row])
        out = model(**alone)
        num_targets = (learned_labels(alone["input_ids"], alone["labels"], model.config) != -100).sum()
        text += torch.stack([out.text_loss * num_targets, num_targets]).detach()
        if "latent_patches" in row:
            num_patches = alone["image_grids"].prod(1)[alone["image_loss_mask"]].sum()
            image += torch.stack([out.image_loss * num_patches, num_patches]).detach()
    together = model(**collator(rows))
    torch.testing.assert_close(together.text_loss.double(), text[0] / text[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together.image_loss.double(), image[0] / image[1], rtol=1e-5, atol=1e-6)
    expected = together.text_loss + 5 * together.image_loss
    torch.testing.assert_close(together.loss, expected)


def test_text_is_dropped_as_sampling_hides_it() -> None:
    """Up to the drawn image, the mask of training is that of the unconditional branch."""
    row = training_row(BOS, 5, (1, 2), 6, 7, (2, 2), 8, 2)
    mask = collate([row], text_dropout=1.0)["attention_mask"][0]
    begin = row["input_ids"].tolist().index(BOI, 5)
    assert torch.equal(mask[: begin + 1].bool(), hide_text(row["input_ids"][: begin + 1], tiny_config()))


def test_share_of_dropped_rows() -> None:
    rows = [training_row(5, 6, (1, 1), 2, seed=seed) for seed in range(4000)]
    dropped = (collate(rows, text_dropout=0.1)["attention_mask"][:, 0] == 0).float().mean().item()
    assert abs(dropped - 0.1) < 5 * (0.1 * 0.9 / 4000) ** 0.5


def test_dropped_text_is_not_seen(objective: str) -> None:
    """Neither the image nor any loss changes with what the dropped text says; gradients are finite."""
    rows = [training_row(5, 6, 7, (2, 3), 8, 2, seed=3)]
    others = [training_row(50, 60, 70, (2, 3), 8, 2, seed=3)]
    model = tiny_model(objective=objective)
    outs = [model(**collate(r, objective=objective, text_dropout=1.0)) for r in (rows, others)]
    torch.testing.assert_close(outs[0].image_prediction, outs[1].image_prediction, rtol=0, atol=1e-12)
    torch.testing.assert_close(outs[0].loss, outs[1].loss, rtol=0, atol=1e-12)
    kept = [model(**collate(r, objective=objective, text_dropout=0.0)).image_prediction for r in (rows, others)]
    assert (kept[0] - kept[1]).abs().max() > 1e-4
    outs[0].loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_dropping_all_text_keeps_half_precision_finite(attention: str) -> None:
    model = tiny_model(attn_implementation=attention).to(torch.bfloat16)
    out = model(**collate(ragged_rows(), text_dropout=1.0))
    out.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


def test_noise_limit_of_images_without_prior_text(objective: str) -> None:
    limit = {"ddpm": 499, "flow": 500.0}[objective]
    first = [training_row((1, 1), 5, 2, seed=seed) for seed in range(2000)]
    after = [training_row(5, (1, 1), 2, seed=seed) for seed in range(2000)]
    times = collate(first + after, objective=objective)["timesteps"]
    assert times[:2000].max() <= limit < times[2000:].max()
    # Cut off and rescaled, so nothing piles up at the limit: few draws lie within a twentieth of it.
    assert 0 < (times[:2000] > 0.95 * limit).float().mean() < 0.15


def test_dropped_text_still_counts_as_text_for_the_limit() -> None:
    rows = [training_row(5, (1, 1), 2, seed=seed) for seed in range(50)]
    assert torch.equal(collate(rows, text_dropout=0.0)["timesteps"], collate(rows, text_dropout=1.0)["timesteps"])


def test_text_alone() -> None:
    rows = [training_row(5, 6, 7, 2, seed=seed) for seed in range(500)]
    batch = collate(rows, text_dropout=1.0)
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert batch["attention_mask"].all() and batch["input_ids"].shape == (500, 4)


def test_plain_lists_are_taken() -> None:
    row = training_row(5, (2, 3), 2, seed=5)
    lists = {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in row.items()}
    batch, expected = collate([lists]), collate([row])
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    torch.testing.assert_close(batch["latent_patches"], expected["latent_patches"].float())


def test_sample_ids_on_request() -> None:
    rows = ragged_rows()
    assert "sample_ids" not in collate(rows)
    assert collate(rows, with_sample_ids=True)["sample_ids"] == [row["sample_id"] for row in rows]


def broken(**changes: Any) -> dict[str, Any]:
    return training_row(5, (2, 2), 2, sample_id="the/broken.png") | changes


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (broken(latent_patches=torch.full((4, 12), torch.nan)), "NaN"),
        (broken(image_grids=torch.tensor([[2, 2], [1, 1]])), "hold 5 patches and latent_patches 4"),
        (broken(image_grids=torch.tensor([[1, 4]]), input_ids=torch.arange(7), labels=torch.arange(7)), "0 runs"),
        (broken(latent_patches=None), "there are no images"),
        (broken(image_loss_mask=torch.ones(2)), "image_loss_mask"),
        (broken(labels=torch.arange(3)), r"labels of shape \(3,\)"),
        ({"sample_id": "the/broken.png", "input_ids": torch.arange(3)}, "lacks labels"),
    ],
)
def test_a_broken_row_is_named(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"Sample the/broken.png.*{reason}"):
        collate([training_row(5, (2, 2), 2), row])


def test_mismatches_that_cancel_out_over_rows_are_found() -> None:
    """The first row has a placeholder run too many, the second one image too many: the batch as a whole would fit."""
    both = training_row(5, (1, 1), 6, (1, 1), 2, seed=0)
    one = {**both, "latent_patches": both["latent_patches"][:1], "image_grids": both["image_grids"][:1]}
    text = training_row(
        5, 6, 2, seed=1, latent_patches=both["latent_patches"][:1], image_grids=both["image_grids"][:1]
    )
    with pytest.raises(ValueError, match="Sample sample-0"):
        collate([one, text])


def test_probability_is_checked() -> None:
    with pytest.raises(ValueError, match="text_dropout is 1.5"):
        collate([], text_dropout=1.5)


def test_padding_id() -> None:
    row = [training_row(5, 2), training_row(5, 6, 7, 2)]
    assert TransfusionDataCollator(tiny_config(pad_token_id=None))(row)["input_ids"][0, -1] == 2
    with pytest.raises(ValueError, match="pad_token_id nor eos_token_id"):
        TransfusionDataCollator(tiny_config(pad_token_id=None, eos_token_id=None))(row)
