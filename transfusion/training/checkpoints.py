"""Checkpoint folders that are complete or are not there: a draft, synced and hashed, is renamed last."""

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1
# Names that neither we nor transformers take for a checkpoint of the run.
DRAFT, REPLACED = "incomplete-", "replaced-"
_CHECKPOINT = re.compile(rf"(?:{REPLACED})?checkpoint-\d+")

Manifest = dict[str, Any]


class Processes:
    """The processes that write one checkpoint together, into one folder that all of them see.

    Args:
        group: A gloo group of theirs that nothing else uses, since a thread of each waits for the others; None where
            there is one process.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.is_first = group is None or dist.get_rank(group) == 0

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Wait at the end of the block until all processes are through it.

        Raises:
            Exception: What the block raised; RuntimeError where that of another process did.
        """
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        has_failed = torch.tensor(int(error is not None))
        if self._group is not None:
            dist.all_reduce(has_failed, dist.ReduceOp.MAX, self._group)
        if error is not None:
            raise error
        if has_failed:
            raise RuntimeError("Another process could not write its part of the checkpoint; its own error says why.")


class BackgroundWriter:
    """Runs one job at a time in a thread. The error of a job comes out of the next call."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Begin `job`, once the one before is done."""
        self.wait()
        self._pending = self._executor.submit(job)

    def check(self) -> None:
        """Raise what the last job raised, if it is done."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the last job, and raise what it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def write_checkpoint(folder: Path, write: Callable[[Path], None], processes: Processes | None = None) -> None:
    """Let `write` fill a draft of `folder`; then sync, hash and rename it, so that `folder` is whole or is not there.

    Called in every process. A checkpoint that has the name already is put aside until the new one is in its place.

    Raises:
        OSError: It could not be written, in this process or another. The draft is removed, and what was there stays.
    """
    processes = processes or Processes()
    draft = folder.with_name(DRAFT + folder.name)
    try:
        with processes.in_step():
            if processes.is_first:
                folder.parent.mkdir(parents=True, exist_ok=True)
                clean_up(folder.parent)
                draft.mkdir()
        with processes.in_step():
            write(draft)
        with processes.in_step():
            if processes.is_first:
                _seal(draft)
                _publish(draft, folder)
    except Exception as error:
        if processes.is_first:
            shutil.rmtree(draft, ignore_errors=True)
        raise OSError(
            f"{folder} could not be written: {error}. Checkpoints from before are intact: when the cause is removed, "
            "go on with resume_from_checkpoint=True."
        ) from error


def clean_up(output_dir: Path) -> None:
    """Remove what a process that was killed left: drafts, and checkpoints that were put aside; these come back
    where nothing took their place.
    """
    for leftover in output_dir.glob(f"{DRAFT}checkpoint-*"):
        logger.warning("%s was left by a process that ended early; it is removed.", leftover)
        shutil.rmtree(leftover)
    for aside in output_dir.glob(f"{REPLACED}checkpoint-*"):
        place = output_dir / aside.name.removeprefix(REPLACED)
        if place.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(place)


def _seal(draft: Path) -> None:
    """Sync and hash all files of `draft`, and write the manifest."""
    files = {}
    for path in sorted(path for path in draft.rglob("*") if path.is_file()):
        _sync(path)
        files[path.relative_to(draft).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    latest = max((written for written, _ in _listed(draft.parent)[0]), default=0)
    manifest = {"format": FORMAT, "written": max(time.time_ns(), latest + 1), "files": files}
    manifest["sha256"] = _own_digest(manifest)
    (draft / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync(draft / MANIFEST)
    for inner in (path for path in draft.rglob("*") if path.is_dir()):
        _sync(inner)
    _sync(draft)


def _publish(draft: Path, folder: Path) -> None:
    aside = folder.with_name(REPLACED + folder.name)
    if folder.exists():
        folder.rename(aside)
    draft.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_digest(manifest: Manifest) -> str:
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint: `written`, in nanoseconds, and `files` with `bytes` and `sha256` of each.

    Raises:
        ValueError: There is none that can be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} has no {MANIFEST}: it was not written to the end, or not by this trainer.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        is_sound = manifest["sha256"] == _own_digest(manifest)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}.") from error
    if not is_sound:
        raise ValueError(f"{path} is not what was written: its own SHA-256 differs.")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path} is of format {manifest['format']}; this version reads {FORMAT}.")
    return manifest


def verify(folder: Path) -> None:
    """Compare a checkpoint with its manifest, byte by byte.

    Raises:
        ValueError: A file is missing, of another size or of another content; the message names it.
    """
    for name, entry in read_manifest(folder)["files"].items():
        path, size, digest = folder / name, entry["bytes"], entry["sha256"]
        if not path.is_file():
            raise ValueError(f"{path} is missing.")
        if path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes; {size} were written.")
        if _sha256(path) != digest:
            raise ValueError(f"{path} is not what was written: its SHA-256 differs from that in {MANIFEST}.")


def require(folder: Path, name: str, remedy: str) -> Path:
    """The file `name` of a checkpoint.

    Raises:
        ValueError: The checkpoint was written without it; the message ends with `remedy`.
    """
    if name not in read_manifest(folder)["files"]:
        raise ValueError(f"{folder} has no {name}. {remedy}")
    return folder / name


def _listed(output_dir: Path) -> tuple[list[tuple[int, Path]], list[str]]:
    """When and where checkpoints with a manifest were written, oldest first; and what is wrong with others."""
    found, faults = [], []
    for folder in sorted(output_dir.iterdir() if output_dir.is_dir() else ()):
        if _CHECKPOINT.fullmatch(folder.name) and folder.is_dir():
            try:
                found.append((read_manifest(folder)["written"], folder))
            except ValueError as error:
                faults.append(str(error))
    return sorted(found), faults


def find_complete(output_dir: str | os.PathLike) -> Path | None:
    """The checkpoint in `output_dir` that was written last, of those that are as they were written.

    Others are named in a warning, and skipped.
    """
    found, faults = _listed(Path(output_dir))
    for fault in faults:
        logger.warning("%s It is skipped.", fault)
    for _, folder in reversed(found):
        try:
            verify(folder)
            return folder
        except ValueError as error:
            logger.warning("%s The checkpoint is skipped.", error)
    return None


def rotate(output_dir: Path, limit: int | None, kept: set[str]) -> None:
    """Remove the oldest checkpoints until `limit` are left, but none whose name is in `kept`."""
    if limit is None or limit <= 0:
        return
    folders = [folder for _, folder in _listed(output_dir)[0]]
    removable = [folder for folder in folders if folder.name not in kept]
    for folder in removable[: max(len(folders) - limit, 0)]:
        draft = folder.with_name(DRAFT + folder.name)  # half of it is never taken for a checkpoint
        folder.rename(draft)
        shutil.rmtree(draft)


__all__ = [
    "DRAFT",
    "MANIFEST",
    "BackgroundWriter",
    "Processes",
    "clean_up",
    "find_complete",
    "read_manifest",
    "require",
    "rotate",
    "verify",
    "write_checkpoint",
]
