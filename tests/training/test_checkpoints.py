import errno
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from transfusion.training import checkpoints
from transfusion.training.checkpoints import (
    BackgroundWriter,
    clean_up,
    find_complete,
    read_manifest,
    require,
    rotate,
    verify,
    write_checkpoint,
)


def fill(draft: Path, content: str = "weights") -> None:
    """Two files, one of them in a folder."""
    (draft / "inner").mkdir()
    (draft / "inner" / "first.txt").write_text(f"first {content}")
    (draft / "second.txt").write_text(f"second {content}")


def write(output_dir: Path, step: int, content: str = "weights") -> Path:
    folder = output_dir / f"checkpoint-{step}"
    write_checkpoint(folder, lambda draft: fill(draft, content))
    return folder


def test_a_checkpoint_is_what_was_written(tmp_path: Path) -> None:
    folder = write(tmp_path / "new", 5)
    verify(folder)
    assert set(read_manifest(folder)["files"]) == {"inner/first.txt", "second.txt"}
    assert (folder / "second.txt").read_text() == "second weights"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["checkpoint-5"]
    assert find_complete(tmp_path / "new") == folder
    assert find_complete(tmp_path / "none") is None and find_complete(tmp_path) is None


def test_everything_is_synced_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda number: done.append(Path(os.readlink(f"/proc/self/fd/{number}")).name))
    rename = Path.rename

    def noted(self: Path, target: Path) -> Path:
        done.append("rename")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", noted)
    write(tmp_path, 5)
    draft = "incomplete-checkpoint-5"
    assert done == ["first.txt", "second.txt", "manifest.json", "inner", draft, "rename", tmp_path.name]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, empty, flip, Path.unlink])
@pytest.mark.parametrize("name", ["inner/first.txt", "second.txt", "manifest.json"])
def test_a_harmed_file_is_named_and_the_checkpoint_skipped(
    name: str, harm: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = write(tmp_path, 5), write(tmp_path, 10)
    assert find_complete(tmp_path) == newer and not caplog.records
    harm(newer / name)
    has_size = name != "manifest.json" and harm in (truncate, empty)
    with pytest.raises(ValueError, match=rf"{name} has \d+ bytes; \d+ were written" if has_size else name):
        verify(newer)
    assert find_complete(tmp_path) == older
    assert str(newer) in caplog.text and name in caplog.text and "skipped" in caplog.text
    shutil.rmtree(older)
    assert find_complete(tmp_path) is None


@pytest.mark.parametrize("content", [None, "checkpoint-is-incomplete.txt"])
def test_folders_of_others_are_skipped(content: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path, 5)
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-mine").mkdir()
    if content is not None:
        (tmp_path / "checkpoint-10" / content).write_text("")
    assert find_complete(tmp_path) == folder
    assert "checkpoint-10 has no manifest.json" in caplog.text and "checkpoint-mine" not in caplog.text


@pytest.mark.parametrize("manifest", ["[]", "{}", '"text"', '{"format": 1, "sha256": "0"}'])
def test_manifests_of_other_kinds_are_refused(manifest: str, tmp_path: Path) -> None:
    folder = write(tmp_path, 5)
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match="manifest.json"):
        verify(folder)


def test_manifests_of_later_formats_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "FORMAT", 2)
    folder = write(tmp_path, 5)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="of format 2; this version reads 1"):
        verify(folder)


def test_no_bit_of_the_manifest_can_change(tmp_path: Path) -> None:
    """Apart from white space."""
    path = write(tmp_path, 5) / "manifest.json"
    content = path.read_bytes()
    for position in range(len(content)):
        if not content[position : position + 1].isspace():
            path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
            with pytest.raises(ValueError, match="manifest.json"):
                verify(path.parent)


