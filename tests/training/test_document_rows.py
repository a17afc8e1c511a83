import collections
import io
import itertools
import logging
import random
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from tests.data.tiny_sources import png
from tests.tiny_processor import text_ids, tiny_processor, tiny_vae
from transfusion.data.documents import Document, Picture, Text, caption_pair, edit_triple, text_only
from transfusion.data.streams import RecordStream
from transfusion.data.survey import picture_key
from transfusion.image_processing import load_picture
from transfusion.processing import IGNORE_INDEX
from transfusion.training.document_rows import RowMaker, StreamRows, nearest_size
from transfusion.training.latent_cache import LatentStore


ONE, TWO = Picture("one", png(1, 8, 4)), Picture("two", png(2, 4, 8))
PAIR = caption_pair("pair", ONE, ["a cat", "one cat"])


def maker(vae: bool = False, size: Any = None, **options: Any) -> RowMaker:
    return RowMaker(tiny_processor(tiny_vae() if vae else None, size=size), **options)


def as_plain(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in row.items()}


def parts_of(*parts: str | Picture) -> list[dict[str, Any]]:
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": load_picture(part.read())}
        for part in parts
    ]


@pytest.mark.parametrize("vae", [False, True])
def test_rows_are_what_the_processor_makes_of_the_parts(vae: bool) -> None:
    """Interleaved in any order, with pictures of unlike size."""
    documents = [
        (Document("a", (Text(("see",)), ONE, TWO, Text(("both",)))), parts_of("see", ONE, TWO, "both")),
        (Document("b", (TWO, Text(("x",)), ONE)), parts_of(TWO, "x", ONE)),
        (text_only("c", "a <image> of <boi>"), parts_of("a <image> of <boi>")),
        (Document("d", (ONE,)), parts_of(ONE)),
    ]
    for document, parts in documents:
        made = maker(vae, size=16 if vae else None)
        row = made.row(document, None, random.Random(0))
        expected = made.processor(text=parts, return_labels=True, return_tensors="pt")
        assert row["sample_id"] == document.id and 0 <= row["sample_seed"] < 2**63
        for name in ("input_ids", "labels"):
            assert torch.equal(row[name], expected[name][0])
        assert ("latent_patches" in row) == bool(document.pictures)
        for name in ("latent_patches", "image_grids") if document.pictures else ():
            torch.testing.assert_close(row[name], expected[name])


def test_shares_of_orders_and_phrasings() -> None:
    counts: collections.Counter[str] = collections.Counter()
    made, number = maker(caption_first=0.8), 2000
    short = len(text_ids("a cat"))
    assert len(text_ids("one cat")) != short
    for seed in range(number):
        ids = made.row(PAIR, None, random.Random(seed))["input_ids"].tolist()
        counts["picture first"] += ids[0] == made.processor.boi_token_id
        counts["short"] += len(ids) == short + 8 // 2 * 4 // 2 + 3
    deviation = 5 * (0.25 / number) ** 0.5
    assert abs(counts["picture first"] / number - 0.2) < deviation
    assert abs(counts["short"] / number - 0.5) < deviation


def test_edits_learn_the_result_alone() -> None:
    made = maker()
    row = made.row(edit_triple("edit", ONE, ["turn"], TWO), None, random.Random(0))
    expected = made.processor(text=parts_of(ONE, "turn", TWO), return_labels=True, return_tensors="pt")
    assert torch.equal(row["input_ids"], expected["input_ids"][0])
    learned = [label for label in row["labels"].tolist() if label != IGNORE_INDEX]
    assert learned == [made.processor.boi_token_id, 1] and row["image_loss_mask"].tolist() == [False, True]
    assert row["image_grids"].tolist() == [[4, 2], [2, 4]]


SIZES = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 999), st.integers(1, 999), SIZES)
def test_nearest_size_loses_least_of_the_picture(height: int, width: int, sizes: list[tuple[int, int]]) -> None:
    def kept(size: tuple[int, int]) -> float:
        ratio = (size[0] / size[1]) / (height / width)
        return min(ratio, 1 / ratio)

    assert kept(nearest_size(height, width, sizes)) == pytest.approx(max(map(kept, sizes)))


