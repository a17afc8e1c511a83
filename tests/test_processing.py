"""The processor against rows written by hand, a slow reference for labels, and texts that try to be control tokens."""

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoProcessor, PreTrainedTokenizerFast

from tests.tiny_processor import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    image_part,
    picture,
    pixel_patches,
    text_ids,
    text_part,
    tiny_processor,
    tiny_tokenizer,
    tiny_vae,
)
from transfusion.configuration import TransfusionConfig
from transfusion.generation import TransfusionGenerateOutput
from transfusion.latents import patchify, split_images
from transfusion.processing import TransfusionImageProcessor, TransfusionProcessor


PROCESSOR = tiny_processor()
GPT2 = tiny_processor(unk_token="<eos>")  # there, too, one token has both tasks
BOI, EOI, IMAGE = PROCESSOR.boi_token_id, PROCESSOR.eoi_token_id, PROCESSOR.image_token_id
BLOCK = [BOI, *[IMAGE] * 6, EOI]


@pytest.fixture(scope="module")
def processor() -> TransfusionProcessor:
    return PROCESSOR


# Tokens


def test_tokens_are_added_in_the_order_of_the_config() -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    processor = TransfusionProcessor(TransfusionImageProcessor(), tokenizer)
    assert (processor.boi_token, processor.eoi_token, processor.image_token) == ("<boi>", "<eoi>", "<image>")
    assert [processor.boi_token_id, processor.eoi_token_id, processor.image_token_id] == [size, size + 1, size + 2]
    config = TransfusionConfig(vocab_size=len(tokenizer), hidden_size=24, latent_channels=3)
    processor.check_model(config)
    assert len(TransfusionProcessor(TransfusionImageProcessor(), tokenizer).tokenizer) == size + 3


def test_tokens_of_the_tokenizer_are_kept() -> None:
    tokenizer = tiny_tokenizer(
        model_specific_special_tokens={"boi_token": "<start_of_image>", "image_token": "<soft>"},
        extra_special_tokens=["<eoi>", "<other>"],
    )
    size = len(tokenizer)
    processor = TransfusionProcessor(TransfusionImageProcessor(size=4), tokenizer)
    assert (processor.boi_token, processor.eoi_token, processor.image_token) == ("<start_of_image>", "<eoi>", "<soft>")
    assert len(tokenizer) == size and "<other>" in tokenizer.all_special_tokens
    out = processor(text="<boi><soft>", images=[picture()])
    block = [processor.boi_token_id, *[processor.image_token_id] * 4, processor.eoi_token_id]
    assert out["input_ids"][0][-6:] == block and out["input_ids"][0][:-6] == text_ids("<boi>")


def test_a_token_that_was_not_special_becomes_so() -> None:
    tokenizer = tiny_tokenizer(extra_special_tokens=["<other>"])
    tokenizer.add_tokens([AddedToken("<image>", special=False)])
    processor = TransfusionProcessor(TransfusionImageProcessor(), tokenizer)
    assert processor.image_token_id not in processor(text="an <image>")["input_ids"][0]
    assert {"<other>", "<boi>", "<image>"} <= set(tokenizer.all_special_tokens)


def test_tokens_that_share_an_id_are_refused() -> None:
    tokenizer = tiny_tokenizer(model_specific_special_tokens={"boi_token": "<x>", "eoi_token": "<x>"})
    with pytest.raises(ValueError, match="must give each its own"):
        TransfusionProcessor(TransfusionImageProcessor(), tokenizer)


# Rows


