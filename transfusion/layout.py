"""Rows of text and pictures: from what users write to parts, each picture in its place, and from tokens to a batch.

A part is a stretch of ordinary text, a control token, a picture or a latent. Only a chat template writes control
tokens; whatever else is text stays text when it is tokenized, whoever its neighbours are.
"""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor


class Part(NamedTuple):
    """A part of a row.

    Attributes:
        kind: `"text"` and `"control"` have a string, `"picture"` what the image processor reads, or None as long as
            the picture is wanted, and `"latent"` a latent (C, h, w).
        content: That.
        written: Of a chat, for each character of the text whether the assistant wrote it; for another part, one
            element.
    """

    kind: Literal["text", "control", "picture", "latent"]
    content: Any = None
    written: tuple[bool, ...] = ()

    @property
    def is_wanted(self) -> bool:
        """Whether this is a placeholder."""
        return self.kind == "picture" and self.content is None

    @property
    def is_image(self) -> bool:
        """Whether this is a picture, a latent or a placeholder."""
        return self.kind in ("picture", "latent")


Row = list[Part]


class RenderedChat(str):
    """A chat as a string, which keeps what it was made of: what is control token in it and what only spells one.

    Whatever makes another string of it makes a plain one, in which all is ordinary text.

    Attributes:
        row: Its parts, with the pictures of the messages.
    """

    row: Row

    def __new__(cls, text: str, row: Sequence[Part] = ()) -> "RenderedChat":
        """Keep the parts beside the string."""
        chat = super().__new__(cls, text)
        chat.row = list(row)
        return chat


Token = tuple[int, bool]  # its id, and whether a chat's assistant wrote it


def text_part(text: str, written: bool = False) -> Part:
    """A stretch of text that the assistant wrote all of, or nothing."""
    return Part("text", text, (written,) * len(text))


def read_rows(text: Any, images: Any, latents: Any, image_token: str) -> list[Row]:
    """What a processor is called with -> rows, every placeholder filled, neighbouring texts joined.

    Pictures without a text become one row.

    Raises:
        ValueError: An empty batch or row, a row of another type, pictures and placeholders that do not match.
    """
    if images is not None and latents is not None:
        raise ValueError("Both images and latents are given; give the one or the other.")
    kind: Literal["picture", "latent"]
    given, kind = (images, "picture") if latents is None else (latents, "latent")
    if text is None and given is not None:
        pictures, _ = _as_groups(given, None)
        return [[Part(kind, picture) for group in pictures for picture in group]]
    if not isinstance(text, str | list | tuple) or not text:
        raise ValueError(f"text is {text!r}; give a string or a list of parts, not empty, or a list of such rows.")
    batch = [text] if isinstance(text, str) or isinstance(text[0], Mapping) else text
    groups, nested = _as_groups(given, len(batch))
    rows = [_read_row(row, index, bool(groups[index * nested]), image_token) for index, row in enumerate(batch)]
    return fill_rows(rows, groups, nested, kind, image_token)


def fill_rows(
    rows: list[Row],
    groups: list[list[Any]],
    nested: bool,
    kind: Literal["picture", "latent"],
    image_token: str,
) -> list[Row]:
    """Put pictures into the placeholders of rows, and join the rows.

    Args:
        rows: The rows.
        groups: Pictures for each row if `nested`, or one list for all rows.
        nested: Which of the two.
        kind: What the pictures are.
        image_token: The placeholder in strings, for the error.

    Raises:
        ValueError: Pictures and placeholders that do not match, or an empty row.
    """
    for index, pictures in enumerate(groups):
        group = [rows[index]] if nested else rows
        places = sum(part.is_wanted for row in group for part in row)
        if places != len(pictures):
            raise ValueError(
                f"There are {places} image placeholders and {len(pictures)} pictures"
                f"{f' in row {index}' if nested else ''}; give one picture for each {image_token} in a string and "
                "each image part that has none of its own."
            )
    supply = itertools.chain.from_iterable(groups)
    filled = [
        _join([Part(kind, next(supply), part.written) if part.is_wanted else part for part in row]) for row in rows
    ]
    if [] in filled:
        raise ValueError(f"Row {filled.index([])} has neither text nor a picture; every row needs one.")
    return filled


def split_text(text: str, image_token: str) -> Row:
    """Cut a string at its placeholders."""
    first, *others = text.split(image_token)
    return [text_part(first), *(part for other in others for part in (Part("picture"), text_part(other)))]


def read_part(part: Any) -> Part:
    """A part as users write it: `{"type": "text", "text": ...}` or `{"type": "image"}`, the picture under `"image"`.

    Raises:
        ValueError: Anything else.
    """
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return text_part(part["text"])
    if kind == "image":
        return Part("picture", part.get("image"))
    raise ValueError(
        f"A part of a row is {part!r}; give {{'type': 'text', 'text': ...}}, or {{'type': 'image'}} with the picture "
        "under 'image' or in `images`."
    )


def is_rendered_chat(value: Any) -> bool:
    """Whether this is a `RenderedChat`, of this file or of a copy of it from the Hub."""
    return type(value).__name__ == RenderedChat.__name__


