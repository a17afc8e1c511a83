import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from tests.data.tiny_sources import caption, png, write_folder, write_pairs
from transfusion.data.documents import Document
from transfusion.data.pictures import DataFault, DataReport
from transfusion.data.sources import open_source
from transfusion.data.specs import SourceSpec
from transfusion.data.survey import PictureKey, Survey, cached_lengths, cached_survey, require_usable, survey


LIMIT = 10_000


def folder_with_faults(root: Path) -> Path:
    rows = [
        {"file_name": "0.png", "text": caption(0), "split": "train"},
        {"file_name": "words.png", "text": "x", "split": "train"},
        {"file_name": "large.png", "text": "x", "split": "train"},
        {"file_name": "../out.png", "text": "x", "split": "train"},
        {"file_name": "1.png", "text": caption(1), "split": "test"},
        {"file_name": "absent.png", "text": "x", "split": "train"},
        {"file_name": "2.png", "text": caption(2), "split": "train"},
    ]
    files = {f"{n}.png": png(n, 8, 6 + n) for n in range(3)}
    return write_folder(root, rows, {**files, "words.png": b"words", "large.png": png(0, 200, 200)})


def test_pictures_and_faults_of_every_row(tmp_path: Path) -> None:
    documents = open_source(SourceSpec("imagefolder", str(folder_with_faults(tmp_path))))
    found = survey(documents, LIMIT)
    assert found.rows == [0, 4, 6]
    assert found.pictures == [
        [PictureKey(hashlib.sha256(png(n, 8, 6 + n)).hexdigest()[:32], 8, 6 + n)] for n in range(3)
    ]
    lines = {fault.where.rsplit(":")[-1]: fault.reason for fault in found.faults}
    for line, reason in {"2": "cannot be opened", "3": "200 x 200 pixels", "4": "leaves the", "6": "no such"}.items():
        assert reason in lines[line]
    report = found.report(tmp_path)
    assert str(report).startswith(f"{tmp_path}: 3 usable rows, 4 faults") and "metadata.jsonl:2" in str(report)


def test_a_split_alone(tmp_path: Path) -> None:
    documents = open_source(SourceSpec("imagefolder", str(folder_with_faults(tmp_path))))
    assert survey(documents, LIMIT, "test").rows == [4] and survey(documents, LIMIT, "train").rows == [0, 6]
    with pytest.raises(ValueError, match=r"No row .* has split 'valid'; they have \['test', 'train'\]"):
        survey(documents, LIMIT, "valid")


def test_what_a_check_refuses_is_a_fault(tmp_path: Path) -> None:
    def check(document: Document) -> None:
        if document.id.endswith(":2"):
            raise ValueError("too blue")

    documents = open_source(write_pairs("imagefolder", tmp_path, 3))
    found = survey(documents, LIMIT, check=check)
    assert found.rows == [0, 2] and [fault.reason for fault in found.faults] == ["too blue"]


@pytest.mark.parametrize("kind", ["imagefolder", "parquet", "webdataset"])
def test_a_survey_is_kept_until_a_file_changes(kind: str, tmp_path: Path) -> None:
    spec, cache, looked = write_pairs(kind, tmp_path / "set", 4), tmp_path / "cache", []

    def look(checked: str = "") -> Survey:
        documents = open_source(spec, cache)
        return cached_survey(documents, spec, cache, LIMIT, lambda document: looked.append(document.id), checked)

    first = look()
    assert len(looked) == 4 and look() == first and len(looked) == 4
    look("another check")
    assert len(looked) == 8
    for kept in cache.glob("survey-*.json"):
        kept.write_text(kept.read_text()[:-5])
    assert look() == first and len(looked) == 12
    name = {"imagefolder": "1.png", "parquet": "0.parquet", "webdataset": "0.tar"}[kind]
    os.utime(tmp_path / "set" / name, (5, 5))
    assert look() == first and len(looked) == 16


