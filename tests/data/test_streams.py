from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as TorchIterable

from tests.data.tiny_sources import caption, png, write_folder, write_pairs
from transfusion.data.documents import Columns, Text
from transfusion.data.specs import SourceSpec
from transfusion.data.streams import RecordStream, open_stream


def stream_of(count: int, block: int = 4, seed: int = 0, shards: int = 1) -> RecordStream:
    rows = Dataset.from_dict({"text": [str(number) for number in range(count)]})
    return RecordStream(rows.to_iterable_dataset(num_shards=min(shards, count)), block=block, seed=seed)


def numbers(stream: RecordStream, epoch: int) -> list[int]:
    found = list(stream.records(epoch))
    assert all(record["text"] == str(number) for number, record in found)
    return [number for number, _ in found]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3), st.integers(1, 5))
def test_no_row_is_lost_or_comes_twice(count: int, block: int, epoch: int, shards: int) -> None:
    stream = stream_of(count, block, seed=5, shards=shards)
    order = numbers(stream, epoch)
    for start in range(0, count, block):
        assert sorted(order[start : start + block]) == list(range(start, min(start + block, count)))


def test_orders_differ_between_epochs_blocks_and_seeds() -> None:
    stream = stream_of(16, 8)
    first = numbers(stream, 0)
    assert first == numbers(stream_of(16, 8), 0)
    assert [number - 8 for number in first[8:]] != first[:8]
    assert numbers(stream, 1) != first != numbers(stream_of(16, 8, seed=1), 0)
    assert numbers(stream_of(5, 1), 0) == [0, 1, 2, 3, 4]


def test_one_block_at_a_time_is_read() -> None:
    read: list[int] = []

    def rows() -> Any:
        for number in range(100):
            read.append(number)
            yield {"text": str(number)}

    stream = RecordStream(IterableDataset.from_generator(rows), block=10)
    read.clear()
    next(stream.records(0))
    assert len(read) == 10


class Numbers(TorchIterable):
    def __init__(self, stream: RecordStream) -> None:
        self.stream = stream

    def __iter__(self) -> Any:
        return (number for number, _ in self.stream.records(0))


def test_every_worker_reads_all_shards() -> None:
    stream = stream_of(12, 4, shards=3)
    found = [int(batch) for batch in DataLoader(Numbers(stream), batch_size=None, num_workers=2)]
    assert sorted(found) == sorted([*range(12), *range(12)])


def test_a_folder_is_streamed_with_pictures_as_bytes(tmp_path: Path) -> None:
    spec = write_pairs("parquet", tmp_path / "set", 5)
    stream = open_stream(SourceSpec("stream", spec.path), block=2)
    found = {}
    for number, record in stream.records(0):
        document = stream.document(record, f"row {number}")
        assert isinstance(document.parts[0], Text)
        found[document.parts[0].phrasings] = document.pictures[0].read()
    assert found == {(caption(number),): png(number) for number in range(5)}


def test_pictures_are_not_decoded_by_datasets() -> None:
    rows = Dataset.from_dict({"image": [{"bytes": b"no picture", "path": None}], "text": ["x"]})
    typed = rows.cast_column("image", Image()).cast_column("text", Value("string"))
    stream = RecordStream(typed.to_iterable_dataset())
    [(_, record)] = stream.records(0)
    assert stream.document(record, "here").pictures[0].read() == b"no picture"


def test_pictures_within_lists_are_not_decoded_by_datasets() -> None:
    features = Features({"parts": List({"type": Value("string"), "image": Image()})})
    parts = [[{"type": "image", "image": {"bytes": b"no picture", "path": None}}]]
    stream = RecordStream(Dataset.from_dict({"parts": parts}, features=features).to_iterable_dataset())
    [(_, record)] = stream.records(0)
    assert stream.document(record, "here").pictures[0].read() == b"no picture"


def local_folder(folder: Path) -> Path:
    rows = [{"file_name": f"{number}.png", "text": caption(number)} for number in range(3)]
    return write_folder(folder, rows, {f"{number}.png": png(number) for number in range(3)})


@pytest.mark.parametrize("linked", [False, True])
def test_pictures_of_a_local_folder_are_streamed(linked: bool, tmp_path: Path) -> None:
    folder = local_folder(tmp_path / "set")
    if linked:
        (tmp_path / "link").symlink_to(folder)
    stream = open_stream(SourceSpec("stream", str(tmp_path / "link" if linked else folder)))
    documents = [stream.document(record, "here") for _, record in stream.records(0)]
    assert sorted(document.pictures[0].read() for document in documents) == sorted(png(n) for n in range(3))


@pytest.mark.parametrize("kind", ["no folder", "another folder", "a URL"])
def test_pictures_that_cannot_be_read_are_said_before_any_is(kind: str, tmp_path: Path) -> None:
    name = "https://example.org/a.png" if kind == "a URL" else str(local_folder(tmp_path / "set") / "0.png")
    rows = Dataset.from_dict({"image": [{"bytes": None, "path": name}], "text": ["x"]}).cast_column("image", Image())
    root = tmp_path / "other" if kind == "another folder" else None
    with pytest.raises(ValueError, match="The pictures of stream cannot be read: .*give the path of a local folder"):
        RecordStream(rows.to_iterable_dataset(), root=root)


def test_a_first_record_with_a_fault_of_its_own_is_left_to_whoever_counts_faults() -> None:
    rows = Dataset.from_dict({"image": [None, png(1)], "text": ["x", "y"]})
    assert len(list(RecordStream(rows.to_iterable_dataset()).records(0))) == 2


def test_bad_streams() -> None:
    with pytest.raises(ValueError, match="has no records"):
        RecordStream(IterableDataset.from_generator(lambda: iter([])))
    with pytest.raises(ValueError, match="caption is the column 'x', and stream has text"):
        RecordStream(Dataset.from_dict({"text": ["a"]}).to_iterable_dataset(), Columns(caption="x"))
