import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from tests.tiny import tiny_model
from tests.training.tiny_rows import RowList, largest_difference, ragged_rows, training_row
from tests.training.uneven_processes import CASES, run
from transfusion.training.collator import TransfusionDataCollator
from transfusion.training.sharding import SharedBatchSampler, SharedRows, SharedStream, divide, share_of, unlearned
from transfusion.training.trainer import count_targets


COUNTS = st.integers(1, 40), st.integers(1, 4), st.integers(1, 5)  # rows, processes, rows of a process


class Deferred(IterableDataset):
    """Numbers, in any worker all of them; notes which were made."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.made: list[int] = []

    def __iter__(self) -> Iterator[Any]:
        return (make() for make in self.deferred())

    def deferred(self, start: int = 0) -> Iterator[Any]:
        return (partial(self.make, number) for number in range(start, self.count))

    def blank(self) -> dict[str, Any]:
        return {"number": -1, "labels": [-100]}

    def make(self, number: int) -> dict[str, Any]:
        self.made.append(number)
        return {"number": number, "labels": [number]}


class Plain(IterableDataset):
    """Numbers, as any stream gives them."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        return ({"number": number, "labels": [number]} for number in range(self.count))


def learned(rows: list[dict[str, Any]]) -> list[int]:
    return [row["number"] for row in rows if list(row["labels"]) != [-100]]


@settings(max_examples=80, deadline=None)
@given(*COUNTS)
def test_a_share_is_a_part(count: int, num_processes: int, batch_size: int) -> None:
    shares = [share_of(range(count), num_processes, index) for index in range(num_processes)]
    assert [number for share, _ in shares for number in share] == list(range(count))
    assert len({len(share) + missing for share, missing in shares}) == 1


@settings(max_examples=80, deadline=None)
@given(*COUNTS, st.booleans())
def test_sampler_neither_loses_nor_repeats_rows(
    count: int, num_processes: int, batch_size: int, drop_last: bool
) -> None:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count)).tolist()
    samplers = [
        SharedBatchSampler(order, batch_size, drop_last, num_processes, index) for index in range(num_processes)
    ]
    batches = [list(sampler) for sampler in samplers]
    assert all(len(found) == len(sampler) for found, sampler in zip(batches, samplers, strict=True))
    steps = list(zip(*batches, strict=True))  # as many in each process
    size = batch_size * num_processes
    kept = count // size * size if drop_last else count
    for number, step in enumerate(steps):
        assert len({len(batch) for batch in step}) == 1 and 1 <= len(step[0]) <= batch_size
        # The rows of a step are those that one process would have, in its order.
        assert [index for batch in step for index in batch if index >= 0] == order[number * size :][:size]
    assert sorted(index for step in steps for batch in step for index in batch if index >= 0) == sorted(order[:kept])


@pytest.mark.parametrize("stream", [Deferred, Plain])
@settings(max_examples=60, deadline=None)
@given(*COUNTS)
def test_streams_neither_lose_nor_repeat_rows(stream: Any, count: int, num_processes: int, batch_size: int) -> None:
    shares = [list(SharedStream(stream(count), batch_size, num_processes, index)) for index in range(num_processes)]
    assert len({len(share) for share in shares}) == 1
    size = batch_size * num_processes
    for start in range(0, len(shares[0]), batch_size):
        step = [row for share in shares for row in share[start : start + batch_size]]
        first = start * num_processes
        assert learned(step) == list(range(first, min(first + size, count)))


def test_a_process_makes_its_own_rows_alone() -> None:
    stream = Deferred(8)
    list(SharedStream(stream, 2, 2, 1))
    assert stream.made == [2, 3, 6, 7]


@pytest.mark.parametrize("process_index", [0, 1])
def test_workers_make_the_same_batches(process_index: int) -> None:
    found = []
    for num_workers in (0, 2):
        shared = SharedStream(Deferred(21), 2, 2, process_index)
        loader = DataLoader(shared, batch_size=2, num_workers=num_workers, collate_fn=list)
        found.append([[row["number"] for row in batch] for batch in loader])
    assert found[0] == found[1] and len(found[0]) == 6


@pytest.mark.parametrize("num_workers", [0, 2, 3])
@pytest.mark.parametrize("num_skipped", [0, 1, 4, 6])
def test_batches_to_be_thrown_away_are_not_made(num_skipped: int, num_workers: int) -> None:
    whole, resumed = (SharedStream(Deferred(21), 2, 2, 1) for _ in range(2))
    resumed.num_skipped = num_skipped
    found = []
    for shared in (whole, resumed):
        loader = DataLoader(shared, batch_size=2, num_workers=num_workers, collate_fn=list)
        found.append([[row["number"] for row in batch] for batch in loader])
    assert found[1] == [[-1, -1]] * num_skipped + found[0][num_skipped:]


