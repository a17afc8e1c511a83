"""Size tokens: begin-of-image tokens of which each stands for one grid."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor

from tests.tiny_processor import (
    SPECIAL_TOKENS,
    image_part,
    picture,
    text_ids,
    text_part,
    tiny_processor,
    tiny_tokenizer,
)
from transfusion.configuration import TransfusionConfig
from transfusion.generation import TransfusionGenerateOutput
from transfusion.inputs import learned_labels
from transfusion.processing import TransfusionImageProcessor, TransfusionProcessor


GRIDS = [(2, 3), (1, 2), (4, 1)]
TOKENS = ["<boi_2x3>", "<boi_1x2>", "<boi_4x1>"]


def sized_processor(grids: Any = GRIDS, **options: Any) -> TransfusionProcessor:
    plain = tiny_processor()
    return TransfusionProcessor(
        TransfusionImageProcessor(patch_size=2), tiny_tokenizer(**options), None, plain.chat_template, grids
    )


PROCESSOR = sized_processor()
BOI, EOI, IMAGE = PROCESSOR.boi_token_id, PROCESSOR.eoi_token_id, PROCESSOR.image_token_id
SIZE_IDS: list[int] = PROCESSOR.tokenizer.convert_tokens_to_ids(TOKENS)
BEGINS = {BOI, *SIZE_IDS}


def sized_config(**overrides: Any) -> TransfusionConfig:
    values = {
        "vocab_size": len(PROCESSOR.tokenizer),
        "hidden_size": 24,
        "latent_channels": 3,
        "boi_token_id": BOI,
        "eoi_token_id": EOI,
        "image_token_id": IMAGE,
        "size_token_grids": GRIDS,
        "size_token_ids": SIZE_IDS,
    }
    return TransfusionConfig(**{**values, **overrides})


def test_they_come_behind_the_other_tokens_which_stay() -> None:
    plain = tiny_processor()
    assert (plain.size_token_grids, plain.size_token_ids, plain.boi_token_ids) == (None, None, [BOI])
    assert [BOI, EOI, IMAGE] == [plain.boi_token_id, plain.eoi_token_id, plain.image_token_id]
    size = len(plain.tokenizer)
    assert PROCESSOR.size_token_ids == SIZE_IDS == [size, size + 1, size + 2]
    assert PROCESSOR.tokenizer.convert_ids_to_tokens(SIZE_IDS) == TOKENS
    assert set(PROCESSOR.boi_token_ids) == BEGINS and len(PROCESSOR.boi_token_ids) == 4


def test_a_picture_begins_with_the_token_of_its_grid() -> None:
    sizes = [(4, 6), (2, 4), (8, 2), (4, 4), (6, 4), (2, 4)]
    pictures = [picture(i, *size) for i, size in enumerate(sizes)]
    begins = [*SIZE_IDS, BOI, BOI, SIZE_IDS[1]]
    expected = text_ids("x")
    for begin, (height, width) in zip(begins, sizes, strict=True):
        expected += [begin, *[IMAGE] * (height * width // 4), EOI]
    for begin, (height, width) in zip(begins, sizes, strict=True):
        assert PROCESSOR.boi_token_for((height // 2, width // 2)) == begin
        assert sized_config().boi_token_for((height // 2, width // 2)) == begin
    sized = PROCESSOR(text="x" + "<image>" * 6, images=pictures, return_labels=True, return_tensors="pt")
    assert sized["input_ids"][0].tolist() == [*expected, 1]
    assert sized["image_grids"].tolist() == [[h // 2, w // 2] for h, w in sizes]
    plain = tiny_processor(size=None)(text="x" + "<image>" * 6, images=pictures, return_labels=True)
    assert plain["input_ids"][0] == [BOI if token in BEGINS else token for token in sized["input_ids"][0].tolist()]
    assert torch.equal(plain["latent_patches"], sized["latent_patches"])
    learned = learned_labels(sized["input_ids"], sized["labels"], sized_config())[0].tolist()
    # The model learns which size to begin, the first after the text and the others after an image, and the end.
    assert [token for token in learned if token != -100] == [*begins, 1]


def test_what_is_written_keeps_no_token() -> None:
    begin = SIZE_IDS[1]
    ids = [*text_ids("see"), begin, IMAGE, IMAGE, EOI, *text_ids(" it"), 1]
    output = TransfusionGenerateOutput(torch.tensor([ids]), [[torch.zeros(2, 12)]], [[(1, 2)]], 0)
    first, image, last = PROCESSOR.post_process_multimodal_output(output)[0]
    assert (first, image.size, last) == ("see", (4, 2), " it")


mixed_text = st.lists(st.sampled_from(SPECIAL_TOKENS + TOKENS) | st.text(max_size=6)).map("".join).filter(bool)


@given(mixed_text, mixed_text)
@settings(max_examples=80, deadline=None)
def test_no_text_becomes_a_size_token(before: str, after: str) -> None:
    row = PROCESSOR(text=[text_part(before), image_part(picture()), text_part(after)])["input_ids"][0]
    start = row.index(SIZE_IDS[0])
    others = row[:start] + row[start + 8 :]
    assert not set(others) & {0, 1, 2, EOI, IMAGE, *BEGINS}
    assert PROCESSOR.decode(row[:start]) == before.rstrip() and PROCESSOR.decode(row[start + 8 :]) == after.lstrip()
    half = len(before) // 2
    content = [text_part(before[:half]), text_part(before[half:]), image_part(picture())]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": after}]
    ids = PROCESSOR.apply_chat_template(chat, tokenize=True)[0]
    assert [token for token in ids if token in BEGINS] == [SIZE_IDS[0]]


def test_no_role_of_a_chat_becomes_a_size_token() -> None:
    with pytest.raises(ValueError, match="'role' of a chat holds.*<boi_1x2>"):
        PROCESSOR.apply_chat_template([{"role": "<boi_1x2>", "content": "a"}], tokenize=True)


def test_saved_and_loaded(tmp_path: Path) -> None:
    PROCESSOR.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["size_token_grids"] == [[2, 3], [1, 2], [4, 1]]
    for kind in (TransfusionProcessor, AutoProcessor):
        loaded = kind.from_pretrained(tmp_path)
        assert loaded.size_token_grids == GRIDS and loaded.size_token_ids == SIZE_IDS
        assert len(loaded.tokenizer) == len(PROCESSOR.tokenizer)
        row: dict[str, Any] = {"text": "a <image> <boi_2x3>", "images": picture()}
        assert loaded(**row)["input_ids"] == PROCESSOR(**row)["input_ids"]
    tiny_processor().save_pretrained(tmp_path / "plain")
    assert "size_token" not in (tmp_path / "plain" / "processor_config.json").read_text()
    assert TransfusionProcessor.from_pretrained(tmp_path / "plain").size_token_grids is None


def test_check_model() -> None:
    PROCESSOR.check_model(sized_config())
    PROCESSOR.check_model(sized_config(size_token_grids=[list(grid) for grid in GRIDS]))  # as JSON gives them back
    backwards = {"size_token_grids": GRIDS[::-1], "size_token_ids": SIZE_IDS[::-1]}
    PROCESSOR.check_model(sized_config(**backwards))
    ids = SIZE_IDS
    for overrides in (
        {"size_token_grids": None, "size_token_ids": None},
        {"size_token_ids": ids[::-1]},
        {"size_token_grids": [(2, 3), (1, 2), (1, 4)]},
        {"size_token_grids": GRIDS[:2], "size_token_ids": ids[:2]},
    ):
        with pytest.raises(ValueError, match="size tokens"):
            PROCESSOR.check_model(sized_config(**overrides))
    with pytest.raises(ValueError, match="size tokens"):
        tiny_processor().check_model(sized_config())


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([(2, 3), (2, 3)], "name each grid once"),
        ([(2, 0)], r"holds \(2, 0\)"),
        ([(2,)], r"holds \(2,\)"),
        ([("2", 3)], "two positive integers"),
        ([(2.0, 3)], "two positive integers"),
    ],
)
def test_what_is_refused(grids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sized_processor(grids)
