"""The shipped template, and that nothing of a chat but a template makes control tokens."""

import base64
import dataclasses
import io
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError

from tests.tiny_processor import CHAT_TEMPLATE as TINY_TEMPLATE
from tests.tiny_processor import image_part, picture, pixel_patches, text_part, tiny_tokenizer
from transfusion.chat import CHAT_TEMPLATE, choose_template, plain_data, tidy_conversation
from transfusion.data.tokenizer import load_tokenizer
from transfusion.processing import IGNORE_INDEX, TransfusionImageProcessor, TransfusionProcessor


ROLES = ["system", "user", "assistant", "tool"]


@cache
def gpt2() -> TransfusionProcessor:
    """Its token for unknown words is `<eos>`, as in GPT-2's tokenizer and those that follow it."""
    return TransfusionProcessor(TransfusionImageProcessor(), tiny_tokenizer(unk_token="<eos>"))


@cache
def demo(size_tokens: bool = False) -> TransfusionProcessor:
    """The demo's tokenizer, pixels as latents."""
    grids = [(2, 3), (1, 1)] if size_tokens else None
    return TransfusionProcessor(TransfusionImageProcessor(), load_tokenizer(), size_token_grids=grids)


@cache
def tools() -> TransfusionProcessor:
    """A tokenizer with chat tokens of its own, and a template that prints all fields of a chat, half tokens too."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>", "<|assistant|>", "<call>", "<|im_end|>"]})
    template = (
        "{% for tool in tools or [] %}<{{ tool.name }}>{{ tool | tojson }}{% endfor %}"
        "{% for d in documents or [] %}<bo{{ d.text }}{% endfor %}<{{ custom }}>"
        "{% for d in documents or [] %}{{ d.content }}{% endfor %}"
        "{% for m in messages %}<|{{ m.role }}|>{{ m.name | lower }}<{{ m.type }}>"
        "{% for key in m.args or {} %}<{{ key }}>{% endfor %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{% if p.type == 'image' %}{{ image_token or '<image>' }}{% else %}{{ p.text }}"
        "{% endif %}{% endfor %}{% endif %}{% for call in m.tool_calls or [] %}<{{ call.name }}>{% endfor %}<eos>"
        "{% endfor %}"
    )
    return TransfusionProcessor(TransfusionImageProcessor(), tokenizer, chat_template=template)


def user(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def controls(processor: TransfusionProcessor, ids: list[int]) -> list[str]:
    """The control tokens of a row, as strings."""
    special = set(processor.tokenizer.all_special_ids)
    return [processor.tokenizer.convert_ids_to_tokens(token) for token in ids if token in special]


# The shipped template


def test_a_chat_written_out() -> None:
    processor = demo()
    chat = [
        {"role": "system", "content": "be kind"},
        user([image_part(picture()), text_part("what is it?")]),
        assistant("a heart"),
        user("and now?"),
    ]
    prompt = "system\nbe kind<eos>user\n<image>what is it?<eos>assistant\na heart<eos>user\nand now?<eos>assistant\n"
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == prompt
    row = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)[0]
    block = "<boi>" + "<image>" * 6 + "<eoi>"
    assert processor.decode(row) == prompt.replace("\n<image>", block)
    assert processor.apply_chat_template(chat[:3], continue_final_message=True).endswith("assistant\na heart")
    open_row = processor.apply_chat_template(chat[:3], tokenize=True, continue_final_message=True)[0]
    assert processor.decode(open_row).endswith("assistant\na heart")
    assert (
        processor.tokenizer(prompt.replace("<image>", ""))["input_ids"]
        == processor.apply_chat_template(
            [chat[0], user("what is it?"), *chat[2:]], tokenize=True, add_generation_prompt=True
        )[0]
    )


def test_every_processor_has_a_template() -> None:
    plain = TransfusionProcessor(TransfusionImageProcessor(), tiny_tokenizer())
    assert plain.chat_template == CHAT_TEMPLATE
    for own, kept in ((TINY_TEMPLATE, True), ("{{ messages[0].content }}", False)):
        processor = TransfusionProcessor(TransfusionImageProcessor(), tiny_tokenizer(chat_template=own))
        assert processor.chat_template == (own if kept else CHAT_TEMPLATE)


def test_the_template_is_saved_and_loaded(tmp_path: Any) -> None:
    demo().save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    for kept in (True, False):
        assert TransfusionProcessor.from_pretrained(tmp_path).chat_template == CHAT_TEMPLATE
        if kept:
            (tmp_path / "chat_template.jinja").unlink()  # as in older checkpoints


def test_what_the_template_refuses() -> None:
    without_end = TransfusionProcessor(TransfusionImageProcessor(), tiny_tokenizer(eos_token=None))
    with pytest.raises(TemplateError, match="has none; set it"):
        without_end.apply_chat_template([user("a")])
    with pytest.raises(TemplateError, match="of type video"):
        demo().tokenizer.apply_chat_template([user([{"type": "video"}])], chat_template=CHAT_TEMPLATE)


# What the assistant wrote


def test_labels_of_the_assistant() -> None:
    processor = demo()
    chat = [user([text_part("who"), image_part(picture())]), assistant([text_part("a b "), image_part(picture(1))])]
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    out = processor.apply_chat_template([chat, chat[:1]], return_labels="assistant", **options)
    learned = out["labels"] != IGNORE_INDEX
    assert not learned[1].any()
    assert processor.decode(out["labels"][0][learned[0]]) == "a b<boi><eos>"
    everything = processor.apply_chat_template(chat, return_labels=True, **options)
    assert everything["input_ids"].tolist()[0] == out["input_ids"].tolist()[0]  # one <eos> at the end, the turn's
    masks = processor.apply_chat_template(chat, return_assistant_tokens_mask=True, **options)["assistant_masks"].bool()
    assert processor.decode(everything["input_ids"][masks]) == "a b<boi>" + "<image>" * 6 + "<eoi><eos>"


def test_masks_are_those_of_the_tokenizer() -> None:
    processor = demo()
    chats = [[user("a red heart "), assistant("yes, red."), user("no"), assistant(" ok")], [assistant("x")]]
    reference = processor.tokenizer.apply_chat_template(
        chats, chat_template=CHAT_TEMPLATE, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    for side in ("left", "right"):
        out = processor.apply_chat_template(
            chats, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, padding_side=side
        )
        for index, ids in enumerate(reference["input_ids"]):
            kept = np.array(out["attention_mask"][index], bool)
            assert np.array(out["input_ids"][index])[kept].tolist() == ids
            assert np.array(out["assistant_masks"][index])[kept].tolist() == reference["assistant_masks"][index]


def test_labels_need_a_template_that_tells_who_wrote() -> None:
    for options in ({"return_labels": "assistant"}, {"return_assistant_tokens_mask": True, "return_dict": True}):
        with pytest.raises(ValueError, match="generation block"):
            demo().apply_chat_template([user("a")], chat_template=TINY_TEMPLATE, tokenize=True, **options)
    with pytest.raises(ValueError, match="in apply_chat_template alone"):
        demo()(text="a", return_labels="assistant")


# Pictures


def test_every_way_to_give_a_picture(tmp_path: Any) -> None:
    stream = io.BytesIO()
    picture().save(stream, "PNG")
    (tmp_path / "a.png").write_bytes(stream.getvalue())
    code = base64.b64encode(stream.getvalue()).decode()
    path, array = str(tmp_path / "a.png"), np.asarray(picture())
    parts: list[dict[str, Any]] = [{"image": picture()}, {"image": array}, {"image": array.transpose(2, 0, 1)}]
    parts += [{"image": path}, {"path": path}, {"url": path}, {"base64": code}]
    parts += [{"image": torch.tensor(array)}, {"url": f"data:image/png;base64,{code}"}]
    messages = [{"type": "image", **part} for part in parts]
    messages.append({"type": "image_url", "image_url": {"url": path}})
    for message in messages:
        options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        out = demo().apply_chat_template([[user([message])], [user("a")]], **options)
        torch.testing.assert_close(out["latent_patches"], pixel_patches(picture()))
        assert out["image_grids"].tolist() == [[2, 3]] and len(out["input_ids"]) == 2


def test_pictures_beside_the_chat() -> None:
    chat = [user([image_part(), image_part(picture(1)), image_part()])]
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    given = [picture(0), picture(2)]
    for conversation, images in ((chat, given), ([chat], [given])):
        out = demo().apply_chat_template(conversation, processor_kwargs={"images": images}, **options)
        torch.testing.assert_close(out["latent_patches"], pixel_patches(*[picture(seed) for seed in range(3)]))
    with pytest.raises(ValueError, match="1 of the given images"):
        demo().apply_chat_template(chat, processor_kwargs={"images": [*given, picture()]}, **options)
    with pytest.raises(ValueError, match="under 'image'"):
        demo().apply_chat_template(chat, processor_kwargs={"images": given[:1]}, **options)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"url": "https://localhost/a.png"}, "URLs are not fetched"),
        ({"url": "data:image/png;base64,?"}, "cannot be decoded"),
        ({"base64": "YQ=="}, "cannot be opened"),
        ({"image": picture(), "path": "a.png"}, "give the picture under"),
    ],
)
def test_pictures_that_are_refused(part: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demo().apply_chat_template([user([{"type": "image", **part}])], tokenize=True)


# No text becomes a control token


def spelled(processor: TransfusionProcessor) -> Any:
    """Texts full of control tokens and halves of them, and of the template's own words."""
    tokens = [str(token) for token in processor.tokenizer.all_special_tokens]
    halves = [half for token in tokens for half in (token[: len(token) // 2], token[len(token) // 2 :])]
    words = [*tokens, *halves, "\nassistant\n", "user\n", "{{ eos_token }}", ":0;", "<", ">"]
    return st.lists(st.sampled_from(words) | st.text(max_size=3), max_size=5).map("".join)


@pytest.mark.parametrize("kind", ["demo", "size_tokens", "gpt2"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_messages_make_no_control_token(kind: str, data: st.DataObject) -> None:
    """In any role and position: the control tokens are those of the turns and of the pictures, in their order."""
    size_tokens = kind == "size_tokens"
    processor = gpt2() if kind == "gpt2" else demo(size_tokens)
    texts = spelled(processor)
    block = ["<boi_2x3>" if size_tokens else "<boi>", *["<image>"] * 6, "<eoi>"]
    chats, expected, written = [], [], []
    for _ in range(data.draw(st.integers(1, 2))):
        chat, tokens, whole = [], [], ""
        for role in data.draw(st.lists(st.sampled_from(ROLES), min_size=1, max_size=3)):
            text = data.draw(texts)
            parts: Any = data.draw(st.lists(st.none() | texts, max_size=4))
            as_text = data.draw(st.booleans())
            content = [image_part(picture()) if part is None else text_part(part) for part in parts]
            chat.append({"role": role, "content": text if as_text else content})
            tokens += [*([] if as_text else block * parts.count(None)), "<eos>"]
            whole += text if as_text else "".join(part or "" for part in parts)
        chats.append(chat)
        expected.append(tokens)
        written.append(whole)
    rows = processor.apply_chat_template(chats, tokenize=True, padding=False)
    assert [controls(processor, row) for row in rows] == expected
    for row, whole in zip(rows, written, strict=True):  # nothing is lost but white space
        plain = processor.decode([token for token in row if token not in processor.tokenizer.all_special_ids])
        assert len("".join(plain.split())) >= len("".join(whole.split()))


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_fields_make_no_control_token(data: st.DataObject) -> None:
    """A template that prints half tokens beside roles, names, tools and documents: refused, or no token of theirs."""
    processor = tools()
    texts = spelled(processor) | st.sampled_from(["call", "im_end", "i>", "image", "user", "eos"])
    message = user(data.draw(texts), name=data.draw(texts | texts.map(str.upper)))
    message |= {"tool_calls": [{"name": data.draw(texts)}], "args": {data.draw(texts): 1}, "type": data.draw(texts)}
    message["role"] = data.draw(st.sampled_from(["user", "assistant"]) | texts)
    fields: dict[str, Any] = {"tools": [{"name": data.draw(texts)}], "documents": [{"text": data.draw(texts)}]}
    fields |= {"custom": data.draw(texts)}
    fields["documents"].append({"content": data.draw(texts)})
    fields = {name: value for name, value in fields.items() if data.draw(st.booleans())}
    try:
        (row,) = processor.apply_chat_template([message], tokenize=True, **fields)
    except ValueError as error:
        assert "control tokens" in str(error)
        return
    role = [f"<|{message['role']}|>"] if message["role"] in ("user", "assistant") else []
    assert controls(processor, row) == [*role, "<eos>"]


@pytest.mark.parametrize(
    "fields",
    [
        {"message": {"role": "im_end"}},
        {"message": {"name": "<boi>"}},
        {"message": {"tool_calls": [{"name": "call"}]}},
        {"tools": [{"name": "call"}]},
        {"tools": [{"name": "<eos>"}]},
        {"documents": [{"text": "i>"}]},
        {"documents": [{"content": "x<e"}, {"content": "os>"}]},
        {"custom": "eos"},
        {"message": {"type": "eos"}},
        {"message": {"type": "image"}},
        {"message": {"name": "x<EOS>assistant"}},
        {"message": {"name": "<|USER|>"}},
        {"message": {"args": {"eos": 1}}},
        {"message": {"args": {"name": 1, "call": 2}}},
    ],
)
def test_fields_that_would_complete_a_token_are_refused(fields: dict[str, Any]) -> None:
    fields = dict(fields)
    message = user("a") | fields.pop("message", {})
    with pytest.raises(ValueError, match="control tokens"):
        tools().apply_chat_template([message], tokenize=True, **fields)


def test_a_template_sees_plain_data() -> None:
    """Of an object its type alone, of which no method can be called."""

    @dataclasses.dataclass
    class Call:
        name: str
        weight: Any

    class Name(str):
        pass

    seen = plain_data({Name("a"): [Call("f", np.int64(3)), (True, 1.5, None)], "b": np.zeros(2)})
    assert seen == {"a": [{"name": "f", "weight": 3}, (True, 1.5, None)], "b": "<ndarray>"}
    assert {type(key) for key in seen} == {str}


def test_messages_are_tidied() -> None:
    url = {"type": "image_url", "image_url": {"url": "x.png"}}
    message: dict[str, Any] = {"role": "user", "content": [url, {"type": "text", "text": "a"}], "tool_calls": None}
    content = [{"type": "image", "url": "x.png"}, {"type": "text", "text": "a"}]
    assert tidy_conversation([message]) == [{"role": "user", "content": content}]
    assert "tool_calls" in message and message["content"][0] is url


def test_a_template_is_chosen_by_name() -> None:
    named = {"default": "A", "other": "B"}
    assert [choose_template(named, asked) for asked in (None, "other", "{{ x }}")] == ["A", "B", "{{ x }}"]
    assert choose_template("A", None) == "A" and choose_template(None, "B") == "B"
    with pytest.raises(ValueError, match=r"no default chat template, but \['other'\]"):
        choose_template({"other": "B"}, None)


def test_templates_may_read_fields() -> None:
    """Lengths, equality and keys that a template names, as in the templates of Mistral and of OpenAI."""
    template = (
        "{% for m in messages %}{{ m.role }}{% if m.thinking %}({{ m.thinking }}){% endif %}"
        "{% for c in m.calls %}{% if c.id | length != 9 or not c.id.isalnum() or c.id != c.again %}"
        "{{ raise_exception('bad id') }}{% endif %}{% if c.function is defined %}{{ c.function.name }}<eos>{% endif %}"
        "{% endfor %}{{ m.content }}<eos>{% endfor %}"
    )
    call = {"id": "abcDEF123", "again": "abcDEF123", "function": {"name": "f"}}
    message = user("a", calls=[call], thinking="hm")
    assert tools().apply_chat_template([message], chat_template=template) == "user(hm)f<eos>a<eos>"
    # Newer transformers copies it to `thinking`.
    tools().apply_chat_template([user("a", calls=[call], reasoning="hm")], chat_template=template)
    template = (
        "{% if messages[0].kind != 'good' %}{{ raise_exception('bad kind') }}{% endif %}{{ messages[0].content }}"
    )
    with pytest.raises(ValueError, match="cannot be checked.*bad kind"):
        tools().apply_chat_template([user("a", kind="good")], chat_template=template)


@pytest.mark.parametrize(
    "expression",
    ["content | tojson", "content[:6]", "content[0]", "content[-1]", "content | reverse", "content | length"]
    + ["content | lower", "content | upper", "content | e", "content | replace('\n', ' ')", "content | urlencode"]
    + ["content.split()[0]", "[content]", "content | capitalize", "content[3:]", "content | indent"],
)
@pytest.mark.parametrize("tokenize", [False, True])
def test_templates_that_alter_a_text_are_refused(expression: str, tokenize: bool) -> None:
    template = f"{{% for m in messages %}}{{{{ m.{expression} }}}}<eos>{{% endfor %}}".replace("m.[c", "[m.c")
    for content in ("a", 'a "quoted" text\n'):
        with pytest.raises(ValueError, match="alters the text"):
            demo().apply_chat_template([user(content)], chat_template=template, tokenize=tokenize)


@given(st.text(max_size=8), st.text(max_size=8))
@settings(max_examples=40, deadline=None)
def test_templates_may_strip_a_text(first: str, second: str) -> None:
    """As those of Llama do; the same as the tokenizer's own rendering."""
    template = "{% for m in messages %}{{ m.role }}\n{{ m.content | trim }}{{ m.content }}<eos>{% endfor %}"
    chat = [user(first), assistant(f" {second}\n")]
    expected = demo().tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
    assert demo().apply_chat_template(chat, chat_template=template) == expected


def test_harmless_fields_pass() -> None:
    message = user("a", name="ann", tool_calls=[{"name": "sum"}])
    fields: dict[str, Any] = {"tools": [{"type": "function", "name": "sum"}], "documents": [{"text": "x"}]}
    (row,) = tools().apply_chat_template([message], tokenize=True, **fields)
    text = '<sum>{"type": "function", "name": "sum"}<box<><|user|>ann<>a<sum><eos>'
    assert tools().decode(row) == text and controls(tools(), row) == ["<|user|>", "<eos>"]


def test_unknown_options_are_named() -> None:
    with pytest.raises(ValueError, match="add_generation_promt"):
        demo().apply_chat_template([user("a")], tokenize=True, add_generation_promt=True)
    with pytest.raises(ValueError, match="at least one message"):
        demo().apply_chat_template([])
    for chat, message in (
        ("hi", "A conversation is 'hi'"),
        ({"role": "user", "content": "a"}, "A conversation is"),
        (["hi"], "A message is 'hi'; give {'role'"),
        ([{}], "A message is {}"),
        ([{"content": "a"}], "A message is"),
        ([{"role": "user"}], "A message is"),
        ([user(3)], "The content of a message is 3"),
        ([user({"type": "text", "text": "a"})], "The content of a message is {'type'"),
    ):
        for tokenize in (False, True):
            with pytest.raises(ValueError, match=message):
                demo().apply_chat_template(chat, tokenize=tokenize)
    with pytest.raises(ValueError, match="exclude each other"):
        demo().apply_chat_template(
            [assistant("a")], tokenize=True, add_generation_prompt=True, continue_final_message=True
        )
