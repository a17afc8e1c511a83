import collections
import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.tiny import tiny_config, tiny_model
from tests.tiny_processor import text_ids, tiny_processor, tiny_tokenizer
from transfusion.data.pictures import CaptionedPicture
from transfusion.image_processing import TransfusionImageProcessor
from transfusion.inputs import learned_labels
from transfusion.latents import patchify
from transfusion.processing import IGNORE_INDEX, TransfusionProcessor
from transfusion.training.collator import TransfusionDataCollator
from transfusion.training.rows import CaptionedPictureRows, EditRows


CAPTIONS = ("a red heart", "an emoji of a red heart")
TEXTS = [f"word {number}: what it means" for number in range(7)]


def pictures(count: int) -> list[CaptionedPicture]:
    return [CaptionedPicture(f"{i}.png", "heart", CAPTIONS, "", "", "", b"") for i in range(count)]


def latents(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, 6 if i % 2 else 4, generator=generator) for i in range(count)]


def make_rows(count: int = 10, **options: Any) -> CaptionedPictureRows:
    return CaptionedPictureRows(pictures(count), latents(count), tiny_processor(), TEXTS, **options)


def as_plain(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in row.items()}


def test_rows_equal_what_the_processor_makes() -> None:
    rows, processor = make_rows(10), tiny_processor()
    for index, (given, latent) in enumerate(zip(pictures(10), latents(10), strict=True)):
        row = rows[index]
        candidates = []
        for caption in given.captions:
            for text in (f"{caption}<image>", f"<image>{caption}"):
                candidates.append(processor(text=text, latents=latent, return_labels=True))
        matches = [c for c in candidates if c["input_ids"][0] == row["input_ids"].tolist()]
        assert len(matches) == 1 and matches[0]["labels"][0] == row["labels"].tolist()
        assert torch.equal(row["latent_patches"], patchify(latent, 2))
        assert row["image_grids"].tolist() == [[2, latent.shape[2] // 2]]
        assert row["sample_id"] == given.id


def test_choices_depend_on_epoch_index_and_seed_alone() -> None:
    rows, again = make_rows(), make_rows()
    backwards = [again[index] for index in reversed(range(10))][::-1]
    assert [as_plain(rows[index]) for index in range(10)] == [as_plain(row) for row in backwards]
    first = [rows[index]["sample_seed"] for index in range(10)]
    rows.set_epoch(1)
    second = [rows[index]["sample_seed"] for index in range(10)]
    other = [make_rows(seed=1)[index]["sample_seed"] for index in range(10)]
    assert len({*first, *second, *other}) == 30
    rows.set_epoch(0)
    assert [rows[index]["sample_seed"] for index in range(10)] == first


def test_shares_of_orders_and_captions() -> None:
    rows = make_rows(1)
    counts: collections.Counter[str] = collections.Counter()
    boi, num_epochs = rows.processor.boi_token_id, 4000
    for epoch in range(num_epochs):
        rows.set_epoch(epoch)
        ids = rows[0]["input_ids"]
        counts["picture first"] += int(ids[0] == boi)
        counts["long"] += int(len(ids) > 18)
    deviation = 5 * (0.25 / num_epochs) ** 0.5
    assert abs(counts["picture first"] / num_epochs - 0.2) < deviation
    lengths = {len(rows.processor.tokenizer(caption)["input_ids"]) for caption in CAPTIONS}
    assert len(lengths) == 2 and abs(counts["long"] / num_epochs - 0.5) < deviation


def test_texts_come_in_their_ratio_and_all_in_turn() -> None:
    rows = make_rows(10, text_ratio=0.3)
    seen: collections.Counter[str] = collections.Counter()
    assert len(rows) == 13
    for epoch in range(7):
        rows.set_epoch(epoch)
        for index in range(10, 13):
            row = rows[index]
            assert row.keys() == {"input_ids", "labels", "sample_id"}
            assert rows.processor.tokenizer.decode(row["input_ids"]) == TEXTS[int(row["sample_id"][5:])] + "<eos>"
            seen[row["sample_id"]] += 1
    assert set(seen.values()) == {3} and len(seen) == 7


@pytest.mark.parametrize(
    "options", [{"num_workers": 0}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": 1}]
)
def test_workers_see_the_epoch(options: dict[str, Any]) -> None:
    rows = make_rows(6)
    loader = DataLoader(rows, batch_size=2, collate_fn=lambda batch: batch, **options)
    for epoch in (0, 1, 2):
        rows.set_epoch(epoch)
        loaded = [row["sample_seed"] for batch in loader for row in batch]
        assert loaded == [rows[index]["sample_seed"] for index in range(6)]


def test_fingerprints_are_of_what_is_chosen_from() -> None:
    assert make_rows().fingerprint == make_rows().fingerprint
    others = [make_rows(9), make_rows(seed=1), make_rows(text_ratio=0.3), make_rows(caption_first=0.5)]
    renamed = [dataclasses.replace(picture, captions=("other",)) for picture in pictures(10)]
    others.append(CaptionedPictureRows(renamed, latents(10), tiny_processor(), TEXTS))
    assert len({rows.fingerprint for rows in [make_rows(), *others]}) == 6
    assert edit_rows().fingerprint == edit_rows().fingerprint != edit_rows(seed=1).fingerprint


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="2 pictures and 1 latents"):
        CaptionedPictureRows(pictures(2), latents(1), tiny_processor())
    with pytest.raises(ValueError, match="0 pictures"):
        CaptionedPictureRows([], [], tiny_processor())
    with pytest.raises(ValueError, match="text_ratio is 0.5 with 0 texts"):
        CaptionedPictureRows(pictures(2), latents(2), tiny_processor(), text_ratio=0.5)
    with pytest.raises(IndexError, match="10"):
        make_rows(10)[10]


def test_captions_with_control_tokens_are_text() -> None:
    given = [CaptionedPicture("x.png", "x", ("a <image> of <boi>",), "", "", "", b"")]
    rows = CaptionedPictureRows(given, [torch.zeros(3, 4, 4)], tiny_processor(), caption_first=1.0)
    ids = rows[0]["input_ids"].tolist()
    assert ids.count(rows.processor.image_token_id) == 4 and ids.count(rows.processor.boi_token_id) == 1


INSTRUCTIONS: list[str | list[str]] = ["make it blue", ["turn it", "turn it around <boi>"], "bigger", " add a sky "]


def edit_processor(sizes: Any) -> TransfusionProcessor:
    return TransfusionProcessor(TransfusionImageProcessor(), tiny_tokenizer(), size_token_grids=sizes)


def edit_rows(sizes: Any = None, **options: Any) -> EditRows:
    return EditRows(latents(4), INSTRUCTIONS, latents(8)[4:][::-1], edit_processor(sizes), **options)


@pytest.mark.parametrize("sizes", [None, [(2, 2), (2, 3)]])
def test_edit_rows_written_out(sizes: Any) -> None:
    rows, processor = edit_rows(sizes), edit_processor(sizes)
    for index, (source, target) in enumerate(zip(latents(4), latents(8)[4:][::-1], strict=True)):
        row, grids = rows[index], [(2, source.shape[2] // 2), (2, target.shape[2] // 2)]
        blocks = [
            [processor.boi_token_for(grid), *[processor.image_token_id] * (grid[0] * grid[1]), processor.eoi_token_id]
            for grid in grids
        ]
        given = rows.instructions[index]
        candidates = [[*blocks[0], *text_ids(one.strip()), *blocks[1], 1] for one in given]
        ids = row["input_ids"].tolist()
        assert ids in candidates and grids[0] != grids[1]
        length = len(ids) - len(blocks[1]) - 1
        unlearned = [IGNORE_INDEX] * len(blocks[1][1:])
        assert row["labels"].tolist() == [IGNORE_INDEX] * length + [blocks[1][0], *unlearned, 1]
        assert torch.equal(row["latent_patches"], torch.cat([patchify(source, 2), patchify(target, 2)]))
        assert row["image_grids"].tolist() == [list(grid) for grid in grids]
        assert row["image_loss_mask"].tolist() == [False, True] and row["sample_id"] == f"edit {index}"


def test_phrasings_and_seeds_depend_on_epoch_index_and_seed_alone() -> None:
    rows, again = edit_rows(), edit_rows()
    lengths, seeds = set(), set()
    for epoch in range(20):
        for one in (rows, again):
            one.set_epoch(epoch)
        assert [as_plain(rows[i]) for i in range(4)] == [as_plain(again[i]) for i in (3, 2, 1, 0)][::-1]
        lengths.add(len(rows[1]["input_ids"]))
        seeds |= {rows[i]["sample_seed"] for i in range(4)}
    assert len(lengths) == 2 and len(seeds) == 80
    rows.set_epoch(0)
    assert rows[0]["sample_seed"] != edit_rows(seed=1)[0]["sample_seed"]


@pytest.mark.parametrize("sizes", [None, [(2, 2), (2, 3)]])
def test_a_model_trains_on_edits(objective: str, sizes: Any) -> None:
    """The source is clean and the target noised; text is learned at two places alone: to begin, and to end."""
    rows, processor = edit_rows(sizes), edit_processor(sizes)
    ids = {name: getattr(processor, name) for name in ("boi_token_id", "eoi_token_id", "image_token_id")}
    sized = {"size_token_grids": processor.size_token_grids, "size_token_ids": processor.size_token_ids}
    model = tiny_model(
        objective=objective, vocab_size=len(processor.tokenizer), bos_token_id=None, eos_token_id=1, **ids, **sized
    )
    processor.check_model(model.config)
    batch = TransfusionDataCollator(model.config, text_dropout=0.0)([rows[index] for index in range(4)])
    targets = learned_labels(batch["input_ids"], batch["labels"], model.config)
    begins = [processor.boi_token_for((rows, columns)) for rows, columns in batch["image_grids"][1::2].tolist()]
    assert [row[row != -100].tolist() for row in targets] == [[begin, 1] for begin in begins]
    batch["latent_patches"], batch["noise"] = batch["latent_patches"].double(), batch["noise"].double()
    out = model(**batch)
    learned = batch["image_loss_mask"].repeat_interleave(batch["image_grids"].prod(1))
    louder = torch.where(learned[:, None], batch["noise"], 100.0)
    torch.testing.assert_close(model(**{**batch, "noise": louder}).loss, out.loss)
    changed = torch.where(learned[:, None], batch["latent_patches"], 0.0)
    other = model(**{**batch, "latent_patches": changed})
    assert (other.image_prediction - out.image_prediction)[learned].abs().max() > 1e-5  # targets see their sources
    out.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


def test_dropping_the_instruction_keeps_the_source() -> None:
    rows = edit_rows()
    processor = rows.processor
    ids = {name: getattr(processor, name) for name in ("boi_token_id", "eoi_token_id", "image_token_id")}
    config = tiny_config(vocab_size=len(processor.tokenizer), bos_token_id=None, eos_token_id=1, **ids)
    batch = TransfusionDataCollator(config, text_dropout=1.0)([rows[0]])
    hidden = batch["input_ids"][0][batch["attention_mask"][0] == 0]
    assert hidden.tolist() == text_ids("make it blue")


def test_bad_edits() -> None:
    with pytest.raises(ValueError, match="2 sources, 1 instructions and 2 targets"):
        EditRows(latents(2), ["a"], latents(2), tiny_processor())
    with pytest.raises(ValueError, match="0 sources"):
        EditRows([], [], [], tiny_processor())
    for phrasings in ([], [""], ["blue", "  "]):
        with pytest.raises(ValueError, match="Edit 1 has the instructions .* no empty one"):
            EditRows(latents(2), ["a", phrasings], latents(2), tiny_processor())
    with pytest.raises(IndexError, match="4"):
        edit_rows()[4]


def test_captions_are_not_made_of_edits() -> None:
    (picture,) = pictures(1)
    edited = dataclasses.replace(picture, original=picture)
    with pytest.raises(ValueError, match="edits of other pictures.*EditRows"):
        CaptionedPictureRows([edited], latents(1), tiny_processor())
