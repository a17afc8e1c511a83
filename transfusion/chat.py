"""Chats: the shipped template, and how messages pass through any template without becoming a part of it.

While a template is rendered, random marks stand in for the texts of the messages. What comes out is cut at the marks:
control tokens count in the template's own pieces, and each text is put back as ordinary text. So no message can begin
a turn, place a picture or end a row, whatever it spells and wherever a template puts it. A template that does more
with a text than print it, or strip its ends, is refused: with other marks it would write something else.

The other strings of a chat (roles, names, tools, documents, variables, and keys that the template does not name) reach
the template as they are, as templates decide by them. They must not matter for control tokens: the chat is rendered
once more with foreign letters in them, and refused where that changes the control tokens. Numbers are not looked at.
"""

import base64
import binascii
import dataclasses
import itertools
import re
import secrets
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from .layout import Part, RenderedChat, Row, fill_rows, read_part, text_part


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
# Types by which templates decide; those of parts of a message are not among them.
_TYPES = ("array", "boolean", "function", "integer", "null", "number", "object", "string", "text")
_SOURCES = ("image", "path", "url", "base64")
# Names of a message's reasoning, which newer transformers copies from one to the others.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# What a template may do to a text damages one of these.
_FRAGILE = "\"\\'<&>\n "
_LEFT, _RIGHT = "\u2003", "\u2002"  # white space that templates do not write

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
        needs_pictures: Whether an image part must have a picture.

    Raises:
        ValueError: A part that is neither text nor image, or a picture that is not given.
    """

    def __init__(self, messages: Sequence[Mapping[str, Any]], images: Iterator[Any], needs_pictures: bool) -> None:
        self.mark, self.other_mark = _new_mark("GHIJghij", 16), _new_mark("QRSTqrst", 24)
        self.texts: list[str] = []
        self.pictures: list[Any] = []
        self.messages = [{**message, "content": self._marked(message, images, needs_pictures)} for message in messages]

    def with_other_marks(self) -> list[dict[str, Any]]:
        """The messages with other marks, and white space around them."""
        mark, other = re.escape(self.mark), self.other_mark

        def exchange(text: str) -> str:
            return re.sub(rf"{mark}(\d+){mark}", lambda found: f"{_LEFT}{other}{found[1]}{other}{_RIGHT}", text)

        def exchange_all(content: str | list[dict[str, Any]]) -> Any:
            if isinstance(content, str):
                return exchange(content)
            return [{**part, "text": exchange(part["text"])} if "text" in part else part for part in content]

        return [{**message, "content": exchange_all(message["content"])} for message in self.messages]

    def row(
        self, prompt: str, other: str, spans: Sequence[Span], control_tokens: Collection[str], image_token: str
    ) -> Row:
        """Cut the rendered prompt into the template's text, control tokens, the messages' texts and placeholders.

        Args:
            prompt: The rendered messages.
            other: The same with other marks.
            spans: Of the prompt, what the assistant wrote, (start, end) in characters.
            control_tokens: What counts in the template's text.
            image_token: The placeholder.

        Raises:
            ValueError: The template altered a text.
        """
        mark, other_mark = re.escape(self.mark), re.escape(self.other_mark)
        pieces = re.split(rf"{mark}(\d+){mark}", prompt)
        others = re.split(rf"({_LEFT}?){other_mark}(\d+){other_mark}({_RIGHT}?)", other)
        if pieces[::2] != others[::4] or pieces[1::2] != others[2::4]:
            raise ValueError("The chat template alters the text of a message; use one that prints it as it is.")
        row: Row = []
        start = 0
        for index, piece in enumerate(pieces):
            if index % 2 == 0:
                row += _template_parts(piece, start, spans, control_tokens, image_token)
                start += len(piece)
                continue
            text = self.texts[int(piece)]
            left, right = others[2 * index - 1], others[2 * index + 1]
            text = text if left else text.lstrip()  # as the template did
            text = text if right else text.rstrip()
            row.append(text_part(text, any(first <= start < last for first, last in spans)))
            start += 2 * len(self.mark) + len(piece)
        return row

    def _marked(
        self, message: Mapping[str, Any], images: Iterator[Any], needs_pictures: bool
    ) -> str | list[dict[str, Any]]:
        content = message.get("content") or ""
        if isinstance(content, str):
            return self._mark_for(content)
        parts = []
        for part in content:
            if isinstance(part, Mapping) and part.get("type") == "image":
                self.pictures.append(_picture_of(part, images, needs_pictures))
                parts.append({"type": "image"})
            else:
                parts.append({"type": "text", "text": self._mark_for(read_part(part).content)})
        return parts

    def _mark_for(self, text: str) -> str:
        self.texts.append(text)
        return f"{self.mark}{len(self.texts) - 1}{self.mark}" if text else ""  # templates ask whether a text is empty


def _new_mark(letters: str, length: int) -> str:
    """A random string, of which any alteration shows."""
    return letters[0] + _FRAGILE + "".join(secrets.choice(letters) for _ in range(length)) + letters[-1]


class Disguise:
    """Puts foreign letters, of which no control token has any, in place of all characters of a chat's strings.

    Each character always becomes the same letter, so what was equal stays equal, and as long as it was.

    Args:
        tokens: The control tokens.
        names: Keys by which the template knows fields; these stay.
    """

    def __init__(self, tokens: Collection[str], names: Collection[str]) -> None:
        taken = set("".join(tokens))
        letters = (code for code in range(0x20000, 0x110000) if chr(code) not in taken)
        self._table: defaultdict[int, int] = defaultdict(lambda: next(letters))
        self._names = {*names, *_REASONING}

    def message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message; its content, of which the texts are marks, and a usual role stay."""
        kept = {"content": message["content"]} | ({"role": message["role"]} if message["role"] in _ROLES else {})
        return self({name: value for name, value in message.items() if name not in kept}) | kept

    def __call__(self, value: Any) -> Any:
        """A string, or whatever holds strings; types by which templates decide stay."""
        if isinstance(value, str):
            return value.translate(self._table)
        if isinstance(value, Mapping):
            return {self._key(k): v if k == "type" and v in _TYPES else self(v) for k, v in value.items()}
        return [self(item) for item in value] if isinstance(value, list | tuple) else value

    def _key(self, key: Any) -> Any:
        return key if key in self._names else self(key)


