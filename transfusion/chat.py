"""Chats: the shipped template, and how messages pass through any template without becoming a part of it.

While a template is rendered, random marks stand in for the texts of the messages. What comes out is cut at the marks:
control tokens count in the template's own pieces, and each text is put back as ordinary text. So no message can begin
a turn, place a picture or end a row, whatever it spells and wherever a template puts it.

The other strings of a chat (roles, names, tools, documents, variables) reach the template as they are, as templates
decide by them; they are refused where they hold a control token or would complete one.
"""

import base64
import binascii
import itertools
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from .layout import Part, Row, fill_rows, read_part, text_part


# A turn is its role, a line break, its content and the end token. A role is ordinary text, and counts because it
# stands at the start or behind an end token: no message can write that, so a text that spells "assistant" begins no
# turn.
CHAT_TEMPLATE = """\
{%- macro write(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == 'image' -%}
                {{- image_token | default('<image>') -}}
            {%- elif part.type == 'text' -%}
                {{- part.text -}}
            {%- else -%}
                {{- raise_exception('A part of a message is of type ' ~ part.type ~ '; give text and image.') -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if not eos_token -%}
    {{- raise_exception('A turn ends with eos_token, but the tokenizer has none; set it.') -}}
{%- endif -%}
{%- for message in messages -%}
    {{- message.role ~ '\\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}
            {{- write(message.content) ~ eos_token -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- write(message.content) ~ eos_token -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'assistant\\n' -}}
{%- endif -%}
"""

# Roles by which templates decide, and of which some make control tokens, as `<|user|>`.
_ROLES = ("assistant", "developer", "function", "ipython", "model", "system", "tool", "user")
_SOURCES = ("image", "path", "url", "base64")

Span = tuple[int, int]


class ChatTokens(NamedTuple):
    """What a template and its texts are made of.

    Attributes:
        named: Special tokens by name, which are variables of every template.
        control: The control tokens.
        image: The placeholder of a picture.
    """

    named: Mapping[str, str]
    control: Sequence[str]
    image: str


class MarkedChat:
    """A conversation with marks in place of its texts, and what they stand for.

    Args:
        messages: `{"role": ..., "content": ...}`, the content a string or a list of parts.
        images: Pictures for the image parts that have none of their own, taken in reading order.

    Raises:
        ValueError: A part that is neither text nor image, or a picture that is not given.
    """

    def __init__(self, messages: Sequence[Mapping[str, Any]], images: Iterator[Any]) -> None:
        self.mark = secrets.token_hex(16)
        self.texts: list[str] = []
        self.pictures: list[Any] = []
        self.messages = [{**message, "content": self._marked(message, images)} for message in messages]

    def row(self, prompt: str, spans: Sequence[Span], control_tokens: Collection[str], image_token: str) -> Row:
        """Cut the rendered prompt into the template's text, control tokens, the messages' texts and placeholders.

        Args:
            prompt: The rendered messages.
            spans: Of the prompt, what the assistant wrote, (start, end) in characters.
            control_tokens: What counts in the template's text.
            image_token: The placeholder.

        Raises:
            ValueError: The template altered a text, so that its mark is damaged.
        """
        row: Row = []
        for start, piece in _pieces(prompt, rf"({self.mark}:\d+;)"):
            written = any(first <= start < last for first, last in spans)
            if found := re.fullmatch(rf"{self.mark}:(\d+);", piece):
                row.append(text_part(self.texts[int(found[1])], written))
            elif any(self.mark[at : at + 8] in piece.lower() for at in range(len(self.mark) - 7)):
                raise ValueError("The chat template alters the text of a message; use one that prints it as it is.")
            else:
                row += _template_parts(piece, start, spans, control_tokens, image_token)
        return row

    def _marked(self, message: Mapping[str, Any], images: Iterator[Any]) -> str | list[dict[str, Any]]:
        content = message.get("content") or ""
        if isinstance(content, str):
            return self._mark_for(content)
        parts = []
        for part in content:
            if isinstance(part, Mapping) and part.get("type") == "image":
                self.pictures.append(_picture_of(part, images))
                parts.append({"type": "image"})
            else:
                parts.append({"type": "text", "text": self._mark_for(read_part(part).content)})
        return parts

    def _mark_for(self, text: str) -> str:
        self.texts.append(text)
        return f"{self.mark}:{len(self.texts) - 1};" if text else ""  # templates ask whether a text is empty


def mark_chats(conversations: Sequence[Any], is_batched: bool, images: Any) -> list[MarkedChat]:
    """Mark conversations, with pictures for all of their image parts.

    Args:
        conversations: Lists of messages.
        is_batched: Whether `images` has a list for each of them, or is that of the only one.
        images: Pictures for the image parts that have none of their own, or None.

    Raises:
        ValueError: Too many or too few pictures, or what `MarkedChat` refuses.
    """
    groups: Any = [[] for _ in conversations]
    if images is not None:
        groups = images if is_batched else [images if isinstance(images, list | tuple) else [images]]
    if len(groups) != len(conversations):
        raise ValueError(
            f"There are {len(conversations)} conversations and {len(groups)} lists of images; match them."
        )
    supplies = [iter(group) for group in groups]
    chats = [MarkedChat(*pair) for pair in zip(conversations, supplies, strict=True)]
    if rest := sum(len(list(supply)) for supply in supplies):
        raise ValueError(f"{rest} of the given images have no place; give one image part for each.")
    return chats


