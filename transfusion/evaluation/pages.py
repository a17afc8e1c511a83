"""What a report looks like: a table of scores, a sheet of drawings, a page of captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..data import CaptionedPicture


@dataclass(frozen=True)
class Score:
    """A line of the table.

    Attributes:
        text: What is measured.
        value: The score; a share of 1 where `is_share`.
        beside: What to hold it against, and its name ("chance", "floor"); None where there is nothing.
        items: What it was measured on, and how many ("drawings", 100).
    """

    text: str
    value: float
    beside: tuple[str, float] | None
    items: tuple[str, int]
    is_share: bool = True

    def row(self) -> str:
        """The line in Markdown."""
        compared = "" if self.beside is None else f"{self.beside[0]} {self._written(self.beside[1])}"
        kind, count = self.items
        return f"| {self.text} | {self._written(self.value)} | {compared} | {count:,} {kind} |"

    def _written(self, value: float) -> str:
        if not self.is_share:
            return f"{value:,.1f}"
        return f"{100 * value:.{2 if 0 < value < 0.01 else 1}f} %"


def score_table(scores: Sequence[Score]) -> str:
    """The scores as a Markdown table."""
    lines = ["| score | value | beside it | measured on |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *(score.row() for score in scores)]) + "\n"


def sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], headings: Sequence[str], columns: int = 3) -> Image.Image:
    """A page of titled rows of pictures, `columns` rows side by side; `headings` stand over the pictures."""
    font = ImageFont.load_default(11)
    side, title = 64, 150
    width, height = title + len(headings) * (side + 6) + 14, side + 6
    lines = -(-len(rows) // columns)
    page = Image.new("RGB", (columns * width, lines * height + 22), "white")
    pen = ImageDraw.Draw(page)
    for column in range(columns):
        for place, heading in enumerate(headings):
            pen.text((column * width + title + place * (side + 6), 5), heading, "black", font)
    for index, (text, pictures) in enumerate(rows):
        left, top = index % columns * width, index // columns * height + 22
        pen.multiline_text((left + 6, top + 18), _wrap(text, 24), "black", font)
        for place, picture in enumerate(pictures):
            page.paste(picture.resize((side, side)), (left + title + place * (side + 6), top))
    return page


def _wrap(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines[:3])


def caption_page(pictures: Sequence[CaptionedPicture], captions: Sequence[str], folder: Path) -> str:
    """A Markdown table of picture, true name and caption; the pictures are written into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["| picture | split | name | the model's caption |", "| --- | --- | --- | --- |"]
    for picture, caption in zip(pictures, captions, strict=True):
        path = folder / f"{Path(picture.id).stem}.png"
        picture.image.save(path)
        said = caption.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| ![{picture.name}]({folder.name}/{path.name}) | {picture.split} | {picture.name} | {said} |")
    return "\n".join(lines) + "\n"


__all__ = ["Score", "caption_page", "score_table", "sheet"]
