"""Chats: a template's control tokens count, those in its messages are text."""

import copy
import pickle
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


# In two steps


def same(first: Any, second: Any) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=0)


@given(mixed_text, mixed_text, st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_a_rendered_chat_makes_the_same_ids(first: str, second: str, own: int) -> None:
    """Whether the messages have their pictures, which `images` may bring again, or `images` brings them."""
    pictures = [picture(seed) for seed in range(2)]
    places = [image_part(drawn if own & (1 << index) else None) for index, drawn in enumerate(pictures)]
    messages = chat([text_part(first), places[0], text_part(second)], second, [places[1]])
    missing = [drawn for index, drawn in enumerate(pictures) if not own & (1 << index)]
    options: dict[str, Any] = {"add_generation_prompt": True}
    expected = PROCESSOR.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"images": missing, "return_tensors": "pt"},
        **options,
    )
    prompt = PROCESSOR.apply_chat_template(messages, **options)
    same(PROCESSOR(text=[prompt], images=pictures, return_tensors="pt"), expected)
    same(PROCESSOR(text=prompt, images=[pictures], return_tensors="pt"), expected)
    latents = PROCESSOR.encode_images(PROCESSOR.image_processor(pictures)["pixel_values"])
    same(PROCESSOR(text=prompt, latents=latents, return_tensors="pt"), expected)
    if not missing:
        same(PROCESSOR(text=prompt, return_tensors="pt"), expected)
    given = PROCESSOR.apply_chat_template(messages, processor_kwargs={"images": missing}, **options)
    for twin in (given, pickle.loads(pickle.dumps(given)), copy.deepcopy(given)):
        assert type(twin) is type(prompt) and twin == prompt
        same(PROCESSOR(text=twin, return_tensors="pt"), expected)


def test_rendered_chats_in_a_batch() -> None:
    chats = [chat("a <eos>"), chat([text_part("b"), image_part(picture())], "c")]
    prompts = PROCESSOR.apply_chat_template(chats)
    expected = PROCESSOR.apply_chat_template(chats, tokenize=True, return_dict=True, return_tensors="pt")
    same(PROCESSOR(text=prompts, return_tensors="pt"), expected)
    same(PROCESSOR(text=prompts, images=[[], [picture()]], return_tensors="pt"), expected)
    same(PROCESSOR(text=prompts, images=picture(), return_tensors="pt"), expected)
    labels = PROCESSOR(text=[*prompts, "plain"], return_labels=True, padding=False)["labels"]
    assert labels[2] == [*text_ids("plain"), 1] and labels[0].count(1) == 2
    for images in ([picture(), picture()], [[picture()], [picture()]]):
        with pytest.raises(ValueError, match="image placeholders and"):
            PROCESSOR(text=prompts, images=images)
    open_place = PROCESSOR.apply_chat_template(chat([image_part()]))
    with pytest.raises(ValueError, match="1 image placeholders and 0 pictures"):
        PROCESSOR(text=open_place)


def test_what_is_made_of_a_rendered_chat_is_ordinary_text() -> None:
    prompt = PROCESSOR.apply_chat_template(chat("a"))
    for made in (prompt + "", prompt.strip(), str(prompt), f"{prompt}", prompt[:], "".join([prompt]), prompt * 1):
        assert type(made) is str
        assert PROCESSOR(text=made)["input_ids"] == [text_ids(made)]


def test_strings_that_spell_control_tokens_are_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("transfusion.processing.logger.warning_once", said.append)
    prompt = PROCESSOR.apply_chat_template(chat([image_part(picture()), text_part("a <eos>")]))
    quiet: list[dict[str, Any]] = [
        {"text": "a"},
        {"text": [prompt, [text_part("<eos>")]]},
        {"text": "<image>", "images": picture()},
        {"images": picture()},
    ]
    for arguments in quiet:
        PROCESSOR(**arguments)
    assert not said
    assert PROCESSOR(text=["a", "an <image> <eos>"], padding=False)["input_ids"][1] == text_ids("an <image> <eos>")
    assert len(said) == 1 and "['<eos>', '<image>']" in said[0] and "apply_chat_template" in said[0]
    PROCESSOR(text="<image> <|im_start|>", images=picture())
    assert "['<|im_start|>']" in said[1]
