"""What a tokenizer says of its special tokens, and texts that become none of them."""

from typing import Any

from transformers.tokenization_utils_base import LARGE_INTEGER

from .layout import Part, Token


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """The tokens that a text can never become, by id: the special ones.

    A token that only stands for unknown words is not one of them; GPT-2's `<|endoftext|>` also ends texts, so it is.
    """
    tokens = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    tokens |= zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    others = [token for name, token in tokenizer.special_tokens_map.items() if name != "unk_token"]
    others += map(str, tokenizer.extra_special_tokens)
    if tokenizer.unk_token_id not in tokenizer.convert_tokens_to_ids(others):
        tokens.pop(tokenizer.unk_token_id, None)
    return tokens


def text_tokens(tokenizer: Any, part: Part) -> list[Token]:
    """The tokens of a text, none of which is a control token.

    Raises:
        ValueError: The tokenizer makes one all the same.
    """
    marked = any(part.written)
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    encoded = tokenizer(part.content, return_offsets_mapping=marked, **options)
    ids = encoded["input_ids"]
    control = control_tokens(tokenizer)
    if found := [control[token_id] for token_id in ids if token_id in control]:
        raise ValueError(
            f"The tokenizer makes the control tokens {found} from ordinary text; take a byte-level one, in whose "
            "vocabulary no word spells a control token."
        )
    if not marked:
        return [(token, False) for token in ids]
    spans = encoded["offset_mapping"]
    return [(token, any(part.written[start:end])) for token, (start, end) in zip(ids, spans, strict=True)]


def first_ids(tokenizer: Any) -> list[int]:
    """`<bos>`, if the tokenizer itself begins texts with it."""
    first = tokenizer("")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def last_ids(tokenizer: Any) -> list[int]:
    """`<eos>`; ValueError where there is none."""
    if tokenizer.eos_token_id is None:
        raise ValueError("return_labels=True ends rows with <eos>, but the tokenizer has no eos_token; set it.")
    return [tokenizer.eos_token_id]


def longest_row(tokenizer: Any) -> int:
    """The tokenizer's `model_max_length`; ValueError where it names none."""
    if tokenizer.model_max_length > LARGE_INTEGER:
        raise ValueError(
            "truncation=True needs a max_length, as the tokenizer has no model_max_length. Pass max_length, or set "
            "processor.tokenizer.model_max_length."
        )
    return tokenizer.model_max_length


__all__ = ["control_tokens", "first_ids", "last_ids", "longest_row", "text_tokens"]
