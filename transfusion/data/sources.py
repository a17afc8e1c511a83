"""Sources whose rows are known: lines of JSON beside pictures, parquet files, and WebDataset shards.

Rows are read by index, when they are asked for, in whatever process asks.
"""

import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .documents import PART_COLUMNS, Columns, Document, Layout, Record
from .pictures import DataFault, find_metadata, unlisted_pictures
from .specs import SourceSpec
from .tars import TarRecords


class Records(Protocol):
    """Rows of one source, by index."""

    path: Path
    root: Path | None
    columns: list[str]
    faults: list[DataFault]  # found when it was opened

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def where(self, index: int) -> str:
        """Where a row stands."""
        ...

    def files(self) -> list[Path]:
        """All files that the rows depend on."""
        ...


class LineRecords:
    """Objects of a file with one JSON object a line, with pictures by name below the file's folder.

    Args:
        path: The file, or a folder that has a metadata.jsonl.
        columns: Which columns name pictures, beside those of the usual names.
    """

    def __init__(self, path: str | Path, columns: Columns | None = None) -> None:
        is_folder = Path(path).is_dir() or Path(path).suffix != ".jsonl"
        self.path = find_metadata(path) if is_folder else _existing(path)
        self.root: Path | None = self.path.parent
        self.faults: list[DataFault] = []
        self._spans: list[tuple[int, int, int]] = []  # line, start, end
        known: dict[str, None] = {}
        listed: set[str] = set()
        for number, start, line in self._lines():
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"a {type(row).__name__}, not an object")
            except ValueError as error:
                reason = f"not JSON: {error}" if isinstance(error, json.JSONDecodeError | UnicodeError) else str(error)
                self.faults.append(DataFault(f"{self.path}:{number}", reason))
                continue
            known |= dict.fromkeys(row)
            listed |= _file_names(row, columns or Columns())
            self._spans.append((number, start, start + len(line)))
        self._listed = sorted(listed)
        self.columns = list(known)
        if is_folder:
            self.faults += unlisted_pictures(self.path.parent, listed)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Record:
        _, start, end = self._spans[index]
        with open(self.path, "rb") as file:
            file.seek(start)
            return json.loads(file.read(end - start))

    def where(self, index: int) -> str:
        """File and line."""
        return f"{self.path}:{self._spans[index][0]}"

    def files(self) -> list[Path]:
        """The file, and the pictures that it names."""
        assert self.root is not None
        return [self.path, *(self.root / name for name in self._listed)]

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        """Number, place and content of each line that has any."""
        start = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, start, line
                start += len(line)


@dataclass(frozen=True)
class Cell:
    """A picture in an Arrow column, which is read when it is asked for."""

    column: Any
    index: int
    name: str

    def read(self) -> bytes:
        """Its bytes."""
        value = self.column[self.index].as_py()
        return value["bytes"] if isinstance(value, Mapping) else value


class TableRecords:
    """Rows of parquet files, memory-mapped by `datasets`. A file that cannot be read is a fault.

    Args:
        path: A file, a folder of them, or a pattern.
        cache_dir: Folder of the Arrow files that are mapped; None: that of `datasets`.
    """

    def __init__(self, path: str | Path, cache_dir: str | Path | None = None) -> None:
        self.path = Path(path)
        self._files = expand(path, ".parquet")
        self.root: Path | None = self._files[0].parent
        self.faults: list[DataFault] = []
        cache = None if cache_dir is None else os.fspath(cache_dir)
        try:
            table = _load_parquet(self._files, cache)
        except Exception as error:  # datasets wraps what it meets
            self.faults = [fault for file in self._files if (fault := _parquet_fault(file)) is not None]
            bad = {fault.where for fault in self.faults}
            good = [file for file in self._files if str(file) not in bad]
            if not good or not bad:
                raise ValueError(f"{path} cannot be read: {error}") from error
            table = _load_parquet(good, cache)
        self.columns = list(table.column_names)
        lazy = [name for name, feature in table.features.items() if _holds_bytes(feature)]
        self._pictures = {name: table.data.column(name) for name in lazy}
        self._rest = table.remove_columns(lazy)
        self._length = len(table)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        record = dict(self._rest[index]) if self._rest.column_names else {}
        for name, column in self._pictures.items():
            value = column[index]
            if value.is_valid and hasattr(value.type, "names") and not value["bytes"].is_valid:
                record[name] = value["path"].as_py()
            else:
                record[name] = Cell(column, index, f"{self.where(index)}, {name}") if value.is_valid else None
        return record

    def where(self, index: int) -> str:
        """File or pattern, and row."""
        return f"{self.path}, row {index}"

    def files(self) -> list[Path]:
        """The parquet files."""
        return self._files