def test_a_prompt_is_its_tokens(processor: TransfusionProcessor) -> None:
    out = processor(text=" a red heart ", return_tensors="pt")
    assert set(out) == {"input_ids", "attention_mask"}
    assert out["input_ids"].tolist() == [text_ids(" a red heart ")] and out["attention_mask"].all()


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ("a red heart <image>", ["a red heart", 0]),
        ("<image>a heart", [0, "a heart"]),
        (" a \n<image>\t<image>\n\n b <image> ", [" a", 0, 1, "b", 2]),
        ("<image>", [0]),
        ([text_part("a "), text_part("red "), image_part(), text_part(" x")], ["a red", 0, "x"]),
        (
            [text_part(" a <image>"), image_part(picture(0)), text_part("  "), image_part(), text_part("<boi>")],
            [" a <image>", 0, 1, "<boi>"],
        ),
    ],
)
def test_rows_written_out(processor: TransfusionProcessor, row: Any, parts: list[str | int]) -> None:
    """Parts are texts, which stand beside pictures without white space, and pictures 0, 1, 2."""
    count = sum(isinstance(part, int) for part in parts)
    given = [picture(i) for i in range(count)]
    own = any(isinstance(part, dict) and "image" in part for part in row)
    out = processor(text=row, images=given[own:], return_tensors="pt")
    expected = [token for part in parts for token in (BLOCK if isinstance(part, int) else text_ids(part))]
    assert out["input_ids"].tolist() == [expected]
    torch.testing.assert_close(out["latent_patches"], pixel_patches(*given))
    assert out["image_grids"].tolist() == [[2, 3]] * count and out["image_grids"].dtype == torch.long


def test_every_way_to_give_pictures_is_the_same(processor: TransfusionProcessor, tmp_path: Path) -> None:
    a, b, c = (picture(i) for i in range(3))
    stream = io.BytesIO()
    b.save(stream, "PNG")
    c.save(tmp_path / "c.png")
    rows = ["x <image> y <image>", "<image>"]
    structured = [[text_part("x"), image_part(a), text_part("y"), image_part(b)], [image_part(c)]]
    latents = [
        patch for p in (a, b, c) for patch in processor.encode_images(processor.image_processor(p)["pixel_values"])
    ]
    expected = processor(text=rows, images=[a, b, c], return_tensors="pt")
    torch.testing.assert_close(expected["latent_patches"], pixel_patches(a, b, c))
    for out in (
        processor(text=rows, images=[[a, b], [c]], return_tensors="pt"),
        processor(text=structured, return_tensors="pt"),
        processor(text=[rows[0], [image_part()]], images=[a, b, c], return_tensors="pt"),
        processor(
            text=rows, images=((np.asarray(a), stream.getvalue()), (str(tmp_path / "c.png"),)), return_tensors="pt"
        ),
        processor(text=rows, latents=latents, return_tensors="pt"),
        processor(text=rows, latents=[latents[:2], latents[2:]], return_tensors="pt"),
        processor(text=rows, latents=[latent.numpy() for latent in latents], return_tensors="pt"),
    ):
        assert set(out) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(out[name], value)


def test_one_picture_without_a_list(processor: TransfusionProcessor) -> None:
    assert processor(text="<image>", images=picture())["input_ids"] == [BLOCK]


def test_pictures_of_various_sizes() -> None:
    processor = tiny_processor(size=None)
    sizes = [(4, 6), (8, 4), (5, 7)]
    given = [picture(i, *size) for i, size in enumerate(sizes)]
    out = processor(text=["<image> and <image>", "<image>"], images=given, return_tensors="pt")
    assert out["image_grids"].tolist() == [[2, 3], [4, 2], [2, 3]]
    assert (out["input_ids"] == IMAGE).sum(1).tolist() == [14, 6]
    cropped = given[2].crop((0, 0, 6, 4))
    torch.testing.assert_close(out["latent_patches"], pixel_patches(*given[:2], cropped))
    assert processor(text="<image>", images=given[1], images_kwargs={"size": 2})["image_grids"].tolist() == [[1, 1]]


