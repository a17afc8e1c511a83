from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transfusion.data import load_emoji
from transfusion.evaluation.pages import Score, caption_page, score_table, sheet


@pytest.mark.parametrize(
    ("score", "row"),
    [
        (
            Score("drawn", 0.84, ("chance", 0.0035), ("drawings", 1000)),
            "| drawn | 84.0 % | chance 0.35 % | 1,000 drawings |",
        ),
        (Score("drawn", 1.0, ("chance", 0.0), ("drawings", 1)), "| drawn | 100.0 % | chance 0.0 % | 1 drawings |"),
        (Score("said", 0.5, None, ("pictures", 7)), "| said | 50.0 % |  | 7 pictures |"),
        (
            Score("read", 1234.56, ("trigrams", 78.21), ("texts", 3), False),
            "| read | 1,234.6 | trigrams 78.2 | 3 texts |",
        ),
    ],
)
def test_a_score_is_a_row_of_the_table(score: Score, row: str) -> None:
    header, line, written = score_table([score]).splitlines()
    assert written == row
    assert header.count("|") == line.count("|") == row.count("|")


def test_the_sheet_puts_each_picture_under_its_heading() -> None:
    colours = ["red", "green", "blue", "black"]
    squares = [Image.new("RGB", (8, 8), colour) for colour in colours]
    page = sheet([("one", squares[:2]), ("two", squares[2:])], ["a", "b"], columns=1)
    centres = [(150 + 32, 22 + 32), (150 + 70 + 32, 22 + 32), (150 + 32, 92 + 32), (150 + 70 + 32, 92 + 32)]
    assert [page.getpixel(centre) for centre in centres] == [square.getpixel((0, 0)) for square in squares]
    has_text = np.asarray(page.crop((0, 22, 150, 92))).min() < 128
    assert has_text


def test_captions_cannot_break_the_table(tmp_path: Path) -> None:
    [picture] = load_emoji("train")[:1]
    page = caption_page([picture], ["a | b\nc"], tmp_path / "pictures")
    assert page.splitlines()[-1].endswith(f"| train | {picture.name} | a \\| b c |")