def render_chats(
    chats: Sequence[MarkedChat],
    fields: Mapping[str, Any],
    variables: Mapping[str, Any],
    options: Mapping[str, Any],
    tokens: ChatTokens,
) -> list[Row]:
    """Marked conversations -> rows.

    Args:
        chats: The conversations.
        fields: `tools` and `documents`.
        variables: Further variables of the template.
        options: The template and flags, as transformers' `render_jinja_template` takes them.
        tokens: The tokenizer's.

    Raises:
        ValueError: A control token in or out of what is not the messages' content, or a template that alters that.
    """
    own = {**tokens.named, "image_token": tokens.image}
    given = {name: value for name, value in variables.items() if own.get(name) != value}
    refuse_control_tokens({**fields, **given}, tokens.control)
    for message in itertools.chain.from_iterable(chat.messages for chat in chats):
        refuse_control_tokens({name: message[name] for name in message if name != "content"}, tokens.control)

    def render(values: Mapping[str, Any]) -> Any:
        return render_jinja_template(**values, **options, **{**tokens.named, **variables})

    values = {"conversations": [chat.messages for chat in chats], **fields}
    prompts, spans = render(values)
    refuse_built_tokens(lambda tagged: render(tagged)[0], values, prompts, tokens.control)
    rows = [
        chat.row(prompt, written, tokens.control, tokens.image)
        for chat, prompt, written in zip(chats, prompts, spans or [[]] * len(chats), strict=True)
    ]
    return fill_rows(rows, [chat.pictures for chat in chats], True, "picture", tokens.image)


def refuse_control_tokens(values: Mapping[str, Any], control_tokens: Collection[str]) -> None:
    """Raise a `ValueError` where a value, or what it holds, holds a control token."""
    for name, value in values.items():
        if found := [token for token in control_tokens if token in str(value)]:
            raise ValueError(
                f"{name!r} of a chat holds the control tokens {found}; only the content of messages may, where they "
                "are ordinary text."
            )


def refuse_built_tokens(
    render: Callable[[Any], Sequence[str]], values: Any, prompts: Sequence[str], control_tokens: Collection[str]
) -> None:
    """Raise a `ValueError` where strings of a chat complete control tokens together with what stands beside them.

    The chat is rendered once more with a tag on either side of each string: a token that a string is a part of is then
    torn apart.

    Args:
        render: Renders `values` to prompts.
        values: Messages, tools and documents, of which the strings may be tagged.
        prompts: What they are rendered to without tags.
        control_tokens: The tokens.
    """
    tag = secrets.token_hex(8)
    if (tagged_values := _tagged(values, tag)) == values:
        return
    for prompt, tagged in zip(prompts, render(tagged_values), strict=True):
        count, expected = (
            {token: text.count(token) for token in control_tokens if token in text} for text in (prompt, tagged)
        )
        if count != expected:
            raise ValueError(
                f"In this chat the template makes some of the control tokens {sorted(count)} out of roles, names, "
                "tools or documents; rename these."
            )


def _tagged(value: Any, tag: str) -> Any:
    """A copy with tagged strings, but for the usual roles, types and the messages' content."""
    if isinstance(value, Mapping):
        return {k: v if k in ("content", "type") else _tagged(v, tag) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_tagged(item, tag) for item in value]
    return tag + value + tag if isinstance(value, str) and value not in _ROLES else value


def _picture_of(part: Mapping[str, Any], images: Iterator[Any]) -> Any:
    """The picture of an image part, or the next of the given ones."""
    found = [name for name in _SOURCES if part.get(name) is not None]
    picture = part[found[0]] if found else next(images, None)
    if picture is None or len(found) > 1:
        raise ValueError(
            f"An image part of a message has the keys {sorted(part)}; give the picture under 'image', its file under "
            "'path' or its bytes under 'base64'. URLs are not fetched."
        )
    if found == ["base64"]:
        return _decode_base64(picture)
    if found == ["url"] and str(picture).startswith("data:image/"):
        return _decode_base64(picture.partition(",")[2])
    return picture


def _decode_base64(data: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"The base64 data of a picture, {data[:20]!r}..., cannot be decoded: {error}") from error


def _pieces(text: str, pattern: str) -> Iterator[tuple[int, str]]:
    """What `re.split` gives, with the position of each piece."""
    start = 0
    for piece in re.split(pattern, text):
        if piece:
            yield start, piece
        start += len(piece)


def _template_parts(
    text: str, start: int, spans: Sequence[Span], control_tokens: Collection[str], image_token: str
) -> Iterator[Part]:
    """Cut the template's own text, which starts at `start` of the prompt, at control tokens and placeholders."""
    tokens = sorted({*control_tokens, image_token}, key=len, reverse=True)  # a longer one first, as tokenizers do
    for offset, piece in _pieces(text, f"({'|'.join(map(re.escape, tokens))})"):
        places = range(start + offset, start + offset + len(piece))
        written = tuple(any(first <= place < last for first, last in spans) for place in places)
        if piece == image_token:
            yield Part("picture", None, written[:1])
        elif piece in tokens:
            yield Part("control", piece, written[:1])
        else:
            yield Part("text", piece, written)


__all__ = ["CHAT_TEMPLATE", "ChatTokens", "MarkedChat", "mark_chats", "render_chats"]