def test_rows_without_pictures_keep_a_literal_placeholder(processor: TransfusionProcessor) -> None:
    literal = text_ids("an <image> here")
    assert processor(text="an <image> here")["input_ids"] == [literal]
    assert processor(text="an <image> here", images=[])["input_ids"] == [literal]
    out = processor(text=["<image>", "an <image> here"], images=[[picture()], []], padding=False)
    assert out["input_ids"] == [BLOCK, literal]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_its_rows(side: str) -> None:
    processor = tiny_processor(vae=tiny_vae(), size=(8, 16))
    rows = ["a heart", "<image> a sky", "a <image> b <image>"]
    given = [[], [picture(0)], [picture(1), picture(2)]]
    batch = processor(text=rows, images=given, padding_side=side, return_tensors="pt")
    for index, (row, own) in enumerate(zip(rows, given, strict=True)):
        alone = processor(text=row, images=own, return_tensors="pt")
        mask = batch["attention_mask"][index].bool()
        assert batch["input_ids"][index][mask].tolist() == alone["input_ids"][0].tolist()
        assert (batch["input_ids"][index][~mask] == 0).all()
        assert (mask.long().diff() >= 0).all() if side == "left" else (mask.long().diff() <= 0).all()
    alone = [processor(text=r, images=g, return_tensors="pt") for r, g in zip(rows[1:], given[1:], strict=True)]
    expected = torch.cat([out["latent_patches"] for out in alone])
    torch.testing.assert_close(batch["latent_patches"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": []}, "not empty"),
        ({"text": ""}, "not empty"),
        ({"text": None}, "None"),
        ({}, "None"),
        ({"text": {"type": "text"}}, "string or a list"),
        ({"text": ["a", ""]}, "Row 1 has neither"),
        ({"text": [[]]}, "Row 0 has neither"),
        ({"text": [text_part("")]}, "Row 0 has neither"),
        ({"text": ["a", 5]}, "Row 1 of text is a int"),
        ({"text": [{"type": "video"}]}, "video"),
        ({"text": [[text_part("a"), "b"]]}, "'b'"),
        ({"text": [{"type": "text"}]}, "A part of a row"),
        ({"text": "a <image>", "images": [0, 0]}, "1 image placeholders and 2 pictures"),
        ({"text": "a", "images": [0]}, "0 image placeholders and 1 pictures"),
        ({"text": ["<image>", "a <image>"], "images": [0]}, "2 image placeholders and 1 pictures"),
        ({"text": ["<image>", "a"], "images": [[0], [0]]}, "0 image placeholders and 1 pictures in row 1"),
        ({"text": [image_part()]}, "1 image placeholders and 0 pictures"),
        ({"text": [image_part(0)], "images": [0]}, "0 image placeholders and 1 pictures"),
        ({"text": ["<image>"] * 2, "images": [[0]]}, "2 rows of text and 1 entries"),
        ({"text": ["<image>"] * 2, "images": [[0], 0]}, "give a list for each row"),
        ({"text": "<image>", "images": [0], "latents": [0]}, "Both images and latents"),
        ({"text": "<image>", "images": [None]}, "NoneType"),
        ({"text": "<image>", "images": ["https://localhost/a.png"]}, "URLs are not fetched"),
        ({"text": "<image>", "images": [0], "images_kwargs": {"sise": 3}}, "sise"),
        ({"text": "a", "padding": "longer"}, "padding is 'longer'"),
        ({"text": "a", "padding": "max_length"}, "max_length None"),
        ({"text": "a", "padding_side": "up"}, "'up'"),
    ],
)
def test_what_is_refused(processor: TransfusionProcessor, arguments: dict[str, Any], message: str) -> None:
    def fill(value: Any) -> Any:
        """0 stands for a picture."""
        if isinstance(value, list):
            return [fill(item) for item in value]
        return picture() if value == 0 and isinstance(value, int) else value

    arguments = {name: fill(value) if name in ("images", "latents") else value for name, value in arguments.items()}
    if isinstance(arguments.get("text"), list):
        for part in arguments["text"]:
            if isinstance(part, dict) and part.get("image") == 0:
                part["image"] = picture()
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


