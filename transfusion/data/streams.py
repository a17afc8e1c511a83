"""Records that come one after the other, shuffled block by block, exactly: none is lost, none comes twice."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .documents import Columns, Document, Record
from .mixing import permutation
from .specs import SourceSpec


class RecordStream:
    """An epoch of a stream: blocks of records, each in an order that seed, epoch and the block's number decide.

    Args:
        records: A `datasets.IterableDataset`, which gives the same records in the same order each time.
        columns: Which columns hold what.
        block: Records shuffled at a time, which are in memory; 1 leaves the order as it is.
        seed: Of the orders.
        path: Where it comes from, for messages.

    Raises:
        ValueError: No records, or columns that are not there.
    """

    def __init__(
        self, records: Any, columns: Columns | None = None, block: int = 1024, seed: int = 0, path: str = "stream"
    ) -> None:
        self.source, self.block, self.seed, self.path = _undecoded(records), block, seed, path
        first = next(self.source.iter(batch_size=1), None)
        if first is None:
            raise ValueError(f"{path} has no records.")
        self.layout = (columns or Columns()).resolve(first, path)

    def records(self, epoch: int) -> Iterator[tuple[int, Record]]:
        """Number in the source, and record, of each row of an epoch; in a worker of a loader all of them too."""
        start = 0
        # Not iter(source), which gives each worker another part.
        for columns in self.source.iter(batch_size=self.block):
            members = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            for place in permutation(len(members), self.seed, epoch, start):
                yield start + int(place), members[place]
            start += len(members)

    def document(self, record: Record, where: str) -> Document:
        """The document of a record; ValueError where it has a fault."""
        return self.layout.document(record, where, None)


def open_stream(spec: SourceSpec, block: int = 1024, seed: int = 0) -> RecordStream:
    """What `datasets.load_dataset(path, streaming=True)` loads, by default its split `train`."""
    from datasets import load_dataset

    path = str(Path(spec.path).resolve()) if Path(spec.path).exists() else spec.path
    loaded = load_dataset(path, split=spec.split or "train", streaming=True)
    return RecordStream(loaded, spec.columns, block, seed, spec.path)


def _undecoded(records: Any) -> Any:
    """The records with pictures as bytes, which our own limits then apply to."""
    from datasets import Image

    for name, feature in (getattr(records, "features", None) or {}).items():
        if isinstance(feature, Image):
            records = records.cast_column(name, Image(decode=False))
    return records


__all__ = ["RecordStream", "open_stream"]
