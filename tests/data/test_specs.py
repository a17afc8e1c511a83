from typing import Any

import pytest

from transfusion.data.documents import Columns
from transfusion.data.specs import DataSpec, SourceSpec


FOLDER = SourceSpec("imagefolder", "pictures")


def test_columns_are_those_stated() -> None:
    spec = SourceSpec("parquet", "x", content="pairs", picture="jpg", caption="title")
    assert spec.columns == Columns(content="pairs", picture="jpg", caption="title")


def test_what_augments() -> None:
    assert not DataSpec((FOLDER,)).augments
    assert DataSpec((FOLDER,), flip=True).augments and DataSpec((FOLDER,), crop="random").augments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": ()}, "sources is empty"),
        ({"sources": (FOLDER, SourceSpec("parquet", "x", 1.0))}, r"weights \[None, 1.0\]; give all of them"),
        ({"sources": (FOLDER, SourceSpec("stream", "x"))}, "cannot be mixed"),
        ({"crop": "left"}, "crop is 'left'; allowed: center, random"),
        ({"caption_first": 1.2}, "caption_first is 1.2"),
        ({"max_faulty": -0.1}, "max_faulty is -0.1"),
        ({"epoch_rows": 0}, "epoch_rows is 0"),
        ({"shuffle_block": 0}, "shuffle_block is 0"),
        ({"max_length": -5}, "max_length is -5"),
    ],
)
def test_bad_specifications(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataSpec(**{"sources": (FOLDER,), **options})


def test_bad_sources() -> None:
    with pytest.raises(ValueError, match="kind is 'zip'; allowed: imagefolder, jsonl, parquet, webdataset, stream"):
        SourceSpec("zip", "x")
    with pytest.raises(ValueError, match="weight of x is 0"):
        SourceSpec("parquet", "x", weight=0)