@pytest.mark.parametrize(
    ("latent", "message"),
    [
        (torch.zeros(4, 4, 4), r"\(4, 4, 4\); it must be \(3, h, w\)"),
        (torch.zeros(3, 5, 4), "multiples of the patch size 2"),
        (torch.zeros(3, 0, 4), "h and w"),
        (torch.zeros(12, 12), "h and w"),
        (torch.full((3, 4, 4), torch.nan), "not finite"),
        (torch.full((3, 4, 4), torch.inf), "not finite"),
    ],
)
def test_latents_are_checked(processor: TransfusionProcessor, latent: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(text="<image>", latents=[latent])


# No text becomes a control token


mixed_text = st.lists(st.sampled_from(SPECIAL_TOKENS) | st.text(max_size=6)).map("".join).filter(bool)


@given(mixed_text)
@settings(max_examples=150, deadline=None)
def test_no_text_becomes_a_control_token(value: str) -> None:
    for processor in (PROCESSOR, GPT2):
        out = processor(text=[value, [text_part(value)]], padding=False)
        for row in out["input_ids"]:
            assert not set(row) & set(processor.tokenizer.all_special_ids) and IMAGE not in row and 2 not in row
            assert processor.decode(row) == value == processor.decode(row, skip_special_tokens=True)


@given(mixed_text, mixed_text)
@settings(max_examples=50, deadline=None)
def test_no_text_beside_a_picture_becomes_a_control_token(before: str, after: str) -> None:
    row = PROCESSOR(text=[text_part(before), image_part(picture()), text_part(after)], return_labels=True)[
        "input_ids"
    ][0]
    before, after = before.rstrip(), after.lstrip()
    start = row.index(BOI)
    assert row[start : start + 8] == BLOCK and row[-1] == 1
    assert PROCESSOR.decode(row[:start]) == before and PROCESSOR.decode(row[start + 8 : -1]) == after
    assert not set(row[:start] + row[start + 8 : -1]) & {0, 1, 2, BOI, EOI, IMAGE}


def test_a_tokenizer_that_spells_control_tokens_as_words_is_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "<image>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    processor = TransfusionProcessor(TransfusionImageProcessor(), fast)
    assert processor(text="a b")["input_ids"] == [[1, 0]]
    with pytest.raises(ValueError, match="<image>.*byte-level"):
        processor(text="a <image>")


# Labels, beginnings and endings


def reference_labels(row: list[int], mask: list[int]) -> list[int]:
    """Position by position: a token is learned where the token before it is neither <boi> nor a patch."""
    labels = []
    for position, token in enumerate(row):
        previous = row[position - 1] if position else None
        learned = mask[position] and previous not in (BOI, IMAGE)
        labels.append(token if learned else -100)
    return labels


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels(processor: TransfusionProcessor, side: str) -> None:
    rows = ["a red heart <image>", "<image> a heart <image> b", "a", "<image>"]
    given = [picture(i) for i in range(4)]
    out = processor(text=rows, images=[given[:1], given[1:3], [], given[3:]], return_labels=True, padding_side=side)
    for row, mask, labels in zip(out["input_ids"], out["attention_mask"], out["labels"], strict=True):
        assert labels == reference_labels(row, mask)
        own = [label for label, seen in zip(labels, mask, strict=True) if seen]
        assert own[-1] == 1  # <eos> is learned, though <pad> is not
        assert own.count(BOI) == row.count(BOI) and EOI not in own and IMAGE not in own


def test_labels_where_padding_is_the_end_token() -> None:
    processor = tiny_processor(pad_token="<eos>")
    out = processor(text=["a", "a red heart"], return_labels=True)
    assert out["labels"][0][:3] == [*text_ids("a"), 1, -100] and out["input_ids"][0][1:3] == [1, 1]


def test_defaults_of_padding(processor: TransfusionProcessor) -> None:
    rows = ["a", "a red heart"]
    assert processor(text=rows)["attention_mask"][0][0] == 0
    assert processor(text=rows, return_labels=True)["attention_mask"][0][0] == 1
    assert "labels" not in processor(text=rows)
    assert [len(row) for row in processor(text=rows, padding="max_length", max_length=9)["input_ids"]] == [9, 9]
    lengths = [len(text_ids(row)) for row in rows]
    assert [len(row) for row in processor(text=rows, padding=False)["input_ids"]] == lengths
    with pytest.raises(ValueError, match="padding=True"):
        processor(text=rows, padding=False, return_tensors="pt")


@pytest.mark.parametrize("kind", [None, "pt", "np"])
def test_return_tensors(processor: TransfusionProcessor, kind: str | None) -> None:
    out = processor(text=["<image>", "a"], images=[[picture()], []], return_labels=True, return_tensors=kind)
    types = {None: (list, Tensor), "pt": (Tensor, Tensor), "np": (np.ndarray, np.ndarray)}[kind]
    assert [type(out[name]) for name in ("input_ids", "attention_mask", "labels")] == [types[0]] * 3
    assert [type(out[name]) for name in ("latent_patches", "image_grids")] == [types[1]] * 2


def test_to_casts_patches_alone(processor: TransfusionProcessor) -> None:
    out = processor(text="<image>", images=picture(), return_tensors="pt").to(dtype=torch.bfloat16)
    assert out["latent_patches"].dtype == torch.bfloat16
    assert out["input_ids"].dtype == out["image_grids"].dtype == torch.long


@pytest.mark.parametrize("row", ["a red heart and a sky", "<image> a red heart and a sky"])
def test_truncation_cuts_text(processor: TransfusionProcessor, row: str) -> None:
    images = [picture()] if "<image>" in row else None
    whole = processor(text=row, images=images, return_labels=True)["input_ids"][0]
    for length in (len(whole) - 1, len(whole) - 2):
        cut = processor(text=row, images=images, return_labels=True, max_length=length, truncation=True)
        assert cut["input_ids"] == [whole[:length]] and cut["labels"][0][-1] == whole[length - 1]
        with pytest.raises(ValueError, match=f"{len(whole)} tokens and max_length is {length}"):
            processor(text=row, images=images, return_labels=True, max_length=length)
    assert processor(text=row, images=images, max_length=len(whole) - 1)["input_ids"] == [whole[:-1]]


@pytest.mark.parametrize("length", range(1, 10))
def test_truncation_never_cuts_a_picture(processor: TransfusionProcessor, length: int) -> None:
    """The row is a text of one token, the eight tokens of a picture, and text."""
    arguments: dict[str, Any] = {
        "text": "a<image>b c d e f",
        "images": picture(),
        "max_length": length,
        "truncation": True,
    }
    if length < 9:
        with pytest.raises(ValueError, match="would cut a picture"):
            processor(**arguments)
    else:
        assert processor(**arguments)["input_ids"] == [[*text_ids("a"), *BLOCK]]


def test_a_tokenizer_that_begins_texts_itself() -> None:
    tokenizer = tiny_tokenizer(bos_token="<bos>")
    bos = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", bos), ("<eos>", 1)]
    )
    processor = TransfusionProcessor(TransfusionImageProcessor(size=(4, 6)), tokenizer)
    block = [processor.boi_token_id, *[processor.image_token_id] * 6, processor.eoi_token_id]
    out = processor(text=["a <image> b", "a"], images=[picture()], padding=False)
    assert out["input_ids"] == [[bos, *text_ids("a"), *block, *text_ids("b")], [bos, *text_ids("a")]]
    assert processor(text="a <bos>")["input_ids"][0].count(bos) == 1


