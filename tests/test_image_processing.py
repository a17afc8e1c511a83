"""Pictures of every kind against pixels worked out by hand, and what must be refused."""

import io
import struct
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers import AutoImageProcessor
from transformers.image_utils import ChannelDimension

from transfusion.configuration import TransfusionConfig
from transfusion.image_processing import TransfusionImageProcessor, load_picture


def noise(*shape: int, high: int = 256, dtype: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def rgb(source: Any, **options: Any) -> np.ndarray:
    picture = load_picture(source, **options)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that claims a size and has no pixels to show for it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b""
    for kind, data in ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")):
        body += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + body


# What a viewer does to the stored pixels, for each value of EXIF's tag 0x0112.
ORIENTATIONS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_pictures_are_turned_upright(orientation: int, tmp_path: Path) -> None:
    stored = noise(4, 7, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(stored), exif=exif)
    (tmp_path / "a.png").write_bytes(data)
    expected = ORIENTATIONS[orientation](stored)
    for source in (data, str(tmp_path / "a.png"), tmp_path / "a.png", Image.open(io.BytesIO(data))):
        np.testing.assert_array_equal(rgb(source), expected)


def test_opaque_and_transparent_pixels_are_exact() -> None:
    """PIL's own conversion would show the red that hides under alpha 0."""
    image = Image.new("RGBA", (2, 1))
    image.putdata([(255, 0, 0, 0), (10, 20, 30, 255)])
    for source in (image, encoded(image), encoded(image, "WEBP", lossless=True, exact=True)):
        np.testing.assert_array_equal(rgb(source), [[[255, 255, 255], [10, 20, 30]]])


def test_half_transparent_pixels_are_laid_over_white() -> None:
    values = noise(9, 9, 4)
    alpha = values[..., 3:] / 255
    expected = values[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(rgb(Image.fromarray(values, "RGBA")) - expected).max() <= 1
    grey = Image.fromarray(values[..., 2:], "LA")
    assert np.abs(rgb(grey) - (values[..., 2:3] * alpha + 255 * (1 - alpha))).max() <= 1


@pytest.mark.parametrize("transparency", [1, b"\xff\x00\xff"])
def test_transparent_palette_entries_are_white(transparency: int | bytes) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([9, 8, 7, 255, 0, 0, 1, 2, 3])
    image.putdata([0, 1, 2])
    data = encoded(image, transparency=transparency)
    np.testing.assert_array_equal(rgb(data), [[[9, 8, 7], [255, 255, 255], [1, 2, 3]]])


@pytest.mark.parametrize(
    ("mode", "values", "key", "expected"),
    [
        ("L", [5, 6], 5, [[255] * 3, [6] * 3]),
        ("RGB", [(1, 2, 3), (4, 5, 6)], (1, 2, 3), [[255] * 3, [4, 5, 6]]),
    ],
)
def test_a_transparent_colour_is_white(mode: str, values: list, key: Any, expected: list) -> None:
    image = Image.new(mode, (2, 1))
    image.putdata(values)
    np.testing.assert_array_equal(rgb(encoded(image, transparency=key)), [expected])


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("P", 0, (0, 0, 0)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("CMYK", (0, 0, 0, 55), (200, 200, 200)),
        ("HSV", (0, 0, 99), (99, 99, 99)),
        ("F", 1.0, (255, 255, 255)),
    ],
)
def test_other_modes(mode: str, value: Any, expected: tuple[int, int, int]) -> None:
    np.testing.assert_array_equal(rgb(Image.new(mode, (1, 1), value)), [[expected]])


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B"])
def test_16_bits_are_scaled(mode: str) -> None:
    values = np.array([[0, 1, 128, 129, 257, 32768, 63000, 65535]])
    dtype = {"I": "<i4", "I;16": "<u2", "I;16B": ">u2"}[mode]
    image = Image.frombytes(mode, (8, 1), values.astype(dtype).tobytes())
    expected = np.round(values / 257).astype(np.uint8)[..., None].repeat(3, -1)
    np.testing.assert_array_equal(rgb(image), expected)
    np.testing.assert_array_equal(rgb(values.astype(np.uint16)), expected)
    if mode == "I;16":
        np.testing.assert_array_equal(rgb(encoded(image)), expected)


@pytest.mark.parametrize("value", [-1, 65536])
def test_32_bit_grey_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match="0 to 65535"):
        load_picture(Image.new("I", (1, 1), value))