@pytest.mark.parametrize("size", [None, 8])
def test_pictures_go_to_their_buckets(size: int | None) -> None:
    made = maker(size=size, buckets=((8, 8), (4, 12), (12, 4)))
    for (height, width), grid in {(30, 31): (4, 4), (10, 40): (2, 6), (50, 20): (6, 2), (7, 3): (6, 2)}.items():
        picture = Picture("x", png(0, height, width))
        row = made.row(Document("x", (picture,)), None, random.Random(0))
        assert row["image_grids"].tolist() == [list(grid)]
        bare = tiny_processor(size=[2 * grid[0], 2 * grid[1]])
        expected = bare.image_processor(load_picture(picture.read()))["pixel_values"][0]
        assert np.array_equal(made.pixels(picture), expected)


def gradient(height: int, width: int) -> Picture:
    """Brighter from left to right, and from row to row."""
    values = np.add.outer(np.arange(height), np.arange(width) * 2).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).convert("RGB").save(buffer, "PNG")
    return Picture("gradient", buffer.getvalue())


def test_crops_and_flips_are_parts_of_the_picture() -> None:
    made, picture = maker(buckets=((8, 8),), crop="random", flip=True), gradient(8, 24)
    whole = maker().pixels(picture)
    assert np.array_equal(made.pixels(picture, (0.0, 0.5)), whole[:, :, :8])
    assert np.array_equal(made.pixels(picture, (1.0, 0.5)), whole[:, :, 16:])
    assert np.array_equal(made.pixels(picture), whole[:, :, 8:16])
    assert np.array_equal(made.pixels(picture, mirror=True), whole[:, :, 15:7:-1])
    document = Document("x", (picture,))
    rows = {
        tuple(made.row(document, None, random.Random(seed))["latent_patches"].flatten().tolist()) for seed in range(30)
    }
    assert len(rows) > 15
    fixed = {
        tuple(maker(buckets=((8, 8),)).row(document, None, random.Random(seed))["latent_patches"].flatten().tolist())
        for seed in range(5)
    }
    assert len(fixed) == 1


def test_half_the_pictures_are_mirrored() -> None:
    made, picture = maker(flip=True), gradient(4, 4)
    document, number = Document("x", (picture,)), 1000
    plain = maker().row(document, None, random.Random(0))["latent_patches"]
    same = sum(torch.equal(made.row(document, None, random.Random(n))["latent_patches"], plain) for n in range(number))
    assert abs(same / number - 0.5) < 5 * (0.25 / number) ** 0.5


def test_stored_latents_are_taken() -> None:
    store = LatentStore()
    key = picture_key(ONE.read(), 1000)
    store.write({key.digest: torch.full((3, 8, 4), 7.0)}, {})
    row = maker(latents=store).row(PAIR, [key], random.Random(0))
    assert (row["latent_patches"] == 7).all() and row["image_grids"].tolist() == [[4, 2]]


@pytest.mark.parametrize("buckets", [(), ((8, 8), (4, 8))])
def test_longest_is_that_of_all_choices(buckets: Any) -> None:
    documents = [
        PAIR,
        text_only("t", "a longer text"),
        Document("m", (Text(("a", "some words more")), ONE, Text(("b",)), TWO)),
        edit_triple("e", TWO, ["x", "a red heart, a blue sky"], ONE),
    ]
    made = maker(buckets=buckets)
    for document in documents:
        keys = [picture_key(picture.read(), 1000) for picture in document.pictures]
        lengths = [len(made.row(document, None, random.Random(seed))["input_ids"]) for seed in range(40)]
        assert made.longest(document, keys) == max(lengths)


def test_bad_makers() -> None:
    with pytest.raises(ValueError, match="size is 7 x 8 pixels; both sides must be multiples"):
        maker(buckets=((8, 8), (7, 8)))
    with pytest.raises(ValueError, match="crop is 'random', but pictures keep their sizes"):
        maker(crop="random")
    with pytest.raises(ValueError, match="truncated or damaged"):
        maker().row(Document("x", (Picture("x", png(0, 30, 30)[:400]),)), None, random.Random(0))


