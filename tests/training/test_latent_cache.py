import copy
import io
import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from tests.tiny_processor import picture, tiny_processor, tiny_vae
from transfusion.data.pictures import CaptionedPicture
from transfusion.training import latent_cache
from transfusion.training.latent_cache import (
    LatentStore,
    StoredLatents,
    encode_missing,
    encode_pictures,
    open_latents,
    settings_key,
)


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


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def equal(first: Any, second: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def numbers(store: LatentStore, count: int, shard_size: int = 4, made: list[int] | None = None) -> None:
    """Encode pictures of one colour, 2 x 2 pixels, which are their own latents."""

    def pixels(number: int) -> np.ndarray:
        if made is not None:
            made.append(number)
        return np.full((3, 2, 2), number, np.float32)

    jobs = ((str(number), partial(pixels, number)) for number in range(count))
    encode_missing(store, jobs, tiny_processor(), batch_size=3, shard_size=shard_size)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_latents_are_those_of_the_processor(batch_size: int, cached: bool, tmp_path: Path) -> None:
    encoded = encode_pictures(PICTURES, processor(), tmp_path if cached else None, batch_size)
    alone = processor()
    assert encoded.pictures == PICTURES and encoded.report.num_pictures == 5 and not encoded.report.faults
    for given, latent in zip(PICTURES, encoded.latents, strict=True):
        expected = alone.encode_images(alone.image_processor([given.image])["pixel_values"])[0]
        torch.testing.assert_close(latent, expected)


def test_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = encode_pictures(PICTURES, processor(), tmp_path)
    [file] = files(tmp_path)
    again = processor()
    monkeypatch.setattr(again, "encode_images", None)
    second = encode_pictures(PICTURES, again, tmp_path)
    assert files(tmp_path) == [file] and equal(first.latents, second.latents)
    assert equal(encode_pictures(PICTURES[3:0:-1], again, tmp_path).latents, first.latents[3:0:-1])


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
    assert settings_key(change()) != settings_key(processor()) == settings_key(processor())


def test_key_changes_with_sizes() -> None:
    assert len({settings_key(processor(), sizes) for sizes in ([], [(8, 8)], [(8, 16)], [(8, 8), (8, 16)])}) == 4


def test_key_does_not_depend_on_the_path_of_the_vae(tmp_path: Path) -> None:
    processor().save_pretrained(tmp_path)
    loaded = type(processor()).from_pretrained(tmp_path)
    assert settings_key(loaded) == settings_key(processor())


def test_pictures_are_found_by_their_bytes_wherever_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, file, given = tmp_path / "cache", tmp_path / "x.png", processor()
    expected = encode_pictures(PICTURES, given, cache).latents
    encoded: list[int] = []
    encode = given.encode_images

    def counted(pixels: list[np.ndarray]) -> Any:
        encoded.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(given, "encode_images", counted)
    file.write_bytes(png(2))
    assert equal(encode_pictures([captioned("moved", file)], given, cache).latents, [expected[2]]) and not encoded
    file.write_bytes(png(99))
    changed = encode_pictures([captioned("moved", file), *PICTURES], given, cache).latents
    assert encoded == [1] and equal(changed[1:], expected) and not torch.equal(changed[0], expected[2])


def test_only_what_is_new_is_encoded_in_shards(tmp_path: Path) -> None:
    made: list[int] = []
    numbers(LatentStore(tmp_path), 10, made=made)
    assert made == list(range(10)) and len(files(tmp_path)) == 3
    made.clear()
    numbers(LatentStore(tmp_path), 13, made=made)
    assert made == [10, 11, 12] and len(files(tmp_path)) == 4
    store = LatentStore(tmp_path)
    assert [float(store[str(number)][0, 0, 0]) for number in range(13)] == list(range(13))
    assert store.shape("3") == (3, 2, 2) and "13" not in store


def test_a_picture_that_comes_twice_is_encoded_once() -> None:
    encoded = encode_pictures([*PICTURES, PICTURES[1]], processor())
    assert torch.equal(encoded.latents[1], encoded.latents[5])
    made: list[str] = []

    def pixels(key: str) -> np.ndarray:
        made.append(key)
        return np.zeros((3, 2, 2), np.float32)

    encode_missing(LatentStore(), [(key, partial(pixels, key)) for key in "abab"], tiny_processor())
    assert made == ["a", "b"]


def test_a_run_that_ends_within_encoding_keeps_whole_shards(tmp_path: Path) -> None:
    made: list[int] = []

    class Full(LatentStore):
        def write(self, latents: Any, faults: Any) -> None:
            if len(made) > 8:
                raise OSError("no space left")
            super().write(latents, faults)

    with pytest.raises(OSError):
        numbers(Full(tmp_path), 20, made=made)
    made.clear()
    numbers(LatentStore(tmp_path), 20, made=made)
    assert made == list(range(8, 20))


def flip_bit(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


CORRUPTIONS: list[Any] = [
    lambda content: b"",
    lambda content: content[:7],
    lambda content: content[: len(content) // 2],
    lambda content: content[:-1],
    lambda content: content + b"x",
    flip_bit,
    lambda content: b"\xff" * len(content),
]


@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_a_corrupt_shard_is_named_ignored_and_replaced(
    corrupt: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    numbers(LatentStore(tmp_path), 8)
    whole = files(tmp_path)
    file = whole[0]
    file.write_bytes(corrupt(file.read_bytes()))
    (tmp_path / f"{file.stem}.123.part").write_bytes(b"half")
    made: list[int] = []
    with caplog.at_level(logging.WARNING):
        numbers(LatentStore(tmp_path), 8, made=made)
    assert made in ([0, 1, 2, 3], [4, 5, 6, 7]) and file.name in caplog.text
    (tmp_path / f"{file.stem}.123.part").unlink()
    assert files(tmp_path) == whole  # the same pictures make the same name
    store = LatentStore(tmp_path)
    numbers(store, 8, made=made)
    assert len(made) == 4 and [float(store[str(n)][0, 0, 0]) for n in range(8)] == list(range(8))


def test_a_shard_that_was_replaced_stays(tmp_path: Path) -> None:
    numbers(LatentStore(tmp_path), 8)
    files(tmp_path)[0].write_bytes(b"")
    numbers(LatentStore(tmp_path), 16)
    store = LatentStore(tmp_path)
    assert [float(store[str(n)][0, 0, 0]) for n in range(16)] == list(range(16)) and len(files(tmp_path)) == 4


def test_a_corrupt_shard_of_other_pictures_is_deleted_with_the_next(tmp_path: Path) -> None:
    numbers(LatentStore(tmp_path), 4)
    [file] = files(tmp_path)
    file.write_bytes(b"")
    numbers(LatentStore(tmp_path), 6, shard_size=6)
    assert len(files(tmp_path)) == 1 and files(tmp_path) != [file]


@pytest.mark.parametrize("missing", [False, True])
def test_a_shard_that_another_process_wrote_anew_is_kept(missing: bool, tmp_path: Path) -> None:
    numbers(LatentStore(tmp_path), 4)
    [file] = files(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    store = LatentStore(tmp_path)
    file.unlink() if missing else file.write_bytes(whole)
    store.write({"9": torch.full((3, 2, 2), 9.0)}, {})
    assert ("3" in store) != missing and (missing or file.read_bytes() == whole)
    assert float(store["9"][0, 0, 0]) == 9 and len(files(tmp_path)) == 2 - missing


def test_a_shard_that_cannot_be_opened_for_now_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers(LatentStore(tmp_path), 4)

    def fail(*given: Any, **options: Any) -> Any:
        raise OSError("the disk is away")

    with monkeypatch.context() as patched:
        patched.setattr(latent_cache, "safe_open", fail)
        store = LatentStore(tmp_path)
        assert "3" not in store
        store.write({}, {"9": "no picture"})
    assert len(files(tmp_path)) == 2 and "3" in LatentStore(tmp_path)


def test_a_shard_is_checked_when_one_of_its_latents_is_first_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers(LatentStore(tmp_path), 8)
    checked: list[int] = []
    checksum = latent_cache._checksum

    def counted(latent: torch.Tensor) -> int:
        checked.append(int(latent[0, 0, 0]))
        return checksum(latent)

    monkeypatch.setattr(latent_cache, "_checksum", counted)
    store = LatentStore(tmp_path)
    assert "77" not in store and not checked
    for _ in range(2):
        assert "1" in store and "3" in store and sorted(checked) == [0, 1, 2, 3]


def test_drafts_of_several_machines_have_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drafts: list[Path] = []

    def save(tensors: Any, part: Path, metadata: Any) -> None:
        drafts.append(part)
        part.touch()

    monkeypatch.setattr(latent_cache, "save_file", save)
    for _ in range(2):
        LatentStore(tmp_path).write({"9": torch.zeros(3, 2, 2)}, {})
    assert len(set(drafts)) == 2 and all(draft.suffix == ".part" for draft in drafts)


def test_a_foreign_safetensors_file_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({"0": torch.zeros(3, 2, 2)}, tmp_path / "foreign.safetensors")
    with caplog.at_level(logging.WARNING):
        assert "0" not in LatentStore(tmp_path)
    assert "foreign.safetensors cannot be read" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 2])
def test_latents_are_read_lazily_in_any_process(num_workers: int, tmp_path: Path) -> None:
    encoded = encode_pictures(PICTURES, processor(), tmp_path)
    again = encode_pictures(PICTURES, processor(), tmp_path)
    assert isinstance(again.latents, StoredLatents) and not again.latents.store._open
    loader = DataLoader(again.latents, batch_size=None, num_workers=num_workers)
    assert equal(list(loader), list(encoded.latents))
    assert equal(copy.deepcopy(again.latents), list(encoded.latents))


@pytest.mark.parametrize(("limit", "batches"), [(4, [4, 4]), (3, [2, 2, 2, 2]), (1, [1] * 8)])
def test_smaller_batches_where_memory_does_not_suffice(
    limit: int, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []

    def encode(pixels: list[np.ndarray]) -> list[torch.Tensor]:
        if len(pixels) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        done.append(len(pixels))
        return [torch.as_tensor(value) for value in pixels]

    given, store = tiny_processor(), LatentStore()
    monkeypatch.setattr(given, "encode_images", encode)
    jobs = ((str(n), lambda n=n: np.full((3, 2, 2), n, np.float32)) for n in range(8))
    encode_missing(store, jobs, given, batch_size=8)
    assert done == batches and [float(store[str(n)][0, 0, 0]) for n in range(8)] == list(range(8))


def test_other_errors_of_the_vae_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    for message in ("no kernel image", "CUDA out of memory. Tried."):

        def encode(pixels: Any, message: str = message) -> Any:
            raise RuntimeError(message)

        given = tiny_processor()
        monkeypatch.setattr(given, "encode_images", encode)
        with pytest.raises(RuntimeError, match=message):
            encode_pictures(PICTURES, given)


def test_a_picture_whose_latent_is_not_finite_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    given = processor()
    poisoned = given.image_processor(PICTURES[2].image)["pixel_values"][0]
    encode = given.encode_images

    def strict(pixels: list[np.ndarray]) -> Any:
        if any(np.array_equal(value, poisoned) for value in pixels):
            raise ValueError("A latent is not finite")
        return encode(pixels)

    monkeypatch.setattr(given, "encode_images", strict)
    encoded = encode_pictures(PICTURES, given)
    assert [fault.where for fault in encoded.report.faults] == ["2.png"] and len(encoded.latents) == 4
    assert "not finite" in encoded.report.faults[0].reason


def test_a_missing_file_is_a_fault(tmp_path: Path) -> None:
    encoded = encode_pictures([*PICTURES, captioned("gone.png", tmp_path / "gone.png")], processor())
    assert [fault.where for fault in encoded.report.faults] == ["gone.png"] and len(encoded.pictures) == 5


def test_what_could_not_be_read_is_tried_again(tmp_path: Path) -> None:
    def fail() -> np.ndarray:
        raise OSError("the disk is away")

    store = LatentStore(tmp_path)
    encode_missing(store, [("a", fail)], tiny_processor())
    assert store.faults == {"a": "the disk is away"} and "a" not in LatentStore(tmp_path)


def test_folder_is_that_of_the_settings(tmp_path: Path) -> None:
    assert open_latents(tmp_path, processor()).folder == tmp_path / f"latents-{settings_key(processor())}"
    assert open_latents(None, processor()).folder is None


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