@pytest.mark.parametrize("channels", [None, 1, 3, 4])
@pytest.mark.parametrize("first", [False, True])
def test_arrays_and_tensors(channels: int | None, first: bool) -> None:
    values = noise(5, 6, channels or 1)
    expected = rgb(Image.fromarray(values.squeeze(-1) if values.shape[-1] == 1 else values))
    layout = values.transpose(2, 0, 1) if first else values
    layout = layout.reshape(5, 6) if channels is None else np.ascontiguousarray(layout)
    for source in (
        layout,
        layout.astype(np.uint16) * 257,
        layout / 255,
        (layout / 255).astype(np.float32),
        torch.tensor(layout),
        torch.tensor(layout, dtype=torch.float32).requires_grad_() / 255,
    ):
        np.testing.assert_array_equal(rgb(source), expected)


def test_small_arrays_are_rgb_where_they_can_be() -> None:
    values = noise(3, 4, 4)
    np.testing.assert_array_equal(rgb(values), values.transpose(1, 2, 0))
    np.testing.assert_array_equal(rgb(values.T), values.T)


def test_bfloat16_tensors() -> None:
    assert (rgb(torch.ones(3, 2, 2, dtype=torch.bfloat16)) == 255).all()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.full((4, 4, 3), -1.0), r"\(x \+ 1\) / 2"),
        (np.full((4, 4, 3), 200.0), "x / 255"),
        (np.full((4, 4, 3), np.nan), "nan"),
        (torch.full((3, 4, 4), 1.01), r"\[0, 1\]"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (np.zeros((4, 4), bool), "bool"),
        (np.zeros((3, 5, 3), np.uint8), "first or last"),
        (np.zeros((1, 5, 4), np.uint8), "first or last"),
        (np.zeros((5, 5, 5), np.uint8), "no axis"),
        (np.zeros((1, 5, 5, 3), np.uint8), "no axis"),
        (np.zeros((0, 5, 3), np.uint8), "0 pixels"),
        (Image.new("RGB", (0, 5)), "0 x 5 pixels"),
        (3.5, "float"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_picture(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_picture(source)


BROKEN = {
    "empty": b"",
    "html": b"<!DOCTYPE html><html>404</html>",
    "text": b"hello",
    "truncated png": encoded(Image.fromarray(noise(64, 64, 3)))[:5000],
    "truncated jpeg": encoded(Image.fromarray(noise(64, 64, 3)), "JPEG")[:2000],
    "truncated webp": encoded(Image.fromarray(noise(64, 64, 3)), "WEBP")[:2000],
    "bmp": encoded(Image.fromarray(noise(4, 4, 3)), "BMP"),
    "tiff": encoded(Image.fromarray(noise(4, 4, 3)), "TIFF"),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_and_foreign_files_are_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a picture.jpg"
    path.write_bytes(BROKEN[kind])
    with pytest.raises(ValueError, match="a picture.jpg"):
        load_picture(str(path))
    with pytest.raises(ValueError, match=f"The picture of {len(BROKEN[kind])} bytes"):
        load_picture(BROKEN[kind])


@pytest.mark.parametrize(
    "name", ["", "missing.png", ".", "http://localhost/a.png", "data:image/png;base64,aaaa", "a\0b"]
)
def test_only_local_files_are_read(name: str) -> None:
    with pytest.raises(ValueError, match="URLs are not fetched"):
        load_picture(name)


def test_pil_images_that_are_truncated() -> None:
    with pytest.raises(ValueError, match="The PIL image cannot be decoded"):
        load_picture(Image.open(io.BytesIO(BROKEN["truncated png"])))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encoded(
        frames[0], format, save_all=True, append_images=frames[1:], **{"lossless": True} if format == "WEBP" else {}
    )
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    np.testing.assert_array_equal(rgb(data)[0, 0], [255, 0, 0])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 30_000, 2_000_000])
def test_bombs_are_refused_before_they_are_decoded(side: int) -> None:
    """The pixels are missing, so that decoding would fail with another message."""
    start, limit = time.perf_counter(), Image.MAX_IMAGE_PIXELS
    with pytest.raises(ValueError, match="pixels"):
        load_picture(png(side, side))
    assert time.perf_counter() - start < 1
    assert Image.MAX_IMAGE_PIXELS == limit


def test_the_limit_is_one_of_the_call() -> None:
    data = encoded(Image.new("RGB", (10, 10)))
    assert load_picture(data, max_image_pixels=100).size == (10, 10)
    for source in (data, Image.open(io.BytesIO(data)), np.zeros((10, 10, 3), np.uint8)):
        with pytest.raises(ValueError, match="10 x 10 pixels.*99"):
            load_picture(source, max_image_pixels=99)
    processor = TransfusionImageProcessor()
    with pytest.raises(ValueError, match="max_image_pixels"):
        processor(data, max_image_pixels=99)
    assert processor(data)["pixel_values"][0].shape == (3, 10, 10)


def test_lazy_pil_images_are_refused_before_they_are_decoded() -> None:
    with pytest.raises(ValueError, match="raise max_image_pixels"):
        load_picture(Image.open(io.BytesIO(png(8_000, 8_000))))


def test_text_bombs_are_refused() -> None:
    text = b"Comment\0\0" + zlib.compress(b"a" * 200_000_000, 9)
    with pytest.raises(ValueError, match="bytes"):
        load_picture(png(2, 2, (b"zTXt", text)))


sides = st.integers(1, 40)


@given(sides, sides, sides, sides)
@settings(max_examples=40, deadline=None)
def test_the_covering_crop_is_central(width: int, height: int, new_width: int, new_height: int) -> None:
    """It has the wanted size, keeps a flat colour, and commutes with mirroring and turning upside down."""
    processor = TransfusionImageProcessor(size={"height": new_height, "width": new_width}, patch_size=1)
    picture = Image.fromarray(noise(height, width, 3))
    pixels = processor(picture)["pixel_values"][0]
    assert pixels.shape == (3, new_height, new_width)
    flipped = processor(ImageOps.flip(ImageOps.mirror(picture)))["pixel_values"][0]
    np.testing.assert_allclose(flipped[:, ::-1, ::-1], pixels, atol=2.1 / 127.5)
    assert (processor(Image.new("RGB", (width, height), "white"))["pixel_values"][0] == 1).all()


def test_resize_of_a_picture_of_the_same_shape_is_plain() -> None:
    picture = Image.fromarray(noise(20, 30, 3))
    pixels = TransfusionImageProcessor(size=(10, 15), patch_size=5)(picture)["pixel_values"][0]
    expected = np.asarray(picture.resize((15, 10), Image.Resampling.BICUBIC)).transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(pixels, expected, atol=1e-6)


def test_a_wide_picture_loses_its_sides() -> None:
    values = noise(8, 20, 3)
    pixels = TransfusionImageProcessor(size=8)(Image.fromarray(values))["pixel_values"][0]
    np.testing.assert_allclose(pixels, values[:, 6:14].transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


def test_a_long_thin_picture_makes_no_giant_intermediate() -> None:
    start = time.perf_counter()
    pixels = TransfusionImageProcessor(size=256)(np.full((1, 40_000), 9, np.uint8))["pixel_values"][0]
    assert pixels.shape == (3, 256, 256) and np.unique(pixels).size == 1
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(("resize", "crop"), [(True, False), (False, True), (False, False)])
def test_resize_and_crop_can_be_switched_off(resize: bool, crop: bool) -> None:
    values = noise(9, 13, 3)
    picture = Image.fromarray(values)
    processor = TransfusionImageProcessor(size=(8, 8), do_resize=resize, do_center_crop=crop)
    if not resize and not crop:
        with pytest.raises(ValueError, match="9 x 13.*8 x 8"):
            processor(picture)
        values = values[:8, :8]
    expected = values[:8, 2:10] if crop else np.asarray(Image.fromarray(values).resize((8, 8), processor.resample))
    pixels = processor(values)["pixel_values"][0]
    np.testing.assert_allclose(pixels, expected.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    if not resize:
        with pytest.raises(ValueError, match="7 x 13"):
            processor(noise(7, 13, 3))


def test_own_size_is_cropped_to_whole_patches() -> None:
    values = noise(21, 17, 3)
    processor = TransfusionImageProcessor(patch_size=2, vae_scale_factor=4)
    pixels = processor(Image.fromarray(values))["pixel_values"][0]
    np.testing.assert_allclose(pixels, values[2:18, :16].transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    with pytest.raises(ValueError, match="7 x 40.*multiples of 8"):
        processor(Image.fromarray(noise(7, 40, 3)))
    with pytest.raises(ValueError, match="21 x 17"):
        processor(Image.fromarray(values), do_center_crop=False)


def test_pixels_and_back_is_exact() -> None:
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    processor = TransfusionImageProcessor()
    pixels = processor(values)["pixel_values"][0]
    assert pixels.dtype == np.float32 and pixels.min() == -1 and pixels.max() == 1
    np.testing.assert_array_equal(np.asarray(processor.to_picture(torch.tensor(pixels))), values)
    assert np.asarray(processor.to_picture(torch.full((3, 1, 1), 7.0))).tolist() == [[[255, 255, 255]]]


def test_mean_and_std_are_per_channel() -> None:
    processor = TransfusionImageProcessor(image_mean=[0, 0.5, 1], image_std=[1, 0.5, 2], patch_size=1)
    picture = Image.new("RGB", (1, 1), (255, 255, 0))
    pixels = processor(picture)["pixel_values"][0]
    np.testing.assert_allclose(pixels.ravel(), [1, 1, -0.5])
    assert processor.to_picture(torch.tensor(pixels)).getpixel((0, 0)) == (255, 255, 0)


def test_batches() -> None:
    processor = TransfusionImageProcessor(size=4)
    pictures = [Image.fromarray(noise(5, 9, 3)), noise(4, 4)]
    assert processor(pictures, return_tensors="pt")["pixel_values"].shape == (2, 3, 4, 4)
    assert len(processor(pictures, size=None)["pixel_values"]) == 2
    with pytest.raises(ValueError, match="empty"):
        processor([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pach_size": 2}, "pach_size.*patch_size"),
        ({"size": {"shortest_edge": 8}}, "'height' and 'width'"),
        ({"size": {"height": 30, "width": 8}, "vae_scale_factor": 4}, "multiples of 8.*nearest is 32 x 8"),
        ({"size": 0}, "multiples"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"max_image_pixels": 1.5}, "max_image_pixels is 1.5"),
        ({"image_std": [0.5, 0.5, 0.0]}, "positive"),
        ({"image_mean": [0.5]}, "three numbers"),
        ({"rescale_factor": 0}, "rescale_factor is 0"),
        ({"input_data_format": "first"}, "input_data_format is 'first'"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransfusionImageProcessor(**options)
    with pytest.raises(ValueError, match=message):
        TransfusionImageProcessor()(noise(64, 64), **options)


@pytest.mark.parametrize("size", [None, {"height": 24, "width": 16}])
def test_saved_and_loaded(size: dict[str, int] | None, tmp_path: Path) -> None:
    AutoImageProcessor.register(
        TransfusionConfig, image_processor_classes={"pil": TransfusionImageProcessor}, exist_ok=True
    )
    processor = TransfusionImageProcessor(size, 4, 2, False, True, Image.Resampling.LANCZOS, [0.1] * 3, [0.2] * 3, 999)
    processor.save_pretrained(tmp_path)
    for kind in (TransfusionImageProcessor, AutoImageProcessor):
        loaded = kind.from_pretrained(tmp_path)
        assert type(loaded) is TransfusionImageProcessor
        assert loaded.to_dict() == processor.to_dict() and loaded.size == size
    assert TransfusionImageProcessor.from_pretrained(tmp_path, size={"height": 8, "width": 8}).size["height"] == 8


# What transformers' callers pass


def test_rescale_and_normalize_can_be_switched() -> None:
    values = np.array([[[0, 51, 255]]], np.uint8)
    picture = Image.fromarray(values)
    cases: list[tuple[dict[str, Any], list[float]]] = [
        ({}, [-1, -0.6, 1]),
        ({"do_normalize": False}, [0, 0.2, 1]),
        ({"do_rescale": False, "do_normalize": False}, [0, 51, 255]),
        ({"do_rescale": False, "image_mean": 51, "image_std": 2}, [-25.5, 0, 102]),
        ({"rescale_factor": -1.0, "do_normalize": False}, [0, -51, -255]),
    ]
    for options, expected in cases:
        processor = TransfusionImageProcessor(patch_size=1, **options)
        pixels = processor(picture)["pixel_values"][0]
        assert pixels.dtype == np.float32
        np.testing.assert_allclose(pixels.ravel(), expected, atol=1e-7)
        np.testing.assert_array_equal(
            TransfusionImageProcessor(patch_size=1)(picture, **options).pixel_values[0], pixels
        )
        assert np.asarray(processor.to_picture(torch.tensor(pixels))).tolist() == values.tolist()
        floats = processor(values / 255)["pixel_values"][0]  # on [0, 1] already
        scale = 255 if options.get("do_rescale") is False else 1
        unscaled = TransfusionImageProcessor(patch_size=1, **{**options, "do_normalize": False})
        if "image_mean" not in options:
            np.testing.assert_allclose(floats * scale, unscaled(picture).pixel_values[0] if scale > 1 else pixels)


def test_channels_can_be_kept() -> None:
    values = np.random.default_rng(0).integers(0, 256, (8, 6, 4), np.uint8)
    plain: dict[str, Any] = {"do_convert_rgb": False, "do_normalize": False, "do_rescale": False}
    for picture, expected in (
        (values, values),
        (values.transpose(2, 0, 1), values),
        (Image.fromarray(values), values),
        (values[..., :1], values[..., :1]),
        (Image.fromarray(values[..., 0]), values[..., :1]),
        (values[..., :3], values[..., :3]),
    ):
        pixels = TransfusionImageProcessor()(picture, **plain)["pixel_values"][0]
        np.testing.assert_array_equal(pixels, expected.transpose(2, 0, 1))
    means: dict[str, Any] = {"image_mean": [0.0] * 4, "image_std": [1.0] * 4}
    pixels = TransfusionImageProcessor()(values, do_convert_rgb=False, **means)["pixel_values"][0]
    np.testing.assert_allclose(pixels, values.transpose(2, 0, 1) / 255, rtol=1e-6)
    with pytest.raises(ValueError, match="4 channels and image_mean"):
        TransfusionImageProcessor()(values, do_convert_rgb=False)
    with pytest.raises(ValueError, match="three numbers"):
        TransfusionImageProcessor(**means)
    with pytest.raises(ValueError, match="mode P"):
        TransfusionImageProcessor()(Image.new("P", (4, 4)), do_convert_rgb=False)


def test_the_order_of_axes_can_be_said() -> None:
    values = np.arange(3 * 4 * 3, dtype=np.uint8).reshape(3, 4, 3)
    processor = TransfusionImageProcessor(patch_size=1)
    with pytest.raises(ValueError, match="could be channels first or last"):
        processor(values)
    first = processor(values, input_data_format="channels_first")["pixel_values"][0]
    last = processor(values, input_data_format="channels_last")["pixel_values"][0]
    np.testing.assert_array_equal(first, processor(Image.fromarray(values.transpose(1, 2, 0))).pixel_values[0])
    np.testing.assert_array_equal(last, processor(Image.fromarray(values)).pixel_values[0])
    with pytest.raises(ValueError, match="input_data_format='channels_last'"):
        processor(noise(3, 4, 8), input_data_format="channels_last")


@pytest.mark.parametrize("tensors", [None, "pt", "np"])
def test_nested_lists_and_batches_of_arrays(tensors: str | None) -> None:
    batch = np.stack([noise(4, 6, 3), noise(4, 6, 3)])
    processor = TransfusionImageProcessor()
    expected = np.stack(processor(list(batch))["pixel_values"])
    for images in (batch, torch.tensor(batch), [[batch[0]], [], [batch[1]]], (batch[0], torch.tensor(batch[1]))):
        pixels = processor(images=images, return_tensors=tensors)["pixel_values"]
        np.testing.assert_array_equal(np.stack([np.asarray(value) for value in pixels]), expected)
    with pytest.raises(ValueError, match=r"\(3, 4, 4\), \(3, 4, 6\).* cannot be stacked"):
        processor([noise(4, 4), noise(4, 6)], return_tensors="np")


def test_options_of_backends() -> None:
    processor = TransfusionImageProcessor()
    same: dict[str, Any] = {"device": "cpu", "data_format": ChannelDimension.FIRST, "disable_grouping": True}
    pixels = processor(noise(4, 4), **same, do_resize=None, resample=None)["pixel_values"][0]
    np.testing.assert_array_equal(pixels, processor(noise(4, 4))["pixel_values"][0])
    for option in ({"device": "cuda"}, {"data_format": "channels_last"}):
        with pytest.raises(ValueError, match="alone"):
            processor(noise(4, 4), **option)


@pytest.mark.parametrize("size", [None, 16])
def test_patch_grids_are_those_of_pictures(size: int | None) -> None:
    processor = TransfusionImageProcessor(size, patch_size=2, vae_scale_factor=4)
    for height, width in ((8, 8), (30, 17), (9, 100)):
        pixels = processor(noise(height, width))["pixel_values"][0]
        assert processor.patch_grid(height, width) == (pixels.shape[1] // 8, pixels.shape[2] // 8)
    assert processor.patch_grid(8, 8, size={"height": 24, "width": 8}) == (3, 1)


def test_attributes_of_others_are_not_saved(tmp_path: Path) -> None:
    processor = TransfusionImageProcessor()
    processor.is_override = True
    processor.save_pretrained(tmp_path)
    assert "is_override" not in (tmp_path / "preprocessor_config.json").read_text()
    assert TransfusionImageProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()


def test_torchvision_is_not_needed() -> None:
    assert "torchvision" not in sys.modules
