"""A processor as transformers' callers use it: options in every place, single modalities, decoding by mode."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer
from transformers.processing_utils import ProcessingKwargs

from tests.tiny_processor import picture, pixel_patches, text_ids, tiny_processor, tiny_tokenizer, tiny_vae
from transfusion.processing import TransfusionImageProcessor, TransfusionProcessor
from transfusion.processing_options import TransfusionProcessorKwargs


PROCESSOR = tiny_processor()
ROW: dict[str, Any] = {"text": "a red <image>", "images": picture()}


def same(first: Any, second: Any) -> bool:
    return first.keys() == second.keys() and all(
        np.array_equal(np.asarray(first[name]), np.asarray(second[name])) for name in first
    )


def test_the_groups_of_options_are_those_of_transformers() -> None:
    """Version 5.17 takes each entry for a group, and reads the defaults of a processor from these alone."""
    assert TransfusionProcessorKwargs.__annotations__.keys() == ProcessingKwargs.__annotations__.keys()
    assert TransfusionProcessorKwargs._defaults == {"text_kwargs": {"padding": True}}


def test_options_are_flat_or_nested() -> None:
    flat = PROCESSOR(**ROW, max_length=20, padding="max_length", do_normalize=False, return_tensors="pt")
    assert flat["input_ids"].shape == (1, 20)
    torch.testing.assert_close(flat["latent_patches"], pixel_patches(picture()) / 2 + 0.5)
    text, images = {"max_length": 20, "padding": "max_length"}, {"do_normalize": False}
    nested = PROCESSOR(**ROW, text_kwargs=text, images_kwargs=images, common_kwargs={"return_tensors": "pt"})
    mixed = PROCESSOR(**ROW, text_kwargs={}, images_kwargs=images, **text, return_tensors="pt")
    assert same(flat, nested) and same(flat, mixed)
    with pytest.raises(ValueError, match="padding was passed two times"):
        PROCESSOR(**ROW, text_kwargs=text, padding=True)


def test_the_tokenizer_s_options_are_defaults(tmp_path: Path) -> None:
    tiny_tokenizer(max_length=20, padding="max_length", padding_side="right").save_pretrained(tmp_path)
    tokenizer = type(tiny_tokenizer()).from_pretrained(tmp_path)
    processor = TransfusionProcessor(TransfusionImageProcessor(), tokenizer)
    ids = processor(text="a")["input_ids"][0]
    assert len(ids) == 20 and ids[-1:] == text_ids("a")  # prompts are padded on the left all the same
    assert len(processor(text="a", padding=False)["input_ids"][0]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paddding": True}, "paddding: not an option"),
        ({"text_kwargs": {"paddding": True}}, "paddding: not an option"),
        ({"images_kwargs": {"crop_size": 3}}, "crop_size: not an option"),
        ({"crop_size": 3}, "crop_size: not an option"),
        ({"common_kwargs": {"padding": True}}, "wrong value.*padding"),
        ({"max_length": "long"}, "max_length"),
        ({"stride": 2}, "stride: not possible"),
        ({"return_offsets_mapping": True}, "return_offsets_mapping: not possible"),
        ({"videos": [0]}, "videos is given"),
        ({"audio": [0]}, "audio is given"),
        ({"device": "cuda"}, "device"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PROCESSOR(**ROW, **options)


def test_what_says_nothing_is_accepted() -> None:
    """As transformers' pipelines pass it."""
    options: dict[str, Any] = {"videos": None, "audio": None, "padding_side": None, "device": "cpu", "verbose": False}
    assert same(PROCESSOR(**ROW, **options, disable_grouping=True), PROCESSOR(**ROW))


def test_further_options() -> None:
    ids = PROCESSOR(text=["a", "a red heart"], pad_to_multiple_of=8)["input_ids"]
    assert [len(row) for row in ids] == [8, 8]
    assert "attention_mask" not in PROCESSOR(text="a", return_attention_mask=False)
    out = PROCESSOR(text=["a <image> b", "b"], images=[[picture()], []], return_mm_token_type_ids=True)
    assert [sum(row) for row in out["mm_token_type_ids"]] == [6, 0]
    for ids, types in zip(out["input_ids"], out["mm_token_type_ids"], strict=True):
        assert [token == PROCESSOR.image_token_id for token in ids] == [bool(kind) for kind in types]
    assert set(PROCESSOR(**ROW)) == set(PROCESSOR.model_input_names)


def test_pictures_alone() -> None:
    for images in (picture(), [picture()], [[picture()]], np.asarray(picture())[None]):
        out = PROCESSOR(images=images, return_tensors="pt")
        assert set(out) == {"latent_patches", "image_grids"}
        torch.testing.assert_close(out["latent_patches"], pixel_patches(picture()))
    assert PROCESSOR(latents=[torch.zeros(3, 4, 6)])["image_grids"].tolist() == [[2, 3]]


@pytest.mark.parametrize("size", [None, 16])
def test_patches_are_counted_without_pictures(size: int | None) -> None:
    processor = tiny_processor(tiny_vae(), size=size)
    sizes = [(16, 24), (33, 8)]
    pictures = [picture(0, height, width) for height, width in sizes]
    out = processor(text=["<image>"] * 2, images=pictures, return_mm_token_type_ids=True)
    counts = processor._get_num_multimodal_tokens(image_sizes=sizes)
    assert counts["num_image_tokens"] == [sum(row) for row in out["mm_token_type_ids"]]
    assert "num_image_tokens" not in processor._get_num_multimodal_tokens()


