"""Chats: a template's control tokens count, those in its messages are text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from tests.tiny_processor import (
    SPECIAL_TOKENS,
    image_part,
    picture,
    pixel_patches,
    text_ids,
    text_part,
    tiny_processor,
)


PROCESSOR = tiny_processor()
BOI, EOI, IMAGE = PROCESSOR.boi_token_id, PROCESSOR.eoi_token_id, PROCESSOR.image_token_id
BLOCK = [BOI, *[IMAGE] * 6, EOI]

mixed_text = st.lists(st.sampled_from(SPECIAL_TOKENS) | st.text(max_size=6)).map("".join).filter(bool)


def chat(*contents: Any) -> list[dict[str, Any]]:
    roles = ["user", "assistant"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def test_a_chat_is_rendered_and_encoded() -> None:
    messages = chat([text_part("what is "), image_part(picture(3)), text_part(" ?")], "a heart")
    prompt = PROCESSOR.apply_chat_template(messages, add_generation_prompt=True)
    assert (
        prompt
        == "<|im_start|>user\nwhat is <image> ?<eos>\n<|im_start|>assistant\na heart<eos>\n<|im_start|>assistant\n"
    )
    options: dict[str, Any] = {"tokenize": True, "add_generation_prompt": True}
    out = PROCESSOR.apply_chat_template(messages, return_dict=True, return_tensors="pt", **options)
    expected = [
        2,
        *text_ids("user\n"),
        *text_ids("what is"),
        *BLOCK,
        *text_ids("?"),
        1,
        *text_ids("\n"),
        2,
        *text_ids("assistant\n"),
    ]
    expected += [*text_ids("a heart"), 1, *text_ids("\n"), 2, *text_ids("assistant\n")]
    assert out["input_ids"].tolist() == [expected]
    torch.testing.assert_close(out["latent_patches"], pixel_patches(picture(3)))
    assert PROCESSOR.apply_chat_template(messages, **options) == [expected]
    batch = PROCESSOR.apply_chat_template([messages, chat("a")], padding=False, **options)
    assert batch[0] == expected and batch[1][0] == 2
    long = PROCESSOR.apply_chat_template(
        messages, processor_kwargs={"return_labels": True}, return_dict=True, **options
    )
    assert long["labels"][0][-1] == 1


@given(mixed_text, mixed_text)
@settings(max_examples=50, deadline=None)
def test_no_message_becomes_a_control_token(first: str, second: str) -> None:
    """Not even where a template joins two parts: `<bo` and `i>`."""
    half = len(first) // 2
    messages = chat([text_part(first[:half]), text_part(first[half:]), image_part(picture())], second)
    row = PROCESSOR.apply_chat_template(messages, tokenize=True)[0]
    assert [token for token in row if token in (0, 1, 2, BOI, EOI, IMAGE)] == [2, *BLOCK, 1, 2, 1]
    written = f"<|im_start|>user\n{first.rstrip()}" + "<boi>" + "<image>" * 6 + "<eoi>"
    assert PROCESSOR.decode(row) == f"{written}<eos>\n<|im_start|>assistant\n{second}<eos>\n"


def test_a_chat_reads_local_pictures(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    messages = chat([{"type": "image", "path": str(tmp_path / "a.png")}])
    out = PROCESSOR.apply_chat_template(messages, tokenize=True, return_dict=True)
    torch.testing.assert_close(out["latent_patches"], pixel_patches(picture()))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "<boi>", "content": "a"}], "'role' of a chat holds.*<boi>"),
        ([{"role": "user", "content": "a", "name": "x<eos>"}], "'name' of a chat"),
        (chat([{"type": "image", "url": "https://localhost/a.png"}]), "URLs are not fetched"),
        (chat([{"type": "image_url", "image_url": {"url": "https://localhost/a.png"}}]), "URLs are not fetched"),
        (chat([image_part("https://localhost/a.png")]), "URLs are not fetched"),
        (chat([image_part()]), "under 'image'"),
    ],
)
def test_chats_that_are_refused(messages: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PROCESSOR.apply_chat_template(messages, tokenize=True)


def test_templates_and_variables_that_are_refused() -> None:
    with pytest.raises(ValueError, match="'documents' of a chat"):
        PROCESSOR.apply_chat_template(chat("a"), tokenize=True, documents=[{"text": "<eos>"}])
    with pytest.raises(ValueError, match="alters the text"):
        template = "{% for m in messages %}{{ m.content[:20] }}{% endfor %}"
        PROCESSOR.apply_chat_template(chat("a"), chat_template=template, tokenize=True)


def test_a_template_that_writes_bos_gets_one() -> None:
    processor = tiny_processor(bos_token="<bos>")
    bos = processor.tokenizer.bos_token_id
    processor.tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    for start in ("<bos>", ""):
        template = start + "{{ messages[0].content }}"
        ids = processor.apply_chat_template(chat("a <bos>"), chat_template=template, tokenize=True)
        assert ids == [[bos, *text_ids("a <bos>")]]
