import collections
import contextlib
import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from tests.data.tiny_sources import caption, png, write_folder, write_pairs, write_parquet, write_tar
from tests.tiny import tiny_config, tiny_model
from tests.tiny_processor import tiny_processor, tiny_vae
from tests.training.test_trainer import sgd_trainer
from tests.training.tiny_rows import largest_difference
from transfusion.data.documents import Document
from transfusion.data.specs import DataSpec, SourceSpec
from transfusion.latents import patchify
from transfusion.training.assembly import build_rows
from transfusion.training.collator import TransfusionDataCollator
from transfusion.training.document_rows import DocumentRows, RowMaker, StreamRows
from transfusion.training.sharding import SharedBatchSampler, SharedRows, SharedStream


KINDS = ("imagefolder", "parquet", "webdataset", "stream")
AUGMENTED = {"buckets": ((8, 8), (4, 12)), "flip": True, "crop": "random"}


def processor() -> Any:
    return tiny_processor(tiny_vae(), size=16)


def as_plain(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in row.items()}


def source(kind: str, folder: Path, count: int = 6) -> SourceSpec:
    return write_pairs(kind, folder, count)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_rows(kind: str, cached: bool, tmp_path: Path) -> None:
    given = processor()
    spec = DataSpec((source(kind, tmp_path / "set"),), cache_dir=str(tmp_path / "cache") if cached else None)
    if kind != "stream":
        assert str(build_rows(spec, given).reports[0]).endswith(": 6 usable rows, 0 faults")
    rows = list(iter_rows(build_rows(spec, given)))
    ids = {tuple(row["labels"][row["labels"] != -100].tolist()) for row in rows}
    assert len(rows) == 6 and len(ids) == 6
    latents = {tuple(row["latent_patches"].flatten().tolist()) for row in rows}
    expected = given.encode_images(
        given.image_processor([Image.open(io.BytesIO(png(n))) for n in range(6)])["pixel_values"]
    )
    for latent in expected:
        found = [torch.tensor(values) for values in latents]
        assert min((one - patchify(latent, 2).flatten()).abs().max() for one in found) < 1e-5


def iter_rows(rows: Any) -> Any:
    """Those of an epoch, or of the first pass over a stream."""
    if isinstance(rows, StreamRows):
        rows.num_passes = 1
        return iter(rows)
    return (rows[index] for index in range(len(rows)))


def loaded(rows: Any, num_workers: int, num_processes: int, start: int = 0, batch: int = 6) -> list[dict[str, Any]]:
    """The rows of an epoch, or of two passes, of all processes in the order of the steps, from row `start` on."""
    steps: list[list[list[Any]]] = []
    size = batch // num_processes
    for index in range(num_processes):
        if isinstance(rows, StreamRows):
            rows.num_passes = 2
            shared = SharedStream(rows, size, num_processes, index)
            shared.num_skipped = start // batch
            loader = DataLoader(shared, size, num_workers=num_workers, collate_fn=list)
        else:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(rows.epoch)).tolist()[start:]
            sampler = SharedBatchSampler(order, size, False, num_processes, index)
            loader = DataLoader(SharedRows(rows), batch_sampler=sampler, num_workers=num_workers, collate_fn=list)
        steps.append(list(loader))
    return [
        as_plain(row)
        for step in zip(*steps, strict=True)
        for share in step
        for row in share
        if (row["labels"] != -100).any()
    ]


@pytest.mark.parametrize("kind", ["webdataset", "stream"])
def test_rows_depend_neither_on_workers_nor_processes_nor_on_resuming(kind: str, tmp_path: Path) -> None:
    """With flips, random crops and phrasings, 17 rows of which neither 2 nor 3 processes have equal parts."""
    spec = DataSpec((source(kind, tmp_path / "set", 17),), shuffle_block=5, **AUGMENTED)  # type: ignore[arg-type]
    rows = build_rows(spec, tiny_processor(), seed=3)
    for epoch in (0, 1) if isinstance(rows, DocumentRows) else (0,):
        if isinstance(rows, DocumentRows):
            rows.set_epoch(epoch)
        expected = loaded(rows, 0, 1)
        passes = [expected[start : start + 17] for start in range(0, len(expected), 17)]
        assert all(len({row["sample_id"] for row in one}) == 17 for one in passes)
        assert len({row["sample_seed"] for row in expected}) == len(expected)
        for num_workers, num_processes in ((2, 1), (0, 2), (0, 3), (2, 3)):
            assert loaded(rows, num_workers, num_processes) == expected
    again = build_rows(spec, tiny_processor(), seed=3)
    if isinstance(again, DocumentRows):
        again.set_epoch(1)
    for num_workers in (0, 2):
        assert loaded(again, num_workers, 2, start=12) == expected[12:]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 12), num_processes=st.integers(1, 4), batch=st.integers(1, 3))