def test_a_bos_token_that_the_tokenizer_does_not_add_is_not_added() -> None:
    assert tiny_processor(bos_token="<bos>")(text="a")["input_ids"] == [text_ids("a")]
    processor = tiny_processor(bos_token="<bos>")
    processor.tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    assert processor(text="a")["input_ids"] == [text_ids("a")]


def test_missing_tokens() -> None:
    processor = tiny_processor(eos_token=None, pad_token=None)
    assert processor(text=["a", "a"])["input_ids"] == [text_ids("a")] * 2
    with pytest.raises(ValueError, match="eos_token"):
        processor(text="a", return_labels=True)
    with pytest.raises(ValueError, match="pad_token"):
        processor(text=["a", "a red heart"])


# Pictures and latents


@pytest.mark.parametrize("patch_size", [1, 2])
def test_pictures_come_back_exactly_without_a_vae(patch_size: int) -> None:
    processor = tiny_processor(size=None, patch_size=patch_size)
    given = [picture(0, 4, 6), picture(1, 2, 2), picture(2, 4, 6)]
    out = processor(text="<image>" * 3, images=given, return_tensors="pt")
    assert out["latent_patches"].shape[1] == processor.patch_dim == 3 * patch_size**2
    for grids in (out["image_grids"], out["image_grids"].tolist()):
        decoded = processor.decode_images(out["latent_patches"].double(), grids)
        assert [p.tobytes() for p in decoded] == [p.tobytes() for p in given]
        assert [p.size for p in decoded] == [p.size for p in given]
    assert processor.decode_images(torch.zeros(0, processor.patch_dim), []) == []