@pytest.mark.parametrize("vae", [None, "AutoencoderKL"])
def test_latents_are_decoded(vae: str | None) -> None:
    processor = tiny_processor(vae and tiny_vae(vae), size=16)
    latents = torch.stack(processor.encode_images(processor.image_processor([picture(0), picture(1)])["pixel_values"]))
    patches = processor(images=[picture(0), picture(1)])
    expected = [
        np.asarray(image) for image in processor.decode_images(patches["latent_patches"], patches["image_grids"])
    ]
    for given in (latents, list(latents), latents.numpy()):
        np.testing.assert_array_equal([np.asarray(image) for image in processor.decode_latents(given)], expected)
    for mode in ("image", None):
        images = processor.post_process_multimodal_output(latents, generation_mode=mode)
        np.testing.assert_array_equal([np.asarray(image) for image in images], expected)
    if vae:  # and each by itself, of its own size
        sizes = [image.size for image in processor.decode_latents([latents[0], latents[1][:, :2]])]
        assert sizes == [(16, 16), (16, 8)]


def test_what_is_not_decoded() -> None:
    for latents, message in (
        (torch.zeros(1, 4, 4, 4), r"shape \(4, 4, 4\); it must be \(3, h, w\)"),
        (torch.full((1, 3, 4, 4), torch.nan), "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            PROCESSOR.decode_latents(latents)
    for outputs, mode, message in (
        (torch.zeros(1, 3), "image", "latents"),
        (torch.zeros(1, 3, dtype=torch.long), "audio", "'audio'; allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            PROCESSOR.post_process_multimodal_output(outputs, generation_mode=mode)


def test_texts_of_ids() -> None:
    ids = PROCESSOR(text=["a red heart", "a"], return_labels=True, return_tensors="pt")["input_ids"]
    assert PROCESSOR.post_process_multimodal_output(ids, generation_mode="text") == ["a red heart", "a"]
    assert PROCESSOR.post_process_image_text_to_text(ids) == ["a red heart", "a"]


def test_options_of_parts_are_passed_on_loading(tmp_path: Path) -> None:
    PROCESSOR.save_pretrained(tmp_path)
    loaded = TransfusionProcessor.from_pretrained(tmp_path, do_normalize=False, cls_token="(CLS)")
    assert loaded.image_processor.do_normalize is False and loaded.tokenizer.cls_token == "(CLS)"
    own = TransfusionImageProcessor(patch_size=1)
    assert TransfusionProcessor.from_pretrained(tmp_path, image_processor=own).image_processor is own
    assert TransfusionProcessor.from_pretrained(tmp_path).to_dict() == PROCESSOR.to_dict()


def test_the_padding_side_is_that_of_the_tokenizer(tmp_path: Path) -> None:
    """Left unless somebody says otherwise; with labels right."""
    rows = ["a", "a red heart"]
    PROCESSOR.save_pretrained(tmp_path / "left")
    right = AutoProcessor.from_pretrained(tmp_path / "left", padding_side="right")
    right.save_pretrained(tmp_path / "right")
    set_later = AutoProcessor.from_pretrained(tmp_path / "left")
    set_later.tokenizer.padding_side = "right"
    for processor, side in (
        (PROCESSOR, "left"),
        (AutoProcessor.from_pretrained(tmp_path / "left"), "left"),
        (right, "right"),
        (set_later, "right"),
        (AutoProcessor.from_pretrained(tmp_path / "right"), "right"),
    ):
        assert processor(text=rows)["attention_mask"][0][0] == (side == "right")
        assert processor(text=rows, padding_side="left")["attention_mask"][0][0] == 0
        assert processor(text=rows, return_labels=True)["attention_mask"][0][0] == 1
    for side in ("left", "right"):
        assert AutoTokenizer.from_pretrained(tmp_path / side).padding_side == side


def test_truncation_without_a_length_is_that_of_the_tokenizer() -> None:
    with pytest.raises(ValueError, match="truncation=True needs a max_length.*model_max_length"):
        PROCESSOR(text="a red heart", truncation=True)
    processor = tiny_processor(model_max_length=2)
    whole = processor(text="a red heart")["input_ids"][0]
    assert processor(text="a red heart", truncation=True)["input_ids"] == [whole[:2]]
    assert processor(text="a red heart", truncation=True, max_length=len(whole) - 1)["input_ids"] == [whole[:-1]]


def test_a_newer_version_s_settings_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    PROCESSOR.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["new"], settings["image_processor"]["sharpen"] = 1, 2
    file.write_text(json.dumps(settings))
    assert AutoProcessor.from_pretrained(tmp_path).to_dict() == PROCESSOR.to_dict()
    assert "sharpen, which is no option of TransfusionImageProcessor" in caplog.text
    with pytest.raises(ValueError, match="sharpen: not an option"):
        TransfusionImageProcessor(sharpen=2)


def test_the_vae_is_neither_copied_nor_printed() -> None:
    processor = tiny_processor(tiny_vae())
    assert "vae" not in processor.to_dict() and "vae" not in vars(TransfusionProcessor)
    assert processor.to_dict()["image_processor"]["vae_scale_factor"] == 4
    assert processor.vae is not None and processor.size_token_grids is None
    assert "AutoencoderKL" not in repr(processor)
