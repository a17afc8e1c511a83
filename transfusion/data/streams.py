"""Records that come one after the other, shuffled block by block, exactly: none is lost, none comes twice."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .documents import Columns, Document, OutsideError, Record
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
        root: Folder that files of pictures must lie in; None: records hold the bytes of their pictures.

    Raises:
        ValueError: No records, columns that are not there, or pictures that lie elsewhere.
    """

    def __init__(
        self,
        records: Any,
        columns: Columns | None = None,
        block: int = 1024,
        seed: int = 0,
        path: str = "stream",
        root: Path | None = None,
    ) -> None:
        # Pictures as bytes, which our own limits then apply to.
        self.source = records.decode(False) if records.features else records
        self.block, self.seed, self.path, self.root = block, seed, path, root
        first = next(self.source.iter(batch_size=1), None)
        if first is None:
            raise ValueError(f"{path} has no records.")
        self.layout = (columns or Columns()).resolve(first, path)
        self._require_readable({name: values[0] for name, values in first.items()})

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
        return self.layout.document(record, where, self.root)

    def _require_readable(self, record: Record) -> None:
        """Refuse what no picture can be read of, before all its rows turn out to be faulty."""
        try:
            self.document(record, "the first record")
        except OutsideError as error:
            raise ValueError(
                f"The pictures of {self.path} cannot be read: {error}. Read a data set that holds their bytes, or "
                "give the path of a local folder that they lie in."
            ) from error
        except ValueError:  # a fault of this record alone, which is counted when it is read
            pass


def open_stream(spec: SourceSpec, block: int = 1024, seed: int = 0) -> RecordStream:
    """What `datasets.load_dataset(path, streaming=True)` loads, by default its split `train`."""
    from datasets import load_dataset

    local = Path(spec.path).resolve() if Path(spec.path).exists() else None
    loaded = load_dataset(str(local or spec.path), split=spec.split or "train", streaming=True)
    return RecordStream(loaded, spec.columns, block, seed, spec.path, local)


__all__ = ["RecordStream", "open_stream"]