def test_pictures_go_through_the_vae() -> None:
    vae = tiny_vae()
    processor = tiny_processor(vae=vae, size=None)
    assert processor.latent_channels == 4 and processor.patch_dim == 16
    assert processor.image_processor.vae_scale_factor == 4
    given = [picture(0, 8, 16), picture(1, 8, 8), picture(2, 8, 16)]
    out = processor(text="<image><image><image>", images=given, return_tensors="pt")
    assert not out["latent_patches"].requires_grad
    decoded = processor.decode_images(out["latent_patches"], out["image_grids"])
    vae.requires_grad_(False)
    for source, patch, result in zip(
        given, split_images(out["latent_patches"], out["image_grids"]), decoded, strict=True
    ):
        pixels = torch.tensor(np.asarray(source).transpose(2, 0, 1) / 127.5 - 1).float()[None]
        raw = vae.encode(pixels).latent_dist.mode()
        torch.testing.assert_close(patch, patchify((raw[0] - 0.3) * 0.4, 2), atol=1e-5, rtol=1e-5)
        expected = ((vae.decode(raw).sample[0] / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0)
        assert np.abs(np.asarray(result).astype(int) - expected.numpy()).max() <= 1


def test_latents_are_sampled_on_request() -> None:
    processor = tiny_processor(vae=tiny_vae())
    pixels = [torch.zeros(3, 8, 8)]
    modes = [processor.encode_images(pixels)[0] for _ in range(2)]
    samples = [processor.encode_images(pixels, torch.Generator().manual_seed(seed))[0] for seed in (0, 0, 1)]
    assert torch.equal(*modes) and torch.equal(*samples[:2]) and not torch.equal(*samples[1:])
    assert not torch.equal(modes[0], samples[0])


@pytest.mark.parametrize("shape", [(3, 10, 8), (3, 8, 9), (1, 8, 8), (8, 8), (1, 3, 8, 8)])
def test_pixels_that_the_vae_would_round_off_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        tiny_processor(vae=tiny_vae()).encode_images([torch.zeros(shape)])


def test_patches_that_cannot_be_decoded(processor: TransfusionProcessor) -> None:
    with pytest.raises(ValueError, match="length 16; this processor's have 12, 3 channels of 2 x 2"):
        processor.decode_images(torch.zeros(6, 16), [(2, 3)])
    with pytest.raises(ValueError, match="not finite"):
        processor.decode_images(torch.full((6, 12), torch.nan), [(2, 3)])
    with pytest.raises(ValueError, match="describe 8 patches"):
        processor.decode_images(torch.zeros(6, 12), [(2, 4)])
    with pytest.raises(ValueError, match="is a list; give one tensor"):
        processor.decode_images([torch.zeros(6, 12)], [(2, 3)])


def test_pictures_are_no_pixels(processor: TransfusionProcessor) -> None:
    for pictures in (picture(), [picture()], ["a.png"]):
        with pytest.raises(ValueError, match=r"call processor\(images=pictures\)"):
            processor.encode_images(pictures)


def test_what_is_no_ids_is_not_decoded_to_text(processor: TransfusionProcessor) -> None:
    output = TransfusionGenerateOutput(torch.tensor([text_ids("a")]), [[]], [[]], 0)
    for value in (output, torch.zeros(1, 3, 4, 4), np.zeros((3, 4)), [torch.zeros(4)]):
        for decode in (processor.decode, processor.batch_decode):
            with pytest.raises(ValueError, match="post_process_multimodal_output"):
                decode(value)


def test_a_half_precision_vae_that_overflows_is_an_error() -> None:
    vae = tiny_vae()
    vae.post_quant_conv.weight.data.mul_(1e30)
    processor = tiny_processor(vae=vae.half(), size=(8, 8))
    with pytest.raises(ValueError, match="float16.*float32"):
        processor.decode_images(torch.ones(4, 16), [(2, 2)])


def test_the_image_processor_must_fit_the_vae() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="vae_scale_factor is 8, but that of the VAE is 4"):
        TransfusionProcessor(TransfusionImageProcessor(vae_scale_factor=8), tokenizer, tiny_vae())
    with pytest.raises(ValueError, match=r"is 8, but that of pixels \(vae=None\) is 1"):
        TransfusionProcessor(TransfusionImageProcessor(vae_scale_factor=8), tokenizer)
    with pytest.raises(ValueError, match="multiples of 8.*nearest is 8 x 16"):
        TransfusionProcessor(TransfusionImageProcessor(size=(8, 14)), tokenizer, tiny_vae())
    with pytest.raises(ValueError, match="vae is a str; allowed"):
        TransfusionProcessor(TransfusionImageProcessor(), tokenizer, "vae")