def test_unlearned_rows_have_no_targets_and_change_no_gradient() -> None:
    rows, model = ragged_rows()[:4], tiny_model(objective="flow")
    collate = TransfusionDataCollator(model.config, text_dropout=0.0)
    gradients = []
    for extra in ([], [unlearned(ragged_rows()[7]), unlearned(ragged_rows()[5])]):
        batch = collate([*rows, *extra])
        counts = count_targets(batch, model.config)
        model.zero_grad()
        model(**batch, num_items_in_batch=counts[0], num_image_items_in_batch=counts[1]).loss.backward()
        gradients.append([counts.tolist(), *[weight.grad.clone() for weight in model.parameters()]])
    assert gradients[0][0] == gradients[1][0]
    torch.testing.assert_close(gradients[0][1:], gradients[1][1:], rtol=1e-9, atol=1e-12)


def test_a_batch_without_targets_has_gradients_of_zero() -> None:
    """Of every weight, or processes would wait for those that are missing."""
    model = tiny_model(objective="flow")
    for row in (ragged_rows()[0], ragged_rows()[5]):
        model.zero_grad()
        batch = TransfusionDataCollator(model.config)([unlearned(row)])
        model(
            **batch, num_items_in_batch=torch.tensor(7.0), num_image_items_in_batch=torch.tensor(5.0)
        ).loss.backward()
        assert all(weight.grad is not None and not weight.grad.any() for weight in model.parameters())


def test_unlearned_leaves_the_row_itself() -> None:
    row = training_row(5, (1, 2), 6, 2, image_loss_mask=torch.tensor([True]))
    before = row["labels"].clone()
    assert unlearned(row)["labels"].eq(-100).all() and not unlearned(row)["image_loss_mask"].any()
    assert torch.equal(row["labels"], before) and row["image_loss_mask"].all()
    assert unlearned({"labels": [1, 2]})["labels"].tolist() == [-100, -100]


class Told(RowList):
    epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


def test_wrappers_pass_the_epoch_on() -> None:
    rows = Told(ragged_rows())
    SharedRows(rows).set_epoch(3)
    SharedStream(rows, 1).set_epoch(4)
    assert rows.epochs == [3, 4] and len(SharedRows(rows)) == 12
    SharedRows(ragged_rows()).set_epoch(1)


def prepared(dataset: Any, process_index: int, num_processes: int = 3, **options: Any) -> DataLoader:
    loader = DataLoader(dataset, batch_size=2, collate_fn=list, **options)
    return prepare_data_loader(loader, num_processes=num_processes, process_index=process_index)


def numbers(loader: DataLoader) -> list[list[int]]:
    return [[row["number"] for row in batch if list(row["labels"]) != [-100]] for batch in loader]


@pytest.mark.parametrize("count", [1, 5, 12, 13, 17])
def test_accelerates_loaders_are_divided_anew(count: int) -> None:
    rows: Any = RowList(list(Plain(count)))
    for dataset, options in ((rows, {"sampler": SequentialSampler(rows)}), (SharedStream(Plain(count), 2), {})):
        loaders = [divide(prepared(dataset, index, **options)) for index in range(3)]
        steps = list(zip(*map(numbers, loaders), strict=True))
        assert [n for step in steps for batch in step for n in batch] == list(range(count))


def test_one_process_keeps_accelerates_loader() -> None:
    loader = prepared(RowList(list(Plain(5))), 0, num_processes=1)
    assert divide(loader) is loader


def test_resuming_skips_batches() -> None:
    rows: Any = RowList(list(Plain(17)))
    whole = numbers(divide(prepared(rows, 1, sampler=SequentialSampler(rows))))
    resumed = skip_first_batches(divide(prepared(rows, 1, sampler=SequentialSampler(rows))), 2)
    assert numbers(resumed) == whole[2:]


@pytest.mark.distributed
def test_uneven_rows_train_and_evaluate_as_in_one_process(tmp_path: Path) -> None:
    """Known rows and streams, of 11, 7 and 1 rows over 3 processes, with dispatching and splitting asked for."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    script = [str(root / "tests/training/uneven_processes.py"), str(tmp_path), "3"]
    finished = subprocess.run(command + script, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    together = json.loads((tmp_path / "results.json").read_text())
    for case in CASES:
        alone = run(case, tmp_path, 1)
        weights = [load_file(tmp_path / f"{case}-{count}.safetensors") for count in (1, 3)]
        assert largest_difference(*weights) < 1e-7, case  # the scale of a loss is float32, and 3 no power of two
        assert together[case]["losses"] == pytest.approx(alone["losses"], abs=1e-5), case
        assert together[case]["eval_loss"] == pytest.approx(alone["eval_loss"], abs=1e-5), case