def stream_rows(number: int = 20, block: int = 8, faulty: tuple[int, ...] = (), **options: Any) -> StreamRows:
    images = [{"bytes": b"words" if n in faulty else png(n, 4, 4), "path": None} for n in range(number)]
    table = Dataset.from_dict({"image": images, "text": [f"noise {n}" for n in range(number)]})
    stream = RecordStream(table.to_iterable_dataset(), block=block, seed=1)
    return StreamRows(stream, maker(flip=True), **{"num_passes": 1, **options})


def test_rows_of_a_stream_depend_on_seed_pass_and_number_alone() -> None:
    first, second = (
        [as_plain(row) for row in rows]
        for rows in (itertools.islice(stream_rows(num_passes=None), 20), islice_second_pass())
    )
    assert [as_plain(row) for row in stream_rows()] == first
    assert len({row["sample_id"] for row in first}) == len({row["sample_seed"] for row in first}) == 20
    by_name = {row["sample_id"]: row for row in first}
    # Another order, the same rows.
    assert {row["sample_id"]: as_plain(row) for row in stream_rows(block=3)} == by_name
    assert {row["sample_id"] for row in second} == set(by_name)
    assert [row["sample_id"] for row in second] != [row["sample_id"] for row in first]
    assert not {row["sample_seed"] for row in second} & {row["sample_seed"] for row in first}


def islice_second_pass() -> Any:
    return itertools.islice(stream_rows(num_passes=None), 20, 40)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_share_the_rows_of_a_stream(num_workers: int) -> None:
    loader = DataLoader(stream_rows(), batch_size=3, num_workers=num_workers, collate_fn=list)
    found = [as_plain(row) for batch in loader for row in batch]
    expected = {row["sample_id"]: as_plain(row) for row in stream_rows()}
    assert len(found) == 20 and {row["sample_id"]: row for row in found} == expected


def test_a_stream_goes_on_where_it_was() -> None:
    whole = [as_plain(row) for row in stream_rows(num_passes=2)]
    for start in (0, 5, 8, 19, 20, 33, 40):
        assert [as_plain(make()) for make in stream_rows(num_passes=2).deferred(start)] == whole[start:]


def test_faulty_rows_of_a_stream_are_said_and_nothing_of_them_learned(caplog: pytest.LogCaptureFixture) -> None:
    rows = stream_rows(faulty=(3, 11), max_length=25)
    with caplog.at_level(logging.WARNING):
        found = list(rows)
    bad = {row["sample_id"] for row in found if row["labels"].tolist() == [IGNORE_INDEX]}
    assert len(found) == 20 and bad == {"stream, row 3", "stream, row 11"}
    assert {fault.where for fault in rows.faults} == bad and "row 11: cannot be opened" in caplog.text
    assert "latent_patches" not in next(row for row in found if row["sample_id"] in bad)


def test_too_many_faults_of_a_stream_are_an_error() -> None:
    with pytest.raises(ValueError, match="1 of .* rows of stream are faulty.*strict=True.*row 3: cannot be opened"):
        list(stream_rows(faulty=(3,), strict=True))
    with pytest.raises(ValueError, match="3 of .*max_faulty=0.02"):
        list(stream_rows(faulty=(3, 4, 5), max_faulty=0.02))


def test_long_rows_of_a_stream_are_no_faults(caplog: pytest.LogCaptureFixture) -> None:
    lengths = [len(row["input_ids"]) for row in stream_rows()]
    assert min(lengths) < max(lengths)
    rows = stream_rows(max_length=min(lengths), max_faulty=0.0, strict=True)
    with caplog.at_level(logging.WARNING):
        learned = [row for row in rows if row["labels"].tolist() != [IGNORE_INDEX]]
    assert len(learned) == lengths.count(min(lengths)) and not rows.faults
    assert len(rows.too_long) == 20 - len(learned) and f"tokens, and max_length is {min(lengths)}" in caplog.text


def test_a_stream_of_which_all_rows_are_too_long_is_an_error() -> None:
    assert len(list(stream_rows(max_length=5))) == 20
    with pytest.raises(ValueError, match="All of the first 100 rows of stream are longer than max_length=5; raise it"):
        list(stream_rows(max_length=5, num_passes=None))