@dataclass(frozen=True)
class Documents(Sequence[Document]):
    """Documents of records, by index; a record with a fault is a ValueError with the reason."""

    records: Records
    layout: Layout

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        return self.document(index, self.records[index])

    def document(self, index: int, record: Record) -> Document:
        """The document of the record that stands at `index`."""
        return self.layout.document(record, self.records.where(index), self.records.root)


def open_source(spec: SourceSpec, cache_dir: str | Path | None = None) -> Documents:
    """Open a source whose rows are known.

    Raises:
        ValueError: No such files, no rows, or columns that are not there.
    """
    records: Records
    if spec.kind == "parquet":
        records = TableRecords(spec.path, cache_dir)
    elif spec.kind == "webdataset":
        records = TarRecords(expand(spec.path, ".tar"), cache_dir)
    else:
        records = LineRecords(spec.path, spec.columns)
    if not len(records):
        raise ValueError(f"{spec.path} has no rows. {'; '.join(fault.reason for fault in records.faults[:3])}")
    columns: Columns = spec.columns
    return Documents(records, columns.resolve(records.columns, spec.path))


def expand(path: str | Path, suffix: str) -> list[Path]:
    """The files of a path: itself, those with the suffix in a folder, or those that fit a pattern; sorted.

    Raises:
        ValueError: None.
    """
    given = Path(path)
    names = glob.glob(str(path)) if not given.exists() else [str(path)]
    files = sorted(given.glob(f"*{suffix}")) if given.is_dir() else [Path(name) for name in sorted(names)]
    if not files:
        raise ValueError(f"{path} has no {suffix} files; give a file, a folder of them, or a pattern.")
    if wrong := [file for file in files if file.suffix != suffix]:
        raise ValueError(f"{wrong[0]} is no {suffix} file; those of this kind of source are (uncompressed).")
    return [_beside(file) for file in files]


def _load_parquet(files: list[Path], cache_dir: str | None) -> Any:
    """A memory-mapped table of the files, with pictures as bytes and paths."""
    import pyarrow.parquet
    from datasets import Dataset, Features

    written = Features.from_arrow_schema(pyarrow.parquet.read_schema(files[0]))
    features = Features.from_dict(_undecoded(written.to_dict()))
    return Dataset.from_parquet([os.fspath(file) for file in files], cache_dir=cache_dir, features=features)


def _undecoded(feature: Any) -> Any:
    """A feature of `datasets` as a dictionary, with pictures as bytes and paths at any depth."""
    if not isinstance(feature, Mapping):
        return feature
    found = {name: _undecoded(inner) for name, inner in feature.items()}
    return {**found, "decode": False} if feature.get("_type") == "Image" else found


def _parquet_fault(file: Path) -> DataFault | None:
    """Why a parquet file cannot be read to its end, or None where it can."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        for group in range(table.num_row_groups):
            table.read_row_group(group)
    except (OSError, pyarrow.ArrowException) as error:
        return DataFault(str(file), f"cannot be read: {error}")
    return None


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise ValueError(f"{path} is no file; give a .jsonl with an object a line, or a folder with metadata.jsonl.")
    return _beside(Path(path))


def _beside(file: Path) -> Path:
    """The absolute path of a file, with links of its folder followed, but not its own: others lie beside the link."""
    return file.parent.resolve() / file.name


def _file_names(row: Record, columns: Columns) -> set[str]:
    """The pictures that a row names, in its parts too."""
    values = [row.get(name) for name in columns.of_pictures]
    for name in columns.of_parts:
        parts = row.get(name)
        for part in parts if isinstance(parts, list) else ():
            values += [part.get(key) for key in PART_COLUMNS] if isinstance(part, Mapping) else []
    names = (value.get("path") if isinstance(value, Mapping) else value for value in values)
    return {os.path.normpath(name) for name in names if isinstance(name, str) and name and "\0" not in name}


def _holds_bytes(feature: Any) -> bool:
    """Whether a column of `datasets` holds pictures: bytes, or bytes and a path."""
    if isinstance(feature, Mapping):
        return "bytes" in feature
    return type(feature).__name__ == "Image" or getattr(feature, "dtype", "") in ("binary", "large_binary")


__all__ = ["Cell", "Documents", "LineRecords", "Records", "TableRecords", "expand", "open_source"]