def template_names(template: str) -> set[str]:
    """Keys that the code of a template looks up, as `m.name`, `m['name']`, `'name' in m` or `m.get('name')`."""
    names = set()
    for node in _compile_jinja_template(template).environment.parse(template).find_all(object):
        kind, constants = type(node).__name__, []
        if kind == "Getattr":
            names.add(node.attr)
        elif kind == "Getitem":
            constants = [node.arg]
        elif kind == "Compare" and node.ops[0].op in ("in", "notin"):
            constants = [node.expr]
        elif kind in ("Call", "Filter"):
            constants = [*node.args, *(pair.value for pair in node.kwargs)]
        names |= {constant.value for constant in constants if type(constant).__name__ == "Const"}
    return names


def check_conversations(conversation: Any) -> bool:
    """Whether this is a list of conversations, not one; ValueError where it is neither."""
    is_batched = isinstance(conversation, list | tuple) and isinstance(conversation[0], list | tuple)
    for messages in conversation if is_batched else [conversation]:
        if not isinstance(messages, list | tuple):
            raise ValueError(f"A conversation is {messages!r}; give a list of messages, or a list of such lists.")
        for message in messages:
            content = message.get("content") if isinstance(message, Mapping) else None
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or len(message) < 2:
                raise ValueError(f"A message is {message!r}; give {{'role': ..., 'content': ...}}.")
            if not isinstance(content, str | list | tuple | None):
                raise ValueError(f"The content of a message is {content!r}; give a string or a list of parts.")
    return is_batched


