"""The same captioned pictures as an imagefolder, parquet, WebDataset shards and a stream."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from transfusion.data.specs import SourceSpec


def png(seed: int, height: int = 8, width: int = 8) -> bytes:
    """Noise."""
    buffer = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def caption(number: int) -> str:
    """What is said of picture `number`."""
    return f"noise {number}"


def write_folder(folder: Path, rows: Sequence[dict[str, Any] | str], files: dict[str, bytes]) -> Path:
    """An imagefolder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_parquet(file: Path, columns: dict[str, list[Any]], row_group_size: int = 2) -> Path:
    """A parquet file."""
    import pyarrow
    import pyarrow.parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=row_group_size)
    return file


def write_tar(file: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """A tar file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file


def write_pairs(kind: str, folder: Path, count: int) -> SourceSpec:
    """A source of `count` captioned pictures, of any kind."""
    if kind == "imagefolder":
        rows = [{"file_name": f"{number}.png", "text": caption(number)} for number in range(count)]
        write_folder(folder, rows, {f"{number}.png": png(number) for number in range(count)})
    elif kind == "webdataset":
        for shard in range(2):
            numbers = range(shard, count, 2)
            members = [(f"{n:04}.{end}", content) for n in numbers for end, content in _members(n)]
            write_tar(folder / f"{shard}.tar", members)
    else:
        pictures: list[Any] = [{"bytes": png(number), "path": f"{number}.png"} for number in range(count)]
        columns = {"image": pictures, "text": [caption(number) for number in range(count)]}
        half = count // 2
        for part, (start, end) in enumerate([(0, half), (half, count)]):
            write_parquet(folder / f"{part}.parquet", {name: values[start:end] for name, values in columns.items()})
    return SourceSpec(kind, str(folder))


def _members(number: int) -> list[tuple[str, bytes]]:
    return [("png", png(number)), ("txt", caption(number).encode())]
