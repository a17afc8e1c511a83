"""What counts as a control token of a tokenizer."""

import pytest
from tokenizers import AddedToken
from transformers import GPT2Tokenizer, Qwen2Tokenizer

from tests.tiny_processor import text_ids, tiny_tokenizer
from transfusion.layout import text_part
from transfusion.special_tokens import control_tokens, first_ids, last_ids, longest_row, text_tokens


def test_special_tokens_are_control_tokens_and_added_words_are_not() -> None:
    tokenizer = tiny_tokenizer(extra_special_tokens=["<extra>"], bos_token="<bos>")
    tokenizer.add_tokens(["<think>", AddedToken("<special>", special=True)])
    names = {"<pad>", "<eos>", "<|im_start|>", "<extra>", "<bos>", "<special>"}
    assert set(control_tokens(tokenizer).values()) == names
    assert all(tokenizer.convert_tokens_to_ids(token) == number for number, token in control_tokens(tokenizer).items())
    (think,) = text_tokens(tokenizer, text_part("<think>"))
    assert think == (tokenizer.convert_tokens_to_ids("<think>"), False)


@pytest.mark.parametrize("role", ["eos_token", "bos_token", "pad_token", "extra_special_tokens"])
def test_a_token_for_unknown_words_counts_where_it_has_another_task(role: str) -> None:
    assert "<unk>" not in control_tokens(tiny_tokenizer(unk_token="<unk>")).values()
    options = {role: ["<unk>"] if role == "extra_special_tokens" else "<unk>"}
    assert "<unk>" in control_tokens(tiny_tokenizer(unk_token="<unk>", **options)).values()


@pytest.mark.parametrize("kind", [GPT2Tokenizer, Qwen2Tokenizer])
def test_the_end_of_gpt2_s_texts_counts(kind: type) -> None:
    """By these classes' defaults it is the token of unknown words too."""
    tokenizer = kind(vocab={"a": 0, "<|endoftext|>": 1}, merges=[])
    assert tokenizer.unk_token == tokenizer.eos_token == "<|endoftext|>"
    assert control_tokens(tokenizer) == {1: "<|endoftext|>"}


def test_text_tokens_tell_who_wrote_them() -> None:
    tokens = text_tokens(tiny_tokenizer(), text_part("a <eos>", written=True))
    assert tokens == [(number, True) for number in text_ids("a <eos>")]


def test_first_last_and_longest() -> None:
    tokenizer = tiny_tokenizer(model_max_length=9)
    assert (first_ids(tokenizer), last_ids(tokenizer), longest_row(tokenizer)) == ([], [1], 9)
    for function, options, message in ((last_ids, {"eos_token": None}, "eos_token"), (longest_row, {}, "max_length")):
        with pytest.raises(ValueError, match=message):
            function(tiny_tokenizer(**options))