def _read_row(row: Any, index: int, has_pictures: bool, image_token: str) -> Row:
    if is_rendered_chat(row):
        return [Part("picture", None, part.written) if has_pictures and part.is_image else part for part in row.row]
    if isinstance(row, str):
        return split_text(row, image_token) if has_pictures else [text_part(row)]
    if isinstance(row, list | tuple):
        return [read_part(part) for part in row]
    raise ValueError(f"Row {index} of text is a {type(row).__name__}; give a string or a list of parts.")


def _as_groups(pictures: Any, num_rows: int | None) -> tuple[list[list[Any]], bool]:
    """Lists of pictures, and whether there is one for each row (of any number, if None) or a single one for all."""
    if pictures is None:
        return [[]], False
    if isinstance(pictures, np.ndarray | Tensor) and pictures.ndim == 4:
        return [list(pictures)], False
    if not isinstance(pictures, list | tuple):
        return [[pictures]], False
    if not any(isinstance(picture, list | tuple) for picture in pictures):
        return [list(pictures)], False
    fits = num_rows is None or len(pictures) == num_rows
    if not fits or not all(isinstance(picture, list | tuple) for picture in pictures):
        raise ValueError(
            f"There are {num_rows} rows of text and {len(pictures)} entries in the nested pictures; give a list for "
            "each row, empty where it has none."
        )
    return [list(row) for row in pictures], True


def _join(row: Row) -> Row:
    """Join neighbouring texts, strip white space beside pictures, and drop what is empty."""
    joined: Row = []
    for part in row:
        if part.kind == "text" and joined and joined[-1].kind == "text":
            joined[-1] = Part("text", joined[-1].content + part.content, joined[-1].written + part.written)
        elif part.kind != "text" or part.content:
            joined.append(part)
    stripped = list(_strip(joined))
    return [part for part in stripped if part.kind != "text" or part.content]


def _strip(row: Sequence[Part]) -> Iterator[Part]:
    """Texts without the white space beside pictures."""
    for index, part in enumerate(row):
        if part.kind == "text":
            text = part.content
            start = len(text) - len(text.lstrip()) if index > 0 and row[index - 1].is_image else 0
            end = len(text.rstrip()) if index + 1 < len(row) and row[index + 1].is_image else len(text)
            part = Part("text", text[start:end], part.written[start:end])
        yield part


def cut_row(tokens: list[Token], index: int, options: Mapping[str, Any], image_ids: Collection[int]) -> list[Token]:
    """Hold a row to the `max_length` of a call's options, without losing a patch.

    Args:
        tokens: The row.
        index: Its place in the batch, for the error.
        options: Those of the call.
        image_ids: Ids that must not be cut.

    Raises:
        ValueError: A longer row without `truncation`, or one of which a picture would be cut.
    """
    max_length = options.get("max_length")
    if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
        raise ValueError(f"max_length is {max_length!r}; it must be a positive integer, or None.")
    if max_length is None or len(tokens) <= max_length:
        return tokens
    if options.get("truncation") in (None, False, "do_not_truncate"):
        raise ValueError(
            f"Row {index} has {len(tokens)} tokens and max_length is {max_length}; shorten it, raise max_length, or "
            "pass truncation=True to cut its text."
        )
    if any(token in image_ids for token, _ in tokens[max_length:]):
        raise ValueError(
            f"Row {index} has {len(tokens)} tokens, and cutting it to max_length={max_length} would cut a picture; "
            "raise max_length, or use a smaller picture or less text before it."
        )
    return tokens[:max_length]


def padded_length(lengths: Sequence[int], options: Mapping[str, Any]) -> int:
    """How long rows of these lengths become by `padding`, `max_length` and `pad_to_multiple_of`; 0 for no padding.

    Raises:
        ValueError: A padding that does not exist, or `"max_length"` without one.
    """
    padding, max_length = options["padding"], options.get("max_length")
    if padding in (False, "do_not_pad"):
        return 0
    length = max_length if padding == "max_length" else max(lengths)
    if padding not in (True, "longest", "max_length") or length is None:
        raise ValueError(
            f"padding is {padding!r} and max_length {max_length!r}; allowed: True, 'longest', False, 'do_not_pad', or "
            "'max_length' with a max_length."
        )
    multiple = options.get("pad_to_multiple_of") or 1
    return -(-length // multiple) * multiple


def pad_rows(rows: Sequence[list[int]], length: int, side: str, value: int) -> list[list[int]]:
    """Fill rows up to `length` on the left or right side; ValueError for another side."""
    if side not in ("left", "right"):
        raise ValueError(f"padding_side is {side!r}; allowed: 'left', 'right'.")
    fills = [[value] * (length - len(row)) for row in rows]
    return [fill + row if side == "left" else row + fill for row, fill in zip(rows, fills, strict=True)]


__all__ = [
    "Part",
    "RenderedChat",
    "Row",
    "Token",
    "cut_row",
    "fill_rows",
    "is_rendered_chat",
    "pad_rows",
    "padded_length",
    "read_part",
    "read_rows",
    "split_text",
    "text_part",
]