def test_check_model() -> None:
    processor = tiny_processor(vae=tiny_vae(), size=None)
    values = {"vocab_size": len(processor.tokenizer), "hidden_size": 24, "latent_channels": 4, "patch_size": 2}
    processor.check_model(TransfusionConfig(**values))
    for name, value, message in (
        ("latent_channels", 8, "latent_channels is 8 in the config and 4"),
        ("patch_size", 1, "patch_size is 1 in the config and 2"),
        ("boi_token_id", 5, "boi_token_id is 5"),
        ("eoi_token_id", 5, "eoi_token_id is 5"),
        ("image_token_id", 5, "image_token_id is 5"),
        ("vocab_size", len(processor.tokenizer) - 1, "the tokenizer has"),
    ):
        with pytest.raises(ValueError, match=message):
            processor.check_model(TransfusionConfig(**{**values, name: value}))


# What a model wrote


def test_interleaved_output(processor: TransfusionProcessor) -> None:
    """The first row draws two pictures after a prompt that holds one; the second, padded on the left, writes text."""
    a, b = picture(0), picture(1, 2, 2)
    prompts = [[*BLOCK, *text_ids("go on")], text_ids("say no")]
    prompt_length = max(map(len, prompts))
    new = [
        [*text_ids("see"), *BLOCK, *text_ids(" and"), BOI, IMAGE, EOI, 1],
        [*text_ids("no <image>"), 1],
    ]
    length = max(map(len, new))
    rows = [
        [0] * (prompt_length - len(prompt)) + prompt + ids + [0] * (length - len(ids))
        for prompt, ids in zip(prompts, new, strict=True)
    ]
    drawn: list[list[Tensor]] = [[pixel_patches(a), pixel_patches(b)], []]
    grids: list[list[tuple[int, int]]] = [[(2, 3), (1, 1)], []]
    output = TransfusionGenerateOutput(torch.tensor(rows), drawn, grids, prompt_length)
    first, second = processor.post_process_multimodal_output(output)
    assert first[0] == "see" and first[2] == " and" and second == ["no <image>"]
    assert first[1].tobytes() == a.tobytes() and first[3].tobytes() == b.tobytes() and len(first) == 4
    raw = processor.post_process_multimodal_output(output, skip_special_tokens=False)
    assert [raw[0][0], raw[0][2]] == ["see<boi>", "<eoi> and<boi>"] and raw[0][4].startswith("<eoi><eos>")
    drawn[1].append(pixel_patches(b))
    grids[1].append((1, 1))
    with pytest.raises(ValueError, match="Row 1 has 0 image blocks and 1 images"):
        processor.post_process_multimodal_output(output)


