import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value

from tests.data.tiny_sources import caption, png, write_folder, write_pairs, write_parquet
from transfusion.data.documents import Picture, Text
from transfusion.data.sources import LineRecords, TableRecords, expand, open_source
from transfusion.data.specs import SourceSpec


@pytest.mark.parametrize("kind", ["imagefolder", "parquet", "webdataset"])
def test_every_kind_gives_the_same_documents_in_any_process(kind: str, tmp_path: Path) -> None:
    documents = open_source(write_pairs(kind, tmp_path / "set", 5), tmp_path / "cache")
    copied = copy.deepcopy(documents)
    found = {}
    for index in (3, 0, 4, 1, 2):
        text, picture = copied[index].parts
        assert isinstance(text, Text) and isinstance(picture, Picture) and copied[index].is_pair
        found[text.phrasings] = picture.read()
        assert documents[index].id == copied[index].id
    assert found == {(caption(number),): png(number) for number in range(5)} and len(documents) == 5


def test_lines_hold_documents_of_any_kind(tmp_path: Path) -> None:
    rows = [
        {"parts": [{"type": "text", "text": "see"}, {"type": "image", "file_name": "./sub/a.png"}]},
        "not json",
        [1],
        "",
        {"parts": [{"type": "image", "file_name": "b.png"}, {"type": "text", "text": "ü"}]},
    ]
    lines = [json.dumps(row, ensure_ascii=False) if not isinstance(row, str) else row for row in rows]
    folder = write_folder(tmp_path, lines, {"sub/a.png": png(1), "b.png": png(2), "c.png": png(3)})
    records = LineRecords(folder)
    assert len(records) == 2 and records.where(1).endswith("metadata.jsonl:5")
    assert [fault.where.rsplit("/")[-1] for fault in records.faults] == [
        "metadata.jsonl:2",
        "metadata.jsonl:3",
        "c.png",
    ]
    assert [fault.reason.split(":")[0] for fault in records.faults] == [
        "not JSON",
        "a list, not an object",
        "no row in metadata.jsonl",
    ]
    documents = open_source(SourceSpec("imagefolder", str(folder)))
    assert documents[0].pictures[0].read() == png(1) and documents[1].parts[1] == Text(("ü",))
    assert {file.name for file in records.files()} == {"metadata.jsonl", "a.png", "b.png"}


def test_a_file_of_lines_beside_other_pictures(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "a.png").write_bytes(png(1))
    documents = open_source(SourceSpec("jsonl", str(tmp_path / "texts.jsonl")))
    assert [document.parts for document in documents] == [(Text(("one",)),), (Text(("two",)),)]
    assert not documents.records.faults
    with pytest.raises(ValueError, match="is no file"):
        open_source(SourceSpec("jsonl", str(tmp_path / "absent.jsonl")))


@pytest.mark.parametrize("as_struct", [True, False])
def test_pictures_of_tables_are_read_when_they_are_asked_for(as_struct: bool, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files/2.png").write_bytes(png(2))
    pictures: list[Any] = [png(number) for number in range(5)]
    if as_struct:
        pictures = [{"bytes": content, "path": "x"} for content in pictures]
        pictures[2] = {"bytes": None, "path": "files/2.png"}
    pictures[3] = None
    columns = {"picture": pictures, "text": [f"row {n}" for n in range(5)], "size": list(range(5))}
    documents = open_source(
        SourceSpec("parquet", str(write_parquet(tmp_path / "a.parquet", columns)), picture="picture"), tmp_path / "c"
    )
    for number in (0, 1, 2, 4):
        assert documents[number].pictures[0].read() == png(number)
    with pytest.raises(ValueError, match="no picture"):
        documents[3]
    assert not isinstance(documents.records[0]["picture"], bytes) and documents.records[4]["size"] == 4


def test_pictures_within_lists_and_structs_are_not_decoded_by_datasets(tmp_path: Path) -> None:
    """As `datasets` writes interleaved documents: `Image` features, at any depth."""
    feature = {"type": Value("string"), "text": Value("string"), "image": Image()}
    features = Features({"parts": List(feature), "other": {"image": Image()}, "label": ClassLabel(names=["a", "b"])})
    broken = {"bytes": b"no picture", "path": None}
    parts = [{"type": "text", "text": "see", "image": None}, {"type": "image", "text": None, "image": broken}]
    rows = {"parts": [parts], "other": [{"image": broken}], "label": [1]}
    Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "a.parquet"))
    documents = open_source(SourceSpec("parquet", str(tmp_path / "a.parquet")), tmp_path / "cache")
    assert documents[0].parts[0] == Text(("see",)) and documents[0].pictures[0].read() == b"no picture"
    assert documents.records[0]["label"] == 1


