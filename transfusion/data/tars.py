"""WebDataset shards: tar files in which the members of one key make a row.

The headers are read once, and what they say is kept as JSON. Only members with a suffix of the list are read; nothing
is ever unpickled, and nothing unpacked to disk.
"""

import hashlib
import json
import logging
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from .documents import Record
from .pictures import DataFault


logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = ("gif", "jpeg", "jpg", "png", "webp")
TEXT_SUFFIXES = ("txt", "json")
_VERSION = 1


@dataclass(frozen=True)
class Member:
    """A file within a tar file, which is read when it is asked for."""

    file: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Its bytes; ValueError where the tar file ends before it."""
        with open(self.file, "rb") as stream:
            stream.seek(self.offset)
            content = stream.read(self.size)
        if len(content) != self.size:
            raise ValueError(f"{self.file} ends within {self.name}")
        return content


class TarRecords:
    """Rows of tar files: members `dir/key.suffix` of one key are a row with the suffixes as columns.

    Pictures are read when they are asked for. A `txt` is a string; the object of a `json` is laid into the row. In
    `key.source.png` the column is `source.png`.

    Args:
        files: The tar files, not compressed.
        cache_dir: Where the index is kept; None keeps none.
    """

    def __init__(self, files: Sequence[Path], cache_dir: str | Path | None = None) -> None:
        self._files = list(files)
        self.path = self._files[0] if len(files) == 1 else self._files[0].parent
        self.root: Path | None = None
        self.faults: list[DataFault] = []
        self._rows: list[tuple[int, str, dict[str, list[int]]]] = []  # tar file, key, offset and size by suffix
        ignored: Counter[str] = Counter()
        for number, file in enumerate(self._files):
            index = _read_index(file, cache_dir)
            self._rows += [(number, key, members) for key, members in index["rows"].items()]
            self.faults += [DataFault(f"{file}: {name}", reason) for name, reason in index["faults"]]
            ignored.update(index["ignored"])
        if ignored:
            counts = ", ".join(f"{count} .{suffix}" for suffix, count in sorted(ignored.items()))
            logger.warning("%s: members that are not read: %s", self.path, counts)
        columns: dict[str, None] = {}
        for _, _, members in self._rows:
            columns |= dict.fromkeys(members)
        self.columns = list(columns | dict.fromkeys(self._object_columns()))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        record: dict[str, Any] = {}
        for suffix in self._rows[index][2]:
            member, ending = self._member(index, suffix)
            if ending == "json":
                record |= self._object(member, ending)
            else:
                record[suffix] = member.read().decode() if ending == "txt" else member
        return record

    def where(self, index: int) -> str:
        """Tar file and key."""
        number, key, _ = self._rows[index]
        return f"{self._files[number]}: {key}"

    def files(self) -> list[Path]:
        """The tar files."""
        return self._files

    def _object_columns(self) -> Record:
        """The first object that can be read of a row's `json`."""
        for index, (_, _, members) in enumerate(self._rows):
            if "json" in members:
                try:
                    return self._object(*self._member(index, "json"))
                except ValueError:  # a fault of that row, which reading it will name
                    continue
        return {}

    def _member(self, index: int, suffix: str) -> tuple[Member, str]:
        number, key, members = self._rows[index]
        file = self._files[number]
        return Member(file, f"{file}: {key}.{suffix}", *members[suffix]), suffix.rsplit(".")[-1]

    def _object(self, member: Member, ending: str) -> dict[str, Any]:
        try:
            found = json.loads(member.read())
        except ValueError as error:
            raise ValueError(f"{member.name} is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{member.name} holds a {type(found).__name__}, not an object")
        return found


def _read_index(file: Path, cache_dir: str | Path | None) -> dict[str, Any]:
    """The index of a tar file, of the cache or of its headers."""
    if cache_dir is None:
        return _make_index(file)
    state = file.stat()
    identity = json.dumps([_VERSION, str(file), state.st_size, state.st_mtime_ns])
    kept = Path(cache_dir) / f"index-{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
    try:
        return json.loads(kept.read_bytes())
    except (OSError, ValueError):
        index = _make_index(file)
        write_json(kept, index)
        return index


def _make_index(file: Path) -> dict[str, Any]:
    """Rows {key: {suffix: [offset, size]}}, faults [name, reason] and how often a suffix was left out."""
    rows: dict[str, dict[str, list[int]]] = {}
    faults: list[tuple[str, str]] = []
    ignored: Counter[str] = Counter()
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                key, _, suffix = name.partition(".")
                suffix = suffix.lower()
                if member.isdir():
                    continue
                if not member.isfile() or member.issparse():
                    faults.append((member.name, "no plain file"))
                elif suffix.rsplit(".")[-1] not in PICTURE_SUFFIXES + TEXT_SUFFIXES:
                    ignored[suffix] += 1
                elif suffix in rows.setdefault(f"{folder}/{key}".lstrip("/"), {}):
                    faults.append((member.name, "comes twice"))
                else:
                    rows[f"{folder}/{key}".lstrip("/")][suffix] = [member.offset_data, member.size]
    except (tarfile.TarError, EOFError) as error:
        faults.append((file.name, f"cannot be read on from here: {error}"))
    return {"rows": rows, "faults": faults, "ignored": ignored}


def write_json(file: Path, value: Any) -> None:
    """Write JSON under another name, then rename it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{uuid4().hex}.part")
    part.write_text(json.dumps(value), encoding="utf-8")
    part.replace(file)


__all__ = ["PICTURE_SUFFIXES", "Member", "TarRecords", "write_json"]
