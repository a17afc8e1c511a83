"""Batches divided among processes: every row once, whatever the number of rows and of processes.

Rows come in global batches, of which each process has an equal part. The last one may be incomplete. It is divided
evenly all the same, and where a process has a row less than another, a row of which nothing is learned stands in. So
every process takes the same number of steps, no row is learned twice or left out, and the rows of a step do not depend
on the number of processes, as long as the global batch is the same.

Neither accelerate's repeated rows (`even_batches`) nor its slicing of batches (`split_batches`, `dispatch_batches`)
would do: patches of all images lie flat in a batch, and a slice of it cuts images.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, IterableDatasetShard
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from ..processing import IGNORE_INDEX


T = TypeVar("T")

# What else a loader is made of; see accelerate's skip_first_batches.
LOADER_OPTIONS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)


def batches_of(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one maybe shorter."""
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch


def share_of(batch: Sequence[T], num_processes: int, process_index: int) -> tuple[Sequence[T], int]:
    """The part of a global batch that a process has, and how many rows must stand in to make it as long as all."""
    length = -(-len(batch) // num_processes)
    share = batch[process_index * length : (process_index + 1) * length]
    return share, length - len(share)


def unlearned(row: dict[str, Any]) -> dict[str, Any]:
    """The row with nothing in it learned."""
    row = {**row, "labels": torch.full_like(torch.as_tensor(row["labels"]), IGNORE_INDEX)}
    if row.get("image_grids") is not None:
        row["image_loss_mask"] = torch.zeros(len(torch.as_tensor(row["image_grids"]).view(-1, 2)), dtype=torch.bool)
    return row


class SharedBatchSampler(BatchSampler):
    """Indices of the rows of one process, batch by batch; `~index` is a row of which nothing is learned.

    Args:
        sampler: Indices of all rows, in the same order in every process.
        batch_size: Rows of a process.
        drop_last: Leave an incomplete last batch out.
        num_processes, process_index: Who shares.
    """

    def __init__(
        self, sampler: Sampler, batch_size: int, drop_last: bool, num_processes: int, process_index: int
    ) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.num_processes, self.process_index = num_processes, process_index

    def __len__(self) -> int:
        size = self.batch_size * self.num_processes
        return len(self.sampler) // size if self.drop_last else -(-len(self.sampler) // size)

    def __iter__(self) -> Iterator[list[int]]:
        size = self.batch_size * self.num_processes
        for batch in batches_of(self.sampler, size):
            if len(batch) == size or not self.drop_last:
                share, num_missing = share_of(batch, self.num_processes, self.process_index)
                yield [*share, *[~batch[0]] * num_missing]


class SharedRows(Dataset):
    """A dataset of which `~index` is the row at `index` with nothing learned."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index] if index >= 0 else unlearned(self.rows[~index])

    def set_epoch(self, epoch: int) -> None:
        """Tell the rows the epoch, if they want to know."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)


class SharedStream(IterableDataset):
    """The rows of one process of a stream that every process reads.

    A stream that has `deferred` makes its rows when it is asked to (see `StreamRows`). Of its batches each of several
    workers makes every so-manieth, so that they do not depend on the number of workers; of another stream each worker
    makes batches of what it is given.

    Args:
        rows: The stream.
        batch_size: Rows of a process.
        num_processes, process_index: Who shares.

    Attributes:
        num_skipped: Batches of a deferred stream in place of which come blank ones, as a training that goes on
            throws away those that it had before.
    """

    def __init__(self, rows: Any, batch_size: int, num_processes: int = 1, process_index: int = 0) -> None:
        self.rows, self.batch_size = rows, batch_size
        self.num_processes, self.process_index = num_processes, process_index
        self.num_skipped = 0

    @property
    def is_deferred(self) -> bool:
        """Whether the stream makes rows when it is asked to."""
        return hasattr(self.rows, "deferred")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        size = self.batch_size * self.num_processes
        if not self.is_deferred:
            for batch in batches_of(self.rows, size):
                share, num_missing = share_of(batch, self.num_processes, self.process_index)
                yield from [*share, *[unlearned(batch[0])] * num_missing]
            return
        worker = get_worker_info()
        turn, turns = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for _ in range(turn, self.num_skipped, turns):
            yield from [self.rows.blank()] * self.batch_size
        deferred = batches_of(self.rows.deferred(self.num_skipped * size), size)
        for batch in islice(deferred, (turn - self.num_skipped) % turns, None, turns):
            share, num_missing = share_of(batch, self.num_processes, self.process_index)
            yield from (make() for make in share)
            yield from [self.rows.blank()] * num_missing

    def set_epoch(self, epoch: int) -> None:
        """Tell the stream the epoch, if it wants to know."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)


def divide(loader: DataLoader) -> DataLoader:
    """A loader that accelerate prepared, with its rows divided by our rule instead of accelerate's.

    Args:
        loader: Of a `SharedStream`, or of rows that are known.
    """
    dataset, sampler = loader.dataset, loader.batch_sampler
    division: dict[str, Any]
    if isinstance(dataset, IterableDatasetShard):
        stream = SharedStream(
            dataset.dataset.rows, dataset.dataset.batch_size, dataset.num_processes, dataset.process_index
        )
        dataset, division = stream, {"batch_size": stream.batch_size, "drop_last": loader.drop_last}
    elif isinstance(sampler, BatchSamplerShard) and sampler.num_processes > 1:
        inner = sampler.batch_sampler
        shares = (sampler.num_processes, sampler.process_index)
        shared = SharedBatchSampler(inner.sampler, inner.batch_size, inner.drop_last, *shares)
        dataset, division = SharedRows(dataset), {"batch_sampler": shared}
    else:
        return loader
    return DataLoaderShard(
        dataset,
        device=loader.device,
        rng_types=loader.rng_types,
        synchronized_generator=loader.synchronized_generator,
        **division,
        **{name: getattr(loader, name) for name in LOADER_OPTIONS},
    )


__all__ = [
    "SharedBatchSampler",
    "SharedRows",
    "SharedStream",
    "divide",
    "share_of",
    "unlearned",
]