def test_a_parquet_file_that_cannot_be_read_is_a_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pairs("parquet", tmp_path, 6)
    file = tmp_path / "1.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with caplog.at_level(logging.CRITICAL):
        records = TableRecords(tmp_path, tmp_path / "cache")
    assert len(records) == 3 and [fault.where for fault in records.faults] == [str(file)]
    assert "cannot be read" in records.faults[0].reason
    with pytest.raises(ValueError, match="cannot be read"):
        TableRecords(file, tmp_path / "cache")


def test_files_of_a_path(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "c.tar.gz"):
        (tmp_path / name).touch()
    assert [file.name for file in expand(tmp_path, ".tar")] == ["a.tar", "b.tar"]
    assert [file.name for file in expand(tmp_path / "*.tar", ".tar")] == ["a.tar", "b.tar"]
    assert [file.name for file in expand(tmp_path / "b.tar", ".tar")] == ["b.tar"]
    with pytest.raises(ValueError, match=r"c.tar.gz is no .tar file.*uncompressed"):
        expand(tmp_path / "c.tar.gz", ".tar")
    for absent in ("x.tar", "*.parquet"):
        with pytest.raises(ValueError, match="has no .tar files"):
            expand(tmp_path / absent, ".tar")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_files_lie_beside_a_link_and_not_beside_its_target(kind: str, tmp_path: Path) -> None:
    """As in a snapshot of the Hub, whose files are links into another folder."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.png").write_bytes(png(1))
    if kind == "jsonl":
        (tmp_path / "blobs/0").write_text('{"file_name": "a.png", "text": "x"}\n')
    else:
        write_parquet(tmp_path / "blobs/0", {"image": [{"bytes": None, "path": "a.png"}], "text": ["x"]})
    link = tmp_path / f"set/rows.{kind}"
    link.symlink_to(tmp_path / "blobs/0")
    documents = open_source(SourceSpec(kind, str(link)), tmp_path / "cache")
    assert documents[0].pictures[0].read() == png(1) and documents.records.files()[0] == link


def test_a_linked_picture_that_leaves_the_folder_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(png(1))
    folder = write_folder(tmp_path / "set", [{"file_name": "a.png", "text": "x"}], {})
    (folder / "a.png").symlink_to(tmp_path / "blob")
    documents = open_source(SourceSpec("imagefolder", str(folder)))
    with pytest.raises(ValueError, match=r"'a.png' leaves the folder \(links are followed\)"):
        documents[0]


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", {"photo": [b"x"], "title": ["y"]})
    with pytest.raises(ValueError, match="has the columns photo, title; name those of picture and caption"):
        open_source(SourceSpec("parquet", str(file)), tmp_path / "cache")
    with pytest.raises(ValueError, match="has no rows"):
        write_folder(tmp_path / "f", [], {})
        open_source(SourceSpec("imagefolder", str(tmp_path / "f")))


@pytest.mark.parametrize("column", ["photo", "before", "story"])
def test_pictures_of_named_columns_are_listed(column: str, tmp_path: Path) -> None:
    rows: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "photo": ({"photo": "a.png", "text": "x"}, {"picture": "photo"}),
        "before": ({"file_name": "b.png", "before": "a.png", "text": "x"}, {"original": "before"}),
        "story": ({"story": [{"type": "image", "image": {"path": "a.png"}}]}, {"parts": "story"}),
    }
    row, names = rows[column]
    pictures = {"a.png": png(1)} | ({"b.png": png(2)} if column == "before" else {})
    folder = write_folder(tmp_path, [row], pictures)
    for kind, path in (("imagefolder", folder), ("jsonl", folder / "metadata.jsonl")):
        documents = open_source(SourceSpec(kind, str(path), **names))
        assert not documents.records.faults and documents[0].pictures[0].read() == png(1)
        assert {file.name for file in documents.records.files()} == {"metadata.jsonl", *pictures}


def test_texts_about_images_are_no_files(tmp_path: Path) -> None:
    row = {"file_name": "a.png", "text": "x", "image_description": "words " * 100, "image_url": "https://example.org/"}
    documents = open_source(SourceSpec("imagefolder", str(write_folder(tmp_path, [row], {"a.png": png(1)}))))
    assert {file.name for file in documents.records.files()} == {"metadata.jsonl", "a.png"}
