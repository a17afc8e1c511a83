import io
import json
import logging
import os
import tarfile
from pathlib import Path

import pytest

from tests.data.tiny_sources import png, write_tar
from transfusion.data.tars import Member, TarRecords, write_json


PAIR = [("set/1.png", png(1)), ("set/1.txt", b"one")]


def test_members_of_a_key_are_a_row(tmp_path: Path) -> None:
    members = [
        *PAIR,
        ("set/2.JPG", png(2)),
        ("set/2.json", json.dumps({"text": "two", "width": 8}).encode()),
        ("other/1.source.png", png(3)),
    ]
    records = TarRecords([write_tar(tmp_path / "a.tar", members)])
    assert len(records) == 3 and not records.faults
    assert records[0]["txt"] == "one" and records[0]["png"].read() == png(1)
    assert records[1]["jpg"].read() == png(2) and records[1]["text"] == "two" and records[1]["width"] == 8
    assert records[2]["source.png"].read() == png(3)
    assert set(records.columns) == {"png", "txt", "jpg", "json", "source.png", "text", "width"}
    assert records.where(1).endswith("a.tar: set/2")


def test_shards_follow_each_other(tmp_path: Path) -> None:
    files = [write_tar(tmp_path / f"{n}.tar", [(f"{n}.txt", str(n).encode())]) for n in range(3)]
    records = TarRecords(files)
    assert [records[index]["txt"] for index in range(3)] == ["0", "1", "2"] and records.files() == files


@pytest.mark.parametrize("suffix", ["pyd", "pickle", "pkl", "pth", "npy", "cls"])
def test_other_members_are_never_read_and_counted(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evil = f"cos\nmkdir\n(S'{tmp_path / 'unpickled'}'\ntR.".encode()  # a pickle that makes a folder
    with caplog.at_level(logging.WARNING):
        records = TarRecords([write_tar(tmp_path / "a.tar", [*PAIR, (f"set/1.{suffix}", evil)])])
    assert set(records[0]) == {"png", "txt"}
    assert f"members that are not read: 1 .{suffix}" in caplog.text and not (tmp_path / "unpickled").exists()


def test_links_and_doubles_are_faults(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", [*PAIR, ("set/1.txt", b"again")])
    with tarfile.open(file, "a") as archive:
        link = tarfile.TarInfo("set/2.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    records = TarRecords([file])
    assert len(records) == 1 and records[0]["txt"] == "one"
    assert [fault.reason for fault in records.faults] == ["comes twice", "no plain file"]


def test_index_is_kept_and_made_anew_for_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = write_tar(tmp_path / "a.tar", PAIR), tmp_path / "cache"
    first = TarRecords([file], cache)
    [index] = cache.iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(tarfile, "open", None)  # the headers are not read again
        assert TarRecords([file], cache)[0].keys() == first[0].keys()
    index.write_text('{"rows": {"half')
    assert len(TarRecords([file], cache)) == 1
    write_tar(file, [("9.txt", b"nine, which is longer")])
    os.utime(file, (1, 1))
    assert TarRecords([file], cache)[0] == {"txt": "nine, which is longer"}
    assert len(list(cache.iterdir())) == 2


def test_a_file_that_was_cut_gives_what_is_whole(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", [*PAIR, ("set/2.png", png(2, 40, 40)), ("set/2.txt", b"two")])
    file.write_bytes(file.read_bytes()[:4000])
    records = TarRecords([file])
    assert records[0]["png"].read() == png(1) and len(records) == 2
    assert "cannot be read on from here" in records.faults[0].reason
    with pytest.raises(ValueError, match="ends within .*set/2.png"):
        records[1]["png"].read()


@pytest.mark.parametrize("content", [b"", b"words" * 400, b"{"])
def test_what_is_no_tar_file_is_a_fault(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "b.tar").write_bytes(content)
    records = TarRecords([write_tar(tmp_path / "a.tar", PAIR), tmp_path / "b.tar"])
    assert len(records) == 1 and len(records.faults) == 1 and "b.tar" in records.faults[0].where


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"])
def test_json_that_is_no_object_is_a_fault_of_its_row(content: bytes, tmp_path: Path) -> None:
    records = TarRecords([write_tar(tmp_path / "a.tar", [("1.json", content), ("2.json", b'{"text": "x"}')])])
    assert "text" in records.columns and records[1] == {"text": "x"}
    with pytest.raises(ValueError, match="1.json (is not JSON|holds a list)"):
        records[0]


def test_json_is_renamed_when_it_is_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "sub/a.json", {"a": 1})
    assert [file.name for file in (tmp_path / "sub").iterdir()] == ["a.json"]


def test_drafts_of_several_machines_have_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drafts: list[Path] = []
    replace = Path.replace

    def counted(draft: Path, file: Path) -> Path:
        drafts.append(draft)
        return replace(draft, file)

    monkeypatch.setattr(Path, "replace", counted)
    for _ in range(2):
        write_json(tmp_path / "a.json", 1)
    assert len(set(drafts)) == 2


def test_member_reads_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(io.BytesIO(b"0123456789").getvalue())
    assert Member(tmp_path / "a", "x", 3, 4).read() == b"3456"
