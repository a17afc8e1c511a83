import io
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_processor import picture, tiny_processor, tiny_vae
from transfusion.data.pictures import CaptionedPicture
from transfusion.training.latent_cache import cache_key, encode_pictures


def captioned(name: str, content: bytes | Path) -> CaptionedPicture:
    return CaptionedPicture(name, name, (name,), "", "", "", content)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed, 8, 8).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [captioned(f"{seed}.png", png(seed)) for seed in range(5)]
BROKEN = captioned("folder/broken.png", b"no picture")


def processor(**options: Any) -> Any:
    return tiny_processor(tiny_vae(**options), size=16)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_latents_are_those_of_the_processor(batch_size: int) -> None:
    encoded = encode_pictures(PICTURES, processor(), batch_size=batch_size)
    alone = processor()
    assert encoded.pictures == PICTURES and encoded.report.num_pictures == 5 and not encoded.report.faults
    for given, latent in zip(PICTURES, encoded.latents, strict=True):
        expected = alone.encode_images(alone.image_processor([given.image])["pixel_values"])[0]
        torch.testing.assert_close(latent, expected)


def test_cache_is_used(tmp_path: Path) -> None:
    first = encode_pictures(PICTURES, processor(), tmp_path)
    [file] = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    second = encode_pictures(PICTURES, processor(), tmp_path)
    assert file.stat().st_mtime_ns == written and files(tmp_path) == [file.name]
    assert all(torch.equal(a, b) for a, b in zip(first.latents, second.latents, strict=True))


def changed_weights() -> Any:
    changed = processor()
    with torch.no_grad():
        changed.vae.encoder.conv_in.bias[0] += 1e-6
    return changed


def other_size() -> Any:
    return tiny_processor(tiny_vae(), size=8)


def no_vae() -> Any:
    return tiny_processor(size=16)


def half() -> Any:
    changed = processor()
    changed.vae.half()
    return changed


def other_scale() -> Any:
    return processor(scaling_factor=0.5)


@pytest.mark.parametrize("change", [changed_weights, other_size, no_vae, half, other_scale])
def test_key_changes_with_what_latents_depend_on(change: Any) -> None:
    assert cache_key(PICTURES, change()) != cache_key(PICTURES, processor())


def test_key_changes_with_the_pictures_and_not_with_where_they_are(tmp_path: Path) -> None:
    key = cache_key(PICTURES, processor())
    assert key == cache_key(PICTURES, processor())
    assert key != cache_key(PICTURES[:4], processor())
    assert key != cache_key([*PICTURES[1:], PICTURES[0]], processor())
    file = tmp_path / "0.png"
    file.write_bytes(PICTURES[0].source)  # type: ignore[arg-type]
    assert key == cache_key([captioned("0.png", file), *PICTURES[1:]], processor())
    file.write_bytes(png(99))
    assert key != cache_key([captioned("0.png", file), *PICTURES[1:]], processor())


def test_key_does_not_depend_on_the_path_of_the_vae(tmp_path: Path) -> None:
    processor().save_pretrained(tmp_path)
    loaded = type(processor()).from_pretrained(tmp_path)
    assert cache_key(PICTURES, loaded) == cache_key(PICTURES, processor())


@pytest.mark.parametrize("keep", [0, 7, 0.5, 0.99])
def test_half_written_file_is_ignored(keep: float, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = encode_pictures(PICTURES, processor(), tmp_path).latents
    [file] = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if 0 < keep < 1 else int(keep)])
    (tmp_path / f"{file.stem}.123.part").write_bytes(content[:100])
    with caplog.at_level(logging.WARNING):
        found = encode_pictures(PICTURES, processor(), tmp_path)
    assert "cannot be read" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(found.latents, expected, strict=True))
    assert file.read_bytes() == content


@pytest.mark.parametrize("cached", [False, True])
def test_broken_picture_is_reported(cached: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = [*PICTURES[:2], BROKEN, *PICTURES[2:]]
    if cached:
        encode_pictures(given, processor(), tmp_path)
    with caplog.at_level(logging.WARNING):
        encoded = encode_pictures(given, processor(), tmp_path, batch_size=2)
    assert encoded.pictures == PICTURES and len(encoded.latents) == 5
    assert [fault.where for fault in encoded.report.faults] == ["folder/broken.png"]
    assert "1 faults" in caplog.text and "folder/broken.png" in caplog.text


def test_broken_pictures_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="(?s)None of the 1 pictures.*folder/broken.png"):
        encode_pictures([BROKEN], processor())