def tidy_conversation(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages without keys of None, which templates would print, and with the image parts of OpenAI's API as ours."""
    tidied = [{name: value for name, value in message.items() if value is not None} for message in messages]
    for message in tidied:
        if isinstance(content := message.get("content"), list):
            message["content"] = [_tidy_part(part) for part in content]
    return tidied


def _tidy_part(part: Any) -> Any:
    if not isinstance(part, Mapping) or part.get("type") != "image_url" or "image_url" not in part:
        return part
    source = part["image_url"]
    return {"type": "image", "url": source.get("url", "") if isinstance(source, Mapping) else source}


def plain_data(value: Any) -> Any:
    """What a template may see of `value`: plain JSON types, and the name of its type in place of any other object."""
    if value is None or isinstance(value, bool):
        return value
    for base in (str, int, float):
        if isinstance(value, base):
            return getattr(base, f"__{base.__name__}__")(value)  # subclasses have methods of their own
    if isinstance(value, Mapping):
        return {plain_data(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = map(plain_data, value)
        return list(items) if isinstance(value, list) else tuple(items)
    if isinstance(value, np.generic):
        return plain_data(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):  # pydantic's
        return plain_data(dump())
    return f"<{type(value).__name__}>"


def choose_template(own: str | dict[str, str] | None, asked: str | None) -> str:
    """The template to render: `asked`, or the one of that name among the processor's `own`, or its default.

    Raises:
        ValueError: None is asked for, and there is no default.
    """
    named = own if isinstance(own, dict) else {"default": own}
    template = named.get("default") if asked is None else named.get(asked, asked)
    if template is None:
        raise ValueError(
            f"The processor has no default chat template, but {sorted(name for name in named if named[name])}; give "
            "chat_template, a template or one of these names."
        )
    return template


def mark_chats(
    conversations: Sequence[Any], is_batched: bool, images: Any, needs_pictures: bool = True
) -> list[MarkedChat]:
    """Mark conversations, with pictures for all of their image parts.

    Args:
        conversations: Lists of messages.
        is_batched: Whether `images` has a list for each of them, or is that of the only one.
        images: Pictures for the image parts that have none of their own, or None.
        needs_pictures: Whether an image part without one is an error.

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
    chats = [MarkedChat(*pair, needs_pictures) for pair in zip(conversations, supplies, strict=True)]
    if rest := sum(len(list(supply)) for supply in supplies):
        raise ValueError(f"{rest} of the given images have no place; give one image part for each.")
    return chats


def render_chats(
    chats: Sequence[MarkedChat],
    fields: Mapping[str, Any],
    variables: Mapping[str, Any],
    options: Mapping[str, Any],
    tokens: ChatTokens,
) -> list[RenderedChat]:
    """Marked conversations -> what the template makes of them.

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
    strings = plain_data({**fields, **given})
    messages = [plain_data(chat.messages) for chat in chats]
    for values in (strings, *itertools.chain.from_iterable(messages)):
        refuse_control_tokens({name: values[name] for name in values if name != "content"}, tokens.control)

    def render(conversations: Any, strings: Mapping[str, Any]) -> tuple[list[str], list[list[Span]]]:
        named = {**tokens.named, **variables, **strings}
        prompts, spans = render_jinja_template(conversations=conversations, **options, **named)
        return prompts, spans or [[]] * len(prompts)

    prompts, spans = render(messages, strings)
    disguise = Disguise(tokens.control, template_names(options["chat_template"]))
    hidden = {name: disguise(value) for name, value in strings.items()}
    try:
        disguised, _ = render([[disguise.message(message) for message in chat] for chat in messages], hidden)
    except Exception as error:  # whatever the template raises
        raise ValueError(
            "The chat template reads roles, names, tools, documents or variables so closely that it cannot be checked "
            f"whether they make control tokens: with other letters in them it fails with {str(error)!r}."
        ) from error
    refuse_built_tokens(prompts, disguised, chats, tokens.control)
    others, _ = render([chat.with_other_marks() for chat in chats], strings)
    rows = [
        chat.row(prompt, other, written, tokens.control, tokens.image)
        for chat, prompt, other, written in zip(chats, prompts, others, spans, strict=True)
    ]
    texts = ["".join(tokens.image if part.is_image else part.content for part in row) for row in rows]
    filled = fill_rows(rows, [chat.pictures for chat in chats], True, "picture", tokens.image)
    return [RenderedChat(text, row) for text, row in zip(texts, filled, strict=True)]


def refuse_control_tokens(values: Mapping[str, Any], control_tokens: Collection[str]) -> None:
    """Raise a `ValueError` where a value, or what it holds, holds a control token."""
    for name, value in values.items():
        if found := [token for token in control_tokens if token in str(value)]:
            raise ValueError(
                f"{name!r} of a chat holds the control tokens {found}; only the content of messages may, where they "
                "are ordinary text."
            )


def refuse_built_tokens(
    prompts: Sequence[str], disguised: Sequence[str], chats: Sequence[MarkedChat], control_tokens: Collection[str]
) -> None:
    """Raise a `ValueError` where strings of chats decide what control tokens their prompts have, or where.

    Args:
        prompts: The rendered chats.
        disguised: The same with disguised strings.
        chats: Whose marks these are.
        control_tokens: The tokens.
    """
    for prompt, other, chat in zip(prompts, disguised, chats, strict=True):
        mark = re.escape(chat.mark)
        pattern = "|".join([rf"{mark}\d+{mark}", *_longest_first(control_tokens)])
        found, expected = re.findall(pattern, prompt), re.findall(pattern, other)
        if found != expected:
            names = sorted({*found, *expected} & set(control_tokens))
            raise ValueError(
                f"In this chat the template makes some of the control tokens {names} out of roles, names, tools, "
                "documents or variables; rename these."
            )


def _longest_first(tokens: Collection[str]) -> list[str]:
    """Patterns of control tokens, a longer one first, as tokenizers take them."""
    return [re.escape(token) for token in sorted(tokens, key=len, reverse=True)]


def _picture_of(part: Mapping[str, Any], images: Iterator[Any], is_needed: bool) -> Any:
    """The picture of an image part, or the next of the given ones; None where there is none and needs to be none."""
    found = [name for name in _SOURCES if part.get(name) is not None]
    picture = part[found[0]] if found else next(images, None)
    if picture is None and not is_needed:
        return None
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
    tokens = {*control_tokens, image_token}
    for offset, piece in _pieces(text, f"({'|'.join(_longest_first(tokens))})"):
        places = range(start + offset, start + offset + len(piece))
        written = tuple(any(first <= place < last for first, last in spans) for place in places)
        if piece == image_token:
            yield Part("picture", None, written[:1])
        elif piece in tokens:
            yield Part("control", piece, written[:1])
        else:
            yield Part("text", piece, written)


__all__ = [
    "CHAT_TEMPLATE",
    "ChatTokens",
    "MarkedChat",
    "check_conversations",
    "choose_template",
    "mark_chats",
    "plain_data",
    "render_chats",
    "tidy_conversation",
]