def test_no_row_is_lost_or_repeated(count: int, num_processes: int, batch: int, tmp_path: Path) -> None:
    folder = tmp_path / str(count)
    spec = DataSpec((source("imagefolder", folder, count),))
    rows = build_rows(spec, tiny_processor())
    names = [row["sample_id"] for row in loaded(rows, 0, num_processes, batch=batch * num_processes)]
    assert sorted(names) == sorted(f"{folder}/metadata.jsonl:{number + 1}" for number in range(count))


def test_sources_are_mixed_by_weight(tmp_path: Path) -> None:
    texts = write_parquet(tmp_path / "texts.parquet", {"text": [f"text {n}" for n in range(4)]})
    edits = [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "then"},
        {"type": "image", "image": "b.png"},
    ]
    members = [("1.a.png", png(1)), ("1.b.png", png(2)), ("1.json", json.dumps({"parts": edits}).encode())]
    sources = (
        SourceSpec("imagefolder", source("imagefolder", tmp_path / "set").path, weight=2),
        SourceSpec("parquet", str(texts), weight=1),
        SourceSpec("webdataset", str(write_tar(tmp_path / "a.tar", members)), weight=1),
    )
    rows = build_rows(DataSpec(sources, epoch_rows=16, cache_dir=str(tmp_path / "cache")), tiny_processor())
    assert isinstance(rows, DocumentRows) and len(rows) == 16
    kinds = [len(row.get("image_grids", ())) for row in iter_rows(rows)]
    assert [kinds.count(number) for number in range(3)] == [4, 8, 4]
    batch = TransfusionDataCollator(tiny_config(**_sizes(rows.maker.processor)))(list(iter_rows(rows)))
    assert batch["input_ids"].shape[0] == 16 and len(batch["image_grids"]) == 16


def _sizes(given: Any) -> dict[str, Any]:
    ids = {name: getattr(given, name) for name in ("boi_token_id", "eoi_token_id", "image_token_id")}
    return {"vocab_size": len(given.tokenizer), "bos_token_id": None, "eos_token_id": 1, **ids}


def faulty_source(folder: Path) -> SourceSpec:
    rows = [{"file_name": f"{n}.png", "text": caption(n)} for n in range(8)]
    files = {f"{n}.png": png(n, 30, 30) for n in range(8)}
    buffer = io.BytesIO()
    Image.open(io.BytesIO(files["2.png"])).save(buffer, "JPEG")
    files |= {"2.png": buffer.getvalue()[:900], "5.png": b"words"}  # a JPEG tells its size, and then ends
    return SourceSpec("imagefolder", str(write_folder(folder, rows, files)))