def test_a_picture_of_a_named_column_that_changes_is_looked_at_again(tmp_path: Path) -> None:
    write_folder(tmp_path, [{"photo": "a.png", "text": "x"}], {"a.png": png(1)})
    spec = SourceSpec("jsonl", str(tmp_path / "metadata.jsonl"), picture="photo")
    digests = []
    for seed in (1, 1, 2):
        (tmp_path / "a.png").write_bytes(png(seed, 8, 8 + seed))
        digests.append(cached_survey(open_source(spec), spec, tmp_path / "cache", LIMIT).pictures[0][0].digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_name_longer_than_any_file_has_is_a_fault_that_is_kept(tmp_path: Path) -> None:
    rows = [{"file_name": "a.png", "text": "x"}, {"image": "ab" * 5000, "text": "x"}]
    write_folder(tmp_path, rows, {"a.png": png(1)})
    spec = SourceSpec("imagefolder", str(tmp_path))
    found = cached_survey(open_source(spec), spec, tmp_path / "cache", LIMIT)
    assert found.rows == [0] and found.is_final and "no such file" in found.faults[0].reason
    assert len(found.faults[0].reason) < 300


def test_what_could_not_be_read_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, cache = write_pairs("imagefolder", tmp_path / "set", 3), tmp_path / "cache"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", fail)
        found = cached_survey(open_source(spec), spec, cache, LIMIT)
    assert not found.rows and [fault.reason for fault in found.faults] == ["the disk is away"] * 3
    assert cached_survey(open_source(spec), spec, cache, LIMIT).rows == [0, 1, 2]


def fail(path: Path) -> bytes:
    raise OSError("the disk is away")


def test_without_a_cache_nothing_is_kept(tmp_path: Path) -> None:
    spec = write_pairs("imagefolder", tmp_path / "set", 2)
    before = sorted(tmp_path.rglob("*"))
    cached_survey(open_source(spec), spec, None, LIMIT)
    assert sorted(tmp_path.rglob("*")) == before


def test_rows_are_taken_out_with_their_reason() -> None:
    pictures = [[], [PictureKey("a", 1, 1)], []]
    found = Survey([2, 5, 7], pictures, ["x", "y", "z"], [DataFault("x", "old")], [DataFault("file", "half")], 9)
    left = found.without({2: DataFault("two", "new"), 7: DataFault("seven", "new")})
    assert left.rows == [5] and left.pictures == [[PictureKey("a", 1, 1)]] and left.texts == ["y"]
    assert [fault.where for fault in left.report(Path("set")).faults] == ["file", "x", "two", "seven"]
    short = found.without_long({5: DataFault("five", "9 tokens")})
    assert short.rows == [2, 7] and [fault.where for fault in short.too_long] == ["five"]
    assert short.faults == found.faults and str(short.report(Path("set"))).startswith(
        "set: 2 usable rows, 2 faults, 1 too long"
    )


def test_texts_have_hashes_of_their_own(tmp_path: Path) -> None:
    def texts(*rows: dict[str, object]) -> list[str]:
        folder = write_folder(tmp_path, rows, {"a.png": png(1)})
        return survey(open_source(SourceSpec("imagefolder", str(folder))), LIMIT).texts

    first, second = texts({"file_name": "a.png", "text": "one"}, {"file_name": "a.png", "text": ["one", "two"]})
    assert first != second and texts({"file_name": "a.png", "text": " one"}) == [first]
    picture, text = {"type": "image", "image": "a.png"}, {"type": "text", "text": "one"}
    assert len({first, *texts({"parts": [picture, text]}), *texts({"parts": [text, picture]})}) == 3


def test_lengths_are_kept_for_the_same_texts_and_sizes(tmp_path: Path) -> None:
    measured: list[int] = []

    def lengths(texts: str = "xy", side: int = 4, settings: str = "s", cached: bool = True) -> list[int]:
        def measure(place: int) -> int:
            measured.append(place)
            return 7 + place

        found = Survey([2, 5], [[PictureKey("a", side, 4)], []], list(texts), [], [], 9)
        return cached_lengths(found, tmp_path if cached else None, settings, measure)

    for _ in range(2):
        assert lengths() == [7, 8] and measured == [0, 1]
    others: list[dict[str, Any]] = [{"texts": "xz"}, {"side": 5}, {"settings": "t"}, {"cached": False}]
    for number, other in enumerate(others, start=2):
        assert lengths(**other) == [7, 8] and len(measured) == 2 * number
    for kept in tmp_path.glob("lengths-*.json"):
        kept.write_text("[7")
    assert lengths() == [7, 8] and len(measured) == 12 and lengths() == [7, 8] and len(measured) == 12


def test_faults_of_the_file_count_by_its_rows(tmp_path: Path) -> None:
    rows = [{"file_name": f"{n}.png", "text": "x", "split": "val" if n < 3 else "train"} for n in range(59)]
    folder = write_folder(tmp_path, rows, {f"{n}.png": png(n % 3) for n in range(60)})
    documents = open_source(SourceSpec("imagefolder", str(folder)))
    shares = [survey(documents, LIMIT, split).report(folder).faulty_share for split in ("val", "train", None)]
    assert shares == pytest.approx([1 / 60] * 3)
    (folder / "0.png").write_bytes(b"words")
    found = survey(documents, LIMIT, "val").report(folder)
    assert found.faulty_share == pytest.approx((1 + 3 / 59) / (3 + 3 / 59)) and len(found.faults) == 2


def test_long_rows_are_no_faults(caplog: pytest.LogCaptureFixture) -> None:
    long = tuple(DataFault(f"row {n}", "9 tokens, and max_length is 8") for n in range(5))
    with caplog.at_level(logging.WARNING):
        require_usable([DataReport(Path("set"), 5, (), "rows", long)], 0.0, strict=True)
    assert "set: 5 usable rows, 0 faults, 5 too long" in caplog.text and "row 4: 9 tokens" in caplog.text
    with pytest.raises(ValueError, match="(?s)No row can be used.*5 too long"):
        require_usable([DataReport(Path("set"), 0, (), "rows", long)], 0.1, strict=False)


def report(usable: int, faults: int) -> DataReport:
    return DataReport(Path("set"), usable, tuple(DataFault(f"row {n}", "bad") for n in range(faults)), "rows")


def test_faults_are_said_up_to_a_share(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        require_usable([report(9, 1), report(5, 0)], 0.1, strict=False)
    assert "set: 9 usable rows, 1 faults" in caplog.text and "row 0: bad" in caplog.text
    with pytest.raises(ValueError, match="(?s)A share of 0.182 is faulty, and max_faulty is 0.1.*row 1: bad"):
        require_usable([report(9, 2)], 0.1, strict=False)
    with pytest.raises(ValueError, match="strict allows no fault.\n.*\n.*row 0: bad"):
        require_usable([report(99, 1)], 0.1, strict=True)
    with pytest.raises(ValueError, match="No row can be used"):
        require_usable([report(0, 0)], 0.1, strict=False)