def test_output_without_pictures(processor: TransfusionProcessor) -> None:
    output = TransfusionGenerateOutput(torch.tensor([text_ids("a red heart")]), [[]], [[]], len(text_ids("a")))
    assert processor.post_process_multimodal_output(output) == [[" red heart"]]
    sequences = torch.tensor([text_ids("a red heart") + [1]])
    for value in (sequences, sequences.numpy()):
        assert processor.post_process_multimodal_output(value) == ["a red heart"]
        assert processor.post_process_multimodal_output(value, generation_mode="text") == ["a red heart"]
        assert processor.post_process_multimodal_output(value, generation_mode="interleaved") == [["a red heart"]]
        assert processor.post_process_image_text_to_text(value) == ["a red heart"]
        assert processor.batch_decode(value) == ["a red heart<eos>"]
    assert processor.decode(sequences[0], skip_special_tokens=True) == "a red heart"


# Files


@pytest.mark.parametrize("with_vae", [False, True])
def test_saved_and_loaded(with_vae: bool, tmp_path: Path) -> None:
    processor = tiny_processor(vae=tiny_vae() if with_vae else None, size=(8, 16))
    processor.save_pretrained(tmp_path)
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    own = {"chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names == own | ({"vae/config.json", "vae/diffusion_pytorch_model.safetensors"} if with_vae else set())
    arguments: dict[str, Any] = {"text": ["a <image>", "<boi>"], "images": [[picture()], []], "return_labels": True}
    expected = processor(**arguments, return_tensors="pt")
    for kind in (TransfusionProcessor, AutoProcessor):
        loaded = kind.from_pretrained(tmp_path)
        assert type(loaded) is TransfusionProcessor and loaded.chat_template == CHAT_TEMPLATE
        assert loaded.patch_dim == processor.patch_dim and len(loaded.tokenizer) == len(processor.tokenizer)
        out = loaded(**arguments, return_tensors="pt")
        for name, value in expected.items():
            torch.testing.assert_close(out[name], value)
    loaded.save_pretrained(tmp_path / "again")
    again = TransfusionProcessor.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(**arguments, return_tensors="pt")["latent_patches"], expected["latent_patches"])
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "again").rglob("*.json"))


def test_loaded_from_a_subfolder(tmp_path: Path) -> None:
    tiny_processor(vae=tiny_vae(), size=None).save_pretrained(tmp_path / "processor")
    assert TransfusionProcessor.from_pretrained(tmp_path, subfolder="processor").latent_channels == 4


def test_a_lost_vae_is_an_error(tmp_path: Path) -> None:
    tiny_processor(vae=tiny_vae(), size=None).save_pretrained(tmp_path)
    (tmp_path / "vae").rename(tmp_path / "lost")
    with pytest.raises(ValueError, match=r"has no folder vae/.*vae_scale_factor is 4.*vae=\.\.\."):
        TransfusionProcessor.from_pretrained(tmp_path)
    vae = tiny_vae()
    processor = AutoProcessor.from_pretrained(tmp_path, vae=vae)
    assert processor.vae is vae
    processor.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).latent_channels == 4


@pytest.mark.parametrize("value", ["../elsewhere", {"_class_name": "AutoencoderKL"}, ["x"]])
def test_a_config_cannot_say_where_the_vae_is(value: Any, tmp_path: Path) -> None:
    tiny_processor(vae=tiny_vae(), size=None).save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vae": value}))
    with pytest.raises(ValueError, match="allowed: AutoencoderKL"):
        TransfusionProcessor.from_pretrained(tmp_path)


def test_the_vae_is_kept_by_reference() -> None:
    vae = tiny_vae()
    processor = tiny_processor(vae=vae, size=None)
    assert processor.vae is vae and "vae" not in processor.to_dict()
    assert "AutoencoderKL" not in repr(processor) and "TransfusionImageProcessor" in repr(processor)
    for twin in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert twin.vae is not vae and twin.latent_channels == 4
    assert copy.copy(processor).vae is vae


def test_model_input_names(processor: TransfusionProcessor) -> None:
    out = processor(text="<image>", images=picture())
    assert set(processor.model_input_names) == set(out)