@pytest.mark.parametrize("cached", [False, True])
def test_faulty_rows_are_left_out_and_said(cached: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = str(tmp_path / "cache") if cached else None
    spec = DataSpec((faulty_source(tmp_path / "set"),), max_faulty=0.3, cache_dir=cache)
    for _ in range(1 + cached):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            rows = build_rows(spec, tiny_processor())
        assert isinstance(rows, DocumentRows) and len(rows) == 6 and len(list(iter_rows(rows))) == 6
        places = sorted(fault.where.rsplit(":")[-1] for fault in rows.reports[0].faults)
        assert places == ["3", "6"] and "6 usable rows, 2 faults" in caplog.text
    with pytest.raises(ValueError, match="(?s)strict allows no fault.*metadata.jsonl:3: .*truncated"):
        build_rows(DataSpec(spec.sources, max_faulty=0.3, cache_dir=cache, strict=True), tiny_processor())
    with pytest.raises(ValueError, match="A share of 0.250 is faulty, and max_faulty is 0.1"):
        build_rows(DataSpec(spec.sources, cache_dir=cache), tiny_processor())


def texts_of(folder: Path, words: Sequence[int]) -> SourceSpec:
    return SourceSpec("parquet", str(write_parquet(folder / "a.parquet", {"text": ["word " * n for n in words]})))


def test_documents_that_are_too_long_are_left_out(tmp_path: Path) -> None:
    """More of them than `max_faulty`, as they are no faults."""
    spec = DataSpec(
        (texts_of(tmp_path, (1, 2, 30, 3, 50)),), cache_dir=str(tmp_path / "c"), max_length=60, strict=True
    )
    rows = build_rows(spec, tiny_processor())
    assert isinstance(rows, DocumentRows) and max(len(row["input_ids"]) for row in iter_rows(rows)) <= 60
    assert len(rows) == 3 and "max_length is 60" in rows.reports[0].too_long[0].reason and not rows.reports[0].faults


def test_lengths_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, longest = (texts_of(tmp_path, (1, 2, 30)),), RowMaker.longest
    measured: list[str] = []

    def counted(maker: RowMaker, document: Document, keys: Any) -> int:
        measured.append(document.id)
        return longest(maker, document, keys)

    monkeypatch.setattr(RowMaker, "longest", counted)

    def num_rows(processor: Any, max_length: int = 60, **options: Any) -> int:
        spec = DataSpec(sources, cache_dir=str(tmp_path / "c"), max_length=max_length, **options)
        return build_rows(spec, processor).reports[0].num_pictures

    used = tiny_processor()
    assert num_rows(used) == 2 and len(measured) == 3
    used.tokenizer(["a", "longer"], padding=True, truncation=True, max_length=4)
    assert num_rows(used) == num_rows(tiny_processor()) == 2 and num_rows(used, 9) == 1 and len(measured) == 3
    others = [tiny_processor(size=16), tiny_processor(), tiny_processor()]
    others[1].tokenizer.add_tokens(["word "])
    for other in others[:2]:
        num_rows(other)
    num_rows(others[2], buckets=((8, 8),))
    assert len(measured) == 12


def test_cached_pictures_are_never_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = DataSpec((source("webdataset", tmp_path / "set"),), cache_dir=str(tmp_path / "cache"))
    first = [as_plain(row) for row in iter_rows(build_rows(spec, processor()))]
    given = processor()
    monkeypatch.setattr(given, "encode_images", nothing_to_encode)
    monkeypatch.setattr("transfusion.data.tars.Member.read", read_text_alone)
    assert [as_plain(row) for row in iter_rows(build_rows(spec, given))] == first


def nothing_to_encode(pixels: list[Any]) -> list[Any]:
    assert not pixels
    return []


def read_text_alone(member: Any) -> bytes:
    assert member.name.endswith("txt"), member.name
    with open(member.file, "rb") as stream:
        stream.seek(member.offset)
        return stream.read(member.size)


def test_augmented_pictures_are_not_cached(tmp_path: Path) -> None:
    spec = DataSpec((source("imagefolder", tmp_path / "set"),), cache_dir=str(tmp_path / "cache"), **AUGMENTED)  # type: ignore[arg-type]
    rows = build_rows(spec, tiny_processor())
    assert not list((tmp_path / "cache").glob("latents-*"))
    patches = []
    for epoch in range(6):
        rows.set_epoch(epoch)
        patches.append({tuple(row["latent_patches"].flatten().tolist()) for row in iter_rows(rows)})
    assert len(set().union(*patches)) > 6


def test_epochs_go_on_in_a_source_that_is_seldom_drawn(tmp_path: Path) -> None:
    sources = tuple(
        SourceSpec("imagefolder", source("imagefolder", tmp_path / name, 6).path, weight=weight)
        for name, weight in (("often", 3), ("seldom", 1))
    )
    rows = build_rows(DataSpec(sources, epoch_rows=8), tiny_processor())
    assert isinstance(rows, DocumentRows)
    seen = []
    for epoch in range(3):
        rows.set_epoch(epoch)
        seen += [row["sample_id"] for row in iter_rows(rows)]
    assert sorted(name for name in seen if "seldom" in name) == [
        f"{tmp_path}/seldom/metadata.jsonl:{line}" for line in range(1, 7)
    ]
    assert collections.Counter(seen).most_common(1)[0][1] == 3


def test_a_stream_ends_after_the_passes_that_are_asked_for(tmp_path: Path) -> None:
    spec = DataSpec((source("stream", tmp_path / "set", 5),))
    for num_passes in (1, 2):
        rows = build_rows(spec, tiny_processor(), num_passes=num_passes)
        names = collections.Counter(row["sample_id"] for row in rows)
        assert len(names) == 5 and set(names.values()) == {num_passes}
    assert build_rows(spec, tiny_processor()).num_passes is None


@pytest.mark.parametrize("fails", [False, True])
def test_the_vae_encodes_on_the_device_and_comes_back(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device "meta" computes nothing: it stands for one that is not there."""
    given, places = processor(), []

    def encode(pixels: list[Any]) -> list[torch.Tensor]:
        places.append(given.vae.device.type)
        if fails:
            raise RuntimeError("no kernel image")
        return [torch.zeros(4, 4, 4) for _ in pixels]

    def move(device: Any) -> Any:
        monkeypatch.setattr(type(given.vae), "device", torch.device(device))
        return given.vae

    monkeypatch.setattr(given, "encode_images", encode)
    monkeypatch.setattr(given.vae, "to", move)
    spec = DataSpec((source("imagefolder", tmp_path / "set"),), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        build_rows(spec, given, device="meta")
    assert places == ["meta"] and given.vae.device.type == "cpu"
    if not fails:
        build_rows(spec, tiny_processor(size=16), device="meta")  # no VAE to move


def test_a_split_is_kept(tmp_path: Path) -> None:
    rows = [{"file_name": f"{n}.png", "text": caption(n), "split": "ab"[n % 2]} for n in range(4)]
    write_folder(tmp_path, rows, {f"{n}.png": png(n) for n in range(4)})
    spec = DataSpec((SourceSpec("imagefolder", str(tmp_path), split="b"),))
    built = build_rows(spec, tiny_processor())
    assert sorted(row["sample_id"].rsplit(":")[-1] for row in iter_rows(built)) == ["2", "4"]


@pytest.mark.parametrize("kind", ["webdataset", "stream"])
def test_a_training_that_goes_on_equals_one_that_was_not_interrupted(kind: str, tmp_path: Path) -> None:
    """In the second of the epochs of three steps, with augmentation, dropped text and a shuffled order."""
    spec = DataSpec((source(kind, tmp_path / "set", 11),), shuffle_block=5, **AUGMENTED)  # type: ignore[arg-type]

    def train(folder: Path, max_steps: int, checkpoint: bool = False) -> Any:
        given = tiny_processor()
        rows, model = build_rows(spec, given), tiny_model(**_sizes(given)).float()
        options: dict[str, Any] = {
            "train_sampling_strategy": "random",
            "per_device_train_batch_size": 4,
            "max_steps": max_steps,
        }
        trainer = sgd_trainer(model, rows, folder, save_strategy="steps", save_steps=4, **options)
        trainer.train(resume_from_checkpoint=checkpoint or None)
        return model, rows

    whole, all_rows = train(tmp_path / "a", 8)
    train(tmp_path / "b", 4)
    resumed, late_rows = train(tmp_path / "b", 8, checkpoint=True)
    assert largest_difference(whole.state_dict(), resumed.state_dict()) == 0
    if isinstance(all_rows, StreamRows):
        assert late_rows.num_read <= all_rows.num_read - 4 * 4  # what was learned before was not made again


def test_a_fingerprint_tells_sets_apart_wherever_they_lie(tmp_path: Path) -> None:
    def found(folder: str, count: int = 6, seed: int = 0, **options: Any) -> str:
        spec = DataSpec((source("imagefolder", tmp_path / folder, count),), **options)
        return build_rows(spec, processor(), seed).fingerprint

    first = found("a")
    assert first == found("b")
    others = [found("c", 5), found("d", seed=1), found("e", caption_first=0.5), found("f", flip=True)]
    assert len({first, *others}) == 5
    reworded = (tmp_path / "b/metadata.jsonl").read_text().replace(caption(3), "noise")
    (tmp_path / "b/metadata.jsonl").write_text(reworded)
    cached = DataSpec((SourceSpec("imagefolder", str(tmp_path / "b")),), cache_dir=str(tmp_path / "cache"))
    prints = {build_rows(cached, processor()).fingerprint for _ in range(2)}
    assert len(prints) == 1 and first not in prints
    stream = build_rows(DataSpec((source("stream", tmp_path / "s"),)), processor())
    assert stream.fingerprint == stream.fingerprint != first