def test_the_newest_is_what_was_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its step, and if the clock goes back."""
    write(tmp_path, 10)
    newer = write(tmp_path, 5)
    assert find_complete(tmp_path) == newer
    monkeypatch.setattr(checkpoints.time, "time_ns", lambda: 0)
    newest = write(tmp_path, 7)
    assert find_complete(tmp_path) == newest


def test_what_a_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, 5)
    assert require(folder, "second.txt", "Do this.") == folder / "second.txt"
    (folder / "planted.txt").write_text("")
    with pytest.raises(ValueError, match=r"checkpoint-5 has no planted.txt. Do this."):
        require(folder, "planted.txt", "Do this.")


def test_the_oldest_are_removed(tmp_path: Path) -> None:
    def left() -> list[int]:
        return sorted(int(path.name.split("-")[1]) for path in tmp_path.iterdir())

    for step in (10, 20, 30, 40):
        write(tmp_path, step)
    rotate(tmp_path, None, {"checkpoint-40"})
    rotate(tmp_path, 0, {"checkpoint-40"})
    assert left() == [10, 20, 30, 40]
    rotate(tmp_path, 3, {"checkpoint-40", "checkpoint-10"})
    assert left() == [10, 30, 40]
    rotate(tmp_path, 1, {"checkpoint-40", "checkpoint-10"})
    assert left() == [10, 40]
    (tmp_path / "checkpoint-50").mkdir()  # not ours
    rotate(tmp_path, 1, {"checkpoint-40"})
    assert left() == [40, 50]


class Killed(BaseException):
    """As a kill, nothing catches it."""


def killed_at(event: int, monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> bool:
    """Whether `work` got as far as the `event`th operation on files, before which it was killed."""
    left = [event]

    def counting(original: Callable) -> Callable:
        def counted(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return original(*args, **kwargs)

        return counted

    with monkeypatch.context() as patched:
        for owner, name in [(os, "fsync"), (Path, "rename"), (Path, "mkdir"), (Path, "write_text"), (os, "unlink")]:
            patched.setattr(owner, name, counting(getattr(owner, name)))
        patched.setattr(checkpoints.shutil, "rmtree", counting(shutil.rmtree))
        try:
            work()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("step", [5, 10])
def test_killed_anywhere_there_is_a_checkpoint(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With save_total_limit=1, writing the next one or the same one again: it is the old one or the new one."""
    event, seen = 1, []
    while True:
        output_dir = tmp_path / f"{step}-{event}"
        write(output_dir, 5, "old")

        def work(output_dir: Path = output_dir) -> None:
            folder = write(output_dir, step, "new")
            rotate(output_dir, 1, {folder.name})

        was_killed = killed_at(event, monkeypatch, work)
        for _ in range(2):
            found = find_complete(output_dir)
            assert found is not None
            seen.append((found / "second.txt").read_text().split()[1])
            clean_up(output_dir)
        assert {path.name for path in output_dir.iterdir()} <= {"checkpoint-5", "checkpoint-10"}
        for folder in output_dir.iterdir():
            verify(folder)
        if not was_killed:
            break
        event += 1
    assert event > 10 and seen[0] == "old" and seen[-1] == "new" and seen == sorted(seen, key="old new".index)


@pytest.mark.parametrize("operation", ["write_text", "mkdir", "fsync"])
def test_a_full_disk(operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is that fails: the error says what, the draft is gone, and the old checkpoint is there."""
    older, count = write(tmp_path, 5), [0]
    owner: Any = os if operation == "fsync" else Path
    original = getattr(owner, operation)

    def full(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, operation, full)
        with pytest.raises(OSError, match="checkpoint-10 could not be written: .*No space left"):
            write(tmp_path, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert find_complete(tmp_path) == older
    newer = write(tmp_path, 10)
    assert find_complete(tmp_path) == newer


def test_the_writer_runs_one_job_at_a_time_beside_its_caller() -> None:
    writer, may_end, order = BackgroundWriter(), threading.Event(), []

    def first() -> None:
        assert may_end.wait(60)
        order.append("first")

    writer.submit(first)
    writer.check()
    order.append("caller")
    may_end.set()
    writer.submit(lambda: order.append("second"))
    writer.wait()
    assert order == ["caller", "first", "second"]


@pytest.mark.parametrize("call", ["check", "wait", "submit"])
def test_an_error_of_the_writer_comes_out_once(call: str) -> None:
    def fail() -> None:
        raise OSError("full")

    writer = BackgroundWriter()
    writer.submit(fail)
    while not writer._pending.done():  # type: ignore[union-attr]
        pass
    with pytest.raises(OSError, match="full"):
        getattr(writer, call)(*[print] * (call == "submit"))
    writer.check()
    writer.wait()


def test_leftovers_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "incomplete-checkpoint-5").mkdir()
    with caplog.at_level(logging.WARNING):
        write(tmp_path, 10)
    assert "incomplete-checkpoint-5 was left by a process that ended early" in caplog.text
    assert json.loads((tmp_path / "checkpoint-10" / "manifest.json").read_text())["format"] == 1
