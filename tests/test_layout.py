"""Rows of parts: what users write, pictures in their places, padding."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transfusion.layout import Part, cut_row, fill_rows, pad_rows, padded_length, read_part, read_rows, text_part


def written_out(row: list[Part]) -> list[Any]:
    return [part.content for part in row]


@pytest.mark.parametrize(
    ("text", "images", "expected"),
    [
        ("a", None, [["a"]]),
        ("a <image> b", ["x"], [["a", "x", "b"]]),
        ("a <image> b", None, [["a <image> b"]]),
        (["<image>", "b"], ["x"], [["x"], ["b"]]),
        (["<image>", "b <image>"], [[], ["x"]], [["<image>"], ["b", "x"]]),
        ([{"type": "text", "text": "a"}, {"type": "image"}], ["x"], [["a", "x"]]),
        ([[{"type": "image", "image": "x"}, {"type": "image"}], ["b"]], ["y"], None),
        ([[{"type": "image", "image": "x"}, {"type": "image"}], "<image>"], ["y", "z"], [["x", "y"], ["z"]]),
        (None, ["x", "y"], [["x", "y"]]),
        (None, [["x"], [], ["y"]], [["x", "y"]]),
    ],
)
def test_rows_written_out(text: Any, images: Any, expected: Any) -> None:
    if expected is None:
        with pytest.raises(ValueError, match="A part of a row is 'b'"):
            read_rows(text, images, None, "<image>")
    else:
        assert [written_out(row) for row in read_rows(text, images, None, "<image>")] == expected


@pytest.mark.parametrize("kind", [np.zeros, torch.zeros])
def test_a_fourth_axis_is_a_batch(kind: Any) -> None:
    (row,) = read_rows("<image> <image>", kind((2, 3, 4, 4)), None, "<image>")
    assert [tuple(part.content.shape) for part in row] == [(3, 4, 4)] * 2
    (row,) = read_rows("<image>", None, kind((3, 4, 4)), "<image>")
    assert [part.kind for part in row] == ["latent"]


pieces = st.lists(st.sampled_from(["<image>", " ", "\n", "a", "b c "]), min_size=1)


@given(pieces, st.lists(st.booleans(), min_size=1, max_size=9))
def test_texts_lose_only_white_space_beside_pictures(parts: list[str], written: list[bool]) -> None:
    """Against the plain words for it; who wrote a character stays with it."""
    flagged = list(zip(parts, itertools.cycle(written), strict=False))
    row = [Part("picture") if part == "<image>" else text_part(part, flag) for part, flag in flagged]
    (out,) = fill_rows([row], [["x"] * parts.count("<image>")], False, "picture", "<image>")
    texts = "".join(parts).split("<image>")
    expected = [text.lstrip() if index else text for index, text in enumerate(texts)]
    expected = [text.rstrip() if index + 1 < len(texts) else text for index, text in enumerate(expected)]
    assert [part.content for part in out if part.kind == "text"] == [text for text in expected if text]
    assert sum(part.kind == "picture" for part in out) == parts.count("<image>")
    flags = [(char, flag) for part, flag in flagged for char in part if part != "<image>"]
    kept = [pair for part in out if part.kind == "text" for pair in zip(part.content, part.written, strict=True)]
    assert [pair for pair in kept if pair[0].strip()] == [pair for pair in flags if pair[0].strip()]


def test_control_tokens_part_texts() -> None:
    row = [text_part(" a "), Part("control", "<eos>"), text_part(" b"), text_part("c")]
    (out,) = fill_rows([row], [[]], False, "picture", "<image>")
    assert written_out(out) == [" a ", "<eos>", " bc"]


@pytest.mark.parametrize("part", ["a", {"type": "video"}, {"type": "text"}, {"type": "text", "text": 3}, Part("text")])
def test_parts_that_are_refused(part: Any) -> None:
    with pytest.raises(ValueError, match="A part of a row"):
        read_part(part)


def test_lengths() -> None:
    lengths = [3, 5]
    for options, expected in (
        ({"padding": True}, 5),
        ({"padding": "longest", "max_length": 9}, 5),
        ({"padding": "max_length", "max_length": 9}, 9),
        ({"padding": True, "pad_to_multiple_of": 4}, 8),
        ({"padding": False, "pad_to_multiple_of": 4}, 0),
    ):
        assert padded_length(lengths, options) == expected
    assert pad_rows([[1], [2, 3]], 3, "left", 0) == [[0, 0, 1], [0, 2, 3]]
    assert pad_rows([[1], [2, 3]], 0, "right", 0) == [[1], [2, 3]]
    with pytest.raises(ValueError, match="'up'"):
        pad_rows([[1]], 3, "up", 0)


def test_rows_are_cut_outside_of_pictures() -> None:
    row = [(token, False) for token in (5, 7, 7, 8, 6)]
    assert cut_row(row, 0, {"max_length": 4, "truncation": "longest_first"}, (7, 8)) == row[:4]
    with pytest.raises(ValueError, match="Row 3 .*cut a picture"):
        cut_row(row, 3, {"max_length": 3, "truncation": True}, (7, 8))
    with pytest.raises(ValueError, match="Row 3 has 5 tokens and max_length is 3"):
        cut_row(row, 3, {"max_length": 3, "truncation": False}, (7, 8))
